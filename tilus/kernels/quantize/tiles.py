"""Packed tiles: which thread of the linear kernel holds what, and where that stands in memory.

A weight [N, K] is cut into tiles of 64 rows by 64 columns. Each tile belongs to one warp, as the left operand of tensor-core
products. A thread holds 128 codes, whose bits are in the order that the cast to 16 bits likes best (`packed_order`; codes that
are looked up in a table follow each other). They come in 16-byte chunks that lie side by side for the 32 threads, so every load
of the kernel is 16 bytes a thread and coalesced.

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

from tilus.dtypes import DataType
from tilus.layout import RegisterLayout, local, replicated, spatial
from tilus.layout.atoms import mma_a

TILE = 64
SMALLEST_GROUP = 16
WHOLE = 0  # the span of a group that is all of K


def span_of(group: int, k: int) -> int:
    """For how many columns a set of factors serves; WHOLE where one set serves all."""
    return WHOLE if group == k else group & -group


def parts(span: int) -> int:
    """How many sets of factors a tile of 64 columns has."""
    return TILE // span if 0 < span < TILE else 1


def fragment_layout(warps: int) -> RegisterLayout:
    """Tile [warps, 64, 64] as the left operand of mma.m16n8k16: one 64x64 tile a warp."""
    return spatial(warps, 1, 1).local(1, 4, 4) * mma_a().unsqueeze(0)


def byte_layout(dtype: DataType, rows: int, warps: int) -> RegisterLayout:
    """Tile [rows, warps, 512 * nbits] of bytes: chunk, thread, byte."""
    return spatial(rows, warps, 1).local(1, 1, dtype.nbits).spatial(1, 1, 32).local(1, 1, 16)


def factor_layout(rows: int, sets: int, warps: int, nbytes: int) -> RegisterLayout:
    """Tile [rows, sets, 8, 8 * nbytes] of a block's factors: a thread holds those of its eight rows of the weight.

    A warp has one or more sets of its own, or several warps share one.
    """
    own = spatial(1, 1, 8, 1) * replicated(4, 4) * local(1, 1, 1, 8 * nbytes)
    if sets >= warps:
        return spatial(rows, warps, 1, 1) * local(1, sets // warps, 1, 1) * own
    return spatial(rows, sets, 1, 1) * replicated(warps // sets, 4) * own


def activation_layout(tokens: int, span: int, rows: int, warps: int) -> RegisterLayout:
    """Tile [tokens, warps * 64] of activations: a thread holds 16 / parts consecutive columns of its tokens."""
    pieces = parts(span)
    own = local(tokens // 8, pieces).spatial(8, 4).local(1, 16 // pieces)
    return replicated(rows, 2) * spatial(1, warps) * own


@lru_cache
def column_order(span: int) -> tuple[int, ...]:
    """For each position in a packed tile the column of the weight that stands there."""
    pieces = parts(span)
    columns = np.arange(TILE).reshape(pieces, 4, 4 // pieces, 2, 2)
    return tuple(int(x) for x in columns.transpose(0, 2, 3, 1, 4).ravel())


@lru_cache
def slots(span: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column of the weight tile for every (thread, slot), [32, 128] each."""
    table = fragment_layout(1).table()
    return table[..., 1].astype(np.intp), np.asarray(column_order(span), np.intp)[table[..., 2]]
