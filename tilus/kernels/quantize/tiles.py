"""Packed tiles: which thread of the linear kernel holds what, and where that stands in memory.

A weight [N, K] is cut into tiles of 64 rows by 64 columns. Each tile belongs to one warp, as the left operand of tensor-core
products; a thread holds 128 codes, its slots in the order that the cast to 16 bits likes best (`code_layout`). Its bits come
in 16-byte chunks that lie side by side for the 32 threads, so every load of the kernel is 16 bytes a thread and coalesced.
A warp takes `depth` neighbouring tiles at once, so that enough bytes are on their way whatever the width of a code.

The columns of a tile are permuted, in two ways at once. Steps of the tensor core (16 columns) stay inside of a group's columns,
so that a group's scale multiplies a finished sum. Inside of that, a thread's columns are consecutive ones of the activations:
with P = `parts(span)` groups in a tile, column k = (64 / P) J + (16 / P) t + 4 j + 2 h + e stands at position
16 (4 / P J + j) + 8 h + 2 t + e, where t is the thread's place among the four of a row.

Factors (scales, minimums, zero points) come in sets of 64, one for each row: [row % 8][row / 8], so that a thread loads those of
its eight rows at once. A set serves `span` columns: the largest power of two that divides the group, or all of K.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tilus.codegen.cast_plan import preferred_chunk
from tilus.dtypes import DataType
from tilus.layout import RegisterLayout, local, reorder_locals, replicated, spatial
from tilus.layout.atoms import mma_a

TILE = 64
SLOTS = TILE * TILE // 32
SMALLEST_GROUP = 16
WHOLE = 0  # the span of a group that is all of K


def span_of(group: int, k: int) -> int:
    """For how many columns a set of factors serves; WHOLE where one set serves all."""
    return WHOLE if group == k else group & -group


def parts(span: int) -> int:
    """How many sets of factors a tile of 64 columns has."""
    return TILE // span if 0 < span < TILE else 1


def fragment_layout(warps: int, depth: int) -> RegisterLayout:
    """Tile [warps, 64, depth * 64] as the left operand of mma.m16n8k16: `depth` tiles of 64 columns a warp."""
    return spatial(warps, 1, 1).local(1, 1, depth).local(1, 4, 4) * mma_a().unsqueeze(0)


def code_layout(dtype: DataType, warps: int, depth: int, *, lookup: bool = False) -> RegisterLayout:
    """The fragment layout with a thread's slots in the order of its packed codes.

    Within each chunk of C slots, slot h * C/2 + r holds what the fragment has in slot 2 r + h: the two halves of a 16-bit pair.
    Codes that are looked up in a table keep the order of the fragment.
    """
    chunk = 2 if lookup else preferred_chunk(dtype, SLOTS)
    return reorder_locals(fragment_layout(warps, depth), (depth * SLOTS // chunk, chunk // 2, 2), (0, 2, 1))


def byte_layout(dtype: DataType, warps: int, depth: int) -> RegisterLayout:
    """Tile [warps * depth, 512 * nbits] of bytes: chunk, thread, byte."""
    return spatial(warps, 1).local(depth, dtype.nbits).spatial(1, 32).local(1, 16)


def factor_layout(sets: int, warps: int, nbytes: int) -> RegisterLayout:
    """Tile [sets, 8, 8 * nbytes] of a block's factors: a thread holds those of its eight rows.

    A warp has one or more sets of its own, or several warps share one.
    """
    rows = spatial(1, 8, 1) * replicated(4, 3) * local(1, 1, 8 * nbytes)
    if sets >= warps:
        return spatial(warps, 1, 1) * local(sets // warps, 1, 1) * rows
    return spatial(sets, 1, 1) * replicated(warps // sets, 3) * rows


def block_sets(span: int, warps: int, depth: int) -> int:
    """How many sets of factors the columns of one step of a block need."""
    return 1 if span == WHOLE else max(1, warps * depth * TILE // span)


def activation_layout(tokens: int, span: int, warps: int, depth: int) -> RegisterLayout:
    """Tile [tokens, warps * depth * 64] of activations: a thread holds 16 / parts consecutive columns of its tokens."""
    pieces = parts(span)
    own = local(1, depth) * local(tokens // 8, pieces).spatial(8, 4).local(1, 16 // pieces)
    return spatial(1, warps) * own


@lru_cache
def column_order(span: int) -> tuple[int, ...]:
    """For each position in a packed tile the column of the weight that stands there."""
    pieces = parts(span)
    columns = np.arange(TILE).reshape(pieces, 4, 4 // pieces, 2, 2)
    return tuple(int(x) for x in columns.transpose(0, 2, 3, 1, 4).ravel())


@lru_cache
def slots(dtype: DataType, span: int, lookup: bool) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column of the weight tile for every (thread, slot), [32, 128] each."""
    table = code_layout(dtype, 1, 1, lookup=lookup).table()
    return table[..., 1].astype(np.intp), np.asarray(column_order(span), np.intp)[table[..., 2]]
