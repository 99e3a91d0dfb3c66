"""Float instructions against exact rational arithmetic, rounded once by definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from emulator_kernels import apply


@dataclass(frozen=True)
class Format:
    """A binary float format by its IEEE 754 parameters."""

    nbits: int
    mantissa: int
    bias: int

    def decode(self, bits: int) -> Fraction | float:
        sign = -1 if bits >> self.nbits - 1 else 1
        exponent = bits >> self.mantissa & (1 << self.nbits - 1 - self.mantissa) - 1
        fraction = bits & (1 << self.mantissa) - 1
        if exponent == (1 << self.nbits - 1 - self.mantissa) - 1:
            return math.nan if fraction else sign * math.inf
        if exponent == 0:
            return sign * Fraction(fraction) * Fraction(2) ** (1 - self.bias - self.mantissa)
        return sign * Fraction((1 << self.mantissa) + fraction) * Fraction(2) ** (exponent - self.bias - self.mantissa)

    def encode(self, value: Fraction, negative_zero: bool = False, mode: str = "rn") -> int:
        """The bits of the value rounded once: to nearest even, or directed."""
        sign = value < 0 or (value == 0 and negative_zero)
        magnitude = abs(value)
        exponent = max(
            (magnitude.numerator.bit_length() - magnitude.denominator.bit_length()) if magnitude else -9999, -9999
        )
        while magnitude and Fraction(2) ** exponent > magnitude:
            exponent -= 1
        while magnitude and Fraction(2) ** (exponent + 1) <= magnitude:
            exponent += 1
        unit = Fraction(2) ** (max(exponent, 1 - self.bias) - self.mantissa)
        steps = magnitude / unit
        whole = steps.numerator // steps.denominator
        rest = steps - whole
        if mode == "rn":
            whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1)
        elif (mode == "rp" and not sign) or (mode == "rm" and sign):
            whole += rest > 0
        # Subnormals, normals and the carry to the next exponent are consecutive codes.
        code = whole + (max(exponent, 1 - self.bias) - 1 + self.bias << self.mantissa) if whole else 0
        infinity = (1 << self.nbits - 1 - self.mantissa) - 1 << self.mantissa
        away = mode == "rn" or (mode == "rp" and not sign) or (mode == "rm" and sign)
        code = min(code, infinity if away else infinity - 1)
        return code | sign << self.nbits - 1


FORMATS = {"f16": Format(16, 10, 15), "bf16": Format(16, 7, 127), "f32": Format(32, 23, 127)}


def sample(name: str, count: int, seed: int) -> npt.NDArray[Any]:
    """Random finite bit patterns, many with exponents close together so that sums cancel and ties occur."""
    rng = np.random.default_rng(seed)
    form = FORMATS[name]
    dtype = np.uint16 if form.nbits == 16 else np.uint32
    wild = rng.integers(0, 1 << form.nbits, count, np.uint64)
    exponent = (form.bias + rng.integers(-4, 5, count)).astype(np.uint64) << np.uint64(form.mantissa)
    mantissa = wild & np.uint64((1 << form.mantissa) - 1)
    short = mantissa & ~np.uint64((1 << form.mantissa // 2) - 1)
    near = (
        exponent
        | np.where(wild >> np.uint64(3) & np.uint64(1), mantissa, short)
        | wild & np.uint64(1 << form.nbits - 1)
    )
    bits = np.where(np.arange(count) % 3 == 0, wild, near)
    top = ((1 << form.nbits - 1 - form.mantissa) - 1) << form.mantissa
    bits = np.where(bits & np.uint64(top) == top, mantissa, bits)
    corners = [
        0,
        1 << form.nbits - 1,
        1,
        top - 1,
        (1 << form.mantissa) - 1,
        1 << form.mantissa,
        form.bias << form.mantissa,
    ]
    bits[: len(corners)] = corners
    rng.shuffle(bits)
    return bits.astype(dtype)


def is_negative_zero(*terms: tuple[Fraction, int]) -> bool:
    """Whether an exact sum of zeros is -0: only when all of them are negative. terms: (value, sign bit)."""
    return all(value == 0 and sign for value, sign in terms)


def expected(name: str, law: str, rows: list[tuple[int, ...]], mode: str = "rn") -> list[int]:
    form = FORMATS[name]
    result: list[int] = []
    for row in rows:
        values = [Fraction(form.decode(bits)) for bits in row]
        signs = [bits >> form.nbits - 1 for bits in row]
        if law == "add":
            exact, zero = values[0] + values[1], is_negative_zero(*zip(values, signs))
        elif law == "sub":
            exact, zero = values[0] - values[1], is_negative_zero((values[0], signs[0]), (values[1], 1 - signs[1]))
        elif law == "mul":
            exact, zero = values[0] * values[1], bool(signs[0] ^ signs[1])
        else:
            product = values[0] * values[1]
            exact, zero = product + values[2], is_negative_zero((product, signs[0] ^ signs[1]), (values[2], signs[2]))
            if exact == 0 and product != 0:
                zero = False
        if mode == "rm" and law != "mul" and exact == 0 and not zero and any(signs) and not all(signs):
            zero = True
        result.append(form.encode(exact, zero, mode))
    return result


@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("law", ["add", "sub", "mul", "fma"])
def test_one_rounding_of_the_exact_result(name: str, law: str) -> None:
    arity = 3 if law == "fma" else 2
    inputs = [sample(name, 1500, seed) for seed in range(arity)]
    if law == "fma":  # in a third of the cases the addend nearly cancels the product, or is tiny beside it
        form = FORMATS[name]
        for i in range(0, 1500, 3):
            product = Fraction(form.decode(int(inputs[0][i]))) * Fraction(form.decode(int(inputs[1][i])))
            inputs[2][i] = form.encode(-product, mode="rz") if i % 2 else 1
    operands = ", ".join(f"{{{i}}}" for i in range(arity))
    got = apply(f"{law}.rn.{name} {{d}}, {operands}", inputs[0].dtype, *inputs)
    rows = list(zip(*(array.tolist() for array in inputs)))
    want = expected(name, law, rows)
    assert [hex(x) for x in got.tolist()] == [hex(x) for x in want]


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("law", ["add", "sub", "mul", "fma"])
def test_directed_rounding_of_f32(mode: str, law: str) -> None:
    arity = 3 if law == "fma" else 2
    inputs = [sample("f32", 900, seed) for seed in range(10, 10 + arity)]
    operands = ", ".join(f"{{{i}}}" for i in range(arity))
    got = apply(f"{law}.{mode}.f32 {{d}}, {operands}", np.uint32, *inputs)
    rows = list(zip(*(array.tolist() for array in inputs)))
    want = expected("f32", law, rows, mode)
    nonzero = [i for i, w in enumerate(want) if w & 0x7FFFFFFF]  # the sign of an exact zero is not our business here
    assert [hex(int(got[i])) for i in nonzero] == [hex(want[i]) for i in nonzero]
    assert len(nonzero) > 600


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_pairs_compute_both_halves(name: str) -> None:
    low, high = ([sample(name, 300, seed + k) for k in range(3)] for seed in (20, 30))
    packed = [h.astype(np.uint32) << np.uint32(16) | l for l, h in zip(low, high)]
    for text, count in (
        ("add.rn", 2),
        ("mul.rn", 2),
        ("fma.rn", 3),
        ("sub.rn", 2),
        ("min", 2),
        ("max", 2),
        ("neg", 1),
        ("abs", 1),
    ):
        operands = ", ".join(f"{{{i}}}" for i in range(count))
        got = apply(f"{text}.{name}x2 {{d}}, {operands}", np.uint32, *packed[:count])
        one = [apply(f"{text}.{name} {{d}}, {operands}", np.uint16, *half[:count]) for half in (low, high)]
        assert got.tolist() == (one[1].astype(np.uint32) << np.uint32(16) | one[0]).tolist()


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.5], np.float32)


def test_minimum_and_maximum_of_zeros_and_nans() -> None:
    a, b = (grid.reshape(-1) for grid in np.meshgrid(SPECIAL, SPECIAL))
    for opcode, pick in (("min", min), ("max", max)):
        got = apply(f"{opcode}.f32 {{d}}, {{0}}, {{1}}", np.float32, a, b)
        with_nan = apply(f"{opcode}.NaN.f32 {{d}}, {{0}}, {{1}}", np.float32, a, b)
        for x, y, g, n in zip(a.tolist(), b.tolist(), got.tolist(), with_nan.tolist()):
            numbers = [v for v in (x, y) if not math.isnan(v)]
            want = pick(numbers, key=lambda v: (v, math.copysign(1, v))) if numbers else math.nan
            assert (g == want and math.copysign(1, g) == math.copysign(1, want)) or (math.isnan(g) and math.isnan(want))
            assert math.isnan(n) if len(numbers) < 2 else n == want


def test_canonical_nan_of_min_and_of_16_bit_arithmetic() -> None:
    nan = np.array([0xFFC12345], np.uint32)
    assert apply("min.f32 {d}, {0}, {0}", np.uint32, nan).tolist() == [0x7FFFFFFF]
    half = np.array([0x7C00], np.uint16)
    assert apply("sub.rn.f16 {d}, {0}, {0}", np.uint16, half).tolist() == [0x7FFF]
    assert apply("sub.rn.bf16 {d}, {0}, {0}", np.uint16, np.array([0x7F80], np.uint16)).tolist() == [0x7FFF]


def test_ftz_flushes_inputs_and_outputs_and_sat_clamps() -> None:
    tiny, one, small = np.float32(1e-40), np.float32(1), np.float32(2.0**-126)
    values = np.array([tiny, -tiny], np.float32)
    got = apply("add.ftz.f32 {d}, {0}, {0}", np.uint32, values)
    assert got.tolist() == [0, 0x80000000]
    got = apply("mul.ftz.f32 {d}, {0}, 0f3F000000", np.float32, np.array([small, one], np.float32))
    assert got.tolist() == [0, 0.5]
    got = apply("mul.f32 {d}, {0}, 0f3F000000", np.float32, np.array([small], np.float32))
    assert got.tolist() == [float(small) / 2]
    got = apply("add.sat.f32 {d}, {0}, {0}", np.float32, np.array([-3, 0.25, 9, np.nan], np.float32))
    assert got.tolist() == [0, 0.5, 1, 0]
    got = apply(
        "fma.rn.relu.f16 {d}, {0}, {0}, {1}", np.float16, np.array([1, 2], np.float16), np.array([-3, 1], np.float16)
    )
    assert got.tolist() == [0, 5]


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_comparisons_with_nan_are_false_when_ordered_and_true_when_not(name: str) -> None:
    a, b = (grid.reshape(-1) for grid in np.meshgrid(SPECIAL, SPECIAL))
    if name != "f32":
        a, b = (v.astype(np.float16 if name == "f16" else ml_dtypes.bfloat16) for v in (a, b))
    pairs = [(float(x), float(y)) for x, y in zip(a, b)]
    bits = [np.ascontiguousarray(v).view(np.uint32 if name == "f32" else np.uint16) for v in (a, b)]
    for operator, law in COMPARISONS.items():
        nan = [math.isnan(x) or math.isnan(y) for x, y in pairs]
        got = apply(f"setp.{operator}.{name} {{d}}, {{0}}, {{1}}", np.bool_, *bits)
        assert got.tolist() == [law(*p) and not n for p, n in zip(pairs, nan)]
        got = apply(f"setp.{operator}u.{name} {{d}}, {{0}}, {{1}}", np.bool_, *bits)
        assert got.tolist() == [law(*p) or n for p, n in zip(pairs, nan)]
    assert apply(f"setp.nan.{name} {{d}}, {{0}}, {{1}}", np.bool_, *bits).tolist() == nan
    assert apply(f"setp.num.{name} {{d}}, {{0}}, {{1}}", np.bool_, *bits).tolist() == [not n for n in nan]


def test_packed_comparison_gives_a_predicate_for_each_half() -> None:
    low, high = np.array([1, 2, 3], np.float16), np.array([3, 2, 1], np.float16)
    packed = high.view(np.uint16).astype(np.uint32) << np.uint32(16) | low.view(np.uint16)
    two = np.full(3, 0x40004000, np.uint32)
    for p, want in (("%p1", low < 2), ("%p2", high < 2)):
        got = apply(f"setp.lt.f16x2 %p1|%p2, {{0}}, {{1}};\nand.pred {{d}}, {p}, {p}", np.bool_, packed, two)
        assert got.tolist() == want.tolist()
    got = apply("set.lt.f16x2.f16x2 {d}, {0}, {1}", np.uint32, packed, two)
    assert got.tolist() == [0x00003C00, 0, 0x3C000000]


@pytest.mark.parametrize(
    ("opcode", "law"),
    [
        ("ex2.approx.ftz.f32", lambda x: 2.0**x), ("lg2.approx.f32", lambda x: math.log2(abs(x))),
        ("rcp.rn.f32", lambda x: 1 / x), ("rcp.approx.f32", lambda x: 1 / x),
        ("rsqrt.approx.f32", lambda x: 1 / math.sqrt(abs(x))),
        ("sqrt.rn.f32", lambda x: math.sqrt(abs(x))), ("sin.approx.f32", math.sin), ("cos.approx.f32", math.cos),
        ("tanh.approx.f32", math.tanh),
    ],
)  # fmt: skip
def test_elementary_functions_are_the_rounded_value(opcode: str, law: Callable[[float], float]) -> None:
    values = np.random.default_rng(5).uniform(-4, 4, 300).astype(np.float32)
    if "lg2" in opcode or "sqrt" in opcode:
        values = np.abs(values)
    got = apply(f"{opcode} {{d}}, {{0}}", np.float32, values)
    want = np.array([law(float(v)) for v in values], np.float32)
    np.testing.assert_array_max_ulp(got, want, 1)


def test_results_below_the_least_normal_number_are_flushed() -> None:
    """With .ftz; PTX ISA, "ex2": without it subnormal numbers are supported."""
    values = np.array([-140, -126.5, -126, 1], np.float32)
    assert apply("ex2.approx.ftz.f32 {d}, {0}", np.float32, values).tolist() == [0, 0, 2.0**-126, 2]
    assert apply("ex2.approx.f32 {d}, {0}", np.float32, values[[0, 2]]).tolist() == [2.0**-140, 2.0**-126]


def test_f16_exponential_and_division() -> None:
    values = np.arange(-2000, 2000, dtype=np.float16) / np.float16(256)
    got = apply("ex2.approx.f16 {d}, {0}", np.float16, values)
    assert got.tolist() == np.exp2(values.astype(np.float64)).astype(np.float16).tolist()
    a, b = sample("f32", 500, 40).view(np.float32), sample("f32", 500, 41).view(np.float32)
    for opcode in ("div.rn.f32", "div.full.f32"):
        got = apply(f"{opcode} {{d}}, {{0}}, {{1}}", np.float32, a, b)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(got, a / b)


def test_decimal_immediates_take_the_type_of_the_instruction() -> None:
    assert apply("add.f32 {d}, {0}, 1.5", np.float32, np.array([2], np.float32)).tolist() == [3.5]
    assert apply("add.f64 {d}, {0}, 1.5", np.float64, np.array([2], np.float64)).tolist() == [3.5]
    assert apply("mov.f32 {d}, 0fC0200000", np.float32, np.array([2], np.float32)).tolist() == [-2.5]


# Conversions.
def all_codes(nbits: int) -> npt.NDArray[Any]:
    return np.arange(1 << nbits, dtype=np.uint16 if nbits > 8 else np.uint8)


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_narrowing_rounds_once_in_each_direction(name: str, mode: str) -> None:
    bits = np.concatenate([sample("f32", 1500, 50), np.arange(0x3F7F0000, 0x3F810000, 173, dtype=np.uint32)])
    got = apply(f"cvt.{mode}.{name}.f32 {{d}}, {{0}}", np.uint16, bits)
    want = [FORMATS[name].encode(Fraction(FORMATS["f32"].decode(b)), bool(b >> 31), mode) for b in bits.tolist()]
    assert [hex(x) for x in got.tolist()] == [hex(x) for x in want]


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_widening_is_exact_on_every_code(name: str) -> None:
    got = apply(f"cvt.f32.{name} {{d}}, {{0}}", np.float32, all_codes(16), threads=1024)
    view = np.float16 if name == "f16" else ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, all_codes(16).view(view).astype(np.float32))


def test_pairs_from_two_floats_put_the_first_on_top() -> None:
    a, b = np.array([1.5, -2, 1e9], np.float32), np.array([0.25, 7, -1e-9], np.float32)
    got = apply("cvt.rn.f16x2.f32 {d}, {0}, {1}", np.uint32, a, b).view(np.float16).reshape(-1, 2)
    assert got.tolist() == [[0.25, 1.5], [7, -2], [-0.0, math.inf]]
    got = apply("cvt.rn.satfinite.f16x2.f32 {d}, {0}, {1}", np.uint32, a, b).view(np.float16).reshape(-1, 2)
    assert got[2].tolist() == [-0.0, 65504]
    bf = apply("cvt.rn.bf16x2.f32 {d}, {0}, {1}", np.uint32, a, b).view(ml_dtypes.bfloat16).reshape(-1, 2)
    assert bf.astype(np.float32)[0].tolist() == [0.25, 1.5]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)])
def test_fp8_decodes_every_code_and_encodes_back(name: str, dtype: Any) -> None:
    low, high = all_codes(8), all_codes(8)[::-1].copy()
    packed = high.astype(np.uint16) << np.uint16(8) | low
    got = apply(f"cvt.rn.f16x2.{name}x2 {{d}}, {{0}}", np.uint32, packed).view(np.float16).reshape(-1, 2)
    np.testing.assert_array_equal(got[:, 0], low.view(dtype).astype(np.float16))
    np.testing.assert_array_equal(got[:, 1], high.view(dtype).astype(np.float16))
    finite = np.isfinite(got[:, 0].astype(np.float32))
    back = apply(f"cvt.rn.satfinite.{name}x2.f16x2 {{d}}, {{0}}", np.uint16, got.view(np.uint32).reshape(-1)) & 255
    assert back[finite].tolist() == low[finite].tolist()
    assert set((back[~finite] & 0x7F).tolist()) <= {0x7F, {"e4m3": 0x7E, "e5m2": 0x7B}[name]}


@pytest.mark.parametrize(
    ("name", "dtype", "top"), [("e4m3", ml_dtypes.float8_e4m3fn, 448), ("e5m2", ml_dtypes.float8_e5m2, 57344)]
)
def test_fp8_encoding_rounds_to_nearest_even_and_saturates(name: str, dtype: Any, top: float) -> None:
    rng = np.random.default_rng(7)
    values = np.concatenate(
        [rng.normal(0, 1, 500), rng.normal(0, 300, 500), rng.normal(0, 0.01, 500), [1e9, -1e9, np.inf]]
    )
    codes = all_codes(8).view(dtype).astype(np.float32)
    middles = (codes[:-1] + codes[1:]) / 2  # ties
    single = np.concatenate([values, middles[np.isfinite(middles)]]).astype(np.float32)
    zero = np.zeros_like(single)
    got = apply(f"cvt.rn.satfinite.{name}x2.f32 {{d}}, {{0}}, {{1}}", np.uint16, zero, single)
    want = np.clip(single, -top, top).astype(dtype).view(np.uint8)
    assert got.tolist() == want.tolist()
    swapped = apply(f"cvt.rn.satfinite.{name}x2.f32 {{d}}, {{0}}, {{1}}", np.uint16, single, zero)
    assert (swapped >> 8).tolist() == want.tolist()


@pytest.mark.parametrize(
    ("mode", "law"), [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)]
)
@pytest.mark.parametrize("target", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_float_to_integer_rounds_and_clamps(mode: str, law: Callable[[float], int], target: str) -> None:
    nbits = int(target[1:])
    values = [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        3.7,
        -3.7,
        1e20,
        -1e20,
        127.5,
        255.5,
        40000.5,
        3e9,
        math.inf,
        -math.inf,
        math.nan,
    ]
    single = np.array(values, np.float32)
    low, high = (-(1 << nbits - 1), (1 << nbits - 1) - 1) if target[0] == "s" else (0, (1 << nbits) - 1)

    def expect(value: float) -> int:
        if math.isnan(value):
            return 0 if nbits < 64 else (low or 1 << 63)
        return (high if value > 0 else low) if math.isinf(value) else max(low, min(high, law(value)))

    held = np.dtype(f"{'i' if target[0] == 's' else 'u'}{max(2, nbits // 8)}")
    got = apply(f"cvt.{mode}.{target}.f32 {{d}}, {{0}}", held, single)
    assert got.tolist() == [expect(float(v)) for v in single]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (source, target)
        for source in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
        for target in ("f16", "bf16", "f32")
        if target != "bf16" or source[1:] != "8"  # PTX has no conversion from 8-bit integers to bf16
    ],
)
def test_integer_to_float_rounds_once(source: str, target: str) -> None:
    nbits = int(source[1:])
    rng = np.random.default_rng(9)
    dtype = np.dtype(f"{'i' if source[0] == 's' else 'u'}{nbits // 8}")
    raw = rng.integers(0, 256, (400, dtype.itemsize), np.uint8).view(dtype).reshape(-1)
    raw[:4] = [0, 1, np.iinfo(dtype).max, np.iinfo(dtype).min]
    if nbits == 64:  # ties of f32 that only a far-away bit breaks
        raw[4:7] = [(1 << 60) + (1 << 36), (1 << 60) + (1 << 36) + 1, (1 << 60) + (1 << 36) - 1]
    got = apply(f"cvt.rn.{target}.{source} {{d}}, {{0}}", np.uint32 if target == "f32" else np.uint16, raw)
    assert got.tolist() == [FORMATS[target].encode(Fraction(int(v))) for v in raw.tolist()]


def test_rounding_to_an_integral_float_and_tf32() -> None:
    values = np.array([0.5, 1.5, -2.5, 2.75, -0.25], np.float32)
    assert apply("cvt.rni.f32.f32 {d}, {0}", np.float32, values).tolist() == [0, 2, -2, 3, -0.0]
    assert apply("cvt.rmi.f32.f32 {d}, {0}", np.float32, values).tolist() == [0, 1, -3, 2, -1]
    assert apply("cvt.sat.f32.f32 {d}, {0}", np.float32, values).tolist() == [0.5, 1, 0, 1, 0]
    bits = np.array([0x3F800FFF, 0x3F801000, 0x3F803000, 0xBF801001], np.uint32)
    assert apply("cvt.rna.tf32.f32 {d}, {0}", np.uint32, bits).tolist() == [
        0x3F800000,
        0x3F802000,
        0x3F804000,
        0xBF802000,
    ]
