"""cvt (PTX ISA 9.7.9.21): between integers, floats, packed pairs and 8-bit floats."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilus.ptx.module import Reg, RegClass
from tilus.runtime.emulator.decode import DTYPES, PAIRS, Array, Site, Step, instruction
from tilus.runtime.emulator.float8 import decode_fp8, encode_fp8
from tilus.runtime.emulator.floating import clamp, narrow, widen
from tilus.runtime.emulator.rounding import f32_bits_to_bf16, flush

_INTEGER_MODES = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOAT_MODES = ("rn", "rz", "rm", "rp", "rna")
_FP8 = {"e4m3x2": (4, 3), "e5m2x2": (5, 2)}


def _is_float(type_name: str) -> bool:
    return "f" in type_name or type_name in _FP8


@instruction("cvt")
def convert(site: Site) -> Step:
    site.allow(*_INTEGER_MODES, *_FLOAT_MODES, "ftz", "sat", "satfinite", "relu")
    if len(site.types) != 2:
        raise site.unsupported("a conversion without two types")
    target, source = site.types
    if target in _FP8:
        return _to_fp8(site, target, source)
    if source in _FP8:
        return _from_fp8(site, target, source)
    if target in PAIRS:
        return _to_pair(site, target, source)
    if _is_float(source):
        return _float_to_float(site, target, source) if _is_float(target) else _float_to_integer(site, target, source)
    return _integer_to_float(site, target, source) if _is_float(target) else _integer_to_integer(site, target, source)


def _wide_target(site: Site, type_name: str) -> tuple[Array, Any]:
    """The destination row, which may be wider than the type, and the dtype to extend through."""
    dtype, operand = np.dtype(DTYPES[type_name]), site.operands[0]
    row = site.row(operand) if isinstance(operand, Reg) and operand.cls is not RegClass.PRED else None
    if row is None or row.dtype.itemsize < dtype.itemsize:
        raise site.fault(f"destination {operand}, expected a register of at least {dtype.itemsize * 8} bits")
    return row, np.dtype(f"{dtype.kind}{row.dtype.itemsize}")


def _integer_to_integer(site: Site, target: str, source: str) -> Step:
    """Truncation or extension; .sat clamps to the range of the target type."""
    out, extended = _wide_target(site, target)
    narrow_type = np.dtype(DTYPES[target])
    saturate = site.has("sat")
    limits = np.iinfo(narrow_type)

    def function(a: Array) -> Array:
        if saturate:
            low = 0 if a.dtype.kind == "u" else max(limits.min, np.iinfo(a.dtype).min)
            a = np.clip(a, a.dtype.type(low), a.dtype.type(min(limits.max, np.iinfo(a.dtype).max)))
        return a.astype(narrow_type).astype(extended).view(out.dtype)

    return site.elementwise(function, out, site.source(1, source))


def _float_to_integer(site: Site, target: str, source: str) -> Step:
    """Rounds to an integer and clamps to the range. NaN gives 0, or 1 << (width - 1) where a 64-bit type takes part."""
    mode = site.one_of(*_INTEGER_MODES)
    if mode is None:
        raise site.unsupported("a float to integer conversion without .rni, .rzi, .rmi or .rpi")
    out, extended = _wide_target(site, target)
    narrow_type = np.dtype(DTYPES[target])
    limits = np.iinfo(narrow_type)
    involves_64 = narrow_type.itemsize == 8 or source == "f64"
    of_nan = (limits.min or limits.max // 2 + 1) if involves_64 else 0
    ftz = site.has("ftz") and source == "f32"

    def function(a: Array) -> Array:
        wide = _INTEGER_MODES[mode](widen(flush(a) if ftz else a, source))
        nan = np.isnan(wide)
        inside = np.where(nan | (wide < limits.min) | (wide >= float(limits.max)), 0.0, wide).astype(narrow_type)
        result = np.where(wide < limits.min, limits.min, np.where(wide >= float(limits.max), limits.max, inside))
        return np.where(nan, of_nan, result).astype(narrow_type).astype(extended).view(out.dtype)

    return site.elementwise(function, out, site.source(1, source))


def _integer_to_float(site: Site, target: str, source: str) -> Step:
    mode = site.one_of(*_FLOAT_MODES)
    if mode is None:
        raise site.unsupported("an integer to float conversion without a rounding mode")
    exact = np.dtype(DTYPES[source]).itemsize < 8

    def function(a: Array) -> Array:
        wide = a.astype(np.float64) if exact else _to_odd_f64(a, target)
        return narrow(wide, target, mode)

    return site.elementwise(function, site.target(0, target), site.source(1, source))


def _to_odd_f64(a: Array, target: str) -> Array:
    """64-bit integers as float64, rounded to odd unless the target is float64 itself."""
    nearest = a.astype(np.float64)
    if target == "f64":
        return nearest
    sticky = (a & a.dtype.type(0x7FF)) != 0
    kept = np.where(sticky, (a & ~a.dtype.type(0x7FF)) | a.dtype.type(0x800), a)
    large = np.abs(nearest) >= 2.0**53
    return np.where(large, kept.astype(np.float64), nearest)


def _float_to_float(site: Site, target: str, source: str) -> Step:
    """Widening is exact; narrowing rounds once; same type with .rni and so on rounds to an integral value."""
    integral = site.one_of(*_INTEGER_MODES)
    mode = site.one_of(*_FLOAT_MODES) or "rn"
    if mode == "rna":
        return _to_tf32(site)
    ftz, saturate, relu = site.has("ftz"), site.has("sat"), site.has("relu")
    if target == "bf16" and source == "f32" and not (ftz or saturate or relu or integral):
        return site.elementwise(
            lambda bits: f32_bits_to_bf16(bits, mode), site.target(0, target), site.source(1, "b32")
        )

    def function(a: Array) -> Array:
        a = flush(a) if ftz and source == "f32" else a
        wide = widen(a, source)
        result = narrow(_INTEGER_MODES[integral](wide) if integral else wide, target, mode)
        result = flush(result) if ftz and target == "f32" else result
        return clamp(result, target, relu=relu) if saturate or relu else result

    return site.elementwise(function, site.target(0, target), site.source(1, source))


def _to_tf32(site: Site) -> Step:
    """cvt.rna.tf32.f32: 10 bits of mantissa, ties away from zero."""

    def function(bits: Array) -> Array:
        special = bits & np.uint32(0x7F800000) == 0x7F800000
        return np.where(special, bits, bits + np.uint32(0x1000) & ~np.uint32(0x1FFF))

    return site.elementwise(function, site.target(0, "b32"), site.source(1, "b32"))


def _to_pair(site: Site, target: str, source: str) -> Step:
    """cvt.rn.f16x2.f32 d, a, b: a goes to the upper half, b to the lower one."""
    site.expect_operands(3)
    if source != "f32":
        raise site.unsupported(f"source type .{source}")
    mode, relu = site.one_of(*_FLOAT_MODES) or "rn", site.has("relu")
    satfinite = site.has("satfinite")
    largest = {"f16x2": 65504.0, "bf16x2": float(np.uint32(0x7F7F0000).view(np.float32))}[target]

    if target == "bf16x2" and not (relu or satfinite):
        return site.elementwise(
            lambda high, low: np.stack(
                [f32_bits_to_bf16(half, mode) for half in np.broadcast_arrays(low, high)], axis=-1
            ),
            site.target(0, target),
            site.source(1, "b32"),
            site.source(2, "b32"),
        )

    def function(high: Array, low: Array) -> Array:
        both = np.stack(np.broadcast_arrays(low, high), axis=-1).astype(np.float64)
        result = narrow(np.clip(both, -largest, largest) if satfinite else both, target, mode)
        return clamp(result, target, relu=True) if relu else result

    return site.elementwise(function, site.target(0, target), site.source(1, source), site.source(2, source))


def _to_fp8(site: Site, target: str, source: str) -> Step:
    """cvt.rn.satfinite.e4m3x2.f32 d, a, b (a upper) and .f16x2 / .bf16x2 d, a."""
    if not site.has("satfinite"):
        raise site.unsupported("a conversion to 8-bit floats without .satfinite")
    out = site.target(0, "b16")
    shape = _FP8[target]
    relu = site.has("relu")

    def pack(low: Array, high: Array) -> Array:
        low, high = (np.where(half < 0, 0.0, half) if relu else half for half in (low, high))
        return encode_fp8(high, *shape) << np.uint16(8) | encode_fp8(low, *shape)

    if source == "f32":
        site.expect_operands(3)
        return site.elementwise(
            lambda a, b: pack(b.astype(np.float64), a.astype(np.float64)),
            out,
            site.source(1, "f32"),
            site.source(2, "f32"),
        )
    if source not in PAIRS:
        raise site.unsupported(f"source type .{source}")
    site.expect_operands(2)
    return site.elementwise(
        lambda pair: pack(widen(pair[..., 0], source), widen(pair[..., 1], source)), out, site.source(1, source)
    )


def _from_fp8(site: Site, target: str, source: str) -> Step:
    """cvt.rn.f16x2.e4m3x2 d, a: exact."""
    if target != "f16x2":
        raise site.unsupported(f"target type .{target}")
    site.expect_operands(2)
    shape, relu = _FP8[source], site.has("relu")

    def function(a: Array) -> Array:
        codes = np.stack([a & np.uint16(255), a >> np.uint16(8)], axis=-1)
        result = narrow(decode_fp8(codes, *shape), target)
        return clamp(result, target, relu=True) if relu else result

    return site.elementwise(function, site.target(0, target), site.source(1, source))
