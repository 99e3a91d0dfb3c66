"""Elements of the operands of matrix instructions: 32-bit registers or words of memory <-> float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tilus.runtime.emulator.float8 import Array, decode_fp8
from tilus.runtime.emulator.rounding import bf16_to_f32, f64_to_f16, f64_to_f32

NBITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "e4m3": 8, "e5m2": 8}
"""Bits of an element of A or B by its type."""
_E4M3, _E5M2 = (decode_fp8(np.arange(256, dtype=np.uint8), *fields) for fields in ((4, 3), (5, 2)))


def _nibbles(bits: Array) -> Array:
    """Four-bit codes, the lowest of a byte first."""
    octets = bits.view(np.uint8)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


DECODERS: dict[str, Callable[[Array], Array]] = {
    "f16": lambda bits: bits.view(np.uint16).view(np.float16).astype(np.float64),
    "bf16": lambda bits: bf16_to_f32(bits.view(np.uint16)).astype(np.float64),
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64),
    "s8": lambda bits: bits.view(np.int8).astype(np.float64),
    "u8": lambda bits: bits.view(np.uint8).astype(np.float64),
    "s4": lambda bits: ((_nibbles(bits) ^ 8).astype(np.int8) - 8).astype(np.float64),
    "u4": lambda bits: _nibbles(bits).astype(np.float64),
    "e4m3": lambda bits: _E4M3[bits.view(np.uint8)],
    "e5m2": lambda bits: _E5M2[bits.view(np.uint8)],
    "f32": lambda bits: bits.view(np.float32).astype(np.float64),
    "s32": lambda bits: bits.view(np.int32).astype(np.float64),
}
"""By type: contiguous uint32 words -> float64, with the elements of a word, lowest bits first, along the last axis."""


def encode(values: Array, type_name: str, *, saturate: bool = False) -> Array:
    """uint32 words of accumulators: rounded once (f16: two of the last axis in a word), integers wrapped or clipped."""
    if type_name == "f16":
        return np.ascontiguousarray(f64_to_f16(values)).view(np.uint32)
    if type_name == "f32":
        return f64_to_f32(values).view(np.uint32)
    limits = np.iinfo(np.int32)
    integers = np.clip(values, limits.min, limits.max) if saturate else values
    return integers.astype(np.int64).astype(np.uint32)
