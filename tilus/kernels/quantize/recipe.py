"""Names for ways to quantise a weight: a type, a scheme and a group, such as int4 in groups of 128, or nvfp4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import (
    DTYPES,
    DataType,
    f16,
    float4_e2m1,
    float6_e2m3,
    float6_e3m2,
    float8_e4m3,
    float8_e5m2,
    uint4,
)
from tilus.errors import TilusError
from tilus.kernels.quantize.error_feedback import quantize_for
from tilus.kernels.quantize.matrix import QuantizedMatrix
from tilus.kernels.quantize.rounding import SCHEMES, Scheme, quantize


@dataclass(frozen=True)
class Recipe:
    """The arguments of `quantize` by one name. group: None for one scale a row."""

    dtype: DataType
    scheme: Scheme
    group: int | None
    scale_dtype: DataType = f16

    def quantize(
        self,
        weight: Any,
        *,
        search: bool = True,
        moments: npt.NDArray[np.float64] | None = None,
        name: str = "weight",
    ) -> QuantizedMatrix:
        """The weight [N, K], rounded: see `quantize`, or, with the second moments [K, K] of its activations, `quantize_for`."""
        if moments is not None:
            return quantize_for(
                weight, moments, self.dtype, self.group, self.scheme, scale_dtype=self.scale_dtype, name=name
            )
        return quantize(
            weight, self.dtype, self.group, self.scheme, scale_dtype=self.scale_dtype, search=search, name=name
        )


PRESETS: dict[str, Recipe] = {
    "nf4": Recipe(uint4, "table", 64),
    "mxfp4": Recipe(float4_e2m1, "mx", 32),
    "mxfp6_e2m3": Recipe(float6_e2m3, "mx", 32),
    "mxfp6_e3m2": Recipe(float6_e3m2, "mx", 32),
    "mxfp8_e4m3": Recipe(float8_e4m3, "mx", 32),
    "mxfp8_e5m2": Recipe(float8_e5m2, "mx", 32),
    "nvfp4": Recipe(float4_e2m1, "nv", 16),
}
# Powers of two without sign are scales, and no weights.
RECIPE_NAMES = (*PRESETS, *(name for name, dtype in DTYPES.items() if dtype.is_small))


def recipe(name: str, group: int | None = None, scheme: str | None = None) -> Recipe:
    """A preset (nf4, mxfp4, nvfp4, ...) or a type of 1 to 8 bits, with another group or scheme than the usual one.

    group: 0 for one scale a row; by default 128, or what the preset says. Raises TilusError for unknown names.
    """
    if name not in RECIPE_NAMES:
        raise TilusError(
            f"unknown weight type {name!r}",
            hint=f"expected a type of 1 to 8 bits such as int4, uint3 or float6_e3m2, or one of {', '.join(PRESETS)}",
        )
    if scheme is not None and scheme not in SCHEMES:
        raise TilusError(f"unknown scheme {scheme!r}, expected one of {', '.join(SCHEMES)}")
    if group is not None and group < 0:
        raise TilusError(f"groups of {group} columns, expected a positive number, or 0 for one scale a row")
    chosen = {known: known for known in SCHEMES}.get(scheme or "")
    if name in PRESETS:
        preset = PRESETS[name]
        if chosen is not None and chosen != preset.scheme:
            raise TilusError(f"{name} has scheme {preset.scheme!r}, but {scheme!r} was asked for")
        return Recipe(preset.dtype, preset.scheme, preset.group if group is None else group or None)
    dtype = DTYPES[name]
    usual: Scheme = "minimum" if dtype.kind == "uint" else "symmetric"
    return Recipe(dtype, chosen or usual, 128 if group is None else group or None)
