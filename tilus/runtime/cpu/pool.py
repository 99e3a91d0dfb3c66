"""The library of threads that all kernels share (pool.c), and one launch of a kernel on it."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.runtime.cpu import build

# `struct launch` in pool.c: what stays the same, then the grid and a slot for each argument.
_FIXED, _GRID, _SLOT_NBYTES = struct.Struct("=Qq"), "=iii4x", 8


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter. dtype: None for a pointer; floats are passed as doubles, all others as 64-bit integers."""

    name: str
    dtype: DataType | None

    @property
    def format(self) -> str:
        """Of its slot, in the words of `struct`."""
        if self.dtype is None:
            return "Q"
        return {"uint": "Q", "int": "q", "float": "d", "bool": "?7x"}[self.dtype.kind]


@functools.cache
def library() -> ctypes.CDLL:
    """The pool of this process; its threads start with the first launch that needs them. Raises: as `build.load`."""
    loaded = build.load(Path(__file__).with_name("pool.c").read_text())
    loaded.tilus_launch.argtypes = [ctypes.c_size_t]
    loaded.tilus_launch.restype = None
    return loaded


class _ThreadState(threading.local):
    """The launch that one thread fills in. `threading.local` calls `__init__` again in every new thread."""

    def __init__(self, launcher: Launcher) -> None:
        nbytes = _FIXED.size + struct.calcsize(_GRID) + _SLOT_NBYTES * len(launcher.parameters)
        self.buffer = ctypes.create_string_buffer(nbytes)
        self.address = ctypes.addressof(self.buffer)
        _FIXED.pack_into(self.buffer, 0, launcher.blocks, launcher.num_threads)


class Launcher:
    """Launches the function `tilus_blocks` of a kernel's library with values in the order of `parameters`.

    num_threads: how many threads run the blocks, the calling one among them.

    Raises: as `build.load` when the pool cannot be built.
    """

    def __init__(self, name: str, kernel: ctypes.CDLL, parameters: Sequence[Parameter], num_threads: int) -> None:
        self.name = name
        self.parameters = tuple(parameters)
        self.num_threads = num_threads
        self.blocks = ctypes.cast(kernel.tilus_blocks, ctypes.c_void_p).value  # ctypes never unloads a library
        self._run = library().tilus_launch
        self._pack_into = struct.Struct(_GRID + "".join(parameter.format for parameter in parameters)).pack_into
        self._thread = _ThreadState(self)

    def launch(self, grid_x: int, grid_y: int, grid_z: int, *values: Any) -> None:
        """Run all blocks; returns when they are done. A grid without blocks does nothing.

        Other Python threads run meanwhile. Raises: TilusError naming the parameter whose value does not fit.
        """
        thread = self._thread
        try:
            self._pack_into(thread.buffer, _FIXED.size, grid_x, grid_y, grid_z, *values)
        except (struct.error, OverflowError, TypeError) as error:
            raise self._explain((grid_x, grid_y, grid_z), values, str(error)) from error
        self._run(thread.address)

    def _explain(self, grid: tuple[int, int, int], values: Sequence[Any], reason: str) -> TilusError:
        if len(values) != len(self.parameters):
            return TilusError(f"kernel {self.name!r} got {len(values)} arguments, expected {len(self.parameters)}")
        for parameter, value in zip(self.parameters, values):
            try:
                struct.pack("=" + parameter.format, value)
            except (struct.error, OverflowError, TypeError):
                expected = f"a value of {parameter.dtype}" if parameter.dtype else "an address"
                return TilusError(
                    f"argument {parameter.name} of kernel {self.name!r} is {value!r}, expected {expected}"
                )
        return TilusError(f"grid of kernel {self.name!r} is {grid}, expected 0 to {2**31 - 1} in each axis: {reason}")
