"""Scales that are powers of two, as OCP Microscaling stores them: a byte e stands for 2^(e - 127), and 255 for NaN."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType

# Only a name for what scales are exact in: its codes are read and written by the functions below.
e8m0 = DataType("float8_e8m0", "float", 8, 8, 0, "nan")
MIN_EXPONENT, MAX_EXPONENT = -127, 127
_VALUES = np.append(np.ldexp(np.float32(1), np.arange(MIN_EXPONENT, MAX_EXPONENT + 1)), np.float32(np.nan))


def decode(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The powers of two, float32; NaN for 255."""
    return _VALUES[codes]


def encode(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The codes of scales that are powers of two from 2^-127 to 2^127."""
    return (np.frexp(scales)[1] - 1 + 127).astype(np.uint8)
