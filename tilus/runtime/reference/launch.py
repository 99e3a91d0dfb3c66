"""Launches: a function is compiled once to closures, then its grid runs in chunks of blocks."""

from __future__ import annotations

import itertools
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tilus.ir.expr import BlockId, Expr, Var, walk
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Inst, Role
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.ir.visit import instructions
from tilus.ir.visit import walk as walk_statements
from tilus.runtime.reference.access import View
from tilus.runtime.reference.affine import Extents
from tilus.runtime.reference.arguments import bind
from tilus.runtime.reference.cluster import Cluster
from tilus.runtime.reference.control import Runner, compile_body
from tilus.runtime.reference.scalars import Compiled, compile_scalar
from tilus.runtime.reference.state import BlockState, TileType

# Large enough that numpy's loops, during which other threads run, outweigh Python's time between them.
MAX_CHUNK_NBYTES = 2 << 20


@dataclass(frozen=True)
class Program:
    """A compiled function.

    scalars: closures of the instructions' scalar operands, by id. fixed: tensors whose place and shape are the same for
    the whole launch. written: pointers that it writes through. ordered: blocks may talk to each other, so that chunks
    must not run side by side. alone: it has roles or barriers, or reaches other blocks, so that each block runs by
    itself. tiles: shape and numpy dtype of every tile. tile_nbytes: the largest tile of one block.
    """

    run: Runner
    num_threads: int
    scalars: Mapping[int, tuple[Expr, Compiled]]
    fixed: frozenset[GlobalTensor]
    written: frozenset[Var]
    ordered: bool
    alone: bool
    tiles: Mapping[RegisterTensor, TileType]
    tile_nbytes: int


_programs: weakref.WeakKeyDictionary[Function, Program] = weakref.WeakKeyDictionary()


def run_reference(
    fn: Function, args: Mapping[str, Any], grid: tuple[int, int, int], *, max_chunk_nbytes: int = MAX_CHUNK_NBYTES,
    max_threads: int | None = None,
) -> None:  # fmt: skip
    """Run all blocks of a grid; tensors in `args` that the kernel writes are changed in place.

    args: by parameter name, numpy arrays in the form that `arguments.bind` describes, or numbers.
    grid: number of blocks along x, y and z.
    max_chunk_nbytes: as many blocks run in lock step as keep the largest tile below this size (at least one).
    max_threads: how many chunks may run side by side; by default one per CPU that the process may use.

    Raises: TilusError for unfit arguments and for mistakes in the kernel, at the user's line.
    """
    fn.check_grid(grid)
    program = _programs.get(fn)
    if program is None:
        program = _programs[fn] = _compile(fn)
    binding = bind(fn, args, program.written)
    views: dict[GlobalTensor, View] = {}

    def run(chunk: tuple[Extents, Extents]) -> None:
        with np.errstate(all="ignore"):  # GPUs do not trap: inf and NaN are values
            first, extents = chunk
            if program.alone and fn.cluster > 1:
                x, y, z = first
                places = [(x * fn.cluster + rank, y, z) for rank in range(fn.cluster)]
                Cluster([BlockState(program, binding, views, grid, place, extents) for place in places]).run(
                    program.run
                )
            else:
                program.run(BlockState(program, binding, views, grid, first, extents))

    if program.alone:  # each block, or those of a cluster
        chunks = list(_chunks((grid[0] // fn.cluster, *grid[1:]), 1))
    else:
        chunks = list(_chunks(grid, max(1, max_chunk_nbytes // program.tile_nbytes)))
    threads = min(len(chunks), max_threads or _cpu_count())
    if threads <= 1 or program.ordered:
        for chunk in chunks:
            run(chunk)
    else:
        futures = [_pool(threads).submit(run, chunk) for chunk in chunks]
        wait(futures)
        for future in futures:
            future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "tilus-reference")


@cache
def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chunks(grid: Extents, max_blocks: int) -> Iterator[tuple[Extents, Extents]]:
    """First block and extents of each part of the grid; every part is a range of the block order (x slowest)."""
    if 0 in grid:
        return
    z = _even(grid[2], max_blocks)
    y = _even(grid[1], max_blocks // grid[2])
    x = _even(grid[0], max_blocks // (grid[2] * grid[1]))
    for first in itertools.product(range(0, grid[0], x), range(0, grid[1], y), range(0, grid[2], z)):
        yield first, (min(x, grid[0] - first[0]), min(y, grid[1] - first[1]), min(z, grid[2] - first[2]))


def _even(count: int, most: int) -> int:
    """The size, at most `most` (or 1), of the fewest and most equal parts of `count`."""
    parts = -(-count // max(1, most))
    return -(-count // parts)


def _compile(fn: Function) -> Program:
    scalars: dict[int, tuple[Expr, Compiled]] = {}
    tensors: dict[GlobalTensor, None] = {}
    written: set[Var] = set()
    tiles: dict[RegisterTensor, TileType] = {}
    ordered = False
    for statement in instructions(fn.body):
        inst = statement.inst
        for expr in inst.scalars:
            scalars.setdefault(id(expr), (expr, compile_scalar(expr)))
        effects = inst.effects()
        stores = {t for t in effects.writes if isinstance(t, GlobalTensor)}
        written.update(t.base for t in stores)
        # Reading and writing in one instruction is an atomic update; packed neighbours share bytes.
        ordered = ordered or bool(stores & set(effects.reads)) or any(t.dtype.nbits < 8 for t in stores)
        tensors.update((t, None) for t in (*inst.operands, *stores) if isinstance(t, GlobalTensor))
        for tile in (*inst.register_operands, *inst.register_results):
            tiles[tile] = tile.shape, tile.dtype.compute
    given = frozenset(fn.kernel_params())
    return Program(
        run=compile_body(fn.body),
        num_threads=fn.num_threads,
        scalars=scalars,
        fixed=frozenset(t for t in tensors if _is_fixed(t, given)),
        written=frozenset(written),
        ordered=ordered,
        alone=any(
            isinstance(s, Role) or (isinstance(s, Inst) and _meets_others(s.inst)) for s in walk_statements(fn.body)
        ),
        tiles=tiles,
        tile_nbytes=max([1, *(math.prod(shape) * dtype.itemsize for shape, dtype in tiles.values())]),
    )


def _meets_others(inst: Instruction) -> bool:
    """Whether it needs others, roles or blocks, that come to it at a time of their own."""
    effects = inst.effects()
    return bool(inst.arrivals()) or effects.remote or effects.cluster_barrier


def _is_fixed(tensor: GlobalTensor, given: frozenset[Var]) -> bool:
    """Whether the tensor's place and shape depend on nothing but parameters."""
    nodes = (node for expr in (*tensor.shape, *tensor.strides, tensor.offset) for node in walk(expr))
    return not any(isinstance(node, BlockId) or (isinstance(node, Var) and node not in given) for node in nodes)
