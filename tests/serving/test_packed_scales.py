"""Scales are packed as float16 unless float16 would lose more of them than rounding does."""

from __future__ import annotations

import numpy as np
import pytest

from serving.quantize import with_short_scales
from tilus.dtypes import f16, f32, uint8
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix

HALF_UNIT = 2.0**-11


def matrix_of(size: float, minimum: float | None = None) -> QuantizedMatrix:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (8, 64), dtype=np.uint8)
    factors = random.uniform(1, 2, (8, 2)).astype(np.float32)
    mins = None if minimum is None else factors * np.float32(minimum)
    return QuantizedMatrix(codes, factors * np.float32(size), mins, uint8, scale_dtype=f32)


@pytest.mark.parametrize("size", [1.0, 2.0**-13])
def test_scales_that_float16_holds_are_rounded(size: float) -> None:
    matrix = matrix_of(size)
    short = with_short_scales(matrix, "w")
    error = np.abs(short.scales / matrix.scales - 1).max()
    assert short.scale_dtype == f16
    assert 0 < error <= HALF_UNIT


@pytest.mark.parametrize(("size", "minimum"), [(2.0**-20, None), (2.0**-30, None), (1.0, 2.0**-20)])
def test_scales_and_minimums_too_small_for_float16_stay(size: float, minimum: float | None) -> None:
    matrix = matrix_of(size, minimum)
    assert with_short_scales(matrix, "w") is matrix


def test_scales_too_large_for_float16_are_refused() -> None:
    with pytest.raises(TilusError, match="w needs a value or scale of"):
        with_short_scales(matrix_of(1e6), "w")
