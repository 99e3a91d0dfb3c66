"""Tensor copies: what arrives and what is written on every execution, at and beyond the edges; layouts; what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tilus
from tilus import Const, Tensor, f16, f32, int32, uint4, uint8, uint16
from tilus.compiler import compile_function
from tilus.dtypes import int64
from tilus.errors import TilusError
from tilus.ptx.assembler import assemble
from tilus.target import DEFAULT_TARGET, get_target

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
Array = npt.NDArray[Any]


@tilus.kernel
def fetch(
    x: Tensor["T", "a", "b", "c"], y: Tensor["T", "p", "q"], i: int32, j: int32, k: int32, *, shape: Const, dims: Const = None,
    stage: Const = 1, warps: Const = 1, evict: Const = None,
):  # fmt: skip
    """A tile of rank 2 through one of three stages of shared memory."""
    tilus.grid(1, warps=warps)
    tile = tilus.shared(x.dtype, [3, *shape])
    full = tilus.mbarrier(3)
    tilus.arrive(full[stage], nbytes=tile[stage].nbytes)
    tilus.copy_tensor(tile[stage], x, [i, j, k], barrier=full[stage], evict=evict, dims=dims)
    tilus.wait_barrier(full[stage], 0)
    tilus.store(y, [0, 0], tilus.load_shared(tile[stage]))


@tilus.kernel
def put(
    x: Tensor["T", "p", "q"], y: Tensor["T", "a", "b", "c"], i: int32, j: int32, k: int32, *, shape: Const,
    dims: Const = None, warps: Const = 1, evict: Const = None,
):  # fmt: skip
    tilus.grid(1, warps=warps)
    tile = tilus.shared(x.dtype, [2, *shape])
    tilus.store_shared(tile[1], tilus.load(x, [0, 0], shape))
    tilus.fence_async()
    tilus.sync()
    tilus.store_tensor(y, [i, j, k], tile[1], evict=evict, dims=dims)
    tilus.commit_stores()
    tilus.wait_stores(reads_only=True)
    tilus.wait_stores()


def drawn(dtype: Any, shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).integers(1, 200, shape).astype(dtype.numpy)


def spread(shape: tuple[int, int], dims: tuple[int, ...] | None) -> tuple[int, ...]:
    """The extents of a tile in all dims of a tensor of rank 3."""
    whole = [1, 1, 1]
    for extent, d in zip(shape, dims or (1, 2), strict=True):
        whole[d] = extent
    return tuple(whole)


def clipped(x: Array, shape: tuple[int, ...], offsets: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a tile and a tensor meet: slices of the tensor, and of the tile."""
    first = [min(max(o, 0), n) for o, n in zip(offsets, x.shape, strict=True)]
    last = [max(f, min(o + s, n)) for f, o, s, n in zip(first, offsets, shape, x.shape, strict=True)]
    return (
        tuple(slice(f, e) for f, e in zip(first, last, strict=True)),
        tuple(slice(f - o, e - o) for f, e, o in zip(first, last, offsets, strict=True)),
    )


# (dtype, extents of the tensor, of the tile, its dims, offsets): one box or several side by side, swizzles of 128, 64, 32
# and 0 bytes, inside of the tensor, over every edge, and beyond it
TILES = [
    (f16, (2, 40, 128), (16, 64), None, (1, 8, 64)),
    (f16, (2, 40, 128), (16, 128), None, (0, 30, 0)),
    (f16, (1, 5, 128), (8, 64), None, (0, 0, 96)),
    (f16, (3, 40, 96), (8, 32), None, (2, -3, 80)),
    (f16, (3, 40, 96), (24, 48), None, (2, 20, -40)),
    (f16, (3, 40, 96), (16, 24), None, (1, 37, 88)),
    (f16, (3, 40, 96), (5, 64), None, (1, 37, 40)),
    (uint8, (2, 20, 256), (8, 256), None, (1, 0, 16)),
    (uint8, (2, 20, 80), (16, 80), None, (1, 10, -5)),
    (f32, (4, 9, 64), (8, 32), None, (3, 4, 40)),
    (f32, (4, 9, 64), (1, 256), None, (0, 8, -100)),
    (f32, (4, 9, 64), (4, 32), (0, 2), (1, 3, 32)),
    (f32, (9, 3, 64), (8, 16), (0, 2), (3, 2, 56)),
    (f16, (2, 40, 128), (16, 64), None, (5, 8, 64)),
    (f16, (2, 40, 128), (16, 64), None, (0, 1000, 64)),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "extents", "shape", "dims", "offsets"), TILES)
