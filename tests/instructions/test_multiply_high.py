"""The upper halves of products: Python's integers say what they are."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tile_programs import WARP_COUNTS, compile_function, function, get_target, run_all, tensor

from tilus.dtypes import DataType, f32, int32, uint32
from tilus.errors import TilusError
from tilus.instructions.memory import load, store
from tilus.instructions.multiply_high import multiply_high
from tilus.ir.builder import IRBuilder
from tilus.ir.tensor import GlobalTensor


@given(st.randoms(use_true_random=False), st.sampled_from([int32, uint32]), st.sampled_from(WARP_COUNTS))
def test_multiply_high(rng: random.Random, dtype: DataType, warps: int) -> None:
    """Rows by columns, with the numbers at which carries and signs show."""
    low, high = int(dtype.min_value), int(dtype.max_value)
    edges = [low, low + 1, 0, 1, high - 1, high, 0x10000, 0xFFFF]
    rows, columns = (
        [rng.choice([*edges, rng.randint(low, high)]) for _ in range(n)] for n in (rng.randrange(1, 9), 24)
    )
    expected = [[(a * b >> 32) for b in columns] for a in rows]

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor, out: GlobalTensor) -> None:
        left, right = load.build(b, x, [0, 0], [len(rows), 1]), load.build(b, y, [0, 0], [1, 24])
        store.build(b, out, [0, 0], multiply_high.build(b, left, right))

    values = {"x": np.array(rows)[:, None], "y": np.array(columns)[None], "out": np.zeros((len(rows), 24))}
    storage = np.int32 if dtype == int32 else np.uint32
    for found in run_all(build, {name: (dtype, array.astype(storage)) for name, array in values.items()}, warps):
        assert found["out"].tolist() == expected


def test_a_number_for_a_tile_and_what_is_refused() -> None:
    def build(b: IRBuilder, x: GlobalTensor, out: GlobalTensor) -> None:
        store.build(b, out, [0], multiply_high.build(b, load.build(b, x, [0], [32]), 0xD2511F53))

    x = np.arange(32, dtype=np.uint32) * 123456789
    for found in run_all(build, {"x": (uint32, x), "out": (uint32, np.zeros(32, np.uint32))}):
        assert found["out"].tolist() == [int(a) * 0xD2511F53 >> 32 for a in x]

    def floats(b: IRBuilder, x: GlobalTensor) -> None:
        store.build(b, x, [0], multiply_high.build(b, load.build(b, x, [0], [32]), 3.0))

    with pytest.raises(
        TilusError, match="multiply_high of tiles of f32 and f32, expected int32 or uint32, both the same"
    ):
        compile_function(function(floats, {"x": tensor("x", f32, [32])}, 1), get_target("sm_90a"))
