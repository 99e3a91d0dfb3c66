"""Bulk copies: what arrives, on every execution; which tiles are runs of memory; what is refused."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tilus
from tilus import Const, Tensor, dtypes, f16, f32, int32, uint8
from tilus.dtypes import int64
from tilus.errors import TilusError
from tilus.instructions.bulk_copy import contiguous_axes
from tilus.ir.expr import Var, as_expr
from tilus.ir.tensor import GlobalTensor
from tilus.ptx.assembler import assemble
from tilus.target import get_target

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
Array = npt.NDArray[Any]


@tilus.kernel
def fetch(
    x: Tensor["T", "a", "b", "c"], y: Tensor["T", "p", "q", "r"], *, b: Const, c: Const, shape: Const, offsets: Const,
    stage: Const = 1, warps: Const = 1, evict: Const = None,
):  # fmt: skip
    """A tile through one of two stages of shared memory."""
    tilus.grid(1, warps=warps)
    tile = tilus.shared(x.dtype, [2, *shape])
    full = tilus.mbarrier(2)
    tilus.arrive(full[stage], nbytes=tile[stage].nbytes)
    tilus.copy_bulk(tile[stage], x, offsets, barrier=full[stage], evict=evict)
    tilus.wait_barrier(full[stage], 0)
    tilus.store(y, [0, 0, 0], tilus.load_shared(tile[stage]))


@tilus.kernel
def put(
    x: Tensor["T", "p", "q", "r"], y: Tensor["T", "a", "b", "c"], *, b: Const, c: Const, shape: Const, offsets: Const,
    warps: Const = 1, add: Const = False,
):  # fmt: skip
    """A tile to global memory, by every block of the grid."""
    tilus.grid(3, warps=warps)
    tile = tilus.shared(x.dtype, shape)
    tilus.store_shared(tile, tilus.load(x, [0, 0, 0], shape))
    tilus.fence_async()
    tilus.sync()
    tilus.store_bulk(y, offsets, tile, add=add)
    tilus.commit_stores()
    tilus.wait_stores()


# (extents of the tensor, of the tile, offsets): one run, a row each, rows of several dims, single elements
TILES = [
    ((3, 4, 64), (1, 4, 64), (2, 0, 0)),
    ((3, 4, 64), (3, 4, 64), (0, 0, 0)),
    ((5, 4, 64), (1, 2, 64), (4, 1, 0)),
    ((5, 4, 64), (3, 2, 64), (1, 2, 0)),
    ((5, 4, 64), (2, 3, 32), (3, 1, 32)),
    ((40, 2, 32), (40, 1, 16), (0, 1, 16)),
    ((2, 7, 48), (1, 1, 16), (1, 6, 32)),
]


def drawn(dtype: Any, shape: tuple[int, ...], seed: int) -> Array:
    """Random values that the type has."""
    rng = np.random.default_rng(seed)
    if dtype in (f16, f32):
        return rng.standard_normal(shape).astype(dtype.numpy)
    return rng.integers(0, 200, shape).astype(dtype.numpy)


def part(x: Array, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Array:
    return x[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("extents", "shape", "offsets"), TILES)
@pytest.mark.parametrize(("dtype", "warps"), [(uint8, 1), (f16, 2), (f32, 4)])
def test_a_copy_brings_the_tile(
    device: str, extents: tuple[int, int, int], shape: tuple[int, ...], offsets: tuple[int, ...], dtype: Any, warps: int
) -> None:
    x, y = drawn(dtype, extents, 1), np.zeros(shape, dtype.numpy)
    options = {"b": extents[1], "c": extents[2], "shape": shape, "offsets": offsets, "warps": warps}
    fetch.on(device)(x, y, evict=(None, "first", "last")[warps // 2], stage=warps % 2, **options)
    np.testing.assert_array_equal(y, part(x, shape, offsets))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("extents", "shape", "offsets"), TILES)
def test_a_store_changes_the_tile_alone(
    device: str, extents: tuple[int, int, int], shape: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    x, y = drawn(f16, shape, 2), drawn(f16, extents, 3)
    expected = y.copy()
    part(expected, shape, offsets)[:] = x
    put.on(device)(x, y, b=extents[1], c=extents[2], shape=shape, offsets=offsets)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("extents", "shape", "offsets"), TILES[:4])
def test_sums_of_several_blocks(
    device: str, extents: tuple[int, int, int], shape: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    x = drawn(f32, shape, 4).round(2) * 256 // 1  # whole numbers: any order of the additions gives the same
    y = np.arange(math.prod(extents), dtype=np.float32).reshape(extents)
    expected = y.copy()
    part(expected, shape, offsets)[:] += 3 * x
    put.on(device)(x, y, b=extents[1], c=extents[2], shape=shape, offsets=offsets, add=True, warps=2)
    np.testing.assert_array_equal(y, expected)


@tilus.kernel
def packed_rows(x: Tensor["T", "m", "k"], y: Tensor["T", "m", "k"], *, k: Const, rows: Const):
    tilus.grid(tilus.cdiv(x.shape[0], rows), warps=1)
    tile = tilus.shared(x.dtype, [rows, k])
    full = tilus.mbarrier(1)
    first = tilus.block_id(0) * rows
    tilus.arrive(full, nbytes=tile.nbytes)
    tilus.prefetch_bulk(x, [first, 0], [rows, k])
    tilus.copy_bulk(tile, x, [first, 0], barrier=full)
    tilus.wait_barrier(full, 0)
    tilus.fence_async()
    tilus.sync()
    tilus.store_bulk(y, [first, 0], tile)
    tilus.commit_stores()
    tilus.wait_stores(reads_only=True)
    tilus.wait_stores()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["uint1", "uint3", "int4", "uint6"])
def test_packed_types_are_bytes_like_others(device: str, name: str) -> None:
    dtype = dtypes.dtype(name)
    x = np.random.default_rng(5).integers(0, 256, (6, 128 * dtype.nbits // 8)).astype(np.uint8)
    y = np.zeros_like(x)
    packed_rows.on(device)(tilus.packed(x, dtype, (6, 128)), tilus.packed(y, dtype, (6, 128)), k=128, rows=2)
    np.testing.assert_array_equal(y, x)


@tilus.kernel
def first_rows(x: Tensor[uint8, "m", "k"], y: Tensor[uint8, "m", "k"], *, rows: Const):
    """Only `rows` of the 4 rows of the shared tensor."""
    tilus.grid(1, warps=1)
    tile = tilus.shared(uint8, [4, 32])
    full = tilus.mbarrier(1)
    tilus.store_shared(tile, tilus.full([4, 32], 7, uint8))
    tilus.fence_async()
    tilus.sync()
    tilus.arrive(full, nbytes=rows * 32)
    tilus.copy_bulk(tile, x, [0, 0], shape=[rows, 32], barrier=full)
    tilus.wait_barrier(full, 0)
    tilus.store(y, [0, 0], tilus.load_shared(tile))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_first_rows_of_a_shared_tensor(device: str, rows: int) -> None:
    x, y = drawn(uint8, (4, 32), 6), np.zeros((4, 32), np.uint8)
    first_rows.on(device)(x, y, rows=rows)
    np.testing.assert_array_equal(y, np.where(np.arange(4)[:, None] < rows, x, 7))


# ---- runs


def test_runs_are_what_is_consecutive_in_memory() -> None:
    """`contiguous_axes` against the addresses of all elements, for constant extents and strides, dims in any order."""
    rng = random.Random(0)
    counts: set[int] = set()
    for _ in range(2000):
        rank = rng.randint(1, 4)
        extents = [rng.choice([1, 2, 3, 4]) for _ in range(rank)]
        strides, step = [0] * rank, 1
        for d in rng.choice([list(reversed(range(rank))), rng.sample(range(rank), rank)]):
            strides[d] = step
            step *= extents[d] + rng.choice([0, 0, 0, 1])
        axes = sorted(rng.sample(range(rank), rng.randint(1, rank)))
        shape = [rng.choice([extents[d], rng.randint(1, extents[d])]) for d in axes]
        exprs = [tuple(map(as_expr, numbers)) for numbers in (extents, strides)]
        found = contiguous_axes(GlobalTensor(uint8, *exprs, Var("p", int64)), shape, axes)
        grid = np.meshgrid(*(np.arange(n) * strides[d] for n, d in zip(shape, axes, strict=True)), indexing="ij")
        addresses = np.sum(grid, axis=0)
        runs = [addresses[(0,) * (len(shape) - count)].reshape(-1) for count in range(len(shape) + 1)]
        assert found == max(count for count, run in enumerate(runs) if (run == np.arange(run.size)).all())
        counts.add(found)
    assert counts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("extents", "shape", "offsets"), TILES)
def test_one_instruction_for_every_run(
    extents: tuple[int, int, int], shape: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    """Runs of the tile by numpy, in the tensor whose first extent is not known."""
    addresses = part(np.arange(math.prod(extents)).reshape(extents), shape, offsets).reshape(-1)
    breaks = int((np.diff(addresses) != 1).sum())
    text = fetch.ptx(T=uint8, b=extents[1], c=extents[2], shape=shape, offsets=offsets)
    assert text.count("cp.async.bulk.shared::cluster.global") == breaks + 1


# ---- refusals


def refused(kernel: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(TilusError) as error:
        kernel(*args, **options)
    return error.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shape": (2, 1, 24)},
            "copy_bulk: a tile of shape [2, 1, 24] of x has contiguous runs of 24 bytes, expected a multiple of 16 bytes",
        ),
        (
            {"offsets": (0, 0, 8)},
            "copy_bulk: runs of x are known to start at multiples of 8 bytes, expected 16 bytes",
        ),
        ({"offsets": (0, 0)}, "copy_bulk: 2 offsets for x, which has rank 3"),
        ({"evict": "soon"}, "copy_bulk: evict='soon', expected 'first', 'last' or None"),
        (
            {"offsets": (8, 0, 0)},
            "load of x in block (0, 0, 0), tile element [0, 0, 0]: index 8 along dimension 0, expected 0 <= index < 8",
        ),
    ],
)
def test_what_cannot_be_copied_is_refused(options: dict[str, Any], message: str) -> None:
    x, y = np.zeros((8, 4, 64), np.uint8), np.zeros((1, 1, 16), np.uint8)
    options = {"b": 4, "c": 64, "shape": (1, 1, 16), "offsets": (0, 0, 0), **options}
    assert refused(fetch.on("reference"), x, y, **options) == message


@tilus.kernel
def mistaken(x: Tensor[uint8, "m", 64], y: Tensor[f16, "m", 64], start: int32, *, case: Const):
    tilus.grid(1, warps=1)
    full = tilus.mbarrier(3)
    tile = tilus.shared(uint8, [2, 3, 64])
    if case == "dtype":
        tilus.copy_bulk(tilus.shared(f16, [3, 64], name="halves"), x, [0, 0], barrier=full[0])
    if case == "shape":
        tilus.copy_bulk(tile[0], x, [0, 0], shape=[2, 32], barrier=full[0])
    if case == "rows":
        tilus.copy_bulk(tile[0], x, [0, 0], shape=[4, 64], barrier=full[0])
    if case == "barriers":
        tilus.copy_bulk(tile[0], x, [0, 0], barrier=full)
    if case == "barrier":
        tilus.copy_bulk(tile[0], x, [0, 0], barrier=full[3])
    if case == "no barrier":
        tilus.copy_bulk(tile[0], x, [0, 0], barrier=tilus.shared(uint8, [1], name="byte")[0])
    if case == "start":
        tilus.copy_bulk(tile[0], x, [0, start], barrier=full[0])
    if case == "part":
        tilus.copy_bulk(tilus.shared(uint8, [5, 24], name="parts")[1], x, [0, 0], shape=[16], barrier=full[0])
    if case == "add":
        tilus.store_bulk(y, [0, 0], tilus.shared(f16, [3, 64]), add=True)
    if case == "pending":
        tilus.wait_stores(-1)
    if case == "prefetch":
        tilus.prefetch_bulk(x, [0, 0], [2, 24])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("dtype", "copy_bulk: x of uint8 and halves of f16"),
        (
            "shape",
            "copy_bulk: a tile of shape [2, 32] and [3, 64] elements of shared; expected the same shape, but for a first "
            "dim that may be smaller",
        ),
        (
            "rows",
            "copy_bulk: a tile of shape [4, 64] and [3, 64] elements of shared; expected the same shape, but for a first "
            "dim that may be smaller",
        ),
        ("barriers", "copy_bulk: [3] barriers, expected one"),
        ("barrier", "index 3 of shared tensor mbarrier is out of range, expected -3 to 2"),
        ("no barrier", "copy_bulk: byte is uint8[1], expected barriers"),
        ("start", "copy_bulk: runs of x are known to start at multiples of 1 bytes, expected 16 bytes"),
        ("part", "copy_bulk: the tile starts at multiples of 24 bytes of parts, expected 16 bytes"),
        ("add", "store_bulk: adds to y of f16, expected f32"),
        ("pending", "wait_stores(-1): expected 0 or more pending groups"),
        (
            "prefetch",
            "prefetch_bulk: a tile of shape [2, 24] of x has contiguous runs of 24 bytes, expected a multiple of 16 bytes",
        ),
    ],
)
def test_mistakes(case: str, message: str) -> None:
    x, y = np.zeros((3, 64), np.uint8), np.zeros((3, 64), np.float16)
    assert refused(mistaken.on("reference"), x, y, 0, case=case) == message


def test_other_targets_are_refused() -> None:
    options = {"T": uint8, "b": 4, "c": 64, "shape": (1, 4, 64), "offsets": (0, 0, 0)}
    assert refused(fetch.ptx, target="sm_89", **options).startswith("tilus.mbarrier needs sm_90a or a later GPU")
    x, y = np.zeros((3, 4, 64), np.uint8), np.zeros((1, 4, 64), np.uint8)
    del options["T"]
    assert "which needs a GPU" in refused(put.on("cpu"), y, x, **options)


# ---- PTX


def test_the_assembler_takes_every_form() -> None:
    options = {"b": 4, "c": 64, "shape": (2, 2, 64), "offsets": (1, 2, 0)}
    target = get_target("sm_90a")
    for text in (
        *(fetch.ptx(T=uint8, evict=evict, warps=warps, **options) for evict in (None, "first") for warps in (1, 4)),
        *(put.ptx(T=f32, add=add, **options) for add in (False, True)),
        packed_rows.ptx(T=dtypes.uint3, k=128, rows=2),
    ):
        assert assemble(text, target).kernels[0].spill_store_nbytes == 0


def test_code_is_made_only_for_starts_that_are_known() -> None:
    """As on the reference, for copies of both directions."""
    options = {"b": 4, "c": 64, "shape": (2, 1, 16), "offsets": (0, 0, 8)}
    message = "are known to start at multiples of 8 bytes, expected 16 bytes"
    assert message in refused(fetch.ptx, T=uint8, **options)
    assert message in refused(put.ptx, T=uint8, **options)


def test_groups_are_waited_for_as_said() -> None:
    text = packed_rows.ptx(T=dtypes.uint3, k=128, rows=2)
    order = ["cp.async.bulk.commit_group;", "cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group 0;"]
    places = [text.index(instruction) for instruction in order]
    assert places == sorted(places)
    assert text.count("cp.async.bulk.prefetch.L2.global") == 1
    assert "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 " in put.ptx(
        T=f32, add=True, b=4, c=64, shape=(1, 1, 16), offsets=(0, 0, 0)
    )


def test_policies_are_made_once() -> None:
    options = {"T": uint8, "b": 4, "c": 64, "shape": (4, 1, 64), "offsets": (0, 0, 0)}
    for evict in ("first", "last"):
        text = fetch.ptx(evict=evict, **options)
        assert text.count(f"createpolicy.fractional.L2::evict_{evict}.b64") == text.count("createpolicy") == 1
        assert text.count("complete_tx::bytes.L2::cache_hint") == 4
    assert "createpolicy" not in fetch.ptx(**options)


# ---- what the emulator shows


@tilus.kernel
def careless(x: Tensor[f32, "n", 64], y: Tensor[f32, "n", 64], *, mistake: Const):
    tilus.grid(1, warps=2)
    tile = tilus.shared(f32, [4, 64])
    full = tilus.mbarrier(1)
    tilus.arrive(full, nbytes=tile.nbytes + (256 if mistake == "too many bytes" else 0))
    tilus.copy_bulk(tile, x, [0, 0], barrier=full)
    if mistake != "no wait":
        tilus.wait_barrier(full, 0)
    value = tilus.load_shared(tile) * 2
    tilus.sync()
    tilus.store_shared(tile, value)
    if mistake != "no fence":
        tilus.fence_async()
    if mistake != "no barrier":
        tilus.sync()
    tilus.store_bulk(y, [0, 0], tile)
    if mistake != "no commit":
        tilus.commit_stores()
    if mistake != "no wait for stores":
        tilus.wait_stores()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("too many bytes", "phase 0 lacks 0 of 2 arrivals and 256 bytes"),
        ("no wait", "while an asynchronous copy into it is in flight"),
        ("no fence", "which a thread has stored to without a fence.proxy.async"),
        ("no barrier", "race: reads shared memory that another thread has written"),
        ("no commit", "exits while a bulk copy of this thread may still read shared memory"),
        ("no wait for stores", "exits while a bulk copy of this thread may still read shared memory"),
    ],
)
def test_mistakes_show_on_the_emulator(mistake: str, message: str) -> None:
    x, y = drawn(f32, (4, 64), 9), np.zeros((4, 64), np.float32)
    assert message in refused(careless.on("emulator"), x, y, mistake=mistake)


def test_without_a_mistake_there_is_none() -> None:
    x, y = drawn(f32, (4, 64), 9), np.zeros((4, 64), np.float32)
    careless.on("emulator")(x, y, mistake=None)
    np.testing.assert_array_equal(y, 2 * x)
