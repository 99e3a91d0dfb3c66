"""Rounding of numpy's numbers to f16, bf16 and tf32, once: what numpy does not have, or has slowly.

A number that is rounded twice may come out wrong, unless the first rounding is *to odd*: the last bit that is kept is set where
any is lost. Source: S. Boldo and G. Melquiond, "When double rounding is odd", 2005.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

TF32_BITS = np.uint32(0xFFFFE000)  # those of an f32 that a tf32 has, in the same places


def to_float64(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Float64 whose later rounding to a narrower type equals rounding the input: 64-bit integers are rounded to odd."""
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 8:
        return array.astype(np.float64)
    dropped = array & array.dtype.type(0x7FF)
    wide = np.abs(array.astype(np.float64)) >= 2.0**53
    sticky = np.where(wide & (dropped != 0), array - dropped | array.dtype.type(0x800), array)
    return sticky.astype(np.float64)


def round_f16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """f32 values rounded to f16, several times faster than numpy's casts there and back.

    Adding and subtracting 3 * 2^(e + 12), e the exponent of the value but at least -14, leaves multiples of f16's spacing.
    """
    magic = np.abs(values)
    np.maximum(magic, np.float32(2.0**-14), out=magic)
    bits = magic.view(np.uint32)
    np.bitwise_and(bits, np.uint32(0x7F800000), out=bits)
    np.multiply(magic, np.float32(3 * 2.0**12), out=magic)
    with np.errstate(all="ignore"):
        result = np.add(values, magic)
        np.subtract(result, magic, out=result)
        np.copysign(result, values, out=result)
        if not float(np.max(np.abs(values), initial=0.0)) < 65520.0:  # overflow to infinity, or NaN
            large = ~(np.abs(values) < 65520.0)
            result[large] = values[large].astype(np.float16)
    return result


def wide_codes(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The codes of floats of more than 8 bits: of f16, bf16, tf32 and f32, by name. array: float32 or float64."""
    match name:
        case "f16":
            return array.astype(np.float16).view(np.uint16)
        case "bf16":
            return _bf16_codes(array)
        case "tf32":
            return _tf32_codes(array)
        case _:
            return array.astype(np.float32).view(np.uint32)


def _bf16_codes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Keep the upper half of the float32 bits, rounded to nearest even."""
    bits = _odd_float32_bits(array)
    codes = ((bits + (bits >> 16 & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), codes)


def _tf32_codes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Add half of the last place to the magnitude and cut: ties go away from zero, as PTX `cvt.rna.tf32.f32` does."""
    bits = _odd_float32_bits(array)
    codes = np.where(np.isinf(array), bits, bits + np.uint32(0x1000)) & TF32_BITS
    return np.where(np.isnan(array), np.uint32(0x7FFFE000), codes)


def _odd_float32_bits(array: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """The bits of float32 values; float64 ones are rounded to odd."""
    single = array.astype(np.float32)
    bits = single.view(np.uint32)
    if array.dtype == np.float64:
        wide = single.astype(np.float64)
        bits = bits - (np.abs(wide) > np.abs(array)) | (wide != array)
    return bits
