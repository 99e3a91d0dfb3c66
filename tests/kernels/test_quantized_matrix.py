"""The algebra of quantised matrices: taking rows and stacking commute with the values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus.dtypes import int8, uint4
from tilus.errors import TilusError
from tilus.kernels.quantize import quantize

WEIGHT = np.random.default_rng(0).normal(0, 0.1, (6, 96)).astype(np.float32)
BASE = quantize(WEIGHT, uint4, 32)
KINDS = [
    quantize(WEIGHT, int8, 32), BASE, quantize(WEIGHT, uint4, 32, "zero"), quantize(WEIGHT, uint4, 32, "table"),
    replace(quantize(WEIGHT, int8, 32), columns=np.roll(np.arange(96, dtype=np.int32), 5)),
]  # fmt: skip


@given(st.permutations(range(6)))
def test_rows_and_stacks_commute_with_values(order: list[int]) -> None:
    for matrix in KINDS:
        rows = np.array(order)
        np.testing.assert_array_equal(matrix.take_rows(rows).dequantize(), matrix.dequantize()[rows])
        other = matrix.take_rows(rows[:2])
        assert matrix.stacks_with(other)
        stacked = np.concatenate([matrix.dequantize(), other.dequantize()])
        np.testing.assert_array_equal(matrix.stack(other).dequantize(), stacked)


@pytest.mark.parametrize(
    "other",
    [
        *KINDS[:1], *KINDS[2:], quantize(WEIGHT[:, :64], uint4, 32), quantize(WEIGHT, uint4, 96), replace(BASE, mins=None),
        replace(BASE, global_scale=2.0), replace(BASE, columns=np.arange(96, dtype=np.int32)),
        replace(BASE, table=np.arange(16, dtype=np.float32)),
    ],
)  # fmt: skip
def test_only_equal_kinds_stack(other) -> None:
    assert not BASE.stacks_with(other) and not other.stacks_with(BASE)
    with pytest.raises(TilusError, match="do not stack"):
        BASE.stack(other)
