"""Prepares launches: a checked call becomes a function that runs its kernel on one of the devices."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tilus import config
from tilus.codegen.tensor_map import PlacedMap, TensorMap
from tilus.compiler import compile_function
from tilus.dtypes import DataType, boolean
from tilus.errors import TilusError
from tilus.ir.expr import Expr, Number, Var, evaluate, walk
from tilus.ir.function import Function, ScalarParam, TensorParam
from tilus.runtime import ahead, binaries
from tilus.runtime.capture import graph_in_capture, refused_in_capture
from tilus.runtime.launch_times import Run, watched
from tilus.runtime.tensor_maps import EncodedMaps, KernelMaps
from tilus.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from tilus.lang.arguments import Array
    from tilus.lang.binding import Call
    from tilus.lang.kernel import Specialization
    from tilus.runtime.binaries import GpuBinary
    from tilus.runtime.cuda import Device
    from tilus.runtime.launch import Launcher

Grid = tuple[int, int, int]


def prepare(call: Call) -> Run:
    """A launch of this call's kernel: `run(pointers, scalars, tensors)` with the arguments of a call with the same key.

    Raises: TilusError when the kernel cannot be compiled or the device cannot run these arguments.
    """
    device, name = _device(call), function_name(call)
    if ahead.is_dry():
        if device in ("cpu", "cuda"):  # the others compile nothing that is kept
            ahead.note(call.specialization, _gpu(call).target if device == "cuda" else None)
        return _nothing
    ways = {"reference": _reference, "emulator": _emulator, "cpu": _cpu, "cuda": _cuda}
    run = ways[device](call)
    if device != "cpu":
        run = refused_in_capture(name, device, run)
    return watched(name, device, run)


def _device(call: Call) -> str:
    on_gpu = any(array is not None and array.device >= 0 for array in call.arrays)
    found = place(call.device, on_gpu)
    if on_gpu and found != "cuda":
        raise TilusError(
            f"{function_name(call)}: its arguments are on a GPU, the device asked for is {found}",
            hint="move them to the CPU, or use device 'cuda'",
        )
    return found


def place(asked: str | None, on_gpu: bool) -> str:
    """Where a kernel runs: the device asked for, else TILUS_DEVICE, else where its arguments are."""
    wanted = asked or config.device()
    if wanted != "auto":
        return wanted
    return "cuda" if on_gpu else _cpu_or_reference()


def default_device() -> str:
    """Where kernels run by default when their arguments are in the memory of the CPU: `cpu`, or what TILUS_DEVICE says, or
    `reference`, with a warning, where no C compiler is found.

    Raises: TilusError for a bad setting.
    """
    return place(None, on_gpu=False)


@functools.cache
def _cpu_or_reference() -> str:
    """Where arrays on the CPU go by default; says once why that is slow."""
    from tilus.runtime.cpu import pool, toolchain

    config.cc()  # a bad setting is a mistake, not a machine without a compiler
    try:
        pool.library()  # a compiler that cannot build it, for want of its headers, is none
    except TilusError as error:
        warnings.warn(
            f"kernels run on the reference, which is slow: {error.message.splitlines()[0]}\n"
            f"  hint: {toolchain.INSTALL_HINT}; TILUS_DEVICE=reference silences this",
            stacklevel=2,
        )
        return "reference"
    return "cpu"


def function_name(call: Call) -> str:
    return call.specialization.kernel.signature.name


class _Values:
    """The values of a function's kernel parameters and grid, given the scalars of a call."""

    def __init__(self, function: Function, sizes: Mapping[Var, int]) -> None:
        self.function = function
        self.sizes = dict(sizes)
        self.scalar_vars = [param.var for param in function.params if isinstance(param, ScalarParam)]
        self.pointer_count = sum(isinstance(param, TensorParam) for param in function.params)
        self.order = function.kernel_params()[self.pointer_count :]
        self.fixed_grid: Grid | None = None
        if not any(var in self.scalar_vars for extent in function.grid for var in walk(extent)):
            self.fixed_grid = self.grid([0] * len(self.scalar_vars))

    def known(self, scalars: Sequence[Any]) -> dict[Expr, Number]:
        return {**self.sizes, **dict(zip(self.scalar_vars, scalars, strict=True))}

    def grid(self, scalars: Sequence[Any]) -> Grid:
        known = self.known(scalars)
        x, y, z = (*(int(evaluate(extent, known)) for extent in self.function.grid), 1, 1)[:3]
        grid = max(0, x), max(0, y), max(0, z)
        self.function.check_grid(grid)
        return grid

    def after_pointers(self, scalars: Sequence[Any]) -> list[Number]:
        known = self.known(scalars)
        return [known[var] for var in self.order]


