"""Arguments for tuning and compiling, and the comparison of results with float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilus.dtypes import DataType, bf16, f16, f32, float8_e4m3, float8_e5m2, int8
from tilus.errors import TilusError
from tilus.lang.arguments import packed
from tilus.runtime.graph_timer import require_torch

CHECKED_AT_ONCE = 256  # rows or columns of results, so that their float64 copies stay small

# Plans differ in the order in which f32 sums are added up, which is far less than this; a tile that is left out is far more.
TOLERANCE = 2.0**-6

_TORCH_NAMES = {
    f16: "float16",
    bf16: "bfloat16",
    f32: "float32",
    float8_e4m3: "float8_e4m3fn",
    float8_e5m2: "float8_e5m2",
    int8: "int8",
}


def torch_dtype(dtype: DataType) -> Any:
    """Raises: TilusError for what is no type of activations, dense weights or results."""
    if dtype not in _TORCH_NAMES:
        known = ", ".join(known.name for known in _TORCH_NAMES)
        raise TilusError(f"a tensor of {dtype}, expected one of {known}")
    return getattr(require_torch(), _TORCH_NAMES[dtype])


def random_tensor(shape: tuple[int, ...], dtype: DataType, device: str) -> Any:
    """Normally distributed numbers, rounded to the type; integers of about 2 in size."""
    torch = require_torch()
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(shape, generator=generator, device=device)
    return (values if dtype.is_float else (2 * values).round()).to(torch_dtype(dtype))


def placeholder(shape: tuple[int, ...], dtype: DataType) -> Any:
    """An array for compiling: no memory is touched, and torch is not needed."""
    return packed(np.empty(math.prod(shape) * dtype.nbytes, np.uint8), dtype, shape)


def wrong_results(found: Any, exact: Any) -> str | None:
    """What is wrong with results, torch tensors of a shape, given those in float64 that broadcast to it; None when nothing is."""
    allowed = TOLERANCE * (exact.abs() + exact.square().mean().sqrt())
    wrong = ~((found.double() - exact).abs() <= allowed)  # NaN is wrong, too
    count = int(wrong.sum())
    return f"{count} of {wrong.numel()} results are wrong" if count else None
