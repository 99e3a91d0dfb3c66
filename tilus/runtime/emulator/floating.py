"""Floating-point instructions (PTX ISA 9.7.3 to 9.7.5): f32, f64, f16, bf16 and packed pairs.

16-bit arithmetic is exact in float64 and rounded once. Approximate functions give the rounded float32 of the numpy
value; hardware may differ by the error that the ISA allows (2 units in the last place, more for tanh, sin and cos).
NaN results have the canonical pattern in 16-bit arithmetic, fma, and conversions; plain f32 arithmetic leaves numpy's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilus.runtime.emulator.decode import PAIRS, Array, Function, Site, Step, instruction
from tilus.runtime.emulator.rounding import (
    add_to_odd,
    bf16_to_f32,
    f64_to_bf16,
    f64_to_f16,
    f64_to_f32,
    flush,
    fma_to_odd,
)  # fmt: skip

Unary = Callable[[Array], Array]
Binary = Callable[[Array, Array], Array]
_MODES = ("rn", "rz", "rm", "rp")


def widen(values: Array, type_name: str) -> Array:
    """float64 values of register elements of a float type."""
    if type_name.startswith("bf16"):
        return bf16_to_f32(values).astype(np.float64)
    return values.astype(np.float64)


def narrow(values: Array, type_name: str, mode: str = "rn") -> Array:
    """Register elements of a float type, from float64 values by one rounding."""
    if type_name.startswith("bf16"):
        return f64_to_bf16(values, mode)
    if type_name.startswith("f16"):
        return f64_to_f16(values, mode)
    if type_name == "f32":
        return f64_to_f32(values, mode)
    return values


def float_handler(site: Site) -> Step:
    """add, sub, mul, mad, div, neg, abs, min and max on float types."""
    match site.name:
        case "add" | "sub" | "mul" | "mad" | "fma":
            return _arithmetic(site)
        case "div":
            return _division(site)
        case "neg" | "abs":
            return _sign(site)
        case _:
            return _extremum(site)


def _mode(site: Site) -> str:
    return site.one_of(*_MODES) or "rn"


def _apply(site: Site, function: Function, count: int) -> Step:
    """A step on `count` sources, with .ftz on inputs and outputs and .sat / .relu on the output."""
    site.expect_operands(count + 1)
    type_name = site.type()
    sources = [site.source(1 + index, type_name) for index in range(count)]
    compute: Callable[..., Array] = function
    ftz = site.has("ftz") and type_name == "f32"
    saturate, relu = site.has("sat"), site.has("relu")

    def whole(*values: Array) -> Array:
        result = compute(*(map(flush, values) if ftz else values))
        result = flush(result) if ftz else result
        return clamp(result, type_name, relu=relu) if saturate or relu else result

    fast = not (ftz or saturate or relu)
    return site.elementwise(function if fast else whole, site.target(0, type_name), *sources)


def clamp(values: Array, type_name: str, *, relu: bool) -> Array:
    """.sat: to [0, 1] with NaN to 0. .relu: negative to 0, NaN stays."""
    wide = widen(values, type_name)
    if relu:
        return narrow(np.where(wide < 0, 0.0, wide), type_name)
    return narrow(np.where(np.isnan(wide), 0.0, np.clip(wide, 0.0, 1.0)), type_name)


@instruction("fma")
def fused_multiply_add(site: Site) -> Step:
    return _arithmetic(site)


def _arithmetic(site: Site) -> Step:
    site.allow(*_MODES, "ftz", "sat", "relu")
    name, type_name, mode = site.name, site.type(), _mode(site)
    fused = name in ("fma", "mad")
    if type_name == "f64":
        if fused or mode != "rn":
            raise site.unsupported("fused or directed f64 arithmetic")
        return _apply(site, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name], 2)
    if type_name == "f32" and mode == "rn" and not fused:
        return _apply(site, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name], 2)
    if fused:
        return _apply(site, lambda a, b, c: narrow(_fused(a, b, c, type_name), type_name, mode), 3)
    if (
        type_name.startswith("f16") and mode == "rn"
    ):  # float32 holds more than twice the bits: rounding twice is innocuous
        short: Binary = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
        return _apply(site, lambda a, b: f64_to_f16(short(a.astype(np.float32), b.astype(np.float32))), 2)
    exact: Binary = {"add": add_to_odd, "sub": _subtract_to_odd, "mul": np.multiply}[name]
    return _apply(site, lambda a, b: narrow(exact(widen(a, type_name), widen(b, type_name)), type_name, mode), 2)


def _subtract_to_odd(a: Array, b: Array) -> Array:
    return add_to_odd(a, -b)


def _fused(a: Array, b: Array, c: Array, type_name: str) -> Array:
    """a * b + c, exact as far as one rounding to the type can see."""
    if type_name.startswith("f16"):  # no float16 tie lies within what float64 loses: exponents span 2^-48 to 2^32
        return widen(a, type_name) * widen(b, type_name) + widen(c, type_name)
    return fma_to_odd(widen(a, type_name), widen(b, type_name), widen(c, type_name))


def _division(site: Site) -> Step:
    site.allow("rn", "approx", "full", "ftz")
    if site.type() not in ("f32", "f64"):
        raise site.unsupported(f"type .{site.type()}")
    return _apply(site, np.divide, 2)


def _sign(site: Site) -> Step:
    """neg and abs work on the bits, so NaN keeps its payload."""
    site.allow("ftz")
    site.expect_operands(2)
    type_name = site.type()
    scalar = {"f16x2": "b32", "bf16x2": "b32", "f16": "b16", "bf16": "b16", "f32": "b32", "f64": "b64"}[type_name]
    out, source = site.target(0, scalar), site.source(1, scalar)
    unsigned: Any = out.dtype.type
    sign = unsigned(0x80008000 if type_name in PAIRS else 1 << (out.dtype.itemsize * 8 - 1))
    negate, ftz = site.name == "neg", site.has("ftz") and type_name == "f32"

    def function(bits: Array) -> Array:
        bits = flush(bits.view(np.float32)).view(np.uint32) if ftz else bits
        return bits ^ sign if negate else bits & ~sign

    return site.elementwise(function, out, source)


def _extremum(site: Site) -> Step:
    """min and max: a NaN loses against a number unless .NaN; -0 is less than +0."""
    site.allow("ftz", "NaN")
    type_name, smaller, keep_nan = site.type(), site.name == "min", site.has("NaN")

    def function(a: Array, b: Array) -> Array:
        x, y = widen(a, type_name), widen(b, type_name)
        x_is_less = (x < y) | ((x == y) & np.signbit(x))
        result = np.where(x_is_less if smaller else ~x_is_less, x, y)
        nan_x, nan_y = np.isnan(x), np.isnan(y)
        if keep_nan:
            result = np.where(nan_x | nan_y, np.nan, result)
        else:
            result = np.where(nan_x, y, np.where(nan_y, x, result))
        return narrow(result, type_name)

    return _apply(site, function, 2)


@instruction("sqrt", "rsqrt", "rcp", "sin", "cos", "lg2", "ex2", "tanh")
def elementary(site: Site) -> Step:
    site.allow("approx", "rn", "ftz")
    type_name = site.type()
    functions: dict[str, Unary] = {
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1.0 / np.sqrt(x),
        "rcp": lambda x: 1.0 / x,
        "sin": np.sin,
        "cos": np.cos,
        "lg2": np.log2,
        "ex2": np.exp2,
        "tanh": np.tanh,
    }
    function = functions[site.name]
    least = 2.0**-126 if "ftz" in site.words else 0.0

    def result(x: Array) -> Array:
        found = np.asarray(function(widen(x, type_name)))
        return narrow(np.where(np.abs(found) < least, np.copysign(0.0, found), found), type_name)

    return _apply(site, result, 1)


@instruction("testp")
def test_property(site: Site) -> Step:
    """testp.{finite,infinite,number,notanumber,normal,subnormal}.type."""
    site.allow("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    least = {"f32": 2.0**-126, "f64": 2.0**-1022}[site.type()]
    tests: dict[str, Unary] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= least),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < least),
    }
    return site.elementwise(tests[site.words[0]], site.target(0, "pred"), site.source(1, site.type()))


@instruction("copysign")
def copy_sign(site: Site) -> Step:
    """copysign d, a, b: the sign of a, the magnitude of b."""
    site.allow()
    return _apply(site, lambda a, b: np.copysign(b, a), 2)
