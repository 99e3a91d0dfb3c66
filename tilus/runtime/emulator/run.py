"""Launching a kernel on the emulator: arguments, memory, waves of blocks, results."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.errors import TilusError
from tilus.ptx.module import Instr, Kernel, Module, Param
from tilus.ptx.parser import parse_source
from tilus.ptx.printer import print_module
from tilus.runtime.emulator.machine import WARP, Machine
from tilus.runtime.emulator.memory import access_nbytes
from tilus.runtime.emulator.memory_space import MemorySpace
from tilus.runtime.emulator.program import Program, load_program
from tilus.runtime.emulator.schedule import Scheduler
from tilus.runtime.emulator.stats import Profile, Stats

GLOBAL_BASE = 0x7F_4000_0000_00
_GLOBAL_PAGE = 256
_SHADOW_NBYTES = 128 << 20

Argument = int | float | npt.NDArray[Any]


@dataclass(frozen=True)
class Result:
    """The report of one launch; results proper are in the argument arrays."""

    stats: Stats


def run_kernel(
    ptx: str | Module,
    kernel_name: str | None,
    grid: tuple[int, int, int],
    args: Sequence[Argument],
    *,
    dynamic_shared_nbytes: int = 0,
    num_threads: int | None = None,
    seed: int | None = 0,
    max_lanes: int = 8192,
    max_blocks: int = 10_000_000,
    profile: bool = False,
) -> Result:
    """Execute one kernel's PTX on numpy, checking everything that can be checked.

    ptx: text or a module (which is printed first: the text is what runs). kernel_name: None for the only kernel.
    args: one per parameter; a C-contiguous array for a pointer (one allocation, written back when the kernel ends),
    a number for a scalar. num_threads: block size when the kernel does not say `.reqntid`. seed: of the random
    schedule; None runs all warps in lockstep, which is fastest. max_lanes: threads that run as one numpy axis.
    max_blocks: basic blocks to execute before the kernel counts as stuck. profile: count bank conflicts
    and sectors, too.

    Raises: EmulatorError (RaceError, DeadlockError) for what the kernel does wrong; TilusError for a bad launch.
    """
    source = parse_source(ptx if isinstance(ptx, str) else print_module(ptx))
    program = load_program(source, kernel_name)
    kernel = program.kernel
    threads = _block_size(kernel, num_threads)
    _check_shared(source.module, kernel, dynamic_shared_nbytes)
    memory, params = _load_arguments(kernel, args)
    granules = _granules(program)
    total = grid[0] * grid[1] * grid[2]
    lanes_per_block = -(-threads // WARP) * WARP
    shared_nbytes = dynamic_shared_nbytes + sum(array.nbytes for array in kernel.shared)
    shadow_nbytes = (shared_nbytes // granules[0] + 64) * 8 * (lanes_per_block // WARP + 1)
    slots = max(1, min(total, max_lanes // lanes_per_block, _SHADOW_NBYTES // shadow_nbytes))
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        machine = Machine(program, memory, params, grid, threads, slots, dynamic_shared_nbytes, granules, rng)
        machine.profile = Profile() if profile else None
        scheduler = Scheduler(machine, interleave=seed is not None, max_blocks=max_blocks)
        order = np.arange(total) if seed is None else rng.permutation(total)
        for first in range(0, total, slots):
            machine.start(order[first : first + slots])
            scheduler.run()
    _write_back(memory, args)
    return Result(_stats(program, scheduler, machine.profile))


def _block_size(kernel: Kernel, num_threads: int | None) -> int:
    if num_threads is None and kernel.num_threads == 0:
        raise TilusError(f"kernel {kernel.name!r} does not fix its block size", hint="pass num_threads=")
    threads = kernel.num_threads if num_threads is None else num_threads
    if not 1 <= threads <= 1024 or (kernel.num_threads and threads != kernel.num_threads):
        expected = kernel.num_threads or "1 to 1024"
        raise TilusError(f"kernel {kernel.name!r} launched with {threads} threads a block, expected {expected}")
    return threads


def _check_shared(module: Module, kernel: Kernel, dynamic_nbytes: int) -> None:
    static = sum(array.nbytes for array in kernel.shared)
    limit = module.target.max_shared_nbytes
    if static > 48 * 1024 or static + dynamic_nbytes > limit:
        raise TilusError(
            f"kernel {kernel.name!r} needs {static} bytes of static and {dynamic_nbytes} of launch-sized shared memory,"
            f" expected at most {48 * 1024} static and {limit} in all on {module.target}"
        )


def _load_arguments(kernel: Kernel, args: Sequence[Argument]) -> tuple[MemorySpace, bytes]:
    """Global memory with the arrays in it, and the bytes of the parameter space."""
    if len(args) != len(kernel.params):
        names = ", ".join(param.name for param in kernel.params)
        raise TilusError(f"kernel {kernel.name!r} got {len(args)} arguments, expected {len(kernel.params)}: {names}")
    arrays = _distinct_arrays(zip(kernel.params, args, strict=True))
    memory = MemorySpace(GLOBAL_BASE, _GLOBAL_PAGE, [(name, array.nbytes, _GLOBAL_PAGE) for name, array in arrays])
    for index, (_, array) in enumerate(arrays):
        memory.bytes_of(index)[:] = array.reshape(-1).view(np.uint8)
    params = bytearray()
    for param, offset, value in zip(kernel.params, param_offsets(kernel), args, strict=True):
        params.extend(bytes(offset - len(params)))
        if isinstance(value, np.ndarray):
            address = next(memory.address_of(i) for i, (_, array) in enumerate(arrays) if array is value)
            params += struct.pack("<Q", address)
        else:
            params += _scalar_bytes(param, value)
    return memory, bytes(params)


def param_offsets(kernel: Kernel) -> list[int]:
    """Byte offset of each parameter in the parameter space: natural alignment, in order."""
    offsets: list[int] = []
    cursor = 0
    for param in kernel.params:
        size = int(param.type[1:]) // 8
        align = param.align or size
        cursor = -(-cursor // align) * align
        offsets.append(cursor)
        cursor += size * (param.count or 1)
    return offsets


def _distinct_arrays(args: Iterable[tuple[Param, Argument]]) -> list[tuple[str, npt.NDArray[Any]]]:
    """The arrays among the arguments, each once, named after the first parameter that takes it."""
    arrays: list[tuple[str, npt.NDArray[Any]]] = []
    for param, value in args:
        if not isinstance(value, np.ndarray):
            continue
        if param.type not in ("u64", "b64", "s64") or param.count is not None:
            raise TilusError(f"parameter {param.name!r} of type .{param.type} got an array, expected a number")
        if not value.flags.c_contiguous:
            raise TilusError(
                f"argument {param.name!r} has strides {value.strides}, expected a C-contiguous array",
                hint="pass numpy.ascontiguousarray(...)",
            )
        if any(value is other for _, other in arrays):
            continue
        for name, other in arrays:
            if np.may_share_memory(value, other):
                raise TilusError(f"arguments {param.name!r} and {name!r} overlap, expected the same or separate arrays")
        arrays.append((param.name, value))
    return arrays


def _scalar_bytes(param: Param, value: float) -> bytes:
    kind, nbytes = param.type[0], int(param.type[1:]) // 8
    if param.count is not None:
        raise TilusError(f"parameter {param.name!r} is an array of {param.count} .{param.type}, got {value!r}")
    if kind == "f":
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[nbytes], value)
    low, high = (-(1 << (nbytes * 8 - 1)), 1 << (nbytes * 8))
    number = int(value)
    if number != value or not low <= number < high:
        raise TilusError(f"parameter {param.name!r} of type .{param.type} got {value!r}, expected an integer in range")
    return (number & (high - 1)).to_bytes(nbytes, "little")


def _write_back(memory: MemorySpace, args: Sequence[Argument]) -> None:
    index = 0
    seen: list[npt.NDArray[Any]] = []
    for value in args:
        if not isinstance(value, np.ndarray) or any(value is other for other in seen):
            continue
        seen.append(value)
        new = memory.bytes_of(index)
        old = value.reshape(-1).view(np.uint8)
        if value.flags.writeable:
            old[:] = new
        elif not np.array_equal(old, new):
            raise TilusError(f"the kernel writes to argument array {len(seen)}, which is read-only")
        index += 1


def _granules(program: Program) -> tuple[int, int]:
    """The smallest number of bytes that any instruction accesses in (shared, global) memory; 16 when none does."""
    shared, globals_ = 16, 16
    for instr in program.instrs:
        spaces, nbytes = access_nbytes(instr)
        shared = min(shared, nbytes) if "shared" in spaces else shared
        globals_ = min(globals_, nbytes) if "global" in spaces else globals_
    return shared, globals_


def _stats(program: Program, scheduler: Scheduler, profile: Profile | None) -> Stats:
    counts: Counter[str] = Counter()
    for start in program.leaders:
        for pc in range(start, program.block_end(start)):
            instr: Instr = program.instrs[pc]
            if runs := int(scheduler.warp_counts[start]):
                counts[instr.opcode] += runs
    if profile is None:
        return Stats(counts)
    return Stats(counts, profile.sites(program, shared=True), profile.sites(program, shared=False))
