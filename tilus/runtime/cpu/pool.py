"""The library of threads that all kernels share (pool.c), and one launch of a kernel on it."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tilus.errors import TilusError
from tilus.ir.expr import Var
from tilus.runtime.cpu import build

# `struct launch` in pool.c: what stays the same, then the grid and a slot for each argument.
_FIXED, _GRID, _SLOT_NBYTES = struct.Struct("=Qq"), "=iii4x", 8
_FORMATS = {"int": "q", "uint": "Q", "float": "d", "bool": "?7x"}  # by the kind of a parameter's type


@functools.cache
def library() -> ctypes.CDLL:
    """The pool of this process; its threads start with the first launch that needs them. Raises: as `build.load`."""
    loaded = build.load(Path(__file__).with_name("pool.c").read_text())
    loaded.tilus_launch.argtypes = [ctypes.c_size_t]
    loaded.tilus_launch.restype = None
    loaded.tilus_launch_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.tilus_launch_all.restype = None
    return loaded


def run_all(launches: Sequence[ctypes.Array[ctypes.c_char]]) -> Callable[[], None]:
    """A function that runs launches, from `Launcher.last_launch`, one after the other in one call. It keeps them alive."""
    kept = tuple(launches)
    addresses = (ctypes.c_void_p * len(kept))(*map(ctypes.addressof, kept))
    run = library().tilus_launch_all

    def run_kept() -> None:
        run(addresses, len(kept))

    return run_kept


class _ThreadState(threading.local):
    """The launch that one thread fills in. `threading.local` calls `__init__` again in every new thread."""

    def __init__(self, launcher: Launcher) -> None:
        nbytes = _FIXED.size + struct.calcsize(_GRID) + _SLOT_NBYTES * len(launcher.parameters)
        self.buffer = ctypes.create_string_buffer(nbytes)
        self.address = ctypes.addressof(self.buffer)
        _FIXED.pack_into(self.buffer, 0, launcher.blocks, launcher.num_threads)


class Launcher:
    """Launches the function `tilus_blocks` of a kernel's library with values in the order of `parameters`.

    parameters: integers and addresses are passed in 64 bits, floats as doubles, whatever the width of their type.
    num_threads: how many threads run the blocks, the calling one among them.

    Raises: as `build.load` when the pool cannot be built.
    """

    def __init__(self, name: str, kernel: ctypes.CDLL, parameters: Sequence[Var], num_threads: int) -> None:
        self.name = name
        self.parameters = tuple(parameters)
        self.num_threads = num_threads
        self.blocks = ctypes.cast(kernel.tilus_blocks, ctypes.c_void_p).value  # ctypes never unloads a library
        self._run = library().tilus_launch
        self._pack_into = struct.Struct(_GRID + "".join(_FORMATS[var.dtype.kind] for var in parameters)).pack_into
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

    def last_launch(self) -> ctypes.Array[ctypes.c_char]:
        """A copy of this thread's latest launch, for `run_all`."""
        buffer = self._thread.buffer
        return type(buffer).from_buffer_copy(buffer)

    def _explain(self, grid: tuple[int, int, int], values: Sequence[Any], reason: str) -> TilusError:
        if len(values) != len(self.parameters):
            return TilusError(f"kernel {self.name!r} got {len(values)} arguments, expected {len(self.parameters)}")
        for var, value in zip(self.parameters, values):
            try:
                struct.pack("=" + _FORMATS[var.dtype.kind], value)
            except (struct.error, OverflowError, TypeError):
                return TilusError(
                    f"argument {var.name} of kernel {self.name!r} is {value!r}, expected a value of {var.dtype}"
                )
        return TilusError(f"grid of kernel {self.name!r} is {grid}, expected 0 to {2**31 - 1} in each axis: {reason}")
