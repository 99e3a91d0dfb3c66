"""Reductions: the meaning against plain numpy, and the PTX against the meaning, over layouts of any kind."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_programs import WARP_COUNTS, Array, assembles, random_layout, run_all, values_of

from tilus.dtypes import DTYPES, DataType, bf16, boolean, f16, f32, int8, int32, int64, uint8, uint16, uint32
from tilus.errors import TilusError
from tilus.instructions import reduce
from tilus.instructions.convert import with_layout
from tilus.instructions.memory import load, store
from tilus.ir.builder import IRBuilder
from tilus.ir.tensor import GlobalTensor
from tilus.layout import RegisterLayout, auto, local, replicated, spatial

NUMBERS = ("sum", "max", "min")
LOGICAL = ("any", "all")
WIDE = {"int": int32, "uint": uint32}


def expected(op: str, dtype: DataType, x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    """Exact for integers and booleans; sums of floats in float64, which the tests compare within an error bound."""
    if op in LOGICAL:
        return getattr(np, op)(x, axis=axes, keepdims=keepdims)
    if op == "sum" and not dtype.is_float:
        total = x.astype(object).sum(axis=axes, keepdims=keepdims)
        wide = WIDE[dtype.kind]
        return np.vectorize(lambda v: int(v) % 2**32, otypes=[np.uint32])(total).view(wide.compute)
    return getattr(np, op)(x.astype(np.float64) if dtype.is_float else x, axis=axes, keepdims=keepdims)


def error_bound(dtype: DataType, x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    """|computed - exact| <= (n - 1) * u * sum |x| (1 + O(u)) for any order of additions in f32 (Higham, 4.6), plus one
    rounding where the result is no f32."""
    n = np.prod([x.shape[a] for a in axes])
    magnitude = np.abs(x.astype(np.float64)).sum(axis=axes, keepdims=keepdims)
    total = np.abs(x.astype(np.float64).sum(axis=axes, keepdims=keepdims))
    accumulated = n * f32.eps / 2 * magnitude * (1 + 1e-3)
    rounded = reduce.result_dtype("sum", dtype) != f32
    return accumulated + (dtype.eps / 2 * (total + accumulated) + dtype.smallest_subnormal if rounded else 0)


def check(
    op: str, dtype: DataType, layout: RegisterLayout, axes: tuple[int, ...], keepdims: bool, num_warps: int,
    rng: random.Random, pinned: RegisterLayout | None = None,
) -> None:  # fmt: skip
    x = values_of(rng, dtype, layout.shape)
    want = expected(op, dtype, x, axes, keepdims)
    out_dtype = reduce.result_dtype(op, dtype)

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [0] * x.rank, shape=layout.shape, layout=layout)
        if op == "sum":
            result = reduce.sum.build(b, tile, axes, keepdims=keepdims, layout=pinned)
        else:
            result = getattr(reduce, op).build(b, tile, axes, keepdims=keepdims)
            result = result if pinned is None else with_layout.build(b, result, pinned)
        store.build(b, y, [0] * y.rank, result)

    arrays = {"x": (dtype, x), "y": (out_dtype, np.zeros(want.shape, out_dtype.compute))}
    for found in run_all(build, arrays, num_warps, seed=rng.getrandbits(16)):
        if op == "sum" and dtype.is_float:
            assert (np.abs(found["y"].astype(np.float64) - want) <= error_bound(dtype, x, axes, keepdims)).all()
        else:
            np.testing.assert_array_equal(found["y"], want)


@pytest.mark.parametrize("op", (*NUMBERS, *LOGICAL))
@settings(max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(1, 3), st.sampled_from(WARP_COUNTS), st.booleans())
def test_any_layout_and_axes(op: str, rng: random.Random, rank: int, num_warps: int, keepdims: bool) -> None:
    """Digits in lanes, in warps, of sizes 2 and 3, replicas in threads and in slots: every element counts once."""
    layout = random_layout(rng, rank, num_warps)
    axes = rng.choice([a for n in range(1, rank + 1) for a in itertools.combinations(range(rank), n)])
    dtype = boolean if op in LOGICAL else rng.choice([f32, f16, bf16, int32, uint32, int8, uint16])
    check(op, dtype, layout, axes, keepdims, num_warps, rng)


@given(st.randoms(use_true_random=False), st.sampled_from(WARP_COUNTS))
def test_result_in_any_layout(rng: random.Random, num_warps: int) -> None:
    """A result whose layout something else decides is exchanged on the way."""
    layout = random_layout(rng, 2, num_warps)
    pinned = auto((layout.shape[0],), 32 * num_warps, rng.choice([1, 2, 4]))
    check("sum", int32, layout, (1,), False, num_warps, rng, pinned)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.nbits <= 32 and d.nbits % 8 == 0 and d != boolean])
@pytest.mark.parametrize("op", NUMBERS)
def test_every_type(op: str, name: str) -> None:
    dtype = DTYPES[name]
    check(op, dtype, spatial(2, 32).local(1, 4), (1,), False, 2, random.Random(op + name))


@pytest.mark.parametrize(
    ("layout", "axes", "shuffles", "parts"),
    [
        (spatial(4, 32), (1,), 5, 1),  # lanes only
        (spatial(32, 4), (1,), 2, 1),
        (spatial(32, 4), (0,), 3, 4),  # 8 of 32 rows in a warp, 4 warps
        (spatial(128, 1).local(1, 8), (1,), 0, 1),  # slots only
        (spatial(96), (0,), 5, 3),  # the power-of-two part of 96 by shuffles
        (spatial(32, 3), (0,), 0, 32),  # strides of 3: no lane differs by one bit
        (spatial(32, 3), (1,), 0, 3),
        (spatial(3, 32), (0,), 0, 3),
        (replicated(4, 1).spatial(32), (0,), 5, 1),
        (spatial(8, 4).replicated(4), (0, 1), 3, 4),
        (spatial(4, 32) * local(2, 2), (0, 1), 5, 4),
    ],
)
def test_digits_go_where_they_are_cheapest(
    layout: RegisterLayout, axes: tuple[int, ...], shuffles: int, parts: int
) -> None:
    plan = reduce.plan_reduction(layout, axes)
    assert (len(plan.lane_masks), plan.parts) == (shuffles, parts)


@given(st.randoms(use_true_random=False), st.sampled_from(WARP_COUNTS), st.integers(1, 3))
def test_plan_counts_every_element_once(rng: random.Random, num_warps: int, rank: int) -> None:
    """For each (part, result index): the threads of one butterfly together hold each of its elements exactly once."""
    layout = random_layout(rng, rank, num_warps)
    axes = rng.choice([a for n in range(1, rank + 1) for a in itertools.combinations(range(rank), n)])
    plan = reduce.plan_reduction(layout, axes)
    table, partial = layout.table(), plan.partial.table()
    for thread in range(0, layout.num_threads, 5):
        team = [thread]
        for mask in plan.lane_masks:
            team += [t ^ mask for t in team]
        assert {t // 32 for t in team} == {thread // 32}
        for slot, group in enumerate(plan.groups):
            held = sorted(tuple(table[t, s].tolist()) for t in team for s in group)
            assert len(set(held)) == len(held)
            target = partial[thread, slot, 1:].tolist()
            assert all([0 if d in axes else i for d, i in enumerate(index)] == target for index in held)
            assert all(tuple(partial[t, slot].tolist()) == tuple(partial[thread, slot].tolist()) for t in team)
    everything = {tuple(i) for i in partial.reshape(-1, rank + 1).tolist()}
    elements = np.prod([n for d, n in enumerate(layout.shape) if d in axes])
    assert len(everything) * len(plan.groups[0]) * 2 ** len(plan.lane_masks) == layout.size
    assert plan.parts * len(plan.groups[0]) * 2 ** len(plan.lane_masks) == elements


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("op", (*NUMBERS, *LOGICAL))
def test_ptx_assembles(op: str, target: str) -> None:
    for seed, dtype in enumerate((boolean,) if op in LOGICAL else (f32, f16, bf16, int32, uint8)):
        layout = random_layout(random.Random(seed), 2, 4)

        def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor, layout: RegisterLayout = layout) -> None:
            tile = load.build(b, x, [0, 0], shape=layout.shape, layout=layout)
            store.build(b, y, [0], getattr(reduce, op).build(b, tile, 0))

        types = {"x": (dtype, layout.shape), "y": (reduce.result_dtype(op, dtype), layout.shape[1:])}
        assembles(build, types, 4, target)


def test_all_holders_of_a_result_have_the_same_bits() -> None:
    """Every thread stores its own copy of a float sum: replicas must agree although each added in its own order."""
    x = values_of(random.Random(1), f32, (128,))

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [0], shape=(128,), layout=spatial(128))
        total = reduce.sum.build(b, tile, keepdims=True)
        from tilus.instructions.view import broadcast

        store.build(b, y, [0], broadcast.build(b, total, (128,)))

    arrays = {"x": (f32, x), "y": (f32, np.zeros(128, np.float32))}
    for found in run_all(build, arrays, 4):
        assert len(np.unique(found["y"])) == 1


def test_nan_is_no_maximum() -> None:
    x = np.array([[np.nan, 1.0], [np.nan, np.nan], [-np.inf, np.nan], [0.5, -2.0]], np.float32)
    padded = np.repeat(x, 16, axis=1)

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [0, 0], shape=(4, 32), layout=spatial(1, 32).local(4, 1))
        store.build(b, y, [0], reduce.max.build(b, tile, 1))

    arrays = {"x": (f32, padded), "y": (f32, np.zeros(4, np.float32))}
    for found in run_all(build, arrays):
        np.testing.assert_array_equal(found["y"], np.array([1.0, np.nan, -np.inf, 0.5], np.float32))


@pytest.mark.parametrize(
    ("op", "dtype", "axis", "message"),
    [
        ("sum", boolean, 0, "sum of a boolean tile, expected numbers"),
        ("any", f32, 0, "any of a tile of f32, expected boolean"),
        ("max", int64, 0, "max of a tile of int64, expected at most 32 bits"),
        ("sum", f32, 2, r"sum over axis 2 of a tile of shape \[32, 4\], expected one of its 2 axes"),
        ("sum", f32, (0, 0), "expected distinct axes"),
    ],
)
def test_mistakes_are_named(op: str, dtype: DataType, axis: int | tuple[int, ...], message: str) -> None:
    b = IRBuilder()
    tile = b.tile(dtype, (32, 4))
    with pytest.raises(TilusError, match=message):
        getattr(reduce, op).build(b, tile, axis)


def test_promoted_types() -> None:
    b = IRBuilder()
    for dtype, wide in ((int8, int32), (uint8, uint32), (f16, f16), (f32, f32)):
        assert reduce.sum.build(b, b.tile(dtype, (32,)), 0).dtype == wide
        assert reduce.max.build(b, b.tile(dtype, (32,)), 0).dtype == dtype
