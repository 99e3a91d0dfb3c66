"""Rounding with error feedback for the activations that a layer sees: GPTQ (Frantar et al., 2023).

Columns are rounded one after the other. What rounding a column does to the layer's output is made up for, as far as possible,
by the columns that are still to come: they move along the rows of the Cholesky factor of the inverse second moments of the
activations. Time: O(N K^2 + K^3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, f16
from tilus.errors import TilusError
from tilus.kernels.quantize.grid import Floats
from tilus.kernels.quantize.matrix import QuantizedMatrix
from tilus.kernels.quantize.rounding import Fit, Rule, Scheme, as_floats, as_matrix, group_width, make_rule

_DAMPING = 0.01  # of the mean second moment, so that the inverse exists
_BLOCK = 128  # columns that are updated one by one; all later ones are updated once a block


def quantize_for(
    weight: Any,
    moments: npt.NDArray[np.float64],
    dtype: DataType,
    group: int | None = None,
    scheme: Scheme | None = None,
    *,
    scale_dtype: DataType = f16,
    name: str = "weight",
) -> QuantizedMatrix:
    """Round a weight [N, K] so that its products with activations x change least.

    moments: [K, K], the sum of the outer products x x^T over a sample of activations; where they are a multiple of the identity
    the result is that of `quantize`, whose other arguments these are. Raises TilusError as `quantize` does, and for moments of
    another shape or that are not finite.
    """
    values = as_floats(weight, name)
    n, k = values.shape
    width = group_width(k, group, name)
    if moments.shape != (k, k) or not np.isfinite(moments).all():
        raise TilusError(f"{name}: second moments of shape {list(moments.shape)}, expected finite numbers [{k}, {k}]")
    rule, global_scale = make_rule(values, dtype, scheme, None, scale_dtype, True, name)
    numbers, fits = _round_columns(values / np.float32(global_scale), _feedback(moments), width, rule)
    codes = rule.grid.codes(numbers.reshape(n, k // width, width)).reshape(n, k)

    def join(parts: list[Floats | None]) -> Floats | None:
        present = [part for part in parts if part is not None]
        return np.concatenate(present, axis=1) if present else None

    scales = np.concatenate([fit.scales for fit in fits], axis=1)
    whole = Fit(scales, join([fit.zeros for fit in fits]), join([fit.mins for fit in fits]))
    return as_matrix(codes, [whole], rule, global_scale)


def _feedback(moments: npt.NDArray[np.float64]) -> Floats:
    """The upper Cholesky factor of the inverse, each row divided by its diagonal: how an error moves later columns."""
    damped = moments + np.eye(len(moments)) * max(
        _DAMPING * float(np.mean(np.diag(moments))), np.finfo(np.float32).tiny
    )
    inverse = np.linalg.inv(damped)
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return (upper / np.diag(upper)[:, None]).astype(np.float32)


def _round_columns(values: Floats, feedback: Floats, width: int, rule: Rule) -> tuple[Floats, list[Fit]]:
    """The grid's numbers [N, K], and the fit of each group, made when its first column is reached."""
    weights, numbers = values.copy(), np.empty_like(values)
    fits: list[Fit] = []
    k = values.shape[1]
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        errors = np.zeros((values.shape[0], end - start), np.float32)
        for column in range(start, end):
            if column % width == 0:
                # Later columns of this group may still lack the errors of this block's columns.
                ahead = weights[:, column : column + width].copy()
                beyond = max(end - column, 0)
                ahead[:, beyond:] -= errors @ feedback[start:end, column + beyond : column + width]
                fits.append(rule.fit(ahead[:, None, :]))
            chosen = fits[-1].numbers(weights[:, None, column : column + 1], rule.grid)
            numbers[:, column] = chosen[:, 0, 0]
            error = weights[:, column] - fits[-1].values(chosen)[:, 0, 0]
            errors[:, column - start] = error
            weights[:, column + 1 : end] -= error[:, None] * feedback[column, column + 1 : end]
        weights[:, end:] -= errors @ feedback[start:end, end:]
    return numbers, fits
