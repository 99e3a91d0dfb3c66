"""How an instruction accesses shared memory, as data: what is moved decides the width, the choice of a layout and the report.

The code generator asks a `SharedAccess` for its vectors or matrices, `layout_shared` for its cost under every candidate, and
the report for its conflicts. All three see the same object, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tilus.codegen.access import MAX_VECTOR_NBITS, shared_vector_size, unit_nbits
from tilus.codegen.matrix_forms import MATRIX_ROW_NBITS, MATRIX_ROWS, Matrices, matrix_forms
from tilus.dtypes import DataType
from tilus.ir.expr import Const, Expr
from tilus.ir.ranges import bounds, divisor
from tilus.ir.tensor import SharedTensor
from tilus.layout import RegisterLayout, SharedLayout
from tilus.layout.banks import BANK_NBYTES, NUM_BANKS, WARP_SIZE, wavefronts

PHASE_NBYTES = NUM_BANKS * BANK_NBYTES

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AccessCost:
    """What one execution of an access costs a block under some layout.

    nbytes: what a lane moves at once (16 for a row of a matrix). matrices: whether it moves by matrices. instructions: that
    warps issue. phases: wavefronts without any conflict. wavefronts: mean over all positions of the tile. worst: most of them.
    """

    nbytes: int
    matrices: bool
    instructions: int
    phases: int
    wavefronts: Fraction
    worst: int

    @property
    def total(self) -> Fraction:
        """Issue slots and cycles of the memory: instructions plus mean wavefronts."""
        return self.instructions + self.wavefronts

    @property
    def conflicts(self) -> Fraction:
        """Wavefronts beyond those that the size needs, in the mean; 0 for an access that is nowhere placed."""
        return max(Fraction(0), self.wavefronts - self.phases)

    @property
    def worst_conflicts(self) -> int:
        return max(0, self.worst - self.phases)


@dataclass(frozen=True, eq=False)
class _Moves:
    """How a tile moves under some layout: `size` elements and `nbytes` bytes a lane, `pieces` such accesses one after another.

    layout: of the elements that lanes address. active: which of the lanes [warps, lanes] act.
    """

    layout: RegisterLayout
    active: npt.NDArray[np.bool_]
    size: int
    nbytes: int
    pieces: int
    matrices: bool
    instructions: int
    phases: int

    def cost(self, counts: Sequence[tuple[int, int]]) -> AccessCost:
        """counts: (wavefronts, at how many positions)."""
        positions = sum(repeats for _, repeats in counts)
        mean = Fraction(sum(found * repeats for found, repeats in counts), max(1, positions))
        worst = max((found for found, _ in counts), default=0)
        return AccessCost(self.nbytes, self.matrices, self.instructions, self.phases, mean, worst)


@dataclass(frozen=True)
class SharedAccess:
    """One access of a tile to a shared tensor, whatever the tensor's layout.

    dtype, shape: of the tensor. layout: which thread moves which element of the tile; None when no thread does (wgmma, TMA).
    starts: for each dim of the tensor, the indices at which the tile may start. dims: the tensor dims that the tile's axes run
    along. writes: then only one of several owners of an element acts. by_matrices: whether ldmatrix (stmatrix when it writes)
    may do it. widest: most elements that a thread may move at once. least_nbytes: fewest bytes that it may (4 for cp.async).
    legal: the layouts that the instruction can work with; None for all.
    """

    dtype: DataType
    shape: tuple[int, ...]
    layout: RegisterLayout | None
    starts: tuple[range, ...]
    dims: tuple[int, ...]
    writes: bool = False
    by_matrices: bool = False
    widest: int = MAX_VECTOR_NBITS
    least_nbytes: int = 1
    legal: tuple[SharedLayout, ...] | None = None

    # How it is done under a layout.

    def vector_size(self, memory: SharedLayout) -> int:
        """Elements that a thread moves at once."""
        if self.layout is None:
            return 1
        return math.gcd(self.widest, shared_vector_size(memory, self.dtype, self.layout, self.starts, self.dims))

    def moves_whole_units(self, memory: SharedLayout) -> bool:
        """Whether vectors are whole bytes, and of sizes that the instruction has."""
        nbits = unit_nbits(self.dtype, self.vector_size(memory))
        return nbits % 8 == 0 and nbits // 8 >= self.least_nbytes

    def matrices(self, memory: SharedLayout) -> Matrices | None:
        """The tile as matrices, if all their rows are 16 aligned bytes of memory and lanes want what ldmatrix gives them."""
        if not self.by_matrices or self.layout is None:
            return None
        for form in matrix_forms(self.layout, self.dtype.nbits):
            size = shared_vector_size(memory, self.dtype, form.rows, self.starts, self.dims)
            if size * self.dtype.nbits == MATRIX_ROW_NBITS:
                return form
        return None

    # What it costs.

    def cost(self, memory: SharedLayout) -> AccessCost | None:
        """The cost of one execution by the whole block, over all positions; None when the access cannot work there."""
        if self.legal is not None and memory not in self.legal:
            return None
        if self.layout is None:
            return AccessCost(0, False, 0, 0, Fraction(0), 0)
        moves = self._moves(memory)
        return None if moves is None else moves.cost(self._count(memory, moves))

    def least_total(self, memory: SharedLayout) -> int | None:
        """The total of the cost if there were no conflicts; None when the access cannot work there."""
        if self.layout is None:
            return 0
        moves = self._moves(memory)
        return None if moves is None else moves.instructions + moves.phases

    def _moves(self, memory: SharedLayout) -> _Moves | None:
        matrices, nbits = self.matrices(memory), self.dtype.nbits
        if matrices is not None:
            active = self._active(matrices.rows).reshape(-1, MATRIX_ROWS)
            warps, row = int(active[:, 0].sum()), MATRIX_ROW_NBITS // nbits
            instructions, phases = warps * len(matrices.groups), warps * len(matrices.starts)
            return _Moves(matrices.rows, active, row, MATRIX_ROW_NBITS // 8, 1, True, instructions, phases)
        if self.layout is None or not self.moves_whole_units(memory):
            return None
        size = self.vector_size(memory)
        nbytes = unit_nbits(self.dtype, size) // 8
        pieces = size * nbits // (8 * nbytes)  # vectors of 3-, 5-, 6- and 7-bit types move in parts
        times = pieces * self.layout.num_locals // size
        active = self._active(self.layout)
        instructions = times * _any(active, WARP_SIZE)
        phases = times * _any(active, PHASE_NBYTES // max(BANK_NBYTES, nbytes))
        return _Moves(self.layout, active.reshape(-1, WARP_SIZE), size, nbytes, pieces, False, instructions, phases)

    def _count(self, memory: SharedLayout, moves: _Moves) -> list[tuple[int, int]]:
        """(wavefronts, how many positions) of classes of positions."""
        nbits = memory.table().reshape(-1) * self.dtype.nbits
        tile = self._flat(_table(moves.layout)[:, :: moves.size])  # [threads, accesses]
        unit = 8 * max(BANK_NBYTES, moves.nbytes)
        positions, repeats = self._positions(memory, unit)
        if len(positions) == 0:
            return []
        if len(positions) > 1:
            positions, repeats = _distinct(nbits, positions, repeats, tile.reshape(-1), unit)
        lanes = moves.active.shape[1]
        warps = tile.reshape(-1, lanes, tile.shape[1]).transpose(0, 2, 1)  # [warps, accesses, lanes]
        addresses = nbits[positions[:, None, None, None] + warps] // 8
        active = None if moves.active.all() else moves.active[:, None]
        found = np.zeros(len(positions), np.int64)
        for piece in range(moves.pieces):
            found += wavefronts(addresses + piece * moves.nbytes, moves.nbytes, active).sum(axis=(1, 2))
        return list(zip(found.tolist(), repeats.tolist(), strict=True))

    def _active(self, layout: RegisterLayout) -> npt.NDArray[np.bool_]:
        """Which threads act: of several that own the same elements, the first one writes."""
        threads = np.arange(layout.num_threads)
        active = np.ones(layout.num_threads, np.bool_)
        if self.writes:
            for term in layout.thread_terms:
                if term.dim is None:
                    active &= threads // term.stride % term.size == 0
        return active

    def _flat(self, index: Ints) -> Ints:
        """Tile indices [..., axes] as differences of row-major numbers of the tensor's elements."""
        return index @ np.array([math.prod(self.shape[d + 1 :]) for d in self.dims], np.int64)

    def _positions(self, memory: SharedLayout, unit: int) -> tuple[Ints, Ints]:
        """Row-major numbers of elements at which the tile may start, and how many places each stands for.

        Along a dim with one stride a step moves all addresses alike; if by a multiple of `unit` bits (and of the swizzle's
        period), it changes nothing that counts.
        """
        whole = math.lcm(unit, self.dtype.nbits) // self.dtype.nbits
        if memory.swizzle is not None:
            whole = math.lcm(whole, memory.swizzle.period)
        numbers, repeats = np.zeros(1, np.int64), np.ones(1, np.int64)
        for d, start in enumerate(self.starts):
            places, times = np.array(start, np.int64), np.ones(len(start), np.int64)
            if len(memory.terms[d]) == 1:
                keys = places * memory.terms[d][0].stride % whole
                _, first, times = np.unique(keys, return_index=True, return_counts=True)
                places = places[first]
            numbers = (numbers[:, None] + places * math.prod(self.shape[d + 1 :])).reshape(-1)
            repeats = (repeats[:, None] * times).reshape(-1)
        return numbers, repeats


