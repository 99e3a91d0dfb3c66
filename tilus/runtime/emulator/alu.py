"""Integer arithmetic and data movement (PTX ISA 9.7.1, 9.7.2, 9.7.9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilus.ptx.module import Operand, Symbol, Vector
from tilus.runtime.emulator.decode import DTYPES, Array, Function, Mask, Site, Step, instruction
from tilus.runtime.emulator.floating import float_handler
from tilus.runtime.emulator.machine import PARAM_WINDOW, SHARED_WINDOW


def is_integer(type_name: str) -> bool:
    return type_name[0] in "us"


def apply_function(site: Site, function: Function, type_name: str, count: int, result: str | None = None) -> Step:
    """A step of `count` sources of one type."""
    site.expect_operands(count + 1)
    sources = [site.source(1 + index, type_name) for index in range(count)]
    return site.elementwise(function, site.target(0, result or type_name), *sources)


@instruction("add", "sub", "mul", "div", "neg", "abs", "min", "max")
def arithmetic(site: Site) -> Step:
    if not is_integer(site.type()):
        return float_handler(site)
    type_name = site.type()
    match site.name:
        case "add" | "sub":
            site.allow("sat")
            if site.has("sat"):
                return _saturating(site)
            return apply_function(site, np.add if site.name == "add" else np.subtract, type_name, 2)
        case "mul":
            site.allow("lo", "hi", "wide")
            result = wide_type(type_name) if site.has("wide") else type_name
            return apply_function(site, _product(site), type_name, 2, result)
        case "div":
            site.allow()
            return apply_function(site, lambda a, b: divide(a, b)[0], type_name, 2)
        case "neg":
            site.allow()
            return apply_function(site, np.negative, type_name, 1)
        case "abs":
            site.allow()
            return apply_function(site, np.abs, type_name, 1)
        case _:
            site.allow()
            return apply_function(site, np.minimum if site.name == "min" else np.maximum, type_name, 2)


def _saturating(site: Site) -> Step:
    if site.type() != "s32":
        raise site.unsupported(f"modifier .sat on .{site.type()}", "it exists for .s32")
    sign = 1 if site.name == "add" else -1
    limits = np.iinfo(np.int32)

    def function(a: Array, b: Array) -> Array:
        return np.clip(a.astype(np.int64) + sign * b.astype(np.int64), limits.min, limits.max).astype(np.int32)

    return apply_function(site, function, "s32", 2)


def wide_type(type_name: str) -> str:
    return {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[type_name]


def _product(site: Site) -> Callable[[Array, Array], Array]:
    """The product function of mul and mad, for .lo, .hi and .wide."""
    type_name = site.type()
    if site.has("wide"):
        if type_name not in ("u16", "s16", "u32", "s32"):
            raise site.unsupported(f"modifier .wide on .{type_name}")
        wide = DTYPES[wide_type(type_name)]
        return lambda a, b: a.astype(wide) * b.astype(wide)
    if site.has("hi"):
        return high_product
    if not site.has("lo"):
        raise site.unsupported("a product without .lo, .hi or .wide")
    return np.multiply


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the full product."""
    dtype = a.dtype
    nbits = dtype.itemsize * 8
    if nbits < 64:
        wide = np.dtype(f"{dtype.kind}{dtype.itemsize * 2}")
        return (a.astype(wide) * b.astype(wide) >> nbits).astype(dtype)
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + (x0 * y0 >> shift)
    high = x1 * y1 + (middle >> shift) + ((x0 * y1 + (middle & low)) >> shift)
    if dtype.kind == "i":  # signed = unsigned minus the other factor for each negative one
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(dtype)


