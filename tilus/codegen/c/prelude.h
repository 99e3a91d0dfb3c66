/* What every generated kernel starts with: vector types, conversions between element types, functions of f32. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#if defined(__AVX512F__)
#define TL_MAD_512 /* has no header */
#endif
#if defined(TL_NO_INTRINSICS) /* their headers take the compiler longer than a small kernel */
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512VNNI__
#undef __AVXVNNI__
#undef __AVX2__
#undef __ARM_NEON
#undef __ARM_FEATURE_DOTPROD
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define TL_INLINE static inline __attribute__((always_inline, unused))
#define TL_NAN __builtin_nanf("")
#define TL_INF __builtin_inff()

/* Integers: division as in Python; shifts by the width and more give 0, or the sign. */
TL_INLINE int64_t tl_floordiv(int64_t a, int64_t b) {
    if (b == 0 || b == -1) return b ? (int64_t)(0 - (uint64_t)a) : 0;
    int64_t q = a / b;
    return q - ((a % b != 0) & ((a < 0) != (b < 0)));
}
TL_INLINE int64_t tl_floormod(int64_t a, int64_t b) {
    if (b == 0 || b == -1) return 0;
    int64_t r = a % b;
    return r + (((r != 0) & ((r < 0) != (b < 0))) ? b : 0);
}
TL_INLINE int64_t tl_min(int64_t a, int64_t b) { return a < b ? a : b; }
TL_INLINE int64_t tl_max(int64_t a, int64_t b) { return a > b ? a : b; }
TL_INLINE int64_t tl_abs(int64_t a) { return a < 0 ? -a : a; }
TL_INLINE int64_t tl_clamp(int64_t a, int64_t low, int64_t high) { return a < low ? low : a > high ? high : a; }
TL_INLINE int64_t tl_shl(int64_t a, int64_t n) { return n < 0 || n > 63 ? 0 : (int64_t)((uint64_t)a << n); }
TL_INLINE int64_t tl_shr(int64_t a, int64_t n) { return a >> (n < 0 || n > 63 ? 63 : n); }

TL_INLINE uint32_t tl_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
TL_INLINE float tl_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* A field of up to 32 bits that starts at any bit of a string of bytes; reads no byte beyond the field. */
TL_INLINE uint32_t tl_field(const uint8_t *bytes, int64_t bit, int nbits) {
    const uint8_t *p = bytes + (bit >> 3);
    int shift = bit & 7, count = (shift + nbits + 7) >> 3;
    uint64_t word = 0;
    for (int i = 0; i < count; i++) word |= (uint64_t)p[i] << (8 * i);
    return (uint32_t)(word >> shift) & (uint32_t)(((uint64_t)1 << nbits) - 1);
}
TL_INLINE void tl_set_field(uint8_t *bytes, int64_t bit, int nbits, uint32_t code) {
    for (int i = 0; i < nbits; i++, bit++) {
        uint8_t mask = (uint8_t)(1u << (bit & 7));
        bytes[bit >> 3] = (uint8_t)((bytes[bit >> 3] & ~mask) | ((code >> i & 1) ? mask : 0));
    }
}
TL_INLINE uint16_t tl_u16(const uint8_t *p) { uint16_t x; memcpy(&x, p, 2); return x; }
TL_INLINE uint32_t tl_u32(const uint8_t *p) { uint32_t x; memcpy(&x, p, 4); return x; }