def shared_access(
    tensor: SharedTensor, layout: RegisterLayout | None, offsets: Sequence[Expr], dims: Sequence[int],
    extents: Sequence[int], *, writes: bool = False, by_matrices: bool = False, widest: int = MAX_VECTOR_NBITS,
    least_nbytes: int = 1, legal: tuple[SharedLayout, ...] | None = None,
) -> SharedAccess:  # fmt: skip
    """The access of a tile of `extents` at `offsets` of a tensor.

    An offset that varies at run time takes every multiple of its known divisor, between its known bounds, at which the tile lies
    inside of the tensor.
    """
    tile = dict(zip(dims, extents, strict=True))
    starts = tuple(
        _starts(offset, extent - tile.get(d, 1))
        for d, (offset, extent) in enumerate(zip(offsets, tensor.shape, strict=True))
    )
    return SharedAccess(
        tensor.dtype, tensor.shape, layout, starts, tuple(dims), writes, by_matrices, widest, least_nbytes, legal
    )


def _starts(offset: Expr, last: int) -> range:
    if isinstance(offset, Const):
        return range(int(offset.value), min(int(offset.value), last) + 1)
    lower, upper = bounds(offset)
    step = divisor(offset)
    first = 0 if lower is None else max(0, lower)
    stop = (last if upper is None else min(last, upper)) + 1
    return range(-(-first // step) * step, stop, step) if step else range(min(1, stop))


def _any(active: npt.NDArray[np.bool_], lanes: int) -> int:
    """How many groups of neighbouring threads have an active one."""
    return int(active.reshape(-1, lanes).any(axis=1).sum())


@lru_cache(maxsize=64)
def _table(layout: RegisterLayout) -> Ints:
    """The table of a layout, which is asked for under every candidate."""
    return layout.table()


def _distinct(nbits: Ints, positions: Ints, repeats: Ints, tile: Ints, unit: int) -> tuple[Ints, Ints]:
    """One position for each pattern of addresses, and how many places have it; patterns that are whole units apart are one.

    nbits: bit address of every element. tile: what the access touches, relative to its position. A shift of all addresses by
    `unit` bits renames banks, so it leaves the number of wavefronts as it is.
    """
    first: dict[bytes, int] = {}
    total: dict[bytes, int] = {}
    for position, times in zip(positions.tolist(), repeats.tolist(), strict=True):
        pattern = nbits[position + tile]
        pattern -= pattern[0] // unit * unit
        key = pattern.tobytes()
        first.setdefault(key, position)
        total[key] = total.get(key, 0) + times
    return np.fromiter(first.values(), np.int64), np.fromiter(total.values(), np.int64)