def test_a_copy_brings_the_tile_with_zeros_outside(
    device: str, dtype: Any, extents: tuple[int, ...], shape: tuple[int, int], dims: Any, offsets: tuple[int, ...]
) -> None:
    x, y = drawn(dtype, extents, 1), np.ones(shape, dtype.numpy)
    whole = np.zeros(spread(shape, dims), dtype.numpy)
    there, here = clipped(x, whole.shape, offsets)
    whole[here] = x[there]
    warps, stage = 1 + 3 * (shape[0] % 3 == 1), shape[0] % 3
    fetch.on(device)(x, y, *offsets, shape=shape, dims=dims, warps=warps, stage=stage, evict=(None, "first", "last")[stage])
    np.testing.assert_array_equal(y, whole.reshape(shape))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "extents", "shape", "dims", "offsets"), TILES)
def test_a_store_writes_what_lies_inside(
    device: str, dtype: Any, extents: tuple[int, ...], shape: tuple[int, int], dims: Any, offsets: tuple[int, ...]
) -> None:
    x, y = drawn(dtype, shape, 2), drawn(dtype, extents, 3)
    expected = y.copy()
    there, here = clipped(y, spread(shape, dims), offsets)
    expected[there] = x.reshape(spread(shape, dims))[here]
    put.on(device)(x, y, *offsets, shape=shape, dims=dims, warps=1 + shape[0] % 2, evict=(None, "first")[shape[0] % 2])
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("device", ["reference", "emulator"])
def test_a_tensor_with_gaps_between_its_rows(device: str) -> None:
    storage = drawn(f16, (2, 12, 80), 4)
    y = np.zeros((8, 64), np.float16)
    fetch.on(device)(storage[:, 1:10, 8:72], y, 1, 3, 0, shape=(8, 64))
    np.testing.assert_array_equal(y[:6], storage[1, 4:10, 8:72])
    assert not y[6:].any()


@tilus.kernel
def of_rank_5(x: Tensor[uint16, 2, 3, 2, 4, 16], y: Tensor[uint16, 2, 2, 4, 8], start: int32):
    tilus.grid(1, warps=1)
    tile = tilus.shared(uint16, [2, 2, 4, 8])
    full = tilus.mbarrier(1)
    tilus.arrive(full, nbytes=tile.nbytes)
    tilus.copy_tensor(tile, x, [0, start, 0, 0, 8], dims=(0, 2, 3, 4), barrier=full)
    tilus.wait_barrier(full, 0)
    tilus.store(y, [0, 0, 0, 0], tilus.load_shared(tile))


@tilus.kernel
def of_rank_1(x: Tensor[f32, "n"], y: Tensor[f32, "n"]):
    tilus.grid(tilus.cdiv(x.shape[0], 64), warps=1)
    tile = tilus.shared(f32, [64])
    full = tilus.mbarrier(1)
    first = tilus.block_id(0) * 64
    tilus.arrive(full, nbytes=tile.nbytes)
    tilus.copy_tensor(tile, x, [first], barrier=full)
    tilus.wait_barrier(full, 0)
    tilus.store_tensor(y, [first], tile)
    tilus.commit_stores()
    tilus.wait_stores()


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_rank_1_and_5(device: str) -> None:
    x, y = drawn(uint16, (2, 3, 2, 4, 16), 5), np.zeros((2, 2, 4, 8), np.uint16)
    of_rank_5.on(device)(x, y, 2)
    np.testing.assert_array_equal(y, x[:, 2, :, :, 8:])
    a, b = drawn(f32, (150,), 6), np.zeros(150, np.float32)
    of_rank_1.on(device)(a, b)
    np.testing.assert_array_equal(a, b)


@tilus.kernel
def part(x: Tensor[f16, "b", "m", "k"], y: Tensor[f16, "p", "q"], first: int32, count: int32, *, rows: Const):
    """Rows of one sequence; the map ends where the part does. Only `rows` of the 16 rows of the tile are copied."""
    tilus.grid(1, warps=1)
    tile = tilus.shared(f16, [16, 128])
    full = tilus.mbarrier(1)
    tilus.store_shared(tile, tilus.full([16, 128], 7.0, f16))
    tilus.fence_async()
    tilus.sync()
    tilus.arrive(full, nbytes=rows * 256)
    tilus.copy_tensor(tile, tilus.narrow(x[1], 0, first, count), [2, 0], shape=[rows, 128], barrier=full)
    tilus.wait_barrier(full, 0)
    tilus.store(y, [0, 0], tilus.load_shared(tile))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [4, 8, 16])
def test_a_part_of_a_tensor_by_the_first_rows_of_a_tile(device: str, rows: int) -> None:
    x, y = drawn(f16, (2, 30, 128), 7), np.zeros((16, 128), np.float16)
    expected = np.full((16, 128), 7, np.float16)
    expected[:rows] = np.concatenate([x[1, 12:17], np.zeros((16, 128))])[:rows]
    part.on(device)(x, y, 10, 7, rows=rows)
    np.testing.assert_array_equal(y, expected)
