"""Codes in the order of packed tiles: by numpy, and by a kernel where the weight is to live on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import tilus
from tilus import Const, Tensor, uint8
from tilus.dtypes import DTYPES, DataType, pack_bits, unpack_bits
from tilus.kernels.quantize.tiles import TILE, activation_layout, byte_layout, code_layout, parts, slots

Bytes = npt.NDArray[np.uint8]


def pack_codes(codes: Bytes, dtype: DataType, span: int, lookup: bool) -> Bytes:
    """Codes [N, K] as [ceil(N / 64), ceil(K / 64), 512 * nbits] bytes; what lies beyond N and K is 0."""
    n, k = codes.shape
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    padded = np.zeros((tiles_n * TILE, tiles_k * TILE), np.uint8)
    padded[:n, :k] = codes
    tiles = padded.reshape(tiles_n, TILE, tiles_k, TILE).transpose(0, 2, 1, 3)
    rows, columns = slots(dtype, span, lookup)
    strings = pack_bits(tiles[:, :, rows, columns], dtype)
    chunks = strings.reshape(tiles_n, tiles_k, 32, dtype.nbits, 16).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(chunks).reshape(tiles_n, tiles_k, 512 * dtype.nbits)


def unpack_codes(packed: Bytes, dtype: DataType, span: int, lookup: bool) -> Bytes:
    """All codes [ceil(N / 64) * 64, ceil(K / 64) * 64], the padding too."""
    tiles_n, tiles_k, _ = packed.shape
    chunks = packed.reshape(tiles_n, tiles_k, dtype.nbits, 32, 16).transpose(0, 1, 3, 2, 4)
    flat = np.ascontiguousarray(chunks).reshape(tiles_n, tiles_k, 32, 16 * dtype.nbits)
    rows, columns = slots(dtype, span, lookup)
    tiles = np.empty((tiles_n, tiles_k, TILE, TILE), np.uint8)
    tiles[:, :, rows, columns] = unpack_bits(flat, dtype, TILE * TILE // 32)
    return tiles.transpose(0, 2, 1, 3).reshape(tiles_n * TILE, tiles_k * TILE)


def plain_layout(span: int):
    """Tile [64, 64] of unpacked codes: each thread holds the elements that it holds in a packed tile, in runs along the rows."""
    return activation_layout(TILE, span, 1, 1)


def to_packed_order(tile, span: int):
    """[64, 64] as the model has it, with the columns in the order of packed tiles."""
    pieces = parts(span)
    split = tilus.reshape(tile, [TILE, pieces, 4, 4 // pieces, 2, 2])
    return tilus.reshape(tilus.transpose(split, [0, 1, 3, 4, 2, 5]), [1, TILE, TILE])


def to_plain_order(tile, span: int):
    """The inverse of `to_packed_order`."""
    pieces = parts(span)
    split = tilus.reshape(tile, [TILE, pieces, 4 // pieces, 2, 4, 2])
    return tilus.reshape(tilus.transpose(split, [0, 1, 4, 2, 3, 5]), [TILE, TILE])


@tilus.kernel
def pack_codes_kernel(
    codes: Tensor[uint8, "n", "k"],
    packed: Tensor[uint8, "tiles_n", "tiles_k", "tile_nbytes"],
    *,
    wdtype: Const,
    span: Const,
    lookup: Const,
):
    """One tile a block of one warp: threads read the bytes that they hold in the packed tile, and write their chunks."""
    tilus.grid(packed.shape[0], packed.shape[1], warps=1)
    i, j = tilus.block_id(0), tilus.block_id(1)
    unsigned = DTYPES[f"uint{wdtype.nbits}"]
    tile = tilus.load(codes, [i * TILE, j * TILE], [TILE, TILE], layout=plain_layout(span))
    ordered = tilus.cast(to_packed_order(tile, span), unsigned, layout=code_layout(wdtype, 1, 1, lookup=lookup))
    raw = tilus.view(ordered, uint8, [1, 512 * wdtype.nbits], byte_layout(wdtype, 1, 1))
    tilus.store(packed, [i, j, 0], raw)


@tilus.kernel
def unpack_codes_kernel(
    packed: Tensor[uint8, "tiles_n", "tiles_k", "tile_nbytes"],
    codes: Tensor[uint8, "n", "k"],
    *,
    wdtype: Const,
    span: Const,
    lookup: Const,
):
    """The inverse of `pack_codes_kernel`; what lies beyond N and K is not written."""
    tilus.grid(packed.shape[0], packed.shape[1], warps=1)
    i, j = tilus.block_id(0), tilus.block_id(1)
    unsigned = DTYPES[f"uint{wdtype.nbits}"]
    raw = tilus.load(packed, [i, j, 0], [1, 512 * wdtype.nbits], layout=byte_layout(wdtype, 1, 1))
    tile = tilus.view(raw, unsigned, [1, TILE, TILE], code_layout(wdtype, 1, 1, lookup=lookup))
    plain = to_plain_order(tilus.cast(tile, uint8), span)
    tilus.store(codes, [i * TILE, j * TILE], tilus.with_layout(plain, plain_layout(span)))


def pack_codes_on(codes: Any, packed: Any, dtype: DataType, span: int, lookup: bool, device: str | None = None) -> None:
    """`pack_codes` by the kernel, from uint8 arrays [N, K] into `packed`."""
    pack_codes_kernel.on(device)(codes, packed, wdtype=dtype, span=span, lookup=lookup)


def unpack_codes_on(packed: Any, codes: Any, dtype: DataType, span: int, lookup: bool, device: str | None = None) -> None:
    """`unpack_codes` by the kernel, cut to the shape of `codes` [N, K]."""
    unpack_codes_kernel.on(device)(packed, codes, wdtype=dtype, span=span, lookup=lookup)
