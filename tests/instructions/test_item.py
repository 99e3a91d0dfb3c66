"""The element of a tile as a scalar: whatever layout the tile has, all threads go by the same value."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_programs import WARP_COUNTS, random_layout, run_all, values_of

from tilus.dtypes import f16, f32, int32
from tilus.errors import TilusError
from tilus.instructions.fill import full
from tilus.instructions.item import item
from tilus.instructions.memory import load, store
from tilus.instructions.reduce import max as tile_max
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import binary
from tilus.ir.tensor import GlobalTensor


@given(st.randoms(use_true_random=False), st.sampled_from(WARP_COUNTS))
@settings(max_examples=15)
def test_a_place_that_all_threads_agree_on(rng: random.Random, warps: int) -> None:
    """The largest of some numbers is the row that is written: a thread with another one would write elsewhere."""
    layout = random_layout(rng, 2, warps)
    numbers = np.array([rng.randrange(7) for _ in range(layout.size)], np.int64).reshape(layout.shape)
    tile = values_of(rng, f32, (64,))

    def build(b: IRBuilder, x: GlobalTensor, tile: GlobalTensor, y: GlobalTensor) -> None:
        row = item.build(b, tile_max.build(b, load.build(b, x, [0, 0], layout.shape, layout=layout)))
        store.build(b, y, [row, 0], load.build(b, tile, [0], [64]), dims=[1])

    expected = np.zeros((7, 64))
    expected[numbers.max()] = tile
    arrays = {"x": (int32, numbers), "tile": (f32, tile), "y": (f32, np.zeros((7, 64)))}
    for found in run_all(build, arrays, warps):
        np.testing.assert_array_equal(found["y"], expected)


@pytest.mark.parametrize("warps", WARP_COUNTS)
def test_a_float_of_one_thread(warps: int) -> None:
    """A loaded tile of one element reaches the threads that did not load it; the scalar fills a tile of all of them."""

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        value = item.build(b, load.build(b, x, [1], [1]))
        store.build(b, y, [0], full.build(b, [256], binary("*", value, 2.0), f32))

    arrays = {"x": (f32, np.array([3.0, -1.25])), "y": (f32, np.zeros(256))}
    for found in run_all(build, arrays, warps):
        np.testing.assert_array_equal(found["y"], np.full(256, -2.5))


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [(f32, (2, 1), r"shape \[2, 1\], expected one element"), (f16, (1,), "a tile of f16, expected int32 or f32")],
)
def test_misfits(dtype, shape: tuple[int, ...], message: str) -> None:
    def build(b: IRBuilder, x: GlobalTensor) -> None:
        item.build(b, load.build(b, x, [0] * len(shape), shape))

    with pytest.raises(TilusError, match=message):
        run_all(build, {"x": (dtype, np.zeros(shape))})
