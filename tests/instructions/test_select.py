"""Parts of tiles at an index: numpy's, for every layout, also where threads share the dim."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tile_programs import WARP_COUNTS, random_layout, run_all, values_of

from tilus.dtypes import bf16, f16, f32, int8
from tilus.errors import TilusError
from tilus.instructions.memory import load, store
from tilus.instructions.view import select
from tilus.ir.builder import IRBuilder
from tilus.ir.tensor import GlobalTensor


@given(st.randoms(use_true_random=False), st.sampled_from([f32, f16, bf16, int8]), st.sampled_from(WARP_COUNTS))
def test_select(rng: random.Random, dtype, warps: int) -> None:
    layout = random_layout(rng, 3, warps)
    dim = rng.randrange(3)
    index = rng.randrange(layout.shape[dim])
    x = values_of(rng, dtype, layout.shape)
    expected = np.take(x, index, axis=dim)

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        part = select.build(b, load.build(b, x, [0, 0, 0], layout.shape, layout=layout), dim, index)
        store.build(b, y, [0, 0], part)

    arrays = {"x": (dtype, x), "y": (dtype, np.zeros_like(expected))}
    for found in run_all(build, arrays, warps):
        np.testing.assert_array_equal(found["y"], expected)


@pytest.mark.parametrize(
    ("dim", "index", "message"),
    [(2, 0, "select along dim 2 of a tile of rank 2"), (1, 4, "select of index 4 along a dim of 4 elements")],
)
def test_misfits(dim: int, index: int, message: str) -> None:
    def build(b: IRBuilder, x: GlobalTensor) -> None:
        select.build(b, load.build(b, x, [0, 0], (8, 4)), dim, index)

    with pytest.raises(TilusError, match=message):
        run_all(build, {"x": (f32, np.zeros((8, 4), np.float32))})
