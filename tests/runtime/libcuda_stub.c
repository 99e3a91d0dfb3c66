/* A libcuda.so.1 without a GPU: device memory is host memory, a launch is recorded (and `increment` is executed).
 * Without cuGetProcAddress_v2 the bindings resolve every function by its exported name. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int CUresult;
enum { INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500 };

/* What the tests read and set through ctypes. */
struct launch { uint64_t function, stream, context, count; uint32_t grid[3], block[3], shared; int attribute, attribute_value;
                uint64_t args[16], map[16]; }; /* map: the last parameter of 128 bytes */
struct launch stub_launch;
static __thread struct launch own_launch; /* the last one of the calling thread */
void stub_own_launch(struct launch *out) { *out = own_launch; }
int stub_delay_us, stub_devices = 1, stub_params = 0, stub_sizes[16];
int64_t stub_live_allocations, stub_shared_limit, stub_waits, stub_context_switches, stub_syncs, stub_encodes;
static char fail_name[64];
static int fail_code;
static __thread void *current;

void stub_fail(const char *name, int code) { strncpy(fail_name, name, sizeof fail_name - 1); fail_code = code; }
#define CALL if (fail_code && !strcmp(fail_name, __func__)) { int code = fail_code; fail_code = 0; return code; }
#define NEEDS_CONTEXT CALL if (!current) return INVALID_CONTEXT;

CUresult cuInit(unsigned flags) { CALL return 0; }
CUresult cuDriverGetVersion(int *version) { CALL *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { CALL *count = stub_devices; return 0; }
CUresult cuDeviceGet(int *device, int index) { CALL *device = index; return index < stub_devices ? 0 : 101; }
CUresult cuDeviceGetName(char *name, int n, int device) { CALL strncpy(name, "Stub GPU", n); return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALL *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 97 ? 232448 : 0;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { CALL *context = (void *)(0xC0L + device); return 0; }
CUresult cuCtxGetCurrent(void **context) { CALL *context = current; return 0; }
CUresult cuCtxSetCurrent(void *context) { CALL current = context; stub_context_switches++; return 0; }
CUresult cuCtxGetDevice(int *device) { NEEDS_CONTEXT *device = (int)((int64_t)current - 0xC0); return 0; }
CUresult cuCtxSynchronize(void) { NEEDS_CONTEXT stub_syncs++; return 0; }

CUresult cuLibraryLoadData(void **library, const char *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
    CALL *library = (void *)0x11B; return memcmp(code, "\x7f" "ELF", 4) ? INVALID_IMAGE : 0;
}
CUresult cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    CALL *kernel = (void *)(strcmp(name, "increment") ? 0xF0L : 0xF1L); return strcmp(name, "missing") ? 0 : NOT_FOUND;
}
CUresult cuKernelGetFunction(void **function, void *kernel) { NEEDS_CONTEXT *function = kernel; return 0; }
CUresult cuKernelSetAttribute(int attribute, int value, void *kernel, int device) { CALL stub_shared_limit = value; return 0; }
CUresult cuKernelGetParamInfo(void *kernel, size_t index, size_t *offset, size_t *size) {
    CALL if ((int)index >= stub_params) return INVALID_VALUE;
    *offset = 8 * index; *size = stub_sizes[index]; return 0;
}
struct config { uint32_t grid[3], block[3], shared; void *stream; struct { int id, pad; int value[16]; } *attrs; unsigned n; };
CUresult cuLaunchKernelEx(const struct config *c, void *f, void **params, void **extra) {
    NEEDS_CONTEXT
    if (!(c->grid[0] && c->grid[1] && c->grid[2])) return INVALID_VALUE;
    if (stub_delay_us) usleep(stub_delay_us); /* time for another thread to spoil a shared buffer */
    struct launch launch = {.count = stub_launch.count + 1}, *l = &launch;
    l->function = (uint64_t)f; l->stream = (uint64_t)c->stream; l->context = (uint64_t)current;
    memcpy(l->grid, c->grid, 12); memcpy(l->block, c->block, 12);
    l->shared = c->shared; l->attribute = c->n ? c->attrs[0].id : -1; l->attribute_value = c->n ? c->attrs[0].value[0] : 0;
    for (int i = 0; i < stub_params; i++) memcpy(stub_sizes[i] == 128 ? l->map : &l->args[i], params[i], stub_sizes[i]);
    stub_launch = own_launch = launch;
    if ((int64_t)f == 0xF1) /* increment(ptr, i32 stride, i32 count): adds one to every stride-th byte */
        for (int i = 0; i < (int)l->args[2]; i++) (*(uint8_t **)params[0])[(int64_t)i * (int32_t)l->args[1]]++;
    return 0;
}

CUresult cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void *stream, void **params, void **extra) {
    struct config config = {{gx, gy, gz}, {bx, by, bz}, shared, stream, 0, 0};
    return cuLaunchKernelEx(&config, f, params, extra);
}

/* A map as the numbers that it was made from, each in a word of its own but for the boxes, which share words in pairs. */
CUresult cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, void *address, const uint64_t *shape, const uint64_t *strides,
                                const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
    CALL
    for (uint32_t i = 0; i < rank; i++) if (steps[i] != 1 || !shape[i] || !box[i]) return INVALID_VALUE;
    memset(map, 0, 128);
    map[0] = (uint64_t)address; map[1] = type; map[2] = rank; map[3] = swizzle; map[4] = interleave | fill << 8;
    memcpy(&map[5], shape, 8 * rank);
    if (rank > 1) memcpy(&map[10], strides, 8 * (rank - 1));
    memcpy(&map[14], box, 4 * (rank < 4 ? rank : 4)); /* the fifth does not fit */
    stub_encodes++;
    return 0;
}

CUresult cuMemAlloc_v2(uint64_t *p, size_t n) {
    NEEDS_CONTEXT *p = (uint64_t)aligned_alloc(256, (n + 255) / 256 * 256); stub_live_allocations++; return 0;
}
CUresult cuMemFree_v2(uint64_t p) { NEEDS_CONTEXT free((void *)p); stub_live_allocations--; return 0; }
CUresult cuMemcpyHtoDAsync_v2(uint64_t d, const void *h, size_t n, void *stream) { NEEDS_CONTEXT memcpy((void *)d, h, n); return 0; }
CUresult cuMemcpyDtoHAsync_v2(void *h, uint64_t d, size_t n, void *stream) { NEEDS_CONTEXT memcpy(h, (void *)d, n); return 0; }
CUresult cuPointerGetAttribute(void *data, int attribute, uint64_t p) { NEEDS_CONTEXT *(int *)data = 0; return 0; }
CUresult cuStreamSynchronize(void *stream) { NEEDS_CONTEXT stub_syncs++; return 0; }
CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) { NEEDS_CONTEXT stub_waits++; return 0; }
CUresult cuEventCreate(void **event, unsigned flags) { NEEDS_CONTEXT *event = malloc(8); return 0; }
CUresult cuEventDestroy_v2(void *event) { CALL free(event); return 0; }
CUresult cuEventRecord(void *event, void *stream) { NEEDS_CONTEXT *(uint64_t *)event = stub_launch.count; return 0; }
CUresult cuEventSynchronize(void *event) { NEEDS_CONTEXT return 0; }
CUresult cuEventElapsedTime_v2(float *ms, uint64_t *start, uint64_t *end) { NEEDS_CONTEXT *ms = *end - *start; return 0; }
CUresult cuGetErrorName(int code, const char **name) {
    *name = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE" : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER";
    return 0;
}
CUresult cuGetErrorString(int code, const char **text) { *text = "the stub's description"; return 0; }
