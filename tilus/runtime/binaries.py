"""From a specialisation to machine code, and to what a launch must know of it; without translating the kernel where it has been
compiled before.

Python's part of a compile takes longer than the assembler's, and machine code is found by the text that it is made of (`cache`,
`cpu.build`). So a compile also leaves an entry under all that went into it (`specialization_key`), which says which machine code
it came to and how that is launched. Kernels that are not of tilus have no entry: each process translates them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilus import config
from tilus.codegen.tensor_map import TensorMap
from tilus.compiler import Compiled, compile_for_cpu, compile_function
from tilus.ir.function import Function, TensorParam
from tilus.ir.stmt import Seq
from tilus.ir.tensor import GlobalTensor
from tilus.ir.visit import instructions
from tilus.ptx import assembler
from tilus.ptx.assembler import SpillError
from tilus.runtime import cache
from tilus.runtime.cpu import build as native
from tilus.runtime.cpu import features, toolchain
from tilus.runtime.specialization_key import key
from tilus.target import Target

if TYPE_CHECKING:
    from tilus.lang.kernel import Specialization

MAX_KERNELS = 1024  # that are kept ready in memory

_FORMAT = b"tilus-binary-1"  # part of the key and of the checksum, so that entries of another layout are never read
_DIGEST_NBYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class GpuBinary:
    """interface: the function without its body. dynamic_nbytes: of shared memory. waits: whether it may start while the kernel in
    front of it runs. code: the name of its entry in the cache of machine code."""

    interface: Function
    kernel_name: str
    tensor_maps: tuple[TensorMap, ...]
    dynamic_nbytes: int
    waits: bool
    code: str


@dataclass(frozen=True, eq=False)
class CpuBinary:
    """interface: the function without its body. written: by tensor parameter, whether the kernel writes to it. code: the name of
    its entry in the cache of native code."""

    interface: Function
    written: tuple[bool, ...]
    code: str


@dataclass(frozen=True)
class _Spilled:
    """What is kept of a kernel whose registers did not suffice: the assembler's words."""

    message: str
    hint: str | None


@functools.lru_cache(maxsize=MAX_KERNELS)
def on_gpu(specialization: Specialization, target: Target) -> tuple[GpuBinary, bytes]:
    """A kernel for GPUs, and its machine code, from the disk where possible.

    Raises: TilusError for a mistake in the kernel, SpillError where registers do not suffice.
    """
    return find_on_gpu(specialization, target) or _compile_for_gpu(specialization, target)


def find_on_gpu(specialization: Specialization, target: Target) -> tuple[GpuBinary, bytes] | None:
    """What has been compiled before. Raises: SpillError where registers did not suffice."""
    found = _read(_gpu_entry(specialization, target))
    if isinstance(found, _Spilled):
        raise SpillError(found.message, hint=found.hint)
    if not isinstance(found, GpuBinary):
        return None
    cubin = cache.load(cache.path_of(found.code), assembler.find_assembler())
    return None if cubin is None else (found, cubin.cubin)


def _compile_for_gpu(specialization: Specialization, target: Target) -> tuple[GpuBinary, bytes]:
    entry = _gpu_entry(specialization, target)
    compiled = compile_function(specialization.function, target)
    try:
        cubin = cache.assemble(compiled.ptx, target)
    except SpillError as error:
        _write(entry, _Spilled(error.message, error.hint))
        raise
    lowered = compiled.lowered
    binary = GpuBinary(
        _interface(specialization.function),
        compiled.kernel_name,
        tuple(lowered.tensor_maps),
        lowered.shared_nbytes if lowered.dynamic_shared else 0,
        lowered.waits_for_kernels,
        cache.key(compiled.ptx, target, cubin.assembler, ()),
    )
    _write(entry, binary)
    return binary, cubin.cubin


@functools.lru_cache(maxsize=MAX_KERNELS)
def on_cpu(specialization: Specialization) -> tuple[CpuBinary, Path]:
    """A kernel for this machine's processor, and its library, from the disk where possible.

    Raises: TilusError for a mistake in the kernel, or without a C compiler.
    """
    found = find_on_cpu(specialization)
    if found is None:
        function = specialization.function
        library = native.build(compile_for_cpu(function, features.host_target()))
        written = tuple(_is_written(function, p) for p in function.params if isinstance(p, TensorParam))
        binary = CpuBinary(_interface(function), written, library.stem)
        _write(_cpu_entry(specialization), binary)
        found = binary, library
    return found


def find_on_cpu(specialization: Specialization) -> tuple[CpuBinary, Path] | None:
    """What has been compiled before."""
    binary = _read(_cpu_entry(specialization))
    if not isinstance(binary, CpuBinary):
        return None
    library = native.find(binary.code, features.host_cpu(toolchain.find_compiler()))
    return None if library is None else (binary, library)


def build(function: Function, target: Target) -> tuple[Compiled, bytes]:
    """Compile and assemble a function, the latter from the disk where possible."""
    compiled = compile_function(function, target)
    return compiled, cache.assemble(compiled.ptx, target).cubin


def has_entry(specialization: Specialization) -> bool:
    """Whether a compile in one process saves one in another."""
    return config.kernel_index() and key(specialization, ()) is not None


def _interface(function: Function) -> Function:
    return replace(function, body=Seq(()))


def _is_written(function: Function, param: TensorParam) -> bool:
    writes = (tensor for stmt in instructions(function.body) for tensor in stmt.inst.effects().writes)
    return any(isinstance(tensor, GlobalTensor) and tensor.base is param.tensor.base for tensor in writes)


def _gpu_entry(specialization: Specialization, target: Target) -> Path | None:
    return _entry(specialization, (target.name, assembler.find_assembler().version))


def _cpu_entry(specialization: Specialization) -> Path | None:
    compiler = toolchain.find_compiler()
    return _entry(specialization, ("cpu", native.key("", compiler, features.host_cpu(compiler))))


def _entry(specialization: Specialization, tools: Iterable[str]) -> Path | None:
    """Where the entry is or would be. None where there is none: a dump wants to see every stage, too."""
    if not config.kernel_index() or config.dump_dir() is not None:
        return None
    name = key(specialization, (_FORMAT.decode(), *tools))
    return None if name is None else config.cache_dir() / "kernels" / name


def _read(path: Path | None) -> Any:
    """None when there is no entry, or a damaged one. Whoever can write to the directory can also replace machine code in it."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, payload = data[:_DIGEST_NBYTES], data[_DIGEST_NBYTES:]
    return pickle.loads(payload) if hashlib.sha256(_FORMAT + payload).digest() == checksum else None


def _write(path: Path | None, binary: GpuBinary | CpuBinary | _Spilled) -> None:
    if path is None:
        return
    payload = pickle.dumps(binary)
    with contextlib.suppress(OSError):  # that of the machine code has warned about this directory
        cache.write_atomically(path, hashlib.sha256(_FORMAT + payload).digest() + payload)
