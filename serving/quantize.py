"""Quantising the float weights of a model while it is loaded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DTYPES, DataType
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix

GROUP = 32
# int1 holds only 0 and -1, which no symmetric scale can use.
WEIGHT_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.is_small and name != "int1")
_Floats = npt.NDArray[np.float32]


def quantize(weight: _Floats, dtype: DataType, name: str) -> QuantizedMatrix:
    """Round to nearest in groups of 32 along K. Signed types are symmetric around 0, unsigned ones span each group.

    weight: float32 [N, K]. Scales and minima are rounded to float16 first, as they are stored, so that codes are
    nearest under the values in use. Raises TilusError, with the tensor's `name`, when K is no multiple of 32 or float16
    overflows.
    """
    num_rows, width = weight.shape
    if width % GROUP:
        raise TilusError(f"{name} has rows of {width} values, but weights are quantised in groups of {GROUP}")
    groups = weight.reshape(num_rows, width // GROUP, GROUP)
    mins = None if dtype.is_signed else fit_float16(groups.min(-1), name)
    # Wide exponents do not need their whole range, and a scale that fills it would be too small for float16.
    top = np.float32(min(dtype.max_value, 256))
    if mins is not None:
        groups = groups - mins[..., None]
    scales = fit_float16(np.abs(groups).max(-1) / top, name)
    scaled = groups / np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = dtype.encode(np.clip(scaled, -top, top))
    return QuantizedMatrix(codes.reshape(num_rows, width), scales, mins, dtype)


def fit_float16(values: _Floats, name: str) -> _Floats:
    """Scales or minima rounded to float16, in which they are stored; raises TilusError when they are too large."""
    limit, largest = float(np.finfo(np.float16).max), float(np.abs(values).max(initial=0.0))
    if not largest <= limit:
        raise TilusError(f"{name} needs a quantisation scale of {largest:g}, but float16 holds at most {limit:g}")
    return values.astype(np.float16).astype(np.float32)
