"""The numbers that the codes of a type (or of a table) stand for, and rounding to the nearest of them, fast on large arrays."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType
from tilus.errors import TilusError

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

# Floats with wide exponents do not need their whole range, and a scale that fills it would be too small for float16.
_LARGEST_LIMIT = 448.0


class Grid:
    """limit: the magnitude that the largest weight of a group is scaled to when nothing is cut off."""

    def __init__(self, dtype: DataType, table: Floats | None = None) -> None:
        self.dtype = dtype
        self.table = table
        if not dtype.is_small:
            raise TilusError(f"codes of {dtype}, expected a type of 1 to 8 bits")
        if table is not None:
            self._order = np.argsort(table, kind="stable")
            self._sorted = table[self._order]
            self._middles = (self._sorted[1:] + self._sorted[:-1]) / 2
            self.low, self.high = float(self._sorted[0]), float(self._sorted[-1])
            self.limit = float(np.abs(table).max())
        else:
            self.low, self.high = float(dtype.min_value), float(dtype.max_value)
            self.limit = min(max(self.high, 1.0), _LARGEST_LIMIT)  # int1 is {-1, 0}

    def nearest(self, x: Floats) -> Floats:
        """The number nearest to each finite x, written into x; ties to the even code, but downward in a table."""
        if self.table is not None:
            index = np.zeros(x.shape, np.uint8)
            for middle in self._middles:  # cheaper than a search: the few comparisons run on whole vectors
                index += x > middle
            return np.take(self._sorted, index, out=x)
        np.clip(x, self.low, self.high, out=x)
        return np.rint(x, out=x) if self.dtype.is_integer else _round_mantissa(x, self.dtype)

    def codes(self, numbers: Floats) -> Codes:
        """The codes of numbers that `nearest` gave."""
        if self.table is not None:
            return self._order.astype(np.uint8)[np.searchsorted(self._sorted, numbers)]
        if self.dtype.is_integer:
            return (numbers.astype(np.int16) & (self.dtype.num_codes - 1)).astype(np.uint8)
        return _codes_by_upper_bits(self.dtype)[np.ascontiguousarray(numbers).view(np.uint32) >> np.uint32(16)]


def _round_mantissa(x: Floats, dtype: DataType) -> Floats:
    """Adding and subtracting 1.5 * 2^(e - m + 23), e the exponent of x but at least the smallest one, leaves multiples of the
    spacing 2^(e - m) at x, rounded to even."""
    magic = np.maximum(np.abs(x), np.float32(2.0 ** (1 - dtype.bias)))
    bits = magic.view(np.uint32)
    np.bitwise_and(bits, np.uint32(0x7F800000), out=bits)
    np.multiply(magic, np.float32(1.5 * 2.0 ** (23 - dtype.mantissa_nbits)), out=magic)
    np.add(x, magic, out=x)
    return np.subtract(x, magic, out=x)


@lru_cache
def _codes_by_upper_bits(dtype: DataType) -> Codes:
    """The code for the upper 16 bits of a float32: they hold every number of a type of at most 7 mantissa bits."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    return dtype.encode(upper.view(np.float32))
