"""Tensor copies: what arrives and what is written on every execution, at and beyond the edges; layouts; PTX."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tensor_copy_kernels import IN_FRONT, Array, arguments, drawn, fetch, put

import tilus
from tilus import Const, Tensor, f16, f32, int32, uint8, uint16
from tilus.compiler import compile_function
from tilus.dtypes import int64
from tilus.ptx.assembler import assemble
from tilus.target import DEFAULT_TARGET, get_target

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


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
# and 0 bytes, inside of the tensor, over every edge at which a store may start, too, and beyond it
INSIDE = [
    (f16, (2, 40, 128), (16, 64), None, (1, 8, 64)),
    (f16, (2, 40, 128), (16, 128), None, (0, 30, 0)),
    (f16, (1, 5, 128), (8, 64), None, (0, 0, 96)),
    (f16, (3, 40, 96), (8, 32), None, (2, 35, 80)),
    (f16, (3, 40, 96), (24, 48), None, (2, 20, 56)),
    (f16, (3, 40, 96), (16, 24), None, (1, 37, 88)),
    (f16, (3, 40, 96), (5, 64), None, (1, 37, 40)),
    (uint8, (2, 20, 256), (8, 256), None, (1, 0, 16)),
    (uint8, (2, 20, 80), (16, 80), None, (1, 10, 16)),
    (f32, (4, 9, 64), (8, 32), None, (3, 4, 40)),
    (f32, (4, 9, 64), (1, 256), None, (0, 8, 12)),
    (f32, (4, 9, 64), (4, 32), (0, 2), (1, 3, 32)),
    (f32, (9, 3, 64), (8, 16), (0, 2), (3, 2, 56)),
    (f16, (2, 40, 128), (16, 64), None, (5, 8, 64)),
    (f16, (2, 40, 128), (16, 64), None, (0, 1000, 64)),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "extents", "shape", "dims", "offsets"), [*INSIDE, *IN_FRONT])
def test_a_copy_brings_the_tile_with_zeros_outside(
    device: str, dtype: Any, extents: tuple[int, ...], shape: tuple[int, int], dims: Any, offsets: tuple[int, ...]
) -> None:
    x, y = drawn(dtype, extents, 1), np.ones(shape, dtype.numpy)
    whole = np.zeros(spread(shape, dims), dtype.numpy)
    there, here = clipped(x, whole.shape, offsets)
    whole[here] = x[there]
    warps, stage = 1 + 3 * (shape[0] % 3 == 1), shape[0] % 3
    options: dict[str, Any] = {"warps": warps, "stage": stage, "evict": (None, "first", "last")[stage]}
    fetch.on(device)(x, y, *arguments(dtype, offsets), shape=shape, dims=dims, **options)
    np.testing.assert_array_equal(y, whole.reshape(shape))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "extents", "shape", "dims", "offsets"), INSIDE)
def test_a_store_writes_what_lies_inside(
    device: str, dtype: Any, extents: tuple[int, ...], shape: tuple[int, int], dims: Any, offsets: tuple[int, ...]
) -> None:
    x, y = drawn(dtype, shape, 2), drawn(dtype, extents, 3)
    expected = y.copy()
    there, here = clipped(y, spread(shape, dims), offsets)
    expected[there] = x.reshape(spread(shape, dims))[here]
    odd = shape[0] % 2
    put.on(device)(x, y, *arguments(dtype, offsets), shape=shape, dims=dims, warps=1 + odd, evict=(None, "first")[odd])
    np.testing.assert_array_equal(y, expected)


@tilus.kernel
def put_behind(x: Tensor[f32, "m", 64], y: Tensor[f32, "m", 64], before: int32):
    """Each block stores rows of its own, unless they start in front of the tensor."""
    tilus.grid(3, warps=1)
    tile = tilus.shared(f32, [8, 64])
    tilus.store_shared(tile, tilus.load(x, [tilus.block_id(0) * 8, 0], [8, 64]))
    tilus.fence_async()
    tilus.sync()
    row = tilus.block_id(0) * 8 - before
    if row >= 0:
        tilus.store_tensor(y, [row, 0], tile)
    tilus.commit_stores()
    tilus.wait_stores()


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_that_do_not_store_may_have_negative_offsets(device: str) -> None:
    x, y = drawn(f32, (24, 64), 11), np.zeros((24, 64), np.float32)
    put_behind.on(device)(x, y, 8)
    np.testing.assert_array_equal(y, np.concatenate([x[8:], np.zeros((8, 64), np.float32)]))


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


# ---- layouts


@pytest.mark.parametrize(
    ("dtype", "shape", "box"),
    [
        (f16, (16, 64), "1 boxes of [1, 16, 64], swizzled by 128 bytes"),
        (f16, (16, 128), "2 boxes of [1, 16, 64], swizzled by 128 bytes"),
        (f16, (16, 96), "3 boxes of [1, 16, 32], swizzled by 64 bytes"),
        (uint8, (8, 256), "2 boxes of [1, 8, 128], swizzled by 128 bytes"),
        (f32, (8, 8), "1 boxes of [1, 8, 8], swizzled by 32 bytes"),
        (f16, (4, 64), "1 boxes of [1, 4, 64], swizzled by 0 bytes"),
        (f32, (1, 256), "1 boxes of [1, 1, 256], swizzled by 0 bytes"),
    ],
)
def test_boxes_are_as_wide_as_the_swizzle(dtype: Any, shape: tuple[int, int], box: str) -> None:
    compiled = compile_function(fetch.ir(T=dtype, shape=shape), DEFAULT_TARGET)
    assert f"copy_tensor x: {box}" in [note.text for note in compiled.lowered.notes]
    (found,) = compiled.lowered.tensor_maps
    assert math.prod(found.box) * int(box.split()[0]) == math.prod(shape)


@tilus.kernel
def by_both(x: Tensor[uint8, "m", 64], y: Tensor[uint8, "m", 64]):
    """Bulk copies need row-major memory, which a tensor copy can write, too."""
    tilus.grid(1, warps=1)
    tile = tilus.shared(uint8, [2, 8, 64])
    full = tilus.mbarrier(1)
    tilus.arrive(full, nbytes=tile.nbytes)
    tilus.copy_bulk(tile[0], x, [0, 0], barrier=full)
    tilus.copy_tensor(tile[1], x, [8, 0], barrier=full)
    tilus.wait_barrier(full, 0)
    tilus.store(y, [0, 0], tilus.load_shared(tile, shape=[8, 64]))
    tilus.store(y, [8, 0], tilus.load_shared(tile[1]))


@pytest.mark.parametrize("device", DEVICES)
def test_the_layout_suits_all_copies(device: str) -> None:
    x, y = drawn(uint8, (16, 64), 8), np.zeros((16, 64), np.uint8)
    by_both.on(device)(x, y)
    np.testing.assert_array_equal(y, x)


@tilus.kernel
def product(
    x: Tensor[f16, "m", "k"], w: Tensor[f16, "n", "k"], y: Tensor[f32, "m", "n"], *, bk: Const, bm: Const = 64, bn: Const = 32,
    stages: Const = 3,
):  # fmt: skip
    """x w^T: a warp copies the tiles of both operands, a warpgroup multiplies them where they land."""
    tilus.grid(tilus.cdiv(x.shape[0], bm), tilus.cdiv(w.shape[0], bn), warps=5)
    xs = tilus.shared(f16, [stages, bm, bk])
    ws = tilus.shared(f16, [stages, bn, bk])
    full = tilus.mbarrier(stages)
    empty = tilus.mbarrier(stages)
    i, j = tilus.block_id(0) * bm, tilus.block_id(1) * bn
    steps = tilus.cdiv(x.shape[1], bk)
    with tilus.warps(4, 1):
        for t in tilus.range(steps):
            s = t % stages
            tilus.wait_barrier(empty[s], 1 - t // stages % 2)
            tilus.arrive(full[s], nbytes=xs[s].nbytes + ws[s].nbytes)
            tilus.copy_tensor(xs[s], x, [i, t * bk], barrier=full[s])
            tilus.copy_tensor(ws[s], w, [j, t * bk], barrier=full[s], evict="last")
    with tilus.warps(0, 4):
        acc = tilus.zeros([bm, bn])
        for t in tilus.range(steps):
            s = t % stages
            tilus.wait_barrier(full[s], t // stages % 2)
            acc = tilus.wgmma(xs[s], ws[s], acc)
            tilus.wgmma_wait(0)
            tilus.arrive(empty[s])
        tilus.store(y, [i, j], acc)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bk", [32, 64, 128])
def test_products_of_tiles_that_copies_bring(device: str, bk: int) -> None:
    """Swizzles of 64 and 128 bytes, one and two boxes; all edges are inside of tiles. Sums of whole numbers are exact."""
    rng = np.random.default_rng(10)
    x, w = (rng.integers(-4, 5, (rows, 200)).astype(np.float16) for rows in (70, 40))
    y = np.zeros((70, 40), np.float32)
    product.on(device)(x, w, y, bk=bk)
    np.testing.assert_array_equal(y, x.astype(np.float32) @ w.T.astype(np.float32))


# ---- PTX


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("dtype", [uint8, f16, f32, int64])
def test_the_assembler_takes_every_form(dtype: Any, warps: int) -> None:
    target = get_target("sm_90a")
    for text in (
        *(fetch.ptx(T=dtype, shape=(8, 64), warps=warps, evict=evict) for evict in (None, "last")),
        *(put.ptx(T=dtype, shape=(8, 64), warps=warps, evict=evict) for evict in (None, "first")),
        of_rank_5.ptx(),
    ):
        assert assemble(text, target).kernels[0].spill_store_nbytes == 0


def test_copies_of_the_same_boxes_share_a_map() -> None:
    @tilus.kernel
    def twice(x: Tensor[f16, "m", 64], y: Tensor[f16, "m", 64]):
        tilus.grid(1, warps=1)
        tile = tilus.shared(f16, [4, 8, 64])
        full = tilus.mbarrier(1)
        for i in tilus.static_range(3):
            tilus.copy_tensor(tile[i], x, [8 * i, 0], barrier=full)
        tilus.copy_tensor(tile[3], y, [0, 0], barrier=full)
        tilus.store_tensor(y, [8, 0], tile[3])

    text = twice.ptx()
    assert text.count(".param .align 64 .b8 tensor_map") == 2
    assert text.count("complete_tx::bytes [") == 4