def divide(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient (towards zero) and remainder (sign of the dividend). By zero: all ones, and the dividend."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    quotient = np.floor_divide(a, safe)
    remainder = (a - quotient * safe).astype(a.dtype)
    if a.dtype.kind == "i":
        adjust = (remainder != 0) & ((a < 0) != (safe < 0))
        quotient = quotient + adjust.astype(a.dtype)
        remainder = remainder - np.where(adjust, safe, a.dtype.type(0))
    ones = np.asarray(-1, np.int64).astype(a.dtype)
    return np.where(zero, ones, quotient), np.where(zero, a, remainder)


@instruction("rem")
def remainder(site: Site) -> Step:
    site.allow()
    return apply_function(site, lambda a, b: divide(a, b)[1], site.type(), 2)


@instruction("mad")
def multiply_add(site: Site) -> Step:
    if not is_integer(site.type()):
        return float_handler(site)
    site.allow("lo", "hi", "wide")
    site.expect_operands(4)
    product, type_name = _product(site), site.type()
    result = wide_type(type_name) if site.has("wide") else type_name
    return site.elementwise(
        lambda a, b, c: product(a, b) + c,
        site.target(0, result),
        site.source(1, type_name),
        site.source(2, type_name),
        site.source(3, result),
    )


@instruction("sad")
def sum_of_absolute_differences(site: Site) -> Step:
    site.allow()
    return apply_function(site, lambda a, b, c: c + np.where(a < b, b - a, a - b), site.type(), 3)


@instruction("dp4a")
def dot_product_4(site: Site) -> Step:
    """d = c + the sum of four byte products; dp4a.atype.btype."""
    site.expect_operands(4)
    a_bytes, b_bytes = (np.int8 if name == "s32" else np.uint8 for name in site.types[:2])
    signed = "s32" in site.types[:2]

    def function(a: Array, b: Array, c: Array) -> Array:
        left = np.ascontiguousarray(np.broadcast_to(a, c.shape)).view(a_bytes).reshape(-1, 4).astype(np.int64)
        right = np.ascontiguousarray(np.broadcast_to(b, c.shape)).view(b_bytes).reshape(-1, 4).astype(np.int64)
        return ((left * right).sum(axis=1) + c).astype(c.dtype)

    result = "s32" if signed else "u32"
    addend = np.broadcast_to(site.source(3, result), site.machine.lanes)
    return site.elementwise(function, site.target(0, result), site.source(1, "u32"), site.source(2, "u32"), addend)


# Data movement.
@instruction("mov")
def move(site: Site) -> Step:
    """mov, and its packing and unpacking forms on vectors."""
    site.allow()
    site.expect_operands(2)
    target, source = site.operands
    type_name = site.type()
    if isinstance(target, Vector):
        return _unpack(site, target, source, type_name)
    if isinstance(source, Vector):
        return _pack(site, target, source, type_name)
    return site.elementwise(lambda a: a, site.target(0, type_name), site.source(1, type_name))


def _piece(site: Site, vector: Vector, type_name: str) -> str:
    nbits = np.dtype(DTYPES[type_name]).itemsize * 8 // len(vector.elements)
    if nbits not in (16, 32):
        raise site.unsupported(f"a vector of {len(vector.elements)} pieces of .{type_name}")
    return f"b{nbits}"


def _unpack(site: Site, target: Vector, source: Operand, type_name: str) -> Step:
    piece = _piece(site, target, type_name)
    whole = site.source(source, type_name)
    count = len(target.elements)
    outs = [site.target(element, piece) for element in target.elements]
    nbits = np.uint64(int(piece[1:]))

    def step(mask: Mask) -> None:
        bits = (
            whole.astype(np.uint64)
            if whole.dtype.kind == "u"
            else whole.view(f"u{whole.dtype.itemsize}").astype(np.uint64)
        )
        pieces = [(bits >> np.uint64(index) * nbits).astype(outs[index].dtype) for index in range(count)]
        for out, values in zip(outs, pieces, strict=True):
            np.copyto(out, values, where=True if mask is None else mask)

    return step


def _pack(site: Site, target: Operand, source: Vector, type_name: str) -> Step:
    piece = _piece(site, source, type_name)
    pieces = [site.source(element, piece) for element in source.elements]
    unsigned: Any = np.dtype(f"u{np.dtype(DTYPES[type_name]).itemsize}").type
    nbits = int(piece[1:])

    def function(*values: Array) -> Array:
        result = unsigned(0)
        for index, value in enumerate(values):
            result = result | value.astype(unsigned) << unsigned(index * nbits)
        return np.asarray(result)

    return site.elementwise(function, site.target(target, f"b{nbits * len(pieces)}"), *pieces)


@instruction("cvta")
def convert_address(site: Site) -> Step:
    """cvta{.to}.space: between an address of a space and a generic one."""
    site.allow("to", "global", "shared", "shared::cta", "shared::cluster", "const", "local", "param")
    out = site.target(0, site.type())
    source = site.operands[1]
    is_shared = isinstance(source, Symbol) and source.name in site.machine.shared_symbols
    value = site.source(source, "u32" if is_shared else site.type())
    in_shared = site.one_of("shared", "shared::cta", "shared::cluster")
    window = np.uint64(SHARED_WINDOW if in_shared else PARAM_WINDOW if site.has("param") else 0)
    if site.has("to"):
        return site.elementwise(lambda a: (a.astype(np.uint64) - window).astype(out.dtype), out, value)
    return site.elementwise(lambda a: (a.astype(np.uint64) + window).astype(out.dtype), out, value)


@instruction("isspacep")
def is_in_space(site: Site) -> Step:
    site.allow("global", "shared", "shared::cta")
    shared = site.one_of("shared", "shared::cta") is not None
    window = np.uint64(SHARED_WINDOW)
    return site.elementwise(lambda a: (a >= window) == shared, site.target(0, "pred"), site.source(1, "u64"))
