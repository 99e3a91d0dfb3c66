"""Codes in the order of packed tiles: by numpy, and by a kernel where the weight is to live on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import tilus
from tilus import Const, Tensor, uint8
from tilus.codegen.packed_order import packed_order
from tilus.dtypes import DTYPES, DataType
from tilus.kernels.quantize.tiles import MMA, TILE, TileOrder, byte_positions, slots

Bytes = npt.NDArray[np.uint8]


def pack_codes(codes: Bytes, dtype: DataType, lookup: bool, order: TileOrder) -> Bytes:
    """Codes [N, K] as [ceil(N / 64), ceil(K / 64), 512 * nbits] bytes; what lies beyond N and K is 0."""
    n, k = codes.shape
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    padded = np.zeros((tiles_n * TILE, tiles_k * TILE), np.uint8)
    padded[:n, :k] = codes
    tiles = padded.reshape(tiles_n, TILE, tiles_k, TILE).transpose(0, 2, 1, 3)
    rows, columns = slots(order)
    packed = np.empty((tiles_n, tiles_k, 512 * dtype.nbits), np.uint8)
    strings = packed_order(dtype, order.codes_packed_for(lookup)).pack(tiles[:, :, rows, columns])
    packed[:, :, byte_positions(order, dtype)] = strings
    return packed


def unpack_codes(packed: Bytes, dtype: DataType, lookup: bool, order: TileOrder) -> Bytes:
    """All codes [ceil(N / 64) * 64, ceil(K / 64) * 64], the padding too."""
    tiles_n, tiles_k, _ = packed.shape
    strings = packed[:, :, byte_positions(order, dtype)]
    rows, columns = slots(order)
    tiles = np.empty((tiles_n, tiles_k, TILE, TILE), np.uint8)
    tiles[:, :, rows, columns] = packed_order(dtype, order.codes_packed_for(lookup)).unpack(strings)
    return tiles.transpose(0, 2, 1, 3).reshape(tiles_n * TILE, tiles_k * TILE)


@tilus.kernel(varying=("n", "tiles_n", "tiles_k"))
def pack_codes_kernel(
    codes: Tensor[uint8, "n", "k"],
    packed: Tensor[uint8, "tiles_n", "tiles_k", "tile_nbytes"],
    *,
    wdtype: Const,
    lookup: Const,
    order: Const = MMA,
):
    """One tile a block of one warp: threads read the bytes that they hold in the packed tile, and write their chunks."""
    tilus.grid(packed.shape[0], packed.shape[1], warps=1)
    i, j = tilus.block_id(0), tilus.block_id(1)
    tile = tilus.load(codes, [i * TILE, j * TILE], [TILE, TILE], layout=order.tile_layout())
    # The bits are what matters, so codes of every type are moved as unsigned integers.
    fragments = tilus.cast(tile, DTYPES[f"uint{wdtype.nbits}"], layout=order.tile_layout())
    shape, layout = [1, 1, 512 * wdtype.nbits], order.string_layout(wdtype, 1, 1)
    packed_for = order.codes_packed_for(lookup)
    raw = tilus.pack_codes(fragments, uint8, shape, layout, packed_as=wdtype, packed_for=packed_for)
    tilus.store(packed, [i, j, 0], tilus.with_layout(raw, order.byte_layout(wdtype, 1, 1)))


@tilus.kernel(varying=("n", "tiles_n", "tiles_k"))
def unpack_codes_kernel(
    packed: Tensor[uint8, "tiles_n", "tiles_k", "tile_nbytes"],
    codes: Tensor[uint8, "n", "k"],
    *,
    wdtype: Const,
    lookup: Const,
    order: Const = MMA,
):
    """The inverse of `pack_codes_kernel`; what lies beyond N and K is not written."""
    tilus.grid(packed.shape[0], packed.shape[1], warps=1)
    i, j = tilus.block_id(0), tilus.block_id(1)
    raw = tilus.load(packed, [i, j, 0], [1, 1, 512 * wdtype.nbits], layout=order.byte_layout(wdtype, 1, 1))
    strings = tilus.with_layout(raw, order.string_layout(wdtype, 1, 1))
    shape, layout = [TILE, TILE], order.tile_layout()
    unsigned, packed_for = DTYPES[f"uint{wdtype.nbits}"], order.codes_packed_for(lookup)
    tile = tilus.unpack_codes(strings, unsigned, unsigned, shape, layout, packed_as=wdtype, packed_for=packed_for)
    tilus.store(codes, [i * TILE, j * TILE], tilus.cast(tile, uint8))


def pack_codes_on(
    codes: Any, packed: Any, dtype: DataType, lookup: bool, order: TileOrder, device: str | None = None
) -> None:
    """`pack_codes` by the kernel, from uint8 arrays [N, K] into `packed`."""
    pack_codes_kernel.on(device)(codes, packed, wdtype=dtype, lookup=lookup, order=order)


def unpack_codes_on(
    packed: Any, codes: Any, dtype: DataType, lookup: bool, order: TileOrder, device: str | None = None
) -> None:
    """`unpack_codes` by the kernel, cut to the shape of `codes` [N, K]."""
    unpack_codes_kernel.on(device)(packed, codes, wdtype=dtype, lookup=lookup, order=order)
