"""Quantising floats: every code is the best one under the scale in use; and the algebra of stacked matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.quantize import WEIGHT_DTYPES, quantize
from tilus.dtypes import dtype, int8, uint4
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix


def random_weight(rows: int = 6, width: int = 96, rng_key: int = 0) -> np.ndarray:
    return np.random.default_rng(rng_key).normal(0, 0.1, (rows, width)).astype(np.float32)


@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_every_code_is_nearest(name: str) -> None:
    weight = random_weight()
    matrix = quantize(weight, dtype(name), "w")
    assert matrix.shape == weight.shape and matrix.group == 32 and matrix.dtype.name == name
    values = matrix.dtype.decode(np.arange(matrix.dtype.num_codes).astype(np.uint8)).astype(np.float64)
    values = values[np.isfinite(values)]
    # Symmetric types use no value beyond the scale's own end, so that -x is as good as x.
    values = values[np.abs(values) <= min(matrix.dtype.max_value, 256)]
    scales = np.repeat(matrix.scales, 32, axis=1).astype(np.float64)
    mins = 0 if matrix.mins is None else np.repeat(matrix.mins, 32, axis=1)
    best = np.abs(weight[..., None] - (scales[..., None] * values + np.asarray(mins)[..., None])).min(-1)
    found = np.abs(weight - matrix.dequantize())
    # float32 arithmetic decides near-ties either way.
    assert np.all(found <= best + 1e-6 * np.abs(weight).max())


@pytest.mark.parametrize("name", [name for name in WEIGHT_DTYPES if dtype(name).is_integer])
def test_codes_span_each_group(name: str) -> None:
    """Half a step is the largest error: of the group's range for unsigned codes, of its magnitude for signed ones."""
    kind, weight = dtype(name), random_weight() + 0.3  # nothing near 0
    groups = weight.reshape(6, 3, 32)
    span = np.abs(groups).max(-1) if kind.is_signed else groups.max(-1) - groups.min(-1)
    half_step = span / kind.max_value / 2
    error = np.abs(quantize(weight, kind, "w").dequantize() - weight).reshape(6, 3, 32).max(-1)
    rounding = 2**-10 * np.abs(groups).max(-1)  # of scale and minimum, to float16
    assert np.all(error <= half_step + rounding)


@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_scales_are_float16_and_zero_is_harmless(name: str) -> None:
    weight = random_weight()
    weight[2] = 0
    matrix = quantize(weight, dtype(name), "w")
    np.testing.assert_array_equal(matrix.scales, matrix.scales.astype(np.float16).astype(np.float32))
    assert np.all(matrix.dequantize()[2] == 0)


def test_more_bits_lose_less() -> None:
    weight = random_weight(rows=32)
    for kind in ("int", "uint"):
        errors = [np.abs(quantize(weight, dtype(f"{kind}{n}"), "w").dequantize() - weight).mean() for n in range(2, 9)]
        assert errors == sorted(errors, reverse=True)


@given(st.permutations(range(6)))
def test_rows_and_stacks_commute_with_values(order: list[int]) -> None:
    for kind in (int8, uint4):
        matrix = quantize(random_weight(), kind, "w")
        rows = np.array(order)
        np.testing.assert_array_equal(matrix.take_rows(rows).dequantize(), matrix.dequantize()[rows])
        other = matrix.take_rows(rows[:2])
        assert matrix.stacks_with(other)
        stacked = np.concatenate([matrix.dequantize(), other.dequantize()])
        np.testing.assert_array_equal(matrix.stack(other).dequantize(), stacked)


def test_only_equal_kinds_stack() -> None:
    weight = random_weight()
    base = quantize(weight, uint4, "w")
    wider_groups = QuantizedMatrix(
        base.codes, base.scales[:, :1], None if base.mins is None else base.mins[:, :1], uint4
    )
    for other in (
        quantize(weight, int8, "w"),
        quantize(weight[:, :64], uint4, "w"),
        QuantizedMatrix(base.codes, base.scales, None, uint4),
        wider_groups,
    ):
        assert not base.stacks_with(other)


def test_what_cannot_be_quantised_is_named() -> None:
    with pytest.raises(TilusError, match=r"blk\.0\.q has rows of 40 values, but weights are quantised in groups of 32"):
        quantize(random_weight(width=96)[:, :40], int8, "blk.0.q")
    with pytest.raises(TilusError, match=r"head needs a quantisation scale of 1e\+07, but float16 holds at most 65504"):
        quantize(np.full((1, 32), 127e7, np.float32), int8, "head")
    with pytest.raises(TilusError, match="head needs a quantisation scale of nan"):
        quantize(np.full((1, 32), np.nan, np.float32), int8, "head")
