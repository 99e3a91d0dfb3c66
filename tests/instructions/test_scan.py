"""Prefix sums and running maxima: the meaning against a loop, and the PTX against the meaning, over any layout."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_programs import WARP_COUNTS, Array, assembles, random_layout, run_all, values_of

from tilus.dtypes import DTYPES, DataType, bf16, boolean, f16, f32, float8_e4m3, int8, int32, int64, uint8, uint32
from tilus.errors import TilusError
from tilus.instructions import scan
from tilus.instructions.convert import with_layout
from tilus.instructions.memory import load, store
from tilus.ir.builder import IRBuilder
from tilus.ir.tensor import GlobalTensor
from tilus.layout import RegisterLayout, auto, local, replicated, spatial

OPS = ("sum", "max", "min")
RESULTS = {int8: int32, int32: int32, uint8: uint32, uint32: uint32, f32: f32, f16: f16, bf16: bf16}


def expected(op: str, dtype: DataType, x: Array, axis: int) -> Array:
    """One element after the other; float sums in float64, integer sums modulo 2^32."""
    x = np.moveaxis(x, axis, 0)
    result = np.empty(x.shape, np.float64 if dtype.is_float else np.int64)
    so_far = None
    for i, row in enumerate(x.astype(result.dtype)):
        if so_far is None:
            so_far = row
        else:
            so_far = so_far + row if op == "sum" else (np.fmax if op == "max" else np.fmin)(so_far, row)
        result[i] = so_far
    result = np.moveaxis(result, 0, axis)
    if dtype.is_float:
        return result
    if op != "sum":
        return result.astype(dtype.compute)
    return (result % 2**32).astype(np.uint32).view(RESULTS[dtype].compute)


def error_bound(dtype: DataType, x: Array, axis: int) -> Array:
    """As for a sum of i elements: any order of additions in f32, then one rounding where the result has 16 bits."""
    magnitude = np.cumsum(np.abs(x.astype(np.float64)), axis)
    accumulated = x.shape[axis] * f32.eps / 2 * magnitude * (1 + 1e-3)
    exact = np.abs(np.cumsum(x.astype(np.float64), axis))
    return accumulated + (0 if dtype == f32 else dtype.eps / 2 * (exact + accumulated) + dtype.smallest_subnormal)


def check(
    op: str, dtype: DataType, layout: RegisterLayout, axis: int, num_warps: int, rng: random.Random,
    pinned: RegisterLayout | None = None,
) -> None:  # fmt: skip
    x = values_of(rng, dtype, layout.shape)
    out_dtype = RESULTS[dtype] if op == "sum" else dtype

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [0] * x.rank, shape=layout.shape, layout=layout)
        result = getattr(scan, f"cum{op}").build(b, tile, axis)
        if pinned is not None:
            result = with_layout.build(b, result, pinned)
        store.build(b, y, [0] * y.rank, result)

    arrays = {"x": (dtype, x), "y": (out_dtype, np.zeros(x.shape, out_dtype.compute))}
    for found in run_all(build, arrays, num_warps, seed=rng.getrandbits(16)):
        want = expected(op, dtype, x, axis)
        if op == "sum" and dtype.is_float:
            assert (np.abs(found["y"].astype(np.float64) - want) <= error_bound(dtype, x, axis)).all()
        else:
            np.testing.assert_array_equal(found["y"], want)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(1, 3), st.sampled_from(WARP_COUNTS))
def test_any_layout(op: str, rng: random.Random, rank: int, num_warps: int) -> None:
    """Slots, lanes and warps interleaved along the axis in any order, digits of 2 and 3, replicas on both sides."""
    layout = random_layout(rng, rank, num_warps)
    check(op, rng.choice(list(RESULTS)), layout, rng.randrange(rank), num_warps, rng)


@given(st.randoms(use_true_random=False), st.sampled_from(WARP_COUNTS))
def test_result_in_any_layout(rng: random.Random, num_warps: int) -> None:
    layout = random_layout(rng, 2, num_warps)
    pinned = auto(layout.shape, 32 * num_warps, rng.choice([1, 2, 4]))
    check("sum", int32, layout, rng.randrange(2), num_warps, rng, pinned)


@pytest.mark.parametrize(
    ("layout", "axis", "steps"),
    [
        (spatial(128).local(4), 0, ["slots 4", "lanes 32", "threads 4"]),
        (local(4).spatial(128), 0, ["lanes 32", "threads 4", "slots 4"]),
        (spatial(4, 32) * local(2, 3), 1, ["slots 3", "lanes 32"]),
        (spatial(4, 32) * local(2, 3), 0, ["slots 2", "threads 4"]),
        (spatial(96), 0, ["lanes 32", "threads 3"]),
        (spatial(32, 3), 0, ["threads 32"]),
        (replicated(4, 1).spatial(32), 0, ["lanes 32"]),
    ],
)
def test_steps(layout: RegisterLayout, axis: int, steps: list[str]) -> None:
    assert [f"{step.place} {step.term.size}" for step in scan.plan_scan(layout, axis)] == steps


@given(st.randoms(use_true_random=False), st.integers(1, 3), st.sampled_from(WARP_COUNTS))
def test_chunks_are_where_their_elements_are(rng: random.Random, rank: int, num_warps: int) -> None:
    """At every step, the thread of a chunk in the coarser layout holds elements of that chunk, and no others of it."""
    layout = random_layout(rng, rank, num_warps)
    axis = rng.randrange(rank)
    for step in scan.plan_scan(layout, axis):
        width = step.term.weight
        chunks = scan.coarser(layout, axis, width)
        scale = np.array([width if d == axis else 1 for d in range(rank)])
        fine, coarse = layout.table() // scale, chunks.table()
        for thread in range(0, layout.num_threads, 7):
            held = sorted(map(tuple, coarse[thread].tolist()))
            assert held == sorted({tuple(i) for i in fine[thread].tolist()})


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("op", OPS)
def test_ptx_assembles(op: str, target: str) -> None:
    for seed, dtype in enumerate(RESULTS):
        layout, axis = random_layout(random.Random(seed), 2, 4), seed % 2

        def build(
            b: IRBuilder, x: GlobalTensor, y: GlobalTensor, layout: RegisterLayout = layout, axis: int = axis
        ) -> None:
            tile = load.build(b, x, [0, 0], shape=layout.shape, layout=layout)
            store.build(b, y, [0, 0], getattr(scan, f"cum{op}").build(b, tile, axis))

        out_dtype = RESULTS[dtype] if op == "sum" else dtype
        assembles(build, {"x": (dtype, layout.shape), "y": (out_dtype, layout.shape)}, 4, target)


def test_neutral_values_change_nothing() -> None:
    """Signed zeros, infinities and NaN of maxima survive: the first element of every thread gets a neutral offset."""
    special = np.array([-0.0, 0.0, np.inf, -np.inf, np.nan, 1.5, -2.0, np.nan], np.float32)
    x = np.stack([np.roll(special, i) for i in range(8)]).repeat(4, axis=0)

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [0, 0], shape=(32, 8), layout=spatial(8, 4).local(4, 2))
        store.build(b, y, [0, 0], scan.cummax.build(b, tile))

    arrays = {"x": (f32, x), "y": (f32, np.zeros(x.shape, np.float32))}
    for found in run_all(build, arrays):
        np.testing.assert_array_equal(found["y"], np.fmax.accumulate(x, axis=1))


def test_negative_zero_is_kept() -> None:
    x = np.full(64, -0.0, np.float32)

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [0], shape=(64,), layout=spatial(64))
        store.build(b, y, [0], scan.cumsum.build(b, tile))

    arrays = {"x": (f32, x), "y": (f32, np.zeros(64, np.float32))}
    for found in run_all(build, arrays, 2):
        assert np.signbit(found["y"]).all()


@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.nbits == 8 and d != boolean])
def test_bytes(name: str) -> None:
    """Maxima of 8-bit types keep their type."""
    dtype = DTYPES[name]
    x = values_of(random.Random(name), dtype, (128,))

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [0], shape=(128,), layout=spatial(32).local(4))
        store.build(b, y, [0], scan.cummax.build(b, tile))

    arrays = {"x": (dtype, x), "y": (dtype, np.zeros(128, dtype.compute))}
    for found in run_all(build, arrays):
        np.testing.assert_array_equal(found["y"], np.fmax.accumulate(x))


@pytest.mark.parametrize(
    ("dtype", "axis", "message"),
    [
        (boolean, 0, "cumulative sum of a tile of boolean, expected a number of at most 32 bits"),
        (int64, 0, "cumulative sum of a tile of int64"),
        (f32, 2, r"cumulative sum along axis 2 of a tile of shape \[32, 4\]"),
    ],
)
def test_mistakes_are_named(dtype: DataType, axis: int, message: str) -> None:
    b = IRBuilder()
    with pytest.raises(TilusError, match=message):
        scan.cumsum.build(b, b.tile(dtype, (32, 4)), axis)


def test_promoted_types() -> None:
    b = IRBuilder()
    for dtype, wide in (*RESULTS.items(), (float8_e4m3, f32)):
        assert scan.cumsum.build(b, b.tile(dtype, (32,))).dtype == wide
        assert scan.cummin.build(b, b.tile(dtype, (32,))).dtype == dtype