/* Conversions round to nearest, ties to even, without branches: loops over them vectorise. */
TL_INLINE float tl_f16_value(uint32_t code) {
    uint32_t magnitude = code & 0x7fff, sign = (code & 0x8000) << 16;
    uint32_t small = tl_bits((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    return tl_float((magnitude < 0x400 ? small : bits) | sign);
}
/* Adding and subtracting 3 * 2^(e + 12), e the exponent but at least -14, leaves multiples of the spacing of f16. */
TL_INLINE float tl_round_f16(float x) {
    uint32_t sign = tl_bits(x) & 0x80000000u, magnitude = tl_bits(x) & 0x7fffffffu;
    uint32_t exponent = (magnitude < 0x38800000u ? 0x38800000u : magnitude) & 0x7f800000u;
    float magic = tl_float(exponent) * 0x3p12f;
    uint32_t rounded = tl_bits((x + magic) - magic) & 0x7fffffffu;
    uint32_t large = magnitude > 0x7f800000u ? 0x7fc00000u : 0x7f800000u;
    return tl_float((magnitude < 0x477ff000u ? rounded : large) | sign);
}
TL_INLINE uint16_t tl_f16_code(float x) {
    float r = tl_round_f16(x);
    uint32_t sign = tl_bits(r) >> 16 & 0x8000, magnitude = tl_bits(r) & 0x7fffffffu;
    uint32_t small = (uint32_t)(int32_t)(tl_float(magnitude < 0x38800000u ? magnitude : 0) * 0x1p24f);
    uint32_t normal = (magnitude - 0x38000000u) >> 13;
    uint32_t special = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    uint32_t code = magnitude < 0x38800000u ? small : magnitude < 0x7f800000u ? normal : special;
    return (uint16_t)(code | sign);
}
TL_INLINE float tl_bf16_value(uint32_t code) { return tl_float(code << 16); }
TL_INLINE uint16_t tl_bf16_code(float x) {
    uint32_t bits = tl_bits(x);
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (bits + (bits >> 16 & 1) + 0x7fff) >> 16);
}
TL_INLINE float tl_round_bf16(float x) { return tl_bf16_value(tl_bf16_code(x)); }
TL_INLINE float tl_tf32_value(uint32_t code) { return tl_float(code & 0xffffe000u); }
TL_INLINE uint32_t tl_tf32_code(float x) { /* ties away from zero (PTX cvt.rna) */
    uint32_t bits = tl_bits(x), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffe000u;
    return (magnitude == 0x7f800000u ? bits : bits + 0x1000) & 0xffffe000u;
}
TL_INLINE float tl_round_tf32(float x) { return tl_float(tl_tf32_code(x)); }
/* Floats of up to 8 bits with a sign: saturated to `max_code`; `nan_code` is what NaN becomes. */
TL_INLINE uint8_t tl_small_code(float x, int exponent_nbits, int mantissa_nbits, int max_code, int nan_code, int over_code) {
    int bias = (1 << (exponent_nbits - 1)) - 1, sign = tl_bits(x) >> 31 << (exponent_nbits + mantissa_nbits);
    float magnitude = fabsf(x);
    if (magnitude != magnitude) return (uint8_t)nan_code;
    int exponent = (int)(tl_bits(magnitude) >> 23) - 127, lowest = 1 - bias;
    int unit = (exponent < lowest ? lowest : exponent) - mantissa_nbits;
    /* Ties go to even codes, which without a mantissa are not even numbers of steps. */
    double steps = rint(ldexp((double)magnitude, -unit) + (exponent > lowest ? (exponent - lowest) << mantissa_nbits : 0));
    if (!(steps <= 1 << 12)) return (uint8_t)(sign | over_code);
    int code = (int)steps;
    return (uint8_t)(sign | (code > max_code ? over_code : code));
}
TL_INLINE uint8_t tl_e8m0_code(float x) { /* ties go up */
    if (x != x) return 255;
    if (!(x > 0x1p-127f)) return 0;
    if (x > 0x1.7fffffp127f) return 254;
    int exponent;
    double fraction = frexp((double)x, &exponent); /* 0.5 to 1 */
    int code = exponent - 1 + (fraction >= 0.75) + 127;
    return (uint8_t)(code < 0 ? 0 : code > 254 ? 254 : code);
}
TL_INLINE int64_t tl_round_int(float x, int64_t low, int64_t high) {
    double r = rint((double)x);
    return r != r ? 0 : r >= (double)high ? high : r <= (double)low ? low : (int64_t)r;
}
TL_INLINE int32_t tl_round_narrow(float x, float low, float high) { /* limits that f32 holds */
    float r = rintf(x);
    r = r >= high ? high : r <= low ? low : r;
    return r == r ? (int32_t)r : 0;
}
/* Rounded to odd, so that a second rounding to fewer bits equals one. */
TL_INLINE float tl_odd_f32(double wide) {
    float x = (float)wide;
    uint32_t bits = tl_bits(x);
    if ((double)x == wide || isinf(x)) return x;
    return tl_float((bits - (fabs((double)x) > fabs(wide))) | 1);
}

/* x * y + z, rounded once where the machine can. It is written out wherever it is meant: a compiler that may contract chooses by
   what stands around, and the same sum would have other bits in another kernel, or with another -O. */
#if defined(__FMA__) || defined(__aarch64__)
#define tl_mad __builtin_fmaf
#else
TL_INLINE float tl_mad(float x, float y, float z) { return x * y + z; }
#endif

/* f32: of a number and NaN, min and max take the number. exp2 to about one unit in the last place. */
TL_INLINE float tl_fmin(float a, float b) { return a < b || b != b ? a : b; }
TL_INLINE float tl_fmax(float a, float b) { return a > b || b != b ? a : b; }
TL_INLINE float tl_exp2(float x) {
    float c = x > 129.0f ? 129.0f : x;
    c = c < -151.0f ? -151.0f : c;
    float n = rintf(c), f = c - n;
    float p = 1.5252734e-5f;
    p = tl_mad(p, f, 1.5403531e-4f);
    p = tl_mad(p, f, 1.3333558e-3f);
    p = tl_mad(p, f, 9.6181291e-3f);
    p = tl_mad(p, f, 5.5504109e-2f);
    p = tl_mad(p, f, 2.4022651e-1f);
    p = tl_mad(p, f, 6.9314718e-1f);
    p = tl_mad(p, f, 1.0f);
    int32_t whole = c == c ? (int32_t)n : 0, half = whole >> 1;
    return p * tl_float((uint32_t)(half + 127) << 23) * tl_float((uint32_t)(whole - half + 127) << 23);
}
TL_INLINE float tl_exp(float x) { /* x log2(e) in two parts: one product would lose the bits of its whole part */
    float high = x * 1.44269504f;
    float rest = __builtin_isinf(high) ? 0.0f : tl_mad(x, 1.92596299e-8f, __builtin_fmaf(x, 1.44269504f, -high));
    float power = tl_exp2(high);
    return power < TL_INF ? tl_mad(power, rest * 0.6931471806f, power) : power;
}
/* x = 2^n (1 + f) with 1 + f around 1, so that f is exact: log2(1 + f) is f log2(e) in two parts plus f^2 times a polynomial. */
TL_INLINE float tl_log2(float x) {
    float scaled = x < 1.17549435e-38f ? x * 8388608.0f : x;
    uint32_t bits = tl_bits(scaled), shifted = bits - 0x3F3504F3u;
    int32_t n = (int32_t)shifted >> 23;
    float f = tl_float(bits - ((uint32_t)n << 23)) - 1.0f;
    float p = -1.0997752e-1f;
    p = tl_mad(p, f, 1.8618706e-1f);
    p = tl_mad(p, f, -1.9105583e-1f);
    p = tl_mad(p, f, 2.0459774e-1f);
    p = tl_mad(p, f, -2.3961803e-1f);
    p = tl_mad(p, f, 2.8856763e-1f);
    p = tl_mad(p, f, -3.6069660e-1f);
    p = tl_mad(p, f, 4.8089823e-1f);
    p = __builtin_fmaf(p, f, -7.2134733e-1f);
    float square = f * f, lost = __builtin_fmaf(f, f, -square);
    float rest = __builtin_fmaf(square, p, tl_mad(f, 1.92596299e-8f, -lost * 0.72134752f));
    float found = (float)(x < 1.17549435e-38f ? n - 23 : n) + __builtin_fmaf(f, 1.44269504f, rest);
    found = x > 0.0f ? found : x == 0.0f ? -TL_INF : TL_NAN;
    return x < TL_INF ? found : x;
}
TL_INLINE float tl_exp2_ftz(float x) { return x < -126.0f ? 0.0f : tl_exp2(x); }
TL_INLINE float tl_rsqrt(float x) { return 1.0f / sqrtf(x); }
TL_INLINE float tl_rcp(float x) { return 1.0f / x; }

/* Keeps a vector in a register: compilers like to load operands again and again, which takes more than the products do. */
#if defined(__AVX512F__)
#define TL_KEEP(x) __asm__("" : "+v"(x))
#else
#define TL_KEEP(x) (void)0
#endif

/* Vectors: the compiler splits those that are wider than the machine's. The types with a u may stand anywhere. */
#define TL_VECTORS(n) \
    typedef float tl_f32x##n __attribute__((vector_size(4 * n))); \
    typedef int32_t tl_i32x##n __attribute__((vector_size(4 * n))); \
    typedef uint32_t tl_u32x##n __attribute__((vector_size(4 * n))); \
    typedef float tl_f32x##n##u __attribute__((vector_size(4 * n), aligned(4), may_alias)); \
    typedef uint32_t tl_u32x##n##u __attribute__((vector_size(4 * n), aligned(1), may_alias)); \
    TL_INLINE tl_f32x##n tl_load_f32x##n(const float *p) { return *(const tl_f32x##n##u *)p; } \
    TL_INLINE void tl_store_f32x##n(float *p, tl_f32x##n x) { *(tl_f32x##n##u *)p = x; } \
    TL_INLINE tl_u32x##n tl_load_u32x##n(const uint8_t *p) { return *(const tl_u32x##n##u *)p; } \
    TL_INLINE tl_f32x##n tl_number_f32x##n(tl_i32x##n x) { return __builtin_convertvector(x, tl_f32x##n); } \
    TL_INLINE tl_f32x##n tl_nan_where_f32x##n(tl_f32x##n x, tl_i32x##n mask) { \
        return (tl_f32x##n)((tl_i32x##n)x | (mask & 0x7fc00000)); \
    }
TL_VECTORS(4)
TL_VECTORS(8)
TL_VECTORS(16)
/* Lanes of tl_mad. Of a loop over lanes compilers make one instruction only where they try hard. */
#define TL_MAD(n, lanes) \
    TL_INLINE tl_f32x##n tl_mad_f32x##n(tl_f32x##n x, tl_f32x##n y, tl_f32x##n z) { return lanes; } \
    TL_INLINE tl_f32x##n tl_scaled_f32x##n(tl_f32x##n x, float y, tl_f32x##n z) { \
        return tl_mad_f32x##n(x, y - (tl_f32x##n){0}, z); \
    }
