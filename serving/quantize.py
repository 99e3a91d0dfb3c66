"""Quantised matrices as plain arrays: what loaders make and what the kernels' packing takes.

The value of an element is scale * decode(code) + min, with one scale (and perhaps one minimum) for each group along K.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DTYPES, DataType
from tilus.errors import TilusError

GROUP = 32
# int1 holds only 0 and -1, which no symmetric scale can use.
WEIGHT_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.is_small and name != "int1")
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """codes: uint8 [N, K], raw codes of `dtype`. scales: float32 [N, K / group]. mins: the same, or None for 0."""

    codes: npt.NDArray[np.uint8]
    scales: _Floats
    mins: _Floats | None
    dtype: DataType

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def take_rows(self, rows: npt.NDArray[np.int64]) -> QuantizedMatrix:
        """The matrix of the given rows, in that order."""
        mins = None if self.mins is None else self.mins[rows]
        return QuantizedMatrix(self.codes[rows], self.scales[rows], mins, self.dtype)

    def stacks_with(self, other: QuantizedMatrix) -> bool:
        """Whether the rows of both can be those of one matrix."""
        mine = (self.dtype, self.group, self.mins is None, self.shape[1])
        return mine == (other.dtype, other.group, other.mins is None, other.shape[1])

    def stack(self, other: QuantizedMatrix) -> QuantizedMatrix:
        """The rows of self, then those of other, which must stack."""
        mins = None if self.mins is None or other.mins is None else np.concatenate([self.mins, other.mins])
        codes, scales = np.concatenate([self.codes, other.codes]), np.concatenate([self.scales, other.scales])
        return QuantizedMatrix(codes, scales, mins, self.dtype)

    def dequantize(self) -> _Floats:
        """The values, float32 [N, K]."""
        groups = self.dtype.decode(self.codes).astype(np.float32).reshape(*self.scales.shape, self.group)
        values = groups * self.scales[..., None]
        if self.mins is not None:
            values = values + self.mins[..., None]
        return values.reshape(self.shape)


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
