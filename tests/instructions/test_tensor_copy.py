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
    fetch.on(device)(
        x, y, *offsets, shape=shape, dims=dims, warps=warps, stage=stage, evict=(None, "first", "last")[stage]
    )
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


# ---- refusals


@tilus.kernel
def mistaken(
    x: Tensor[f16, "m", 64], odd: Tensor[f16, "m", 65], codes: Tensor[uint4, "m", 64], six: Tensor[f16, 1, 1, 1, 1, "m", 64], *,
    case: Const,
):  # fmt: skip
    tilus.grid(1, warps=1)
    full = tilus.mbarrier(3)
    tile = tilus.shared(f16, [2, 8, 64], name="tile")
    match_dims = (1, 0)
    if case == "type":
        tilus.copy_tensor(tilus.shared(uint4, [8, 64]), codes, [0, 0], barrier=full[0])
    if case == "rank":
        tilus.copy_tensor(tile[0], six, [0, 0, 0, 0, 0, 0], barrier=full[0])
    if case == "order":
        tilus.copy_tensor(tilus.shared(f16, [64, 8]), x, [0, 0], dims=match_dims, barrier=full[0])
    if case == "last":
        tilus.copy_tensor(tilus.shared(f16, [64]), x, [0, 0], dims=(0,), barrier=full[0])
    if case == "stride":
        tilus.copy_tensor(tile[0], odd, [0, 0], barrier=full[0])
    if case == "row":
        tilus.copy_tensor(tilus.shared(f16, [8, 12]), x, [0, 0], barrier=full[0])
    if case == "large":
        tilus.copy_tensor(tilus.shared(f16, [264, 64]), x, [0, 0], barrier=full[0])
    if case == "start":
        tilus.copy_tensor(tilus.shared(f16, [2, 5, 24], name="stages")[1], x, [0, 0], barrier=full[0])
    if case == "block":
        tilus.copy_tensor(tile[0], tilus.narrow(x, 0, tilus.block_id(0) * 8, 8), [0, 0], barrier=full[0])
    if case == "pinned":
        wide = tilus.shared(f16, [8, 64], layout=tilus.layout.padded([8, 64], 8))
        tilus.store_tensor(x, [0, 0], wide)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("type", "copy_tensor: codes of uint4, expected elements of 8, 16, 32 or 64 bits"),
        ("rank", "copy_tensor: six has rank 6, expected at most 5"),
        ("order", "copy_tensor: a tile along dims [1, 0] of x, expected ascending dims, the last one included"),
        ("last", "copy_tensor: a tile along dims [0] of x, expected ascending dims, the last one included"),
        ("stride", "copy_tensor: dim 0 of odd has a stride of 130 bytes, expected a multiple of 16"),
        (
            "row",
            "copy_tensor: a tile of shape [8, 12] of f16, whose rows are 24 bytes; expected at most 256 elements along each "
            "dim and rows of a multiple of 16 bytes",
        ),
        (
            "large",
            "copy_tensor: a tile of shape [264, 64] of f16, whose rows are 128 bytes; expected at most 256 elements along "
            "each dim and rows of a multiple of 16 bytes",
        ),
        ("start", "copy_tensor: the tile starts at multiples of 240 bytes of stages, expected 128 bytes"),
        (
            "block",
            "a tensor copy of x: where the view lies depends on block_id(0); expected a tensor that is known when the kernel is "
            "launched",
        ),
    ],
)
def test_mistakes(case: str, message: str) -> None:
    with pytest.raises(TilusError) as error:
        mistaken.ptx(case=case)
    assert error.value.message == message
    assert error.value.loc is not None and error.value.hint


def test_a_pinned_layout_that_the_hardware_cannot_read() -> None:
    with pytest.raises(
        TilusError, match=r"store_tensor cannot work with layout strided\(.*\) of wide; expected one of row_major"
    ):
        mistaken.ptx(case="pinned")


def test_a_transposed_tensor_is_refused() -> None:
    x, y = drawn(f16, (1, 64, 40), 9), np.zeros((8, 40), np.float16)
    with pytest.raises(TilusError, match="the last dim of x has stride x_stride2, expected 1"):
        fetch.on("reference")(x.transpose(0, 2, 1), y, 0, 0, 0, shape=(8, 40))


def test_the_emulator_checks_addresses_at_the_launch() -> None:
    storage = np.zeros(8 + 40 * 64, np.float16)
    skew = (storage.ctypes.data // 2) % 8
    x = storage[8 - skew + 1 :][: 39 * 64].reshape(1, 39, 64)
    with pytest.raises(TilusError, match=r"a tensor copy of x: its address is [0-9]+ bytes, expected a multiple of 16"):
        fetch.on("emulator")(x, np.zeros((8, 64), np.float16), 0, 0, 0, shape=(8, 64))


def test_other_targets_are_refused() -> None:
    with pytest.raises(TilusError, match=r"tilus\.store_tensor needs sm_90a or a later GPU, the target is sm_89"):
        only_store.ptx(target="sm_89")
    with pytest.raises(TilusError, match=r"kernel only_store uses tilus\.store_tensor, which needs a GPU"):
        only_store.on("cpu")(np.zeros((8, 64), np.float16))


@tilus.kernel
def only_store(x: Tensor[f16, "m", 64]):
    tilus.grid(1, warps=1)
    tilus.store_tensor(x, [0, 0], tilus.shared(f16, [8, 64]))


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
