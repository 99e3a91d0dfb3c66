"""8-bit floats <-> float64 (OCP 8-bit Floating Point Specification)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def decode_fp8(bits: Array, exponent_nbits: int, mantissa_nbits: int) -> Array:
    """float64 values of 8-bit floats. e4m3 has no infinity, and NaN is all ones; e5m2 follows IEEE 754."""
    bits = bits.astype(np.int64)
    bias = (1 << (exponent_nbits - 1)) - 1
    mantissa = bits & ((1 << mantissa_nbits) - 1)
    exponent = bits >> mantissa_nbits & ((1 << exponent_nbits) - 1)
    fraction = mantissa + np.where(exponent > 0, 1 << mantissa_nbits, 0)
    value = np.ldexp(fraction.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_nbits)
    top = exponent == (1 << exponent_nbits) - 1
    if exponent_nbits == 5:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where(top & (mantissa == 7), np.nan, value)
    return np.where(bits & 0x80, -value, value)


def encode_fp8(values: Array, exponent_nbits: int, mantissa_nbits: int) -> Array:
    """Codes of float64 values: to nearest even, saturating to the largest finite value; NaN becomes 0x7F."""
    largest = 448.0 if exponent_nbits == 4 else 57344.0
    bias = (1 << (exponent_nbits - 1)) - 1
    magnitude = np.minimum(np.abs(values), largest)
    _, exponent = np.frexp(np.where(np.isfinite(magnitude), magnitude, 0.0))
    unit = np.maximum(exponent - 1, 1 - bias) - mantissa_nbits
    steps = np.rint(np.ldexp(magnitude, -unit))
    rounded = np.minimum(np.ldexp(steps, unit), largest)
    _, exponent = np.frexp(rounded)
    biased = np.maximum(exponent - 1 + bias, 0)
    normal = rounded >= 2.0 ** (1 - bias)
    scale = np.where(normal, exponent - 1, 1 - bias) - mantissa_nbits
    mantissa = np.ldexp(rounded, -scale) - np.where(normal, 1 << mantissa_nbits, 0)
    code = np.where(normal, biased, 0) * (1 << mantissa_nbits) + np.where(np.isnan(values), 0, mantissa)
    code = np.where(np.isnan(values), 0x7F, code + np.where(np.signbit(values), 0x80, 0))
    return code.astype(np.uint16)
