"""Builds libcuda_stub.c as a libcuda.so.1 and shows what it records, in processes that load it instead of a driver.

A process uses the stub when it starts with LD_LIBRARY_PATH naming the directory that `build` returned.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tilus.errors import TilusError
from tilus.runtime import cuda
from tilus.runtime.launch import Launcher, Parameter

SOURCE = Path(__file__).with_suffix(".c")
CUBIN = b"\x7fELF and the rest"  # the stub looks at no more than the magic number
PARAMETER_NBYTES = {"ptr": 8, "i32": 4, "i64": 8, "f32": 4, "map": 128}


def build(directory: Path) -> Path:
    """Compile the stub into `directory`, and return it."""
    flags = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, str(SOURCE), "-o", str(directory / "libcuda.so.1")], check=True)
    return directory


class Launch(ctypes.Structure):
    """`struct launch` of the stub."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("function", "stream", "context", "count")),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block")),
        ("shared", ctypes.c_uint32),
        ("attribute", ctypes.c_int),
        ("attribute_value", ctypes.c_int),
        ("args", ctypes.c_uint64 * 16),
        ("map", ctypes.c_uint64 * 16),
    ]


class Stub:
    """The stub that this process has loaded."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.set("stub_devices", 1)
        self.set("stub_delay_us", 0)
        self.expect_parameters(())
        self.library.stub_fail(b"", 0)

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, name).value = value

    def counter(self, name: str) -> int:
        return ctypes.c_int64.in_dll(self.library, name).value

    def expect_parameters(self, kinds: Sequence[str]) -> None:
        """What the stub's kernels take."""
        sizes = (ctypes.c_int * 16).in_dll(self.library, "stub_sizes")
        for index, kind in enumerate(kinds):
            sizes[index] = PARAMETER_NBYTES[kind]
        self.set("stub_params", len(kinds))

    def fail(self, function: str, code: int) -> None:
        """Let the next call of the C function fail."""
        self.library.stub_fail(function.encode(), code)

    @property
    def last(self) -> Launch:
        """The last launch of any thread."""
        return Launch.from_buffer_copy(Launch.in_dll(self.library, "stub_launch"))

    @property
    def own(self) -> Launch:
        """The last launch of the calling thread."""
        launch = Launch()
        self.library.stub_own_launch(ctypes.byref(launch))
        return launch

    def launcher(self, kinds: Sequence[Any], *, name: str = "k", shared: int = 0, **options: Any) -> Launcher:
        """A launcher of a kernel with such parameters, `arg0`, `arg1`, ..., and 128 threads a block."""
        self.expect_parameters(kinds)
        kernel = cuda.load_kernel(CUBIN, name, cuda.device(0), shared)
        return Launcher(kernel, [Parameter(kind, f"arg{i}") for i, kind in enumerate(kinds)], 128, **options)


def failure(action: Callable[[], object]) -> str:
    """The message of the TilusError that `action` raises."""
    try:
        action()
    except TilusError as error:
        return str(error)
    return "no error"
