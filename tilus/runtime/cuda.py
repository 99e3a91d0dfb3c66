"""The CUDA driver through `cuda.bindings.driver`: checked calls, devices, loaded kernels, streams, events.

Nothing here touches the driver at import. Handles are plain ints, contexts are the devices' primary ones, so that
torch and everybody else in the process share memory and streams with us.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tilus.codegen.tensor_map import PlacedMap
from tilus.errors import TilusError
from tilus.target import Target, target_of_capability

NO_DRIVER_HINT = "run `tilus doctor`, or use device='cpu', 'reference' or 'emulator', which need no GPU"

_HINTS = {
    "CUDA_ERROR_NO_DEVICE": NO_DRIVER_HINT,
    "CUDA_ERROR_INVALID_CONTEXT": "this thread has no CUDA context: call Device.make_current() in it first",
    "CUDA_ERROR_NOT_INITIALIZED": "CUDA does not survive fork(): start processes with the 'spawn' method",
    "CUDA_ERROR_OUT_OF_MEMORY": "free device memory, or use smaller arguments",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernel was compiled for another GPU: pass the target of this device",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an earlier kernel accessed memory out of bounds; device='emulator' shows the line",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "an earlier kernel made a misaligned access; device='emulator' shows the line",
    "CUDA_ERROR_LAUNCH_FAILED": "an earlier kernel crashed; device='emulator' shows the line",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "the block needs more registers or shared memory than an SM has: "
    "use fewer warps or smaller tiles",
    "CUDA_ERROR_INVALID_IMAGE": "the cubin is damaged: clear the cache directory",
}


@functools.cache
def driver() -> Any:
    """The module `cuda.bindings.driver`, with the driver initialised.

    Raises: TilusError when the bindings, the driver or every device is missing.
    """
    try:
        bindings: Any = importlib.import_module("cuda.bindings.driver")  # it has no type stubs
    except ImportError as error:
        raise TilusError(f"cannot import cuda.bindings: {error}", hint="pip install 'cuda-python>=13.0,<14'") from error
    try:
        (status,) = bindings.cuInit(0)
    except RuntimeError as error:  # raised by the bindings when dlopen fails
        raise TilusError("no CUDA driver found (libcuda.so.1)", hint=NO_DRIVER_HINT) from error
    if status != bindings.CUresult.CUDA_SUCCESS:
        raise error_of(bindings, "cuInit", status)
    return bindings


def error_of(bindings: Any, call_name: str, status: Any) -> TilusError:
    """The error for a failed call: the call, the driver's name and description of the status, and what to do."""
    name = _text(bindings.cuGetErrorName(status), str(status))
    description = _text(bindings.cuGetErrorString(status), "no description")
    return TilusError(f"{call_name} failed with {name} ({int(status)}): {description}", hint=_HINTS.get(name))


def _text(result: tuple[Any, bytes | None], otherwise: str) -> str:
    return result[1].decode() if result[1] else otherwise


def call(name: str, *args: Any) -> Any:
    """The result of the driver function `name`: None, one value or a tuple of values.

    Raises: TilusError when it does not return CUDA_SUCCESS, or this driver is too old to have it.
    """
    bindings = driver()
    try:
        status, *values = getattr(bindings, name)(*args)
    except RuntimeError as error:  # raised by the bindings for a function that the driver library lacks
        raise TilusError(f"{name} is missing in this CUDA driver: {error}", hint="update the NVIDIA driver") from error
    if status != bindings.CUresult.CUDA_SUCCESS:
        raise error_of(bindings, name, status)
    return values[0] if len(values) == 1 else tuple(values) or None