#define TL_MAD_LOOP(n) \
    TL_INLINE tl_f32x##n tl_mads_f32x##n(tl_f32x##n x, tl_f32x##n y, tl_f32x##n z) { \
        for (int i = 0; i < n; i++) z[i] = tl_mad(x[i], y[i], z[i]); \
        return z; \
    } \
    TL_MAD(n, tl_mads_f32x##n(x, y, z))
#if defined(__FMA__)
TL_MAD(4, (tl_f32x4)__builtin_ia32_vfmaddps(x, y, z))
TL_MAD(8, (tl_f32x8)__builtin_ia32_vfmaddps256(x, y, z))
#else
TL_MAD_LOOP(4)
TL_MAD_LOOP(8)
#endif
#if defined(TL_MAD_512)
TL_MAD(16, (tl_f32x16)__builtin_ia32_vfmaddps512_mask(x, y, z, -1, 4))
#else
TL_MAD_LOOP(16)
#endif
/* The sum of the lanes, halves added to each other. */
#define TL_TOTAL(n) \
    TL_INLINE float tl_total_f32x##n(tl_f32x##n x) { \
        float part[n]; \
        memcpy(part, &x, sizeof part); \
        for (int step = n / 2; step; step /= 2) for (int i = 0; i < step; i++) part[i] += part[i + step]; \
        return part[0]; \
    }
