"""Logic, shifts, bit fields and byte permutation (PTX ISA 9.7.1, 9.7.8, 9.7.9.7)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilus.runtime.emulator.alu import apply_function
from tilus.runtime.emulator.decode import DTYPES, Array, Function, Site, Step, instruction


@instruction("and", "or", "xor")
def logic(site: Site) -> Step:
    site.allow()
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[site.name]
    return apply_function(site, function, site.type(), 2)


@instruction("not")
def complement(site: Site) -> Step:
    site.allow()
    return apply_function(site, np.invert, site.type(), 1)


@instruction("cnot")
def logical_complement(site: Site) -> Step:
    site.allow()
    return apply_function(site, lambda a: (a == 0).astype(a.dtype), site.type(), 1)


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

        return apply_function(site, shift_amount, type_name, 1, "u32")
    return apply_function(site, functions[site.name], type_name, 1, type_name if site.name == "brev" else "u32")


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
