"""Launching a kernel on the emulator: arguments, memory, waves of blocks, results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilus.errors import TilusError
from tilus.ptx.module import Instr, Kernel, Module
from tilus.ptx.parser import parse_source
from tilus.ptx.printer import print_module
from tilus.runtime.emulator.arguments import Argument, load_arguments
from tilus.runtime.emulator.clocks import MAX_CLUSTER
from tilus.runtime.emulator.machine import WARP, Machine
from tilus.runtime.emulator.memory import access_nbytes
from tilus.runtime.emulator.program import Program, load_program
from tilus.runtime.emulator.schedule import Scheduler
from tilus.runtime.emulator.stats import Profile, Stats
from tilus.runtime.emulator.tensor_map import TensorMap

_SHADOW_NBYTES = 128 << 20


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
    cluster: int | None = None,
) -> Result:
    """Execute one kernel's PTX on numpy, checking everything that can be checked.

    ptx: text or a module (which is printed first: the text is what runs). kernel_name: None for the only kernel.
    args: one per parameter; a C-contiguous array for a pointer (one allocation, together with the arrays it overlaps;
    written back when the kernel ends), a number for a scalar, a `TensorMap` for a tensor map. num_threads: block size
    when the kernel does not say `.reqntid`. seed: of the random schedule; None runs all warps in lockstep, which is
    fastest. max_lanes: threads that run as one numpy axis. max_blocks: basic blocks to execute before the kernel counts
    as stuck. profile: count bank conflicts and sectors, too. cluster: blocks along x that form a cluster; None: as the
    kernel says.

    Raises: EmulatorError (RaceError, DeadlockError) for what the kernel does wrong; TilusError for a bad launch.
    """
    source = parse_source(ptx if isinstance(ptx, str) else print_module(ptx))
    program = load_program(source, kernel_name)
    kernel = program.kernel
    threads = _block_size(kernel, num_threads)
    _check_shared(source.module, kernel, dynamic_shared_nbytes)
    arguments = load_arguments(kernel, args)
    memory = arguments.memory
    granules = _granules(program, args)
    total = grid[0] * grid[1] * grid[2]
    shared_nbytes = dynamic_shared_nbytes + sum(array.nbytes for array in kernel.shared)
    size = _cluster_size(kernel, cluster, grid)
    warps = -(-threads // WARP)
    shadow_nbytes = (shared_nbytes // granules[0] + 64) * 8 * (size * warps + 1)
    slots = min(total, max_lanes // (warps * WARP), _SHADOW_NBYTES // shadow_nbytes) // size * size or size
    rng = np.random.default_rng(seed or 0)
    with np.errstate(all="ignore"):
        machine = Machine(
            program, memory, arguments.params, grid, threads, slots, dynamic_shared_nbytes, granules, rng,
            random_times=seed is not None, cluster=size,
        )  # fmt: skip
        machine.profile = Profile() if profile else None
        scheduler = Scheduler(machine, interleave=seed is not None, max_blocks=max_blocks)
        order = np.arange(total // size) if seed is None else rng.permutation(total // size)
        blocks = (order[:, None] * size + np.arange(size)).reshape(-1)  # of a cluster next to each other
        for first in range(0, total, slots):
            machine.start(blocks[first : first + slots])
            scheduler.run()
    arguments.write_back()
    return Result(_stats(program, scheduler, machine.profile))


def _block_size(kernel: Kernel, num_threads: int | None) -> int:
    if num_threads is None and kernel.num_threads == 0:
        raise TilusError(f"kernel {kernel.name!r} does not fix its block size", hint="pass num_threads=")
    threads = kernel.num_threads if num_threads is None else num_threads
    if not 1 <= threads <= 1024 or (kernel.num_threads and threads != kernel.num_threads):
        expected = kernel.num_threads or "1 to 1024"
        raise TilusError(f"kernel {kernel.name!r} launched with {threads} threads a block, expected {expected}")
    return threads


def _cluster_size(kernel: Kernel, cluster: int | None, grid: tuple[int, int, int]) -> int:
    """Blocks of a cluster, which lie along x."""
    if cluster is None and kernel.explicit_cluster and kernel.cluster == 1:
        raise TilusError(f"kernel {kernel.name!r} needs a cluster size at its launch", hint="pass cluster=")
    size = kernel.cluster if cluster is None else cluster
    if not 1 <= size <= MAX_CLUSTER or (kernel.cluster > 1 and size != kernel.cluster):
        expected = kernel.cluster if kernel.cluster > 1 else f"1 to {MAX_CLUSTER}"
        raise TilusError(f"kernel {kernel.name!r} launched with clusters of {size} blocks, expected {expected}")
    if grid[0] % size:
        raise TilusError(f"grid of {grid[0]} blocks along x, expected a multiple of the cluster's {size}")
    return size


def _check_shared(module: Module, kernel: Kernel, dynamic_nbytes: int) -> None:
    static = sum(array.nbytes for array in kernel.shared)
    limit = module.target.max_shared_nbytes
    if static > 48 * 1024 or static + dynamic_nbytes > limit:
        raise TilusError(
            f"kernel {kernel.name!r} needs {static} bytes of static and {dynamic_nbytes} of launch-sized shared memory,"
            f" expected at most {48 * 1024} static and {limit} in all on {module.target}"
        )


def _granules(program: Program, args: Sequence[Argument]) -> tuple[int, int]:
    """The smallest number of bytes that any instruction accesses in (shared, global) memory; 16 when none does.

    A copy of a box may begin and end at any element of its tensor.
    """
    elements = [arg.element_nbytes for arg in args if isinstance(arg, TensorMap)]
    shared, globals_ = 16, min([16, *elements])
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
