"""Packed tiles: which thread of the linear kernel holds what, and where that stands in memory.

A weight [N, K] is cut into tiles of 64 rows by 64 columns. Each tile belongs to one warp, a thread holds 128 codes. Factors
(scales, minimums, zero points) come in sets of 64, one for each row. A set serves `span` columns: the largest power of two that
divides the group, or all of K.

There are two orders of tiles. They take as many bytes, in arrays of the same shapes.

**mma** is for tensor cores: a tile is the left operand of their products. The bits of a thread's codes are in the order that the
cast to 16 bits likes best (`packed_order`; codes that are looked up in a table follow each other). They come in 16-byte chunks
that lie side by side for the 32 threads, so every load of the kernel is 16 bytes a thread and coalesced. The columns of a tile
are permuted, in two ways at once. Steps of the tensor core (16 columns) stay inside of a group's columns, so that a group's scale
multiplies a finished sum. Inside of that, a thread's columns are consecutive ones of the activations: with P = `parts(span)`
groups in a tile, column k = (64 / P) J + (16 / P) t + 4 j + 2 h + e stands at position 16 (4 / P J + j) + 8 h + 2 t + e, where
t is the thread's place among the four of a row. A set of factors is [row % 8][row / 8], so that a thread loads those of its eight
rows at once.

**rows** is for CPUs, whose vector lanes are rows of the weight: thread t of the 32 holds rows t and t + 32, all else is natural.
The 64 codes of a row are a little-endian string of 2 * nbits words of 32 bits; word w of row r stands at byte
((r / 32 * 2 * nbits + w) * 32 + r % 32) * 4 of the tile, beside the same word of the neighbouring rows. Factors are in the order
of the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, f16, f32
from tilus.errors import TilusError
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


class TileOrder(ABC):
    """An order of the codes and factors of tiles: `MMA` or `ROWS`.

    name: in headers. packed_for: the order of bits of a thread's codes (`packed_order`). chunk_nbytes: how many bytes of a thread
    lie side by side. factor_axes: a set of factors is the rows as [row / 8, row % 8], with its axes in this order.
    """

    name: ClassVar[str]
    packed_for: ClassVar[DataType]
    chunk_nbytes: ClassVar[int]
    factor_axes: ClassVar[tuple[int, int]]

    @abstractmethod
    def tile_layout(self) -> RegisterLayout:
        """Tile [64, 64] of a warp: rows, and columns as they stand in the packed tile."""

    @abstractmethod
    def column_axes(self, span: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A shape of 64 columns, and the order of its axes that brings them to where they stand in a packed tile."""

    @abstractmethod
    def own_factors(self, nbytes: int) -> RegisterLayout:
        """Tile [1, 1, 8, 8 * nbytes] of a set of factors: a thread holds those of its rows of the weight."""

    @abstractmethod
    def activation_layout(self, tokens: int, span: int, rows: int, warps: int) -> RegisterLayout | None:
        """Tile [tokens, warps * 64] of activations, None for any layout."""

    @abstractmethod
    def plain_layout(self, span: int) -> RegisterLayout:
        """Tile [64, 64] of unpacked codes: each thread holds the elements that it holds in a packed tile."""

    def fragment_layout(self, warps: int) -> RegisterLayout:
        """Tile [warps, 64, 64]: one 64x64 tile a warp."""
        return spatial(warps, 1, 1) * self.tile_layout().unsqueeze(0)

    def byte_layout(self, dtype: DataType, rows: int, warps: int) -> RegisterLayout:
        """Tile [rows, warps, 512 * nbits] of bytes: chunk, thread, byte."""
        chunks = 16 * dtype.nbits // self.chunk_nbytes
        return spatial(rows, warps, 1).local(1, 1, chunks).spatial(1, 1, 32).local(1, 1, self.chunk_nbytes)

    def factor_layout(self, rows: int, sets: int, warps: int, nbytes: int) -> RegisterLayout:
        """Tile [rows, sets, 8, 8 * nbytes] of a block's factors.

        A warp has one or more sets of its own, or several warps share one.
        """
        own = self.own_factors(nbytes)
        if sets >= warps:
            return spatial(rows, warps, 1, 1) * local(1, sets // warps, 1, 1) * own
        return spatial(rows, sets, 1, 1) * replicated(warps // sets, 4) * own

    def codes_packed_for(self, lookup: bool) -> DataType:
        """What a tile's codes are packed for: those that are looked up in a table are little-endian in every order."""
        return f32 if lookup else self.packed_for

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class MmaOrder(TileOrder):
    """Tiles as the left operand of mma.m16n8k16, for GPUs."""

    name = "mma"
    packed_for = f16
    chunk_nbytes = 16
    factor_axes = (1, 0)

    def tile_layout(self) -> RegisterLayout:
        return local(4, 4) * mma_a()

    def column_axes(self, span: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        pieces = parts(span)
        return (pieces, 4, 4 // pieces, 2, 2), (0, 2, 3, 1, 4)

    def own_factors(self, nbytes: int) -> RegisterLayout:
        return spatial(1, 1, 8, 1) * replicated(4, 4) * local(1, 1, 1, 8 * nbytes)

    def activation_layout(self, tokens: int, span: int, rows: int, warps: int) -> RegisterLayout | None:
        """A thread holds 16 / parts consecutive columns of its tokens; None for numbers of tokens that no tensor core takes."""
        return None if tokens % 8 else self._activations(tokens, span, rows, warps)

    def _activations(self, tokens: int, span: int, rows: int, warps: int) -> RegisterLayout:
        pieces = parts(span)
        own = local(tokens // 8, pieces).spatial(8, 4).local(1, 16 // pieces)
        return replicated(rows, 2) * spatial(1, warps) * own

    def plain_layout(self, span: int) -> RegisterLayout:
        """In runs along the rows."""
        return self._activations(TILE, span, 1, 1)


@dataclass(frozen=True)
class RowsOrder(TileOrder):
    """Tiles whose lanes are rows of the weight, for CPUs."""

    name = "rows"
    packed_for = f32
    chunk_nbytes = 4
    factor_axes = (0, 1)

    def tile_layout(self) -> RegisterLayout:
        return local(2, 1).spatial(32, 1).local(1, TILE)

    def column_axes(self, span: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (TILE,), (0,)

    def own_factors(self, nbytes: int) -> RegisterLayout:
        return local(2, 1).spatial(32, 1).local(1, nbytes).reshape((1, 1, 8, 8 * nbytes))

    def activation_layout(self, tokens: int, span: int, rows: int, warps: int) -> None:
        return None

    def plain_layout(self, span: int) -> RegisterLayout:
        return self.tile_layout()


MMA, ROWS = MmaOrder(), RowsOrder()
ORDERS: dict[str, TileOrder] = {order.name: order for order in (MMA, ROWS)}


def order_named(name: str) -> TileOrder:
    """The order of tiles with this name.

    Raises: TilusError for other names.
    """
    if name not in ORDERS:
        raise TilusError(f"a packed weight in the order {name!r}, expected {' or '.join(ORDERS)}")
    return ORDERS[name]


@lru_cache
def column_order(order: TileOrder, span: int) -> tuple[int, ...]:
    """For each position in a packed tile the column of the weight that stands there."""
    shape, axes = order.column_axes(span)
    return tuple(int(x) for x in np.arange(TILE).reshape(shape).transpose(axes).ravel())


@lru_cache
def slots(order: TileOrder, span: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column of the weight tile for every (thread, slot), [32, 128] each."""
    table = order.tile_layout().table()
    return table[..., 0].astype(np.intp), np.asarray(column_order(order, span), np.intp)[table[..., 1]]