def _present(call: Call, values: Sequence[Any]) -> list[Any]:
    return [value for value, array in zip(values, call.arrays, strict=True) if array is not None]


def as_numpy(tensor: Any, dtype: DataType) -> npt.NDArray[Any]:
    """A CPU tensor argument as a numpy array over the same memory, in the dtype's storage form."""
    storage = getattr(tensor, "storage", None)
    if hasattr(tensor, "stride") and storage is not None and not callable(storage):
        return as_numpy(storage, dtype)  # a PackedTensor: its bytes
    if isinstance(tensor, np.ndarray):
        array: npt.NDArray[Any] = tensor
    elif not hasattr(tensor, "data_ptr"):
        array = _over_foreign_memory(tensor, dtype)
    elif dtype.numpy is None or dtype == boolean:  # torch: types that numpy lacks travel as bits
        import torch

        array = tensor.detach().view(getattr(torch, "int16" if dtype.nbits == 16 else "uint8")).numpy()
    else:
        array = tensor.detach().numpy()
    wanted = dtype.numpy or dtype.storage
    return array if array.dtype == wanted or dtype.nbits < 8 else array.view(wanted)


def _over_foreign_memory(tensor: Any, dtype: DataType) -> npt.NDArray[Any]:
    """A numpy array over a CPU array of another library, which keeps its memory alive."""
    from tilus.runtime.arrays import array_argument

    found = array_argument(tensor)
    count = 0 if 0 in found.shape else 1 + sum((n - 1) * s for n, s in zip(found.shape, found.strides, strict=True))
    memory = _bytes_at(found.address, count * dtype.nbytes)
    strides_nbytes = [stride * dtype.nbytes for stride in found.strides]
    return np.ndarray(found.shape, dtype.numpy or dtype.storage, memory, strides=strides_nbytes)


def sizes_of(function: Function, arrays: Sequence[Array | None]) -> dict[Var, int]:
    """Values of a function's variables. Dims come first: the stride of a dim of extent 1 may be any number, also where the IR
    says that it is another dim's extent."""
    sizes: dict[Var, int] = {}
    tensors = [p.tensor for p in function.params if isinstance(p, TensorParam)]
    present = [a for a in arrays if a is not None]
    for tensor, array in zip(tensors, present, strict=True):
        sizes.update((e, n) for e, n in zip(tensor.shape, array.shape, strict=True) if isinstance(e, Var))
    for tensor, array in zip(tensors, present, strict=True):
        for stride, value in zip(tensor.strides, array.strides, strict=True):
            if isinstance(stride, Var):
                sizes.setdefault(stride, value)
    return sizes


def _reference(call: Call) -> Run:
    from tilus.runtime.reference import run_reference

    function = call.specialization.function
    values = _Values(function, sizes_of(function, call.arrays))
    dtypes = [param.tensor.dtype for param in function.params if isinstance(param, TensorParam)]
    names = [param.name for param in function.params if isinstance(param, TensorParam)]
    scalar_names = [param.name for param in function.params if isinstance(param, ScalarParam)]

    def run(pointers: Sequence[int], scalars: Sequence[Any], tensors: Sequence[Any]) -> None:
        args: dict[str, Any] = dict(zip(scalar_names, scalars, strict=True))
        for name, dtype, tensor in zip(names, dtypes, _present(call, tensors), strict=True):
            args[name] = as_numpy(tensor, dtype)
        run_reference(function, args, values.fixed_grid or values.grid(scalars))

    return run