TL_TOTAL(4)
#if defined(__AVX2__)
TL_INLINE float tl_total_f32x8(tl_f32x8 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    return tl_total_f32x4((tl_f32x4)sum);
}
#else
TL_TOTAL(8)
#endif
#if defined(__AVX512F__)
TL_INLINE float tl_total_f32x16(tl_f32x16 x) { return _mm512_reduce_add_ps((__m512)x); }
#else
TL_TOTAL(16)
#endif
typedef float tl_f32x1;
#define tl_mad_f32x1 tl_mad
#define tl_scaled_f32x1 tl_mad
TL_INLINE float tl_load_f32x1(const float *p) { return *p; }
TL_INLINE void tl_store_f32x1(float *p, float x) { *p = x; }
TL_INLINE float tl_total_f32x1(float x) { return x; }

/* Entries of a table of 32 floats, by the low five bits of each lane; with 16 entries it holds them twice. */
#define TL_LOOKUP(n) \
    TL_INLINE tl_f32x##n tl_lookup_f32x##n(const float *table, tl_u32x##n index) { \
        tl_f32x##n found; \
        for (int i = 0; i < n; i++) found[i] = table[index[i] & 31]; \
        return found; \
    }
TL_LOOKUP(4)
TL_LOOKUP(8)
#if defined(__AVX512F__)
TL_INLINE tl_f32x16 tl_lookup_f32x16(const float *table, tl_u32x16 index) {
    __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
    return (tl_f32x16)_mm512_permutex2var_ps(low, (__m512i)index, high);
}
TL_INLINE tl_f32x16 tl_lookup16_f32x16(const float *table, tl_u32x16 index) {
    return (tl_f32x16)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}
