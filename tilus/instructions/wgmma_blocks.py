"""How the warps of a group share a `wgmma`: which rows and columns are whose, and which instructions that makes.

As for mma.sync (see `mma_blocks`), a partition is a layout [1, m / 16, n / 8] whose "threads" are warps. The four warps of a
warpgroup run each instruction together, so they have the same columns. An instruction takes the rows of one slot of each warp: if
A is in registers, these are any 16 rows a warp, since D has the same ones; if A is in shared memory, warp w has rows 16 w to
16 w + 15 of 64 neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tilus.instructions.mma_blocks import (
    COLUMNS,
    ROWS,
    Candidate,
    Extents,
    blocks_of_operand,
    candidate,
    slots_by_index,
)
from tilus.instructions.wgmma_atoms import MAX_COLUMNS, WARPS, WgmmaAtom
from tilus.instructions.wgmma_atoms import ROWS as INSTRUCTION_ROWS
from tilus.layout import RegisterLayout, local, replicated, spatial

COLUMN_STEP = 64  # at which a row of n is cut into instructions: the widest row of a block of B in shared memory
FRAGMENT_ROWS, FRAGMENT_COLUMNS = 16, 8

Known = tuple[RegisterLayout | None, RegisterLayout | None, RegisterLayout | None]
"""What is known of the layouts of a, acc and out."""


@dataclass(frozen=True)
class Part:
    """One instruction of a step of k: the row slot of a warp, the first column relative to the warpgroup's, and how many."""

    row: int
    column: int
    width: int


@dataclass(frozen=True)
class WgmmaWay:
    """A way to compute a product: `blocks` of the tile over warps, as in `mma_blocks`."""

    atom: WgmmaAtom
    candidate: Candidate

    @property
    def blocks(self) -> RegisterLayout:
        return self.candidate.blocks

    @property
    def layouts(self) -> tuple[RegisterLayout, RegisterLayout]:
        """Of A in registers and of D."""
        a, _, d = self.candidate.layouts_of_one
        return a, d

    @property
    def num_steps(self) -> int:
        return self.candidate.a_blocks.shape[2]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """What a row slot adds to the index of the warp's first 16 rows, in slot order."""
        return tuple(dict.fromkeys(self.blocks.table()[0, :, ROWS].tolist()))

    @property
    def num_columns(self) -> int:
        """Columns of a warpgroup."""
        return FRAGMENT_COLUMNS * self.blocks.num_locals // len(self.rows)

    def parts(self) -> Iterator[Part]:
        """The instructions of one step of k. Columns are cut into equal runs of whole blocks, as far as the widths allow."""
        most = MAX_COLUMNS
        if self.num_columns > most:
            count = -(-self.num_columns // most)
            most = -(-self.num_columns // (count * COLUMN_STEP)) * COLUMN_STEP
        for row in range(len(self.rows)):
            column = 0
            while column < self.num_columns:
                width = max(w for w in self.atom.widths if w <= min(most, self.num_columns - column))
                yield Part(row, column, width)
                column += width

    def d_slots(self, part: Part) -> list[int]:
        """The slots of D's layout that the instruction's registers are, in the instruction's order."""
        columns = range(part.column // FRAGMENT_COLUMNS, (part.column + part.width) // FRAGMENT_COLUMNS)
        blocks = (self._block_slots[0, self.rows[part.row], column] for column in columns)
        return [4 * block + slot for block in blocks for slot in range(4)]

    def a_slots(self, part: Part, step: int) -> range:
        """The slots of A's layout that the instruction's registers are."""
        count = FRAGMENT_ROWS * self.atom.k // 32
        first = self._a_block_slots[0, self.rows[part.row], step] * count
        return range(first, first + count)

    @cached_property
    def _block_slots(self) -> dict[tuple[int, ...], int]:
        return slots_by_index(self.blocks)

    @cached_property
    def _a_block_slots(self) -> dict[tuple[int, ...], int]:
        return slots_by_index(self.candidate.a_blocks)


@functools.lru_cache(maxsize=1024)
def wgmma_ways(
    atom: WgmmaAtom, extents: Extents, num_warps: int, a_in_registers: bool, known: Known
) -> tuple[WgmmaWay, ...]:
    """The ways to compute a product, best first: D's layout counts most, as it may not be converted under way; then the least
    conversions, the least repeated work, and the fewest warpgroups that need the same A."""
    found: dict[Candidate, None] = {}
    for blocks in (*_grids(extents, num_warps), *_derived(atom, extents, known)):
        if _is_possible(blocks, a_in_registers):
            found[candidate(atom.fragments, blocks, extents.k)] = None

    def rank(way: WgmmaWay) -> tuple[int, ...]:
        a, d = way.layouts
        wanted = zip((a, d, d), known, strict=True)
        moved = [own is not None and own.thread_digits != layout.thread_digits for layout, own in wanted]
        return int(moved[2]), sum(moved), way.blocks.num_replicas, -way.num_columns

    return tuple(sorted((WgmmaWay(atom, found_) for found_ in found), key=rank))


def _grids(extents: Extents, num_warps: int) -> Iterator[RegisterLayout]:
    """Grids of warpgroups with boxes of whole instructions, which follow each other or take turns along m."""
    groups, m, n = num_warps // WARPS, extents.m // INSTRUCTION_ROWS, extents.n // FRAGMENT_COLUMNS
    for along_m in (g for g in reversed(range(1, groups + 1)) if groups % g == 0 and m % g == 0):
        for along_n in (g for g in range(1, groups + 1) if groups // along_m % g == 0 and n % g == 0):
            same = replicated(groups // (along_m * along_n), 3)
            grid, repeats = spatial(1, along_m, along_n), local(1, m // along_m, 1)
            inner = spatial(1, WARPS, 1) * local(1, 1, n // along_n)
            yield same * grid * repeats * inner
            yield same * repeats * grid * inner


def _derived(atom: WgmmaAtom, extents: Extents, known: Known) -> Iterator[RegisterLayout]:
    """The partitions that leave an operand or the result in the layout that it has."""
    for which, layout in zip((0, 2, 2), known, strict=True):
        if layout is not None:
            yield from blocks_of_operand(atom.fragments, which, layout.unsqueeze(0), extents)


def _is_possible(blocks: RegisterLayout, a_in_registers: bool) -> bool:
    table = blocks.table()
    warps = table[:, 0].reshape(-1, WARPS, 3)  # [warpgroup, warp, dim]: the first block of each warp
    slots = table[0] - table[0, 0]
    columns = sorted(set(slots[:, COLUMNS].tolist()))
    rows = warps[:, :, ROWS] - warps[:, :1, ROWS]
    if (warps[:, :, COLUMNS] != warps[:, :1, COLUMNS]).any() or columns != list(range(len(columns))):
        return False
    if a_in_registers:
        return all(len(set(own)) == WARPS for own in rows.tolist())
    aligned = not (warps[:, 0, ROWS] % WARPS).any() and not (slots[:, ROWS] % WARPS).any()
    return aligned and bool((rows == np.arange(WARPS)).all())