def _emulator(call: Call) -> Run:
    from tilus.runtime.emulator import run_kernel

    function = call.specialization.function
    compiled = compile_function(function, DEFAULT_TARGET)
    values = _Values(function, sizes_of(function, call.arrays))
    spans = [_span_nbytes(array) for array in call.arrays if array is not None]
    dynamic = compiled.lowered.shared_nbytes if compiled.lowered.dynamic_shared else 0
    bases = [param.tensor.base for param in function.params if isinstance(param, TensorParam)]
    maps = [(bases.index(tensor_map.base), tensor_map) for tensor_map in compiled.lowered.tensor_maps]

    def run(pointers: Sequence[int], scalars: Sequence[Any], tensors: Sequence[Any]) -> None:
        grid = values.fixed_grid or values.grid(scalars)
        if 0 in grid:
            return
        present, known = _present(call, pointers), values.known(scalars)
        memory = [_bytes_at(p, n) for p, n in zip(present, spans, strict=True)]
        mapped = [_emulated_map(i, tensor_map.at(present[i], known), present[i]) for i, tensor_map in maps]
        args = [*memory, *values.after_pointers(scalars), *mapped]
        run_kernel(compiled.ptx, compiled.kernel_name, grid, args, dynamic_shared_nbytes=dynamic)

    return run


def _emulated_map(param: int, placed: PlacedMap, pointer: int) -> Any:
    """The emulator's tensor map of the tensor that is argument `param`, at `pointer`."""
    from tilus.runtime.emulator import TensorMap

    return TensorMap(
        param,
        placed.address - pointer,
        len(placed.shape),
        placed.element_nbytes,
        placed.swizzle_nbytes,
        placed.shape,
        placed.strides_nbytes,
        placed.box,
    )


def _span_nbytes(array: Array) -> int:
    """Bytes from the first to the last element of a strided tensor."""
    if 0 in array.shape:
        return 0
    elements = 1 + sum((extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True))
    return -(-elements * array.dtype.nbits // 8)


def _bytes_at(pointer: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The memory of a CPU tensor as bytes; the caller keeps the tensor alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))


def _gpu(call: Call) -> Device:
    """The one that its arguments are on, else the current one."""
    from tilus.runtime import cuda

    ordinals = [array.device for array in call.arrays if array is not None and array.device >= 0]
    return cuda.device(ordinals[0]) if ordinals else cuda.current_device()


@functools.lru_cache(maxsize=binaries.MAX_KERNELS)
def _gpu_launcher(
    specialization: Specialization, device: Device, early: bool
) -> tuple[GpuBinary, Launcher, KernelMaps]:
    """A kernel that is loaded once, for arguments of many sizes. early: it may start before its predecessor ends."""
    from tilus.runtime import cuda, launch

    binary, cubin = binaries.on_gpu(specialization, device.target)
    kernel = cuda.load_kernel(cubin, binary.kernel_name, device, binary.dynamic_nbytes)
    parameters = _parameters(binary.interface, binary.tensor_maps)
    programmatic = binary.waits and early
    launcher = launch.Launcher(kernel, parameters, binary.interface.num_threads, programmatic=programmatic)
    return binary, launcher, KernelMaps(binary.interface, binary.tensor_maps, cuda.encode_tensor_map)


def _cuda(call: Call) -> Run:

    device = _gpu(call)
    binary, launcher, maps = _gpu_launcher(call.specialization, device, config.dependent_launch())
    function, sizes = binary.interface, sizes_of(binary.interface, call.arrays)
    values = _Values(function, sizes)
    encoded = maps.of(_places(call), sizes)
    if all(array is None or array.device < 0 for array in call.arrays):
        return _staged(call, _submitting(call, functools.partial(launcher.launch_on, 0), values, encoded), device)
    return _submitting(call, launcher.launch, values, encoded)


