"""Packed tiles: which thread of the linear kernel holds what, and where that stands in memory.

A weight [N, K] is cut into tiles of 64 rows by 64 columns. Each tile belongs to one warp, a thread holds 128 codes. Factors
(scales, minimums, zero points) come in sets of 64, one for each row. A set serves `span` columns: the largest power of two that
divides the group, or all of K.

There are two orders of tiles. They take as many bytes, in arrays of the same shapes.

**mma** is for tensor cores: a tile is the left operand of their products, four blocks of 16 rows by 64 columns. A thread's
codes of a block are `nbits` words of 32 bits, in which the bits have the order that the cast to 16 bits likes best
(`packed_order`; codes that are looked up in a table follow each other). The words of the four blocks are interleaved in chunks of
16 bytes that lie side by side for the 32 threads: with u = gcd(nbits, 4), a chunk has u words of one block, then u of the next.
So one packed weight serves two kinds of readers with aligned and coalesced accesses: a warp that owns the tile loads chunks of 16
bytes, and the four warps of a warpgroup that own a block each (wgmma) load pieces of 4 u bytes. Columns are in their natural
order, since TMA brings activations in no other. A set of factors is [row % 8][row / 8], so that a thread loads those of its eight
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
from math import gcd
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, f16, f32
from tilus.errors import TilusError
from tilus.layout import Digit, RegisterLayout, local, replicated, spatial
from tilus.layout.atoms import mma_a, mma_b, wgmma_a

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
        """Tile [64, 64] of a warp."""

    @abstractmethod
    def own_factors(self, nbytes: int) -> RegisterLayout:
        """Tile [1, 1, 8, 8 * nbytes] of a set of factors: a thread holds those of its rows of the weight."""

    @abstractmethod
    def activation_layout(self, tokens: int, rows: int, warps: int) -> RegisterLayout | None:
        """Tile [tokens, warps * 64] of activations, None for any layout."""

    @abstractmethod
    def string_layout(self, dtype: DataType, rows: int, warps: int) -> RegisterLayout:
        """The tile of `byte_layout` with a thread's bytes in the order of its codes."""

    def fragment_layout(self, warps: int) -> RegisterLayout:
        """Tile [warps, 64, 64]: one 64x64 tile a warp."""
        return spatial(warps, 1, 1) * self.tile_layout().unsqueeze(0)

    def byte_layout(self, dtype: DataType, rows: int, warps: int) -> RegisterLayout:
        """Tile [rows, warps, 512 * nbits] of bytes as they are loaded: chunk, thread, byte."""
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

    def own_factors(self, nbytes: int) -> RegisterLayout:
        return spatial(1, 1, 8, 1) * replicated(4, 4) * local(1, 1, 1, 8 * nbytes)

    def activation_layout(self, tokens: int, rows: int, warps: int) -> RegisterLayout | None:
        """The right operand of products; None for numbers of tokens that no tensor core takes."""
        if tokens % 8:
            return None
        return replicated(rows, 2) * spatial(1, warps) * local(tokens // 8, 4) * mma_b().permute((1, 0))

    def string_layout(self, dtype: DataType, rows: int, warps: int) -> RegisterLayout:
        words, blocks = dtype.nbits // _words_together(dtype), 4 // _words_together(dtype)
        nbytes = self.chunk_nbytes // blocks
        threads = (Digit(rows, 0, 1), Digit(warps, 1, 1), Digit(32, 2, self.chunk_nbytes))
        chunk = 32 * self.chunk_nbytes
        slots = (
            Digit(4 // blocks, 2, chunk),
            Digit(blocks, 2, nbytes),
            Digit(words, 2, chunk * 4 // blocks),
            Digit(nbytes, 2, 1),
        )
        return RegisterLayout((rows, warps, 512 * dtype.nbits), threads, slots)

    # For warpgroups, each of `blocks` of a block's rows of tiles: warp w of the four has the 16-row block w of every tile.

    def warpgroup_bytes(self, dtype: DataType, groups: int, blocks: int, depth: int) -> RegisterLayout:
        """Tile [groups * blocks, depth, 512 * nbits] of bytes, a thread's in the order of its codes."""
        together = _words_together(dtype)
        nbytes, chunk = 4 * together, 32 * self.chunk_nbytes
        warp = (Digit(together, 2, chunk), Digit(4 // together, 2, nbytes))
        threads = (Digit(groups, 0, blocks), *warp, Digit(32, 2, self.chunk_nbytes))
        slots = (
            Digit(blocks, 0, 1),
            Digit(depth, 1, 1),
            Digit(dtype.nbits // together, 2, chunk * together),
            Digit(nbytes, 2, 1),
        )
        return RegisterLayout((groups * blocks, depth, 512 * dtype.nbits), threads, slots)

    def warpgroup_fragments(self, groups: int, blocks: int, depth: int) -> RegisterLayout:
        """Tile [groups * blocks * 64, depth * 64]: the left operand of wgmma."""
        return spatial(groups, 1) * local(blocks, 4 * depth) * wgmma_a()

    def warpgroup_factors(self, groups: int, blocks: int, sets: int, nbytes: int) -> RegisterLayout:
        """Tile [groups * blocks, sets, 8, 8 * nbytes]: a thread holds the factors of the rows of its results."""
        threads = (Digit(groups, 0, blocks), Digit(4, 3, 2 * nbytes), Digit(8, 2, 1), Digit(4, None, 0))
        slots = (Digit(blocks, 0, 1), Digit(sets, 1, 1), Digit(2 * nbytes, 3, 1))
        return RegisterLayout((groups * blocks, sets, 8, 8 * nbytes), threads, slots)


@dataclass(frozen=True)
class RowsOrder(TileOrder):
    """Tiles whose lanes are rows of the weight, for CPUs."""

    name = "rows"
    packed_for = f32
    chunk_nbytes = 4
    factor_axes = (0, 1)

    def tile_layout(self) -> RegisterLayout:
        return local(2, 1).spatial(32, 1).local(1, TILE)

    def own_factors(self, nbytes: int) -> RegisterLayout:
        return local(2, 1).spatial(32, 1).local(1, nbytes).reshape((1, 1, 8, 8 * nbytes))

    def activation_layout(self, tokens: int, rows: int, warps: int) -> None:
        return None

    def string_layout(self, dtype: DataType, rows: int, warps: int) -> RegisterLayout:
        return self.byte_layout(dtype, rows, warps)


MMA, ROWS = MmaOrder(), RowsOrder()
ORDERS: dict[str, TileOrder] = {order.name: order for order in (MMA, ROWS)}


def order_named(name: str) -> TileOrder:
    """The order of tiles with this name.

    Raises: TilusError for other names.
    """
    if name not in ORDERS:
        raise TilusError(f"a packed weight in the order {name!r}, expected {' or '.join(ORDERS)}")
    return ORDERS[name]


def _words_together(dtype: DataType) -> int:
    """How many words of a block a chunk has."""
    return gcd(dtype.nbits, 4)


@lru_cache
def slots(order: TileOrder) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column of the weight tile for every (thread, slot), [32, 128] each."""
    table = order.tile_layout().table().astype(np.intp)
    return table[..., 0], table[..., 1]


@lru_cache
def byte_positions(order: TileOrder, dtype: DataType) -> npt.NDArray[np.intp]:
    """Where the bytes of every thread's codes stand in a packed tile, [32, 16 * nbits]."""
    return order.string_layout(dtype, 1, 1).table()[..., 2].astype(np.intp)
