"""Shared layouts that the hardware prescribes: operands of wgmma, and the tiles that TMA writes for them.

Source: PTX ISA, "Asynchronous warpgroup level matrix shared memory layout" (core matrices, K-major and MN-major, swizzling
modes) and "Swizzling modes" of tensor copies. The unit is a row of 16 bytes. Eight of them, one below the other, are a core
matrix; without swizzle they are 128 consecutive bytes. Swizzled by 32, 64 or 128 bytes, the rows of 2, 4 or 8 neighbouring
core matrices are joined to rows of that many bytes, in which the address bits from bit 7 on are XORed into those from bit 4 on.

The ISA leaves the distance of such blocks to the matrix descriptor. Here blocks that lie side by side along the contiguous
dimension follow each other as wholes, since a swizzled box of TMA is at most one block wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from tilus.layout.arrangements import row_major, strided
from tilus.layout.errors import LayoutError
from tilus.layout.shared import SharedLayout

Major = Literal["k", "mn"]

SWIZZLES_NBYTES = (128, 64, 32, 0)
UNIT_NBYTES = 16
CORE_ROWS = 8
SOURCE_BIT = 7  # the lowest bit of the byte address that is XORed into another, from bit 4 on


@dataclass(frozen=True)
class WgmmaForm:
    """A way in which wgmma reads an operand [..., M or N, K] from shared memory.

    swizzle_nbytes, major: as in `wgmma_operand`. width: elements of the contiguous dim in a row of a block. linear: the
    addresses before the swizzle, in elements. leading_nbytes, stride_nbytes: the two distances of a matrix descriptor.
    """

    swizzle_nbytes: int
    major: Major
    width: int
    linear: SharedLayout
    leading_nbytes: int
    stride_nbytes: int


def wgmma_operand(shape: Sequence[int], nbytes: int, swizzle_nbytes: int, major: Major) -> SharedLayout:
    """An operand of wgmma in shared memory.

    shape: [..., M or N, K]; dims in front count buffers, which follow each other. nbytes: 1, 2 or 4 bytes an element.
    swizzle_nbytes: 0 (none), 32, 64 or 128. major: the dim that is contiguous in memory; "mn" exists for 2-byte elements.

    Raises: LayoutError where the shape is no multiple of the core matrices (8 rows of 16 bytes) or of the swizzle's rows.
    """
    if swizzle_nbytes not in SWIZZLES_NBYTES or major not in ("k", "mn") or nbytes not in (1, 2, 4) or len(shape) < 2:
        raise LayoutError(
            f"a wgmma operand of shape {tuple(shape)}, {nbytes}-byte elements, {major}-major, swizzled by {swizzle_nbytes}; "
            "expected [..., mn, k], 1, 2 or 4 bytes, k or mn, and 0, 32, 64 or 128 bytes"
        )
    if major == "mn" and nbytes != 2:
        raise LayoutError(
            f"an mn-major wgmma operand of {nbytes}-byte elements; only 2-byte elements can be mn-major",
            hint="store the operand with k contiguous",
        )
    *buffers, mn, k = shape
    inner, outer = (k, mn) if major == "k" else (mn, k)
    width = _width(nbytes, swizzle_nbytes)
    if inner % width or outer % CORE_ROWS:
        raise LayoutError(
            f"a wgmma operand of {outer} rows of {inner} contiguous elements; expected multiples of {CORE_ROWS} and {width}",
            hint="use a narrower swizzle or a larger tile",
        )
    tile = _blocks((outer, inner), nbytes, swizzle_nbytes)
    return _buffered(buffers, tile if major == "k" else tile.permute((1, 0)))


@lru_cache(maxsize=256)
def wgmma_forms(shape: tuple[int, ...], nbytes: int) -> Mapping[SharedLayout, WgmmaForm]:
    """All layouts from which wgmma can read an operand [..., M or N, K], and how: k-major first, wide swizzles first."""
    found: dict[SharedLayout, WgmmaForm] = {}
    majors: tuple[Major, ...] = ("k", "mn") if nbytes == 2 else ("k",)
    for major in majors:
        outer, inner = shape[-2:] if major == "k" else shape[:-3:-1]
        for swizzle in SWIZZLES_NBYTES:
            width = _width(nbytes, swizzle)
            if outer % CORE_ROWS == 0 and inner % width == 0:
                tile = _linear_blocks((outer, inner), width)
                linear = _buffered(shape[:-2], tile if major == "k" else tile.permute((1, 0)))
                form = WgmmaForm(swizzle, major, width, linear, *_distances(outer, swizzle, major))
                found.setdefault(wgmma_operand(shape, nbytes, swizzle, major), form)
    return found


def wgmma_operands(shape: Sequence[int], nbytes: int) -> tuple[SharedLayout, ...]:
    """The layouts of `wgmma_forms`."""
    return tuple(wgmma_forms(tuple(shape), nbytes))


def _distances(rows: int, swizzle_nbytes: int, major: Major) -> tuple[int, int]:
    """(leading, stride) of a matrix descriptor in bytes, for blocks of `rows` rows.

    PTX ISA, "Leading dimension byte offset" and "Stride dimension byte offset". The two say how far it is from 8 rows of a block
    to the next 8, and from a block to the next. With k contiguous the stride is the former, and with a swizzle the latter is not
    asked for, as an instruction's k lies in one block. Else the stride is the former with a swizzle, and the latter without.
    """
    width_nbytes = max(UNIT_NBYTES, swizzle_nbytes)
    to_rows, to_block = CORE_ROWS * width_nbytes, rows * width_nbytes
    if major == "mn" and not swizzle_nbytes:
        return to_rows, to_block
    return (0 if major == "k" and swizzle_nbytes else to_block), to_rows


def tma_tile(shape: Sequence[int], nbytes: int, swizzle_nbytes: int, rank: int = 2) -> SharedLayout:
    """What TMA writes for a tile with the last dim contiguous: one box, or boxes side by side as wide as the swizzle.

    rank: dims of the tile; those of `shape` in front of them count buffers. Without swizzle a tile is row-major.
    nbytes: 1, 2, 4 or 8 bytes an element.
    Raises: LayoutError where rows are no multiple of 16 bytes, or of the swizzle.
    """
    if swizzle_nbytes not in SWIZZLES_NBYTES or nbytes not in (1, 2, 4, 8) or not 1 <= rank <= min(5, len(shape)):
        raise LayoutError(
            f"a TMA tile of rank {rank} and shape {tuple(shape)}, {nbytes}-byte elements, swizzled by {swizzle_nbytes}; "
            "expected rank 1 to 5, 1, 2, 4 or 8 bytes, and 0, 32, 64 or 128 bytes"
        )
    if shape[-1] % _width(nbytes, swizzle_nbytes):
        raise LayoutError(
            f"a TMA tile with rows of {shape[-1]} elements of {nbytes} bytes; "
            f"expected a multiple of {_width(nbytes, swizzle_nbytes)}",
            hint="use a narrower swizzle or longer rows",
        )
    tile = tuple(shape[-rank:])
    layout = _blocks(tile, nbytes, swizzle_nbytes) if swizzle_nbytes else row_major(tile)
    return _buffered(shape[:-rank], layout)


def tma_tiles(shape: Sequence[int], nbytes: int, rank: int = 2) -> tuple[SharedLayout, ...]:
    """All layouts in which TMA can write a tile, wide swizzles first."""
    fitting = (swizzle for swizzle in SWIZZLES_NBYTES if shape[-1] % _width(nbytes, swizzle) == 0)
    return tuple(tma_tile(shape, nbytes, swizzle, rank) for swizzle in fitting)


def _width(nbytes: int, swizzle_nbytes: int) -> int:
    """Elements in a row of a block."""
    return max(UNIT_NBYTES, swizzle_nbytes) // nbytes


def _blocks(shape: Sequence[int], nbytes: int, swizzle_nbytes: int) -> SharedLayout:
    """Blocks of full height, one after another, with rows of 16 bytes or of the swizzle's width."""
    layout = _linear_blocks(shape, _width(nbytes, swizzle_nbytes))
    if not swizzle_nbytes:
        return layout
    base = (UNIT_NBYTES // nbytes).bit_length() - 1
    bits = (swizzle_nbytes // UNIT_NBYTES).bit_length() - 1
    return layout.swizzled(base, bits, SOURCE_BIT - 4)


def _linear_blocks(shape: Sequence[int], width: int) -> SharedLayout:
    """The same without a swizzle, with rows of `width` elements."""
    *outer, inner = shape
    strides = [width * prod(outer[d + 1 :]) for d in range(len(outer))]
    return strided((*outer, (inner // width, width)), (*strides, (width * prod(outer), 1)))


def _buffered(buffers: Sequence[int], tile: SharedLayout) -> SharedLayout:
    """One tile after another, with the dims `buffers` in front."""
    outer = row_major((*buffers, *(1,) * tile.rank))
    for _ in buffers:
        tile = tile.unsqueeze(0)
    return outer * tile