def driver_version() -> tuple[int, int]:
    """The CUDA version that the driver supports, e.g. (13, 0)."""
    version = call("cuDriverGetVersion")
    return (version // 1000, version % 1000 // 10)


def device_count() -> int:
    """The number of GPUs. Raises: TilusError when there is no driver."""
    return call("cuDeviceGetCount")


@functools.cache
def is_available() -> bool:
    """Whether this process can use a GPU; found out once."""
    try:
        return device_count() > 0
    except TilusError:
        return False


@dataclass(frozen=True)
class Device:
    """One GPU. `context` is its retained primary context; `max_shared_nbytes` what one block may opt in to."""

    index: int
    name: str
    capability: tuple[int, int]
    num_sms: int
    max_shared_nbytes: int
    context: int

    @functools.cached_property
    def target(self) -> Target:
        """What to compile for. Raises: TilusError for a GPU older than sm_80."""
        return target_of_capability(*self.capability)

    def make_current(self) -> None:
        """Make this device's primary context the calling thread's current one, unless it already is."""
        if int(call("cuCtxGetCurrent")) != self.context:
            call("cuCtxSetCurrent", self.context)

    @contextmanager
    def active(self) -> Generator[None]:
        """Have this device current inside the `with` block, then the caller's again: torch keeps its choice there."""
        previous = int(call("cuCtxGetCurrent"))
        self.make_current()
        try:
            yield
        finally:
            if previous not in (0, self.context):
                call("cuCtxSetCurrent", previous)


@functools.cache
def device(index: int = 0) -> Device:
    """The GPU of that index.

    Raises: TilusError when there is no driver or no such GPU.
    """
    count = device_count()
    if not 0 <= index < count:
        raise TilusError(f"no CUDA device {index}: this machine has {count}", hint="check CUDA_VISIBLE_DEVICES")
    handle = call("cuDeviceGet", index)
    attribute = driver().CUdevice_attribute

    def get(name: str) -> int:
        return call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), handle)

    return Device(
        index=index,
        name=call("cuDeviceGetName", 128, handle).split(b"\0")[0].decode(),
        capability=(get("COMPUTE_CAPABILITY_MAJOR"), get("COMPUTE_CAPABILITY_MINOR")),
        num_sms=get("MULTIPROCESSOR_COUNT"),
        max_shared_nbytes=get("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        context=int(call("cuDevicePrimaryCtxRetain", handle)),
    )


def current_device() -> Device:
    """The device of the calling thread's current context; device 0 is made current when there is none."""
    if int(call("cuCtxGetCurrent")) == 0:
        device(0).make_current()
    return device(int(call("cuCtxGetDevice")))


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel loaded for one device. `handle` is a CUkernel: it may be launched into any stream of the device."""

    name: str
    handle: int
    device: Device
    dynamic_shared_nbytes: int


def load_kernel(cubin: bytes, name: str, device: Device, dynamic_shared_nbytes: int = 0) -> Kernel:
    """Load a kernel and allow it its dynamic shared memory. It stays loaded for the life of the process.

    Loading is forced here, not left to the first launch: that one may happen inside a graph capture.
    Raises: TilusError when the cubin does not fit the device, lacks the kernel, or the shared memory is too much.
    """
    if dynamic_shared_nbytes > device.max_shared_nbytes:
        raise TilusError(
            f"kernel {name!r} needs {dynamic_shared_nbytes} bytes of dynamic shared memory, "
            f"{device.name} has {device.max_shared_nbytes} a block",
            hint="use smaller tiles or fewer pipeline stages",
        )
    with device.active():
        library = call("cuLibraryLoadData", cubin, None, None, 0, None, None, 0)
        handle = call("cuLibraryGetKernel", library, name.encode())
        call("cuKernelGetFunction", handle)
        if dynamic_shared_nbytes:
            attribute = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuKernelSetAttribute", attribute, dynamic_shared_nbytes, handle, call("cuDeviceGet", device.index))
    return Kernel(name, int(handle), device, dynamic_shared_nbytes)


def parameter_nbytes(kernel: Kernel) -> list[int]:
    """The sizes of the kernel's parameters, as recorded in its cubin."""
    bindings = driver()
    sizes: list[int] = []
    handle = bindings.CUkernel(kernel.handle)
    while True:
        status, _offset, nbytes = bindings.cuKernelGetParamInfo(handle, len(sizes))
        if status == bindings.CUresult.CUDA_ERROR_INVALID_VALUE:  # past the last one
            return sizes
        if status != bindings.CUresult.CUDA_SUCCESS:
            raise error_of(bindings, "cuKernelGetParamInfo", status)
        sizes.append(nbytes)


def encode_tensor_map(placed: PlacedMap) -> bytes:
    """The 128 bytes by which TMA finds boxes of a tensor; elements outside of it are zeros. Values are not interpreted.

    Raises: TilusError when the driver refuses the map.
    """
    bindings = driver()
    word, long = bindings.cuuint32_t, bindings.cuuint64_t
    encoded = call(
        "cuTensorMapEncodeTiled",
        getattr(bindings.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_UINT{8 * placed.element_nbytes}"),
        len(placed.shape),
        placed.address,
        [long(extent) for extent in placed.shape],
        [long(stride) for stride in placed.strides_nbytes] or [long(0)],  # of rank 1: the driver refuses a null pointer
        [word(extent) for extent in placed.box],
        [word(1) for _ in placed.box],
        bindings.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(bindings.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{_SWIZZLES[placed.swizzle_nbytes]}"),
        bindings.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        bindings.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return b"".join(int(part).to_bytes(8, "little") for part in encoded.opaque)


_SWIZZLES = {0: "NONE", 32: "32B", 64: "64B", 128: "128B"}

_stream_of_torch: Callable[[int], int] | None = None


def current_stream(device_index: int) -> int:
    """The raw handle of the caller's current stream: torch's when torch is loaded, else the default stream (0)."""
    if _stream_of_torch is not None:
        return _stream_of_torch(device_index)
    torch = sys.modules.get("torch")
    return _adopt_torch(torch)(device_index) if torch is not None else 0


def _adopt_torch(torch: Any) -> Callable[[int], int]:
    """Keep torch's stream getter. The private one costs 0.1 us, the public one builds an object first."""
    global _stream_of_torch
    if getattr(torch, "cuda", None) is None:  # torch is half-way through its own import: ask again next time
        return _default_stream
    if torch.version.cuda is None:
        getter = _default_stream
    else:
        getter = getattr(torch._C, "_cuda_getCurrentRawStream", None) or _public_torch_stream
    _stream_of_torch = getter
    return getter


def _public_torch_stream(device_index: int) -> int:
    return sys.modules["torch"].cuda.current_stream(device_index).cuda_stream


def _default_stream(device_index: int) -> int:
    return 0


def synchronize(stream: int = 0) -> None:
    """Wait for everything issued to `stream` so far, and raise what went wrong in it."""
    call("cuStreamSynchronize", stream)


class Event:
    """A point in a stream, for timing and for ordering streams."""

    def __init__(self) -> None:
        self.handle = int(call("cuEventCreate", 0))

    def record(self, stream: int = 0) -> None:
        call("cuEventRecord", self.handle, stream)

    def synchronize(self) -> None:
        call("cuEventSynchronize", self.handle)

    def elapsed_ms(self, end: Event) -> float:
        """Milliseconds from this event to `end`; both must have happened."""
        return call("cuEventElapsedTime", self.handle, end.handle)

    def __del__(self) -> None:
        if hasattr(self, "handle") and not sys.is_finalizing():
            driver().cuEventDestroy(self.handle)


def order_after(stream: int, producer: int) -> None:
    """Let `stream` wait for what was issued to the stream `producer` so far, without blocking the host."""
    if stream == producer:
        return
    event = Event()
    event.record(producer)
    call("cuStreamWaitEvent", stream, event.handle, 0)


def measure_ms(run: Callable[[], object], *, repeats: int, stream: int = 0) -> Sequence[float]:
    """Device times of `repeats` calls of `run`, each between two events in `stream`. Synchronises once, at the end."""
    events = [(Event(), Event()) for _ in range(repeats)]
    for start, end in events:
        start.record(stream)
        run()
        end.record(stream)
    synchronize(stream)
    return [start.elapsed_ms(end) for start, end in events]
