"""The launch path: one prepacked argument buffer per kernel and thread, one `pack_into`, one driver call.

Built for generated code: the front end writes a small Python launcher for each specialisation that computes the grid
and the values and ends in `launcher.launch(grid_x, grid_y, grid_z, *values)`. Nothing is allocated on the device,
nothing synchronises, and the launch goes into the caller's current stream, so it can be captured into a CUDA graph.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tilus.errors import TilusError
from tilus.runtime import cuda

ParameterKind = Literal["ptr", "i32", "i64", "f32", "map"]

# Every argument has a slot of its own, of 8 bytes, or of 128 bytes for a tensor map. The driver copies from there.
_FORMATS: dict[ParameterKind, str] = {"ptr": "Q", "i32": "i4x", "i64": "q", "f32": "f4x", "map": "128s"}
_NBYTES: dict[ParameterKind, int] = {"ptr": 8, "i32": 4, "i64": 8, "f32": 4, "map": 128}
Argument = int | float | bytes

_MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter. `source` says in the user's words where its value comes from (`x`, `x.shape[0]`).

    kind: `ptr` (device address), `i32`, `i64`, `f32` (a Python float, rounded to the nearest f32) or `map` (the 128 bytes of a
    tensor map).
    """

    kind: ParameterKind
    source: str


class _ThreadState(threading.local):
    """What one thread overwrites at each launch. `threading.local` calls `__init__` again in every new thread."""

    def __init__(self, launcher: Launcher) -> None:
        if int(cuda.call("cuCtxGetCurrent")) == 0:  # a thread starts without a context; torch's choice stays
            launcher.kernel.device.make_current()
        slots = [struct.calcsize("<" + _FORMATS[parameter.kind]) for parameter in launcher.parameters]
        self.buffer = ctypes.create_string_buffer(max(sum(slots), 1))
        places = itertools.accumulate(slots[:-1], initial=ctypes.addressof(self.buffer))
        self.pointers = (ctypes.c_void_p * max(len(slots), 1))(*places)
        self.pointers_address = ctypes.addressof(self.pointers)
        self.config = launcher.new_config()


class Launcher:
    """Launches one loaded kernel with values in the order of `parameters`.

    num_threads: threads a block. programmatic: allow the kernel to start before its predecessor in the stream ends
    (programmatic dependent launch; the kernel must then contain `griddepcontrol.wait`).

    Raises: TilusError when `parameters` are not those of the cubin.
    """

    def __init__(
        self, kernel: cuda.Kernel, parameters: Sequence[Parameter], num_threads: int, *, programmatic: bool = False
    ) -> None:
        self.kernel = kernel
        self.parameters = tuple(parameters)
        self.num_threads = num_threads
        self.programmatic = programmatic
        self._check_parameters()
        bindings = cuda.driver()
        self._function = bindings.CUfunction(kernel.handle)
        self._launch_kernel = bindings.cuLaunchKernelEx
        self._success = bindings.CUresult.CUDA_SUCCESS
        self._pack_into = struct.Struct("<" + "".join(_FORMATS[p.kind] for p in self.parameters)).pack_into
        self._device_index = kernel.device.index
        self._several_devices = cuda.device_count() > 1
        self._thread = _ThreadState(self)

    def launch(self, grid_x: int, grid_y: int, grid_z: int, *values: Argument) -> None:
        """Launch into the caller's current stream. A grid without blocks does nothing.

        Raises: TilusError naming the parameter whose value does not fit, or what the driver says.
        """
        self.launch_on(cuda.current_stream(self._device_index), grid_x, grid_y, grid_z, *values)

    def launch_on(self, stream: int, grid_x: int, grid_y: int, grid_z: int, *values: Argument) -> None:
        """`launch` into the stream of that raw handle."""
        if not (grid_x and grid_y and grid_z):
            return
        if stream or not self._several_devices:
            self._submit(stream, grid_x, grid_y, grid_z, values)
        else:  # the default stream is the one of the current context
            with self.kernel.device.active():
                self._submit(stream, grid_x, grid_y, grid_z, values)

    def _submit(self, stream: int, grid_x: int, grid_y: int, grid_z: int, values: tuple[Argument, ...]) -> None:
        thread = self._thread
        config = thread.config
        try:
            self._pack_into(thread.buffer, 0, *values)
            config.gridDimX = grid_x
            config.gridDimY = grid_y
            config.gridDimZ = grid_z
        except (struct.error, OverflowError, TypeError) as error:
            raise self._explain((grid_x, grid_y, grid_z), values, str(error)) from error
        config.hStream = stream
        (status,) = self._launch_kernel(config, self._function, thread.pointers_address, 0)
        if status is not self._success:
            error = cuda.error_of(cuda.driver(), "cuLaunchKernelEx", status)
            raise self._explain((grid_x, grid_y, grid_z), values, error.message, error.hint)

    def new_config(self) -> Any:
        """A CUlaunchConfig with everything but grid and stream filled in."""
        bindings = cuda.driver()
        config = bindings.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = self.num_threads, 1, 1
        config.sharedMemBytes = self.kernel.dynamic_shared_nbytes
        if self.programmatic:
            attribute = bindings.CUlaunchAttribute()
            attribute.id = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        return config

    def _check_parameters(self) -> None:
        expected = cuda.parameter_nbytes(self.kernel)
        found = [_NBYTES[parameter.kind] for parameter in self.parameters]
        if found != expected:
            raise TilusError(
                f"parameters of kernel {self.kernel.name!r} do not match its cubin: "
                f"sizes {found} in bytes, expected {expected}"
            )

    def _explain(
        self, grid: tuple[int, int, int], values: Sequence[Any], reason: str, hint: str | None = None
    ) -> TilusError:
        """The error for a failed launch: the first value or grid size that does not fit, else the driver's reason."""
        name = self.kernel.name
        if len(values) != len(self.parameters):
            return TilusError(f"kernel {name!r} got {len(values)} arguments, expected {len(self.parameters)}")
        for parameter, value in zip(self.parameters, values):
            try:
                struct.pack("<" + _FORMATS[parameter.kind], value)
            except (struct.error, OverflowError, TypeError):
                return TilusError(
                    f"argument {parameter.source} of kernel {name!r} is {value!r}, expected a value of {parameter.kind}"
                )
        for axis, size, limit in zip("xyz", grid, _MAX_GRID):
            if not 0 <= size <= limit:
                return TilusError(f"grid of kernel {name!r} is {size} in {axis}, expected 0 to {limit}")
        return TilusError(
            f"cannot launch kernel {name!r} with grid {grid}, {self.num_threads} threads a block and "
            f"{self.kernel.dynamic_shared_nbytes} bytes of dynamic shared memory: {reason}",
            hint=hint,
        )
