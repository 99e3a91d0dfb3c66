"""Integer, logic and data movement instructions (PTX ISA 9.7.1, 9.7.2, 9.7.8, 9.7.9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilus.ptx.module import Operand, Symbol, Vector
from tilus.runtime.emulator.decode import DTYPES, Array, Mask, Site, Step, instruction
from tilus.runtime.emulator.floating import float_handler
from tilus.runtime.emulator.machine import SHARED_WINDOW

Function = Callable[..., Array]


def is_integer(type_name: str) -> bool:
    return type_name[0] in "us"


def _operation(site: Site, function: Function, type_name: str, count: int, result: str | None = None) -> Step:
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
            return _operation(site, np.add if site.name == "add" else np.subtract, type_name, 2)
        case "mul":
            site.allow("lo", "hi", "wide")
            result = wide_type(type_name) if site.has("wide") else type_name
            return _operation(site, _product(site), type_name, 2, result)
        case "div":
            site.allow()
            return _operation(site, lambda a, b: divide(a, b)[0], type_name, 2)
        case "neg":
            site.allow()
            return _operation(site, np.negative, type_name, 1)
        case "abs":
            site.allow()
            return _operation(site, np.abs, type_name, 1)
        case _:
            site.allow()
            return _operation(site, np.minimum if site.name == "min" else np.maximum, type_name, 2)


def _saturating(site: Site) -> Step:
    if site.type() != "s32":
        raise site.unsupported(f"modifier .sat on .{site.type()}", "it exists for .s32")
    sign = 1 if site.name == "add" else -1
    limits = np.iinfo(np.int32)

    def function(a: Array, b: Array) -> Array:
        return np.clip(a.astype(np.int64) + sign * b.astype(np.int64), limits.min, limits.max).astype(np.int32)

    return _operation(site, function, "s32", 2)


def wide_type(type_name: str) -> str:
    return {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[type_name]


def _product(site: Site) -> Function:
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
    return _operation(site, lambda a, b: divide(a, b)[1], site.type(), 2)


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
    return _operation(site, lambda a, b, c: c + np.where(a < b, b - a, a - b), site.type(), 3)


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


# Logic and shifts.
@instruction("and", "or", "xor")
def logic(site: Site) -> Step:
    site.allow()
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[site.name]
    return _operation(site, function, site.type(), 2)


@instruction("not")
def complement(site: Site) -> Step:
    site.allow()
    return _operation(site, np.invert, site.type(), 1)


@instruction("cnot")
def logical_complement(site: Site) -> Step:
    site.allow()
    return _operation(site, lambda a: (a == 0).astype(a.dtype), site.type(), 1)


@instruction("shl", "shr")
def shift(site: Site) -> Step:
    """Shift amounts are unsigned 32-bit and clamped to the width."""
    site.allow()
    site.expect_operands(3)
    type_name = site.type()
    left = site.name == "shl"
    return site.elementwise(
        lambda a, amount: shifted(a, amount, left=left),
        site.target(0, type_name),
        site.source(1, type_name),
        site.source(2, "u32"),
    )


def shifted(a: Array, amount: Array, *, left: bool) -> Array:
    """a << amount or a >> amount; amounts of the width or more shift everything out."""
    nbits = a.dtype.itemsize * 8
    small = np.minimum(amount, np.uint32(nbits - 1)).astype(a.dtype)
    moved = np.left_shift(a, small) if left else np.right_shift(a, small)
    if not left and a.dtype.kind == "i":
        return moved
    return np.where(amount >= nbits, a.dtype.type(0), moved)


@instruction("shf")
def funnel_shift(site: Site) -> Step:
    """shf.{l,r}.{clamp,wrap}.b32 d, a (low), b (high), c."""
    site.allow("l", "r", "clamp", "wrap")
    site.expect_operands(4)
    left, clamp = site.has("l"), site.has("clamp")

    def function(low: Array, high: Array, amount: Array) -> Array:
        n = np.minimum(amount, np.uint32(32)) if clamp else amount & np.uint32(31)
        pair = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        moved = pair << n.astype(np.uint64) >> np.uint64(32) if left else pair >> n.astype(np.uint64)
        return moved.astype(np.uint32)

    sources = [site.source(index, "u32") for index in (1, 2, 3)]
    return site.elementwise(function, site.target(0, "b32"), *sources)


@instruction("lop3")
def logic_of_three(site: Site) -> Step:
    """lop3.b32 d, a, b, c, immLut: bit (a << 2 | b << 1 | c) of the table is the result bit."""
    site.allow()
    site.expect_operands(5)
    table = int(site.source(4, "u32"))
    if table > 255:
        raise site.fault(f"lop3 table {table}, expected 0 to 255")
    minterms = [(bits >> 2 & 1, bits >> 1 & 1, bits & 1) for bits in range(8) if table >> bits & 1]
    zero = np.uint32(0)

    def function(a: Array, b: Array, c: Array) -> Array:
        result = zero
        for in_a, in_b, in_c in minterms:
            result = result | (a if in_a else ~a) & (b if in_b else ~b) & (c if in_c else ~c)
        return np.asarray(result)

    return site.elementwise(function, site.target(0, "b32"), *(site.source(index, "b32") for index in (1, 2, 3)))


@instruction("bfe")
def bit_field_extract(site: Site) -> Step:
    """bfe.type d, a, pos, len; signed forms fill up with the last bit of the field, at most the top bit of a."""
    site.allow()
    site.expect_operands(4)
    type_name = site.type()
    dtype = np.dtype(DTYPES[type_name])
    top = dtype.itemsize * 8 - 1
    unsigned = np.dtype(f"u{dtype.itemsize}")

    def function(a: Array, position: Array, length: Array) -> Array:
        pos, count = position & np.uint32(255), length & np.uint32(255)
        bits = a.astype(unsigned)
        present = np.minimum(count, np.uint32(top + 1) - np.minimum(pos, np.uint32(top + 1)))
        keep = ~shifted(np.asarray(~unsigned.type(0)), present, left=True)
        field = shifted(bits, pos, left=False) & keep
        if dtype.kind == "i":
            last = np.minimum(pos + count - np.uint32(1), np.uint32(top)).astype(unsigned)
            negative = (bits >> last & unsigned.type(1) != 0) & (count != 0)
            field = np.where(negative, field | ~keep, field)
        return field.astype(dtype)

    return site.elementwise(
        function, site.target(0, type_name), site.source(1, type_name), site.source(2, "u32"), site.source(3, "u32")
    )


@instruction("bfi")
def bit_field_insert(site: Site) -> Step:
    """bfi.type f, a, b, pos, len: the low len bits of a replace those of b at pos."""
    site.allow()
    site.expect_operands(5)
    type_name = site.type()
    dtype: Any = DTYPES[type_name]

    def function(a: Array, b: Array, position: Array, length: Array) -> Array:
        pos, count = position & np.uint32(255), length & np.uint32(255)
        keep = shifted(~shifted(np.asarray(~dtype(0)), count, left=True), pos, left=True)
        return b & ~keep | shifted(a, pos, left=True) & keep

    sources = [site.source(1, type_name), site.source(2, type_name), site.source(3, "u32"), site.source(4, "u32")]
    return site.elementwise(function, site.target(0, type_name), *sources)


@instruction("popc", "clz", "brev", "bfind")
def bit_counts(site: Site) -> Step:
    site.allow("shiftamt")
    type_name = site.type()
    functions: dict[str, Function] = {"popc": _popc, "clz": _clz, "brev": _brev, "bfind": _bfind}
    if site.has("shiftamt") and site.name != "bfind":
        raise site.unsupported("modifier .shiftamt")
    if site.has("shiftamt"):
        nbits = np.dtype(DTYPES[type_name]).itemsize * 8

        def shift_amount(a: Array) -> Array:
            found = _bfind(a)
            return np.where(found == 0xFFFFFFFF, found, np.uint32(nbits - 1) - found)

        return _operation(site, shift_amount, type_name, 1, "u32")
    return _operation(site, functions[site.name], type_name, 1, type_name if site.name == "brev" else "u32")


def _bits_of(a: Array) -> Array:
    """[..., nbits] bits of unsigned integers, least significant first."""
    nbits = a.dtype.itemsize * 8
    return (a[..., None] >> np.arange(nbits, dtype=a.dtype)) & a.dtype.type(1)


def _popc(a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


def _clz(a: Array) -> Array:
    nbits = a.dtype.itemsize * 8
    smeared = a
    for distance in (1, 2, 4, 8, 16, 32)[: nbits.bit_length() - 1]:
        smeared = smeared | smeared >> a.dtype.type(distance)
    return np.uint32(nbits) - np.bitwise_count(smeared).astype(np.uint32)


def _brev(a: Array) -> Array:
    bits = _bits_of(a)[..., ::-1]
    return (bits << np.arange(bits.shape[-1], dtype=a.dtype)).sum(axis=-1, dtype=a.dtype)


def _bfind(a: Array) -> Array:
    """Position of the most significant bit that differs from the sign; all ones when there is none."""
    value = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
    return np.uint32(a.dtype.itemsize * 8 - 1) - _clz(value.astype(f"u{a.dtype.itemsize}"))


@instruction("prmt")
def permute_bytes(site: Site) -> Step:
    """prmt.b32{.mode} d, a, b, selector: byte picks out of {b, a}."""
    site.allow("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    site.expect_operands(4)
    mode = site.one_of("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")

    def function(a: Array, b: Array, selector: Array) -> Array:
        pool = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        result = np.uint32(0)
        for byte in range(4):
            pick = _special_pick(mode, selector & np.uint32(3), byte) if mode else selector >> np.uint32(4 * byte)
            value = (pool >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(
                255
            )
            if mode is None:  # bit 3 of a selector nibble replicates the sign of the byte
                sign = (value >> np.uint32(7)) * np.uint32(255)
                value = np.where(pick & np.uint32(8) != 0, sign, value)
            result = result | value << np.uint32(8 * byte)
        return np.asarray(result)

    return site.elementwise(function, site.target(0, "b32"), *(site.source(index, "u32") for index in (1, 2, 3)))


def _special_pick(mode: str, control: Array, byte: int) -> Array:
    """Which byte of the pool a special prmt mode takes (PTX ISA, table of prmt)."""
    c = control.astype(np.uint32)
    match mode:
        case "f4e":
            return c + np.uint32(byte)
        case "b4e":
            return c - np.uint32(byte) & np.uint32(7)
        case "rc8":
            return c
        case "ecl":
            return np.maximum(c, np.uint32(byte))
        case "ecr":
            return np.minimum(c, np.uint32(byte))
        case _:
            return (c & np.uint32(1)) * np.uint32(2) + np.uint32(byte & 1)


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
    site.allow("to", "global", "shared", "shared::cta", "const", "local", "param")
    out = site.target(0, site.type())
    source = site.operands[1]
    value = site.source(source, "u32" if isinstance(source, Symbol) else site.type())
    window = np.uint64(SHARED_WINDOW if site.one_of("shared", "shared::cta") else 0)
    if site.has("to"):
        return site.elementwise(lambda a: (a.astype(np.uint64) - window).astype(out.dtype), out, value)
    return site.elementwise(lambda a: (a.astype(np.uint64) + window).astype(out.dtype), out, value)


@instruction("isspacep")
def is_in_space(site: Site) -> Step:
    site.allow("global", "shared", "shared::cta")
    shared = site.one_of("shared", "shared::cta") is not None
    window = np.uint64(SHARED_WINDOW)
    return site.elementwise(lambda a: (a >= window) == shared, site.target(0, "pred"), site.source(1, "u64"))