def _submitting(call: Call, submit: Callable[..., None], values: _Values, maps: Sequence[EncodedMaps] = ()) -> Run:
    """Launches by `submit(grid x, grid y, grid z, *kernel parameters)`: generated, so that a launch decides nothing."""
    if maps and values.fixed_grid is not None and 0 in values.fixed_grid:
        return _nothing  # there may be no tensor map of an empty tensor
    scalar = {var: f"s[{index}]" for index, var in enumerate(values.scalar_vars)}
    arguments = [
        *(map(str, values.fixed_grid) if values.fixed_grid is not None else ["*grid(s)"]),
        *(f"p[{place}]" for place in _places(call)),
        *(scalar.get(var) or str(values.sizes[var]) for var in values.order),
        *(f"maps[{index}][{encoded.key}]" for index, encoded in enumerate(maps)),
    ]
    names = {"submit": submit, "grid": values.grid, "maps": tuple(maps)}
    return eval(f"lambda p, s, tensors: submit({', '.join(arguments)})", names)


def _nothing(pointers: Sequence[int], scalars: Sequence[Any], tensors: Sequence[Any]) -> None:
    """A launch of no blocks, or of a dry run."""


def _places(call: Call) -> list[int]:
    """Where the tensors that are present stand among the arguments."""
    return [index for index, array in enumerate(call.arrays) if array is not None]


def _cpu(call: Call) -> Run:
    from tilus.runtime.cpu import build, pool, threads

    binary, library = binaries.on_cpu(call.specialization)
    function = binary.interface
    launcher = pool.Launcher(function.name, build.load_built(library), function.kernel_params(), threads.num_threads())
    run = _submitting(call, launcher.launch, _Values(function, sizes_of(function, call.arrays)))
    present = _places(call)
    params = [param for param in function.params if isinstance(param, TensorParam)]
    places = zip(present, params, binary.written, strict=True)
    written = [(index, param) for index, param, is_written in places if is_written]

    def run_checked(pointers: Sequence[int], scalars: Sequence[Any], tensors: Sequence[Any]) -> None:
        for index, param in written:  # native code would not notice, or end the process where memory is mapped so
            tensor = tensors[index]
            array = tensor if param.tensor.dtype.nbits >= 8 else tensor.storage
            if isinstance(array, np.ndarray) and not array.flags.writeable:
                raise TilusError(f"{function.name}: the kernel writes to argument {param.name!r}, which is read-only")
        run(pointers, scalars, tensors)
        graph = graph_in_capture()
        if graph is not None:
            graph.record(launcher.last_launch(), tensors)

    return run_checked


def _staged(call: Call, submit: Run, device: Any) -> Run:
    """CPU arrays on a GPU: copy them there, run, copy them back."""
    from tilus.runtime.staging import staged

    dtypes = [array.dtype for array in call.arrays if array is not None]

    def run(pointers: Sequence[int], scalars: Sequence[Any], tensors: Sequence[Any]) -> None:
        device.make_current()
        arrays = [as_numpy(t, d) for t, d in zip(_present(call, tensors), dtypes, strict=True)]
        with staged(arrays) as addresses:
            places = dict(zip(_places(call), addresses, strict=True))
            submit([places.get(index, 0) for index in range(len(call.arrays))], scalars, tensors)

    return run


def _parameters(function: Function, maps: Sequence[TensorMap]) -> list[Any]:
    from tilus.runtime.launch import Parameter, ParameterKind

    pointers = {param.tensor.base for param in function.params if isinstance(param, TensorParam)}

    def kind(var: Var) -> ParameterKind:
        if var in pointers:
            return "ptr"
        if var.dtype.is_float:
            return "f32"
        return "i64" if var.dtype.nbits == 64 else "i32"

    ordinary = [Parameter(kind(var), var.name) for var in function.kernel_params()]
    return [*ordinary, *(Parameter("map", f"the tensor map of {m.name}") for m in maps)]
