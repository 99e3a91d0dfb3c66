"""Rounding for activations: the layer's output changes less than under plain rounding, and what the law says at its ends."""

from __future__ import annotations

import numpy as np
import pytest
from test_rounding import numbers_of, random_weight, values_of

from tilus.dtypes import DataType, float4_e2m1, int3, int4, uint4
from tilus.errors import TilusError
from tilus.kernels.quantize import error_feedback, quantize, quantize_for, recipe

CASES = [
    (int3, 32, None), (int4, None, None), (int4, 48, None), (uint4, 32, "zero"), (uint4, 64, "minimum"), (uint4, 64, "table"),
    (float4_e2m1, 32, "mx"), (float4_e2m1, 16, "nv"),
]  # fmt: skip
IDS = [f"{dtype}-{group}-{scheme}" for dtype, group, scheme in CASES]


def activations(tokens: int = 600, width: int = 192) -> np.ndarray:
    """Correlated, with columns of very different size, as those of language models are."""
    rng = np.random.default_rng(1)
    mix = rng.normal(0, 1, (width // 4, width)) * rng.lognormal(0, 1, width)
    return rng.normal(0, 1, (tokens, width // 4)) @ mix + 0.1 * rng.normal(0, 1, (tokens, width))


def output_error(matrix, weight: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (matrix.dequantize().astype(np.float64) - weight).T).sum())


@pytest.mark.parametrize(("dtype", "group", "scheme"), CASES, ids=IDS)
def test_outputs_change_less(dtype: DataType, group: int | None, scheme: str | None) -> None:
    """On the activations that it was made for and on others of the same kind."""
    weight, x = random_weight(24), activations()
    plain = quantize(weight, dtype, group, scheme)
    found = quantize_for(weight, x[:400].T @ x[:400], dtype, group, scheme)
    for part in (x[:400], x[400:]):
        assert output_error(found, weight, part) < 0.75 * output_error(plain, weight, part)


@pytest.mark.parametrize(("dtype", "group", "scheme"), CASES, ids=IDS)
def test_without_correlation_it_is_plain_rounding(dtype: DataType, group: int | None, scheme: str | None) -> None:
    weight = random_weight()
    found = quantize_for(weight, 3 * np.eye(192), dtype, group, scheme)
    np.testing.assert_array_equal(found.dequantize(), quantize(weight, dtype, group, scheme).dequantize())


@pytest.mark.parametrize(("dtype", "group", "scheme"), CASES, ids=IDS)
def test_the_result_is_on_its_grid(dtype: DataType, group: int | None, scheme: str | None) -> None:
    """Whatever moved on the way, codes and scales mean what they say."""
    x = activations()
    matrix = quantize_for(random_weight(), x.T @ x, dtype, group, scheme)
    grid = values_of(matrix, numbers_of(matrix))
    assert np.abs(grid - matrix.dequantize()[..., None]).min(-1).max() < 1e-6
    assert matrix.shape == (6, 192) and matrix.group == (group or 192)


def plain_gptq(weight: np.ndarray, moments: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The paper's algorithm as its figure states it, for int4 with one given scale a row: float64, column by column, the inverse
    recomputed by elimination instead of Cholesky."""
    weight = weight.astype(np.float64).copy()
    inverse = np.linalg.inv(moments + 0.01 * np.mean(np.diag(moments)) * np.eye(len(moments)))
    result = np.empty_like(weight)
    for column in range(weight.shape[1]):
        result[:, column] = np.clip(np.rint(weight[:, column] / scale), -8, 7) * scale
        error = (weight[:, column] - result[:, column]) / inverse[column, column]
        weight -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


def test_codes_are_those_of_the_published_algorithm() -> None:
    """With one group a row, whose scale is fixed before anything moves."""
    weight, x = random_weight(8), activations()
    found = quantize_for(weight, x.T @ x, int4)
    expected = plain_gptq(weight, x.T @ x, found.scales[:, 0].astype(np.float64))
    differs = np.abs(found.dequantize() - expected) > 1e-6
    assert differs.mean() < 0.01  # float32 decides a few ties the other way, which moves what follows


@pytest.mark.parametrize("block", [16, 40])
@pytest.mark.parametrize(("dtype", "group", "scheme"), CASES[:6], ids=IDS[:6])
def test_how_updates_are_put_off_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, dtype: DataType, group: int | None, scheme: str | None, block: int
) -> None:
    """Groups that lie in several blocks of updates see all of them: only the order of float32 sums differs."""
    weight, x = random_weight(), activations()
    monkeypatch.setattr(error_feedback, "_BLOCK", 192)
    expected = quantize_for(weight, x.T @ x, dtype, group, scheme)
    monkeypatch.setattr(error_feedback, "_BLOCK", block)
    found = quantize_for(weight, x.T @ x, dtype, group, scheme)
    assert (found.scales != expected.scales).mean() < 0.03
    assert (found.codes != expected.codes).mean() < 0.03


@pytest.mark.parametrize("column", [0, 77, 191])
def test_columns_that_are_never_used_are_harmless(column: int) -> None:
    x = activations()
    x[:, column] = 0
    weight = random_weight()
    matrix = quantize_for(weight, x.T @ x, int4, 32)
    assert np.isfinite(matrix.dequantize()).all()
    assert output_error(matrix, weight, x) < output_error(quantize(weight, int4, 32), weight, x)


def test_no_activations_at_all() -> None:
    weight = random_weight()
    found = quantize_for(weight, np.zeros((192, 192)), int4, 32)
    np.testing.assert_array_equal(found.dequantize(), quantize(weight, int4, 32).dequantize())


def test_recipes_take_moments() -> None:
    x, weight = activations(), random_weight()
    found = recipe("int4", 32).quantize(weight, moments=x.T @ x)
    np.testing.assert_array_equal(found.dequantize(), quantize_for(weight, x.T @ x, int4, 32).dequantize())


@pytest.mark.parametrize(
    ("moments", "group", "message"),
    [
        (np.eye(96), 32, r"w: second moments of shape \[96, 96\], expected finite numbers \[192, 192\]"),
        (np.full((192, 192), np.nan), 32, "expected finite numbers"),
        (np.eye(192), 40, "w: groups of 40 do not divide K = 192"),
    ],
)
def test_what_does_not_fit_is_named(moments: np.ndarray, group: int, message: str) -> None:
    with pytest.raises(TilusError, match=message):
        quantize_for(random_weight(), moments, int4, group, name="w")
