"""Exact arithmetic with one rounding, on numpy arrays.

Values are carried in float64. Where an exact result does not fit, it is rounded to odd: a later rounding to a format of
at most 51 bits then gives what one rounding of the exact result would have given (Boldo and Melquiond, "Emulation of
FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
NAN_F32, NAN_16 = np.uint32(0x7FFFFFFF), np.uint16(0x7FFF)


def _to_odd(nearest: F64, error: F64) -> F64:
    """The round-to-odd result, from the nearest one and the sign of what it lost."""
    bits = np.asarray(nearest).view(np.int64)
    even = (bits & 1 == 0) & (error != 0) & np.isfinite(nearest)
    away = (error > 0) == (nearest >= 0)  # the exact value has the larger magnitude
    return np.where(even, bits + np.where(away, 1, -1), bits).view(np.float64)


def add_to_odd(a: F64, b: F64) -> F64:
    """a + b rounded to odd (error term by Knuth's TwoSum)."""
    total = np.asarray(a + b)
    part = total - a
    error = (a - (total - part)) + (b - part)
    return _to_odd(total, np.where(np.isnan(error), 0.0, error))


def fma_to_odd(a: F64, b: F64, c: F64) -> F64:
    """a * b + c rounded to odd; the product must be exact in float64, as it is for factors of at most 26 bits."""
    return add_to_odd(np.asarray(a * b), c)


def f64_to_f32(x: F64, mode: str = "rn") -> npt.NDArray[np.float32]:
    """Round to float32; mode rn, rz, rm (down) or rp (up). NaN becomes the canonical 0x7FFFFFFF."""
    nearest = np.asarray(x).astype(np.float32)
    if mode != "rn":
        nearest = _directed(x, nearest, mode, np.uint32)
    return np.where(np.isnan(x), NAN_F32.view(np.float32), nearest)


def f64_to_f16(x: F64, mode: str = "rn") -> npt.NDArray[np.float16]:
    """Round to float16 once; NaN becomes the canonical 0x7FFF."""
    nearest = np.asarray(x).astype(np.float16)
    if mode != "rn":
        nearest = _directed(x, nearest, mode, np.uint16)
    return np.where(np.isnan(x), NAN_16.view(np.float16), nearest)


def f64_to_bf16(x: F64, mode: str = "rn") -> npt.NDArray[np.uint16]:
    """Round to the bits of a bfloat16 once; NaN becomes the canonical 0x7FFF."""
    x = np.asarray(x)
    single = x.astype(np.float32)
    wide = single.astype(np.float64)
    odd = single.view(np.uint32) - (np.abs(wide) > np.abs(x)) | (wide != x)
    return f32_bits_to_bf16(np.where(np.isnan(x), NAN_F32, odd).astype(np.uint32), mode)


def f32_bits_to_bf16(bits: npt.NDArray[np.uint32], mode: str = "rn") -> npt.NDArray[np.uint16]:
    """Round float32 bit patterns to the bits of a bfloat16; NaN becomes the canonical 0x7FFF."""
    match mode:
        case "rn":
            step = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        case "rz":
            step = np.uint32(0)
        case "rm":
            step = np.where(bits >> np.uint32(31) == 1, np.uint32(0xFFFF), np.uint32(0))
        case _:
            step = np.where(bits >> np.uint32(31) == 0, np.uint32(0xFFFF), np.uint32(0))
    nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
    return np.where(nan, NAN_16, (bits + step) >> np.uint32(16)).astype(np.uint16)


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _directed(x: F64, nearest: Any, mode: str, unsigned: Any) -> Any:
    """Step the nearest value back by one unit in the last place where it lies on the wrong side of x."""
    wide = nearest.astype(np.float64)
    infinite = nearest.dtype.type(np.inf)
    match mode:
        case "rz":
            wrong, towards = np.abs(wide) > np.abs(x), np.zeros_like(nearest)
        case "rm":
            wrong, towards = wide > x, np.full_like(nearest, -infinite)
        case _:
            wrong, towards = wide < x, np.full_like(nearest, infinite)
    return np.where(wrong, np.nextafter(nearest, towards), nearest)


def flush(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Subnormals become zeros of the same sign (.ftz)."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x)