#else
TL_LOOKUP(16)
#define tl_lookup16_f32x16 tl_lookup_f32x16
#endif
#define tl_lookup16_f32x8 tl_lookup_f32x8
#define tl_lookup16_f32x4 tl_lookup_f32x4

/* Floats of 8 bits with a sign in both halves of lanes, as bf16. table: the bf16 of 128 magnitudes. */
#if defined(__AVX512BW__)
TL_INLINE tl_u32x16 tl_byte_floats_u32x16(const uint16_t *table, tl_u32x16 codes) {
    const __m512i index = (__m512i)codes;
    __m512i low = _mm512_permutex2var_epi16(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 32));
    __m512i high = _mm512_permutex2var_epi16(_mm512_loadu_si512(table + 64), index, _mm512_loadu_si512(table + 96));
    __m512i magnitude = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(index, _mm512_set1_epi16(64)), high);
    __m512i sign = _mm512_slli_epi16(index, 8); /* or-and below: a | b & c */
    return (tl_u32x16)_mm512_ternarylogic_epi32(magnitude, sign, _mm512_set1_epi16((int16_t)0x8000), 0xf8);
}
#endif

/* The low halves of lanes as f16. */
#define TL_HALVES(n) \
    TL_INLINE tl_f32x##n tl_halves_f32x##n(tl_u32x##n code) { \
        tl_f32x##n value; \
        for (int i = 0; i < n; i++) value[i] = tl_f16_value(code[i]); \
        return value; \
    }
#if defined(__AVX512F__)
TL_INLINE tl_f32x16 tl_halves_f32x16(tl_u32x16 code) {
    return (tl_f32x16)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)code));
}
#else
TL_HALVES(16)
#endif
#if defined(__AVX2__) && defined(__F16C__)
TL_INLINE tl_f32x8 tl_halves_f32x8(tl_u32x8 code) {
    __m256i packed = _mm256_packus_epi32((__m256i)code, (__m256i)code);
    return (tl_f32x8)_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
TL_HALVES(8)
#endif
TL_HALVES(4)

/* Four products of bytes in each lane, added to it: unsigned by signed on x86, signed by signed on Arm. */
TL_INLINE tl_i32x4 tl_load_i32x4(const uint8_t *p) { return (tl_i32x4)tl_load_u32x4(p); }
TL_INLINE tl_i32x8 tl_load_i32x8(const uint8_t *p) { return (tl_i32x8)tl_load_u32x8(p); }
TL_INLINE tl_i32x16 tl_load_i32x16(const uint8_t *p) { return (tl_i32x16)tl_load_u32x16(p); }
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
TL_INLINE tl_i32x16 tl_dot_i32x16(tl_i32x16 sum, uint32_t four, tl_i32x16 bytes) {
    return (tl_i32x16)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32((int32_t)four), (__m512i)bytes);
}
TL_INLINE tl_i32x8 tl_dot_i32x8(tl_i32x8 sum, uint32_t four, tl_i32x8 bytes) {
    return (tl_i32x8)_mm256_dpbusd_epi32((__m256i)sum, _mm256_set1_epi32((int32_t)four), (__m256i)bytes);
}
TL_INLINE tl_i32x4 tl_dot_i32x4(tl_i32x4 sum, uint32_t four, tl_i32x4 bytes) {
    return (tl_i32x4)_mm_dpbusd_epi32((__m128i)sum, _mm_set1_epi32((int32_t)four), (__m128i)bytes);
}
#elif defined(__AVXVNNI__)
TL_INLINE tl_i32x8 tl_dot_i32x8(tl_i32x8 sum, uint32_t four, tl_i32x8 bytes) {
    return (tl_i32x8)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32((int32_t)four), (__m256i)bytes);
}
#elif defined(__ARM_FEATURE_DOTPROD)
TL_INLINE tl_i32x4 tl_dot_i32x4(tl_i32x4 sum, uint32_t four, tl_i32x4 bytes) {
    return (tl_i32x4)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_u32(vdupq_n_u32(four)), (int8x16_t)bytes);
}
#endif

/* Runs of codes of 1 to 7 bits: eight of them are a whole number of bytes. */
TL_INLINE void tl_load_codes(uint8_t *restrict to, const uint8_t *restrict from, int64_t bit, int nbits, int64_t count) {
    int64_t i = 0;
    const uint8_t *bytes = from + (bit >> 3);
    if ((bit & 7) == 0)
        for (; i + 8 <= count; i += 8, bytes += nbits) {
            uint64_t word = 0;
            memcpy(&word, bytes, nbits);
            for (int j = 0; j < 8; j++) to[i + j] = (uint8_t)(word >> (j * nbits)) & (uint8_t)((1 << nbits) - 1);
        }
    for (; i < count; i++) to[i] = (uint8_t)tl_field(from, bit + i * nbits, nbits);
}

/* Runs of f16. */
TL_INLINE void tl_load_f16(float *restrict to, const uint16_t *restrict from, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
#elif defined(__AVX2__) && defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < count; i++) to[i] = tl_f16_value(from[i]);
}
TL_INLINE void tl_store_f16(uint16_t *restrict to, const float *restrict from, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; i++) to[i] = tl_f16_code(from[i]);
}

/* Reductions of runs, in an order that depends on the length only. */
TL_INLINE float tl_sum_row(const float *x, int64_t count) {
    tl_f32x16 part = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) part += tl_load_f32x16(x + i);
    float total = tl_total_f32x16(part);
    for (; i < count; i++) total += x[i];
    return total;
}
#define TL_EXTREME_ROW(name) \
    TL_INLINE float tl_##name##_row(const float *x, int64_t count) { \
        float part[16]; \
        int64_t i = 0; \
        for (int lane = 0; lane < 16; lane++) part[lane] = TL_NAN; \
        for (; i + 16 <= count; i += 16) \
            for (int lane = 0; lane < 16; lane++) part[lane] = tl_f##name(part[lane], x[i + lane]); \
        for (; i < count; i++) part[0] = tl_f##name(part[0], x[i]); \
        for (int step = 8; step; step /= 2) \
            for (int lane = 0; lane < step; lane++) part[lane] = tl_f##name(part[lane], part[lane + step]); \
        return part[0]; \
    }
TL_EXTREME_ROW(max)
TL_EXTREME_ROW(min)
