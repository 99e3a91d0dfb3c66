"""Integer and logic instructions against Python's unbounded integers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from emulator_kernels import apply

TYPES = ("u16", "s16", "u32", "s32", "u64", "s64")


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(f"{'i' if name[0] == 's' else 'u'}{int(name[1:]) // 8}")


def corner_values(name: str) -> list[int]:
    """Values of a type at which arithmetic wraps or signs change, and a few others."""
    nbits = int(name[1:])
    raw = [
        0,
        1,
        2,
        3,
        5,
        7,
        100,
        12345,
        (1 << nbits - 1) - 1,
        1 << nbits - 1,
        (1 << nbits) - 1,
        (1 << nbits) - 7,
        0x9E37,
    ]
    return [wrap(value, name) for value in dict.fromkeys(raw)]


def wrap(value: int, name: str) -> int:
    """An integer modulo 2^n in the range of the type."""
    nbits = int(name[1:])
    value &= (1 << nbits) - 1
    return value - (1 << nbits) if name[0] == "s" and value >> nbits - 1 else value


def check(instruction: str, name: str, law: Callable[..., int], arity: int, result: str | None = None) -> None:
    """The instruction equals the law, wrapped, on all tuples of corner values."""
    result = result or name
    tuples = list(product(corner_values(name), repeat=arity))
    columns = [np.array([t[i] for t in tuples], dtype_of(name)) for i in range(arity)]
    got = apply(instruction, dtype_of(result), *columns)
    want = [wrap(law(*t), result) for t in tuples]
    assert got.tolist() == want


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


@pytest.mark.parametrize("name", TYPES)
def test_sums_and_low_products_wrap(name: str) -> None:
    check(f"add.{name} {{d}}, {{0}}, {{1}}", name, lambda a, b: a + b, 2)
    check(f"sub.{name} {{d}}, {{0}}, {{1}}", name, lambda a, b: a - b, 2)
    check(f"mul.lo.{name} {{d}}, {{0}}, {{1}}", name, lambda a, b: a * b, 2)
    check(f"mul.hi.{name} {{d}}, {{0}}, {{1}}", name, lambda a, b: a * b >> int(name[1:]), 2)


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32"])
def test_wide_products_are_exact(name: str) -> None:
    wide = f"{name[0]}{int(name[1:]) * 2}"
    check(f"mul.wide.{name} {{d}}, {{0}}, {{1}}", name, lambda a, b: a * b, 2, wide)


@pytest.mark.parametrize("name", TYPES)
def test_division_truncates_and_remainder_keeps_the_dividends_sign(name: str) -> None:
    check(f"div.{name} {{d}}, {{0}}, {{1}}", name, quotient, 2)
    check(f"rem.{name} {{d}}, {{0}}, {{1}}", name, lambda a, b: a - b * quotient(a, b) if b else a, 2)


@pytest.mark.parametrize("name", TYPES)
def test_order_operations(name: str) -> None:
    check(f"min.{name} {{d}}, {{0}}, {{1}}", name, min, 2)
    check(f"max.{name} {{d}}, {{0}}, {{1}}", name, max, 2)
    if name[0] == "s":
        check(f"abs.{name} {{d}}, {{0}}", name, abs, 1)
        check(f"neg.{name} {{d}}, {{0}}", name, lambda a: -a, 1)


def test_multiply_add_of_three_widths() -> None:
    check("mad.lo.u32 {d}, {0}, {1}, {2}", "u32", lambda a, b, c: a * b + c, 3)
    check("mad.hi.s32 {d}, {0}, {1}, {2}", "s32", lambda a, b, c: (a * b >> 32) + c, 3)
    check("sad.s32 {d}, {0}, {1}, {2}", "s32", lambda a, b, c: c + abs(a - b), 3)
    a, b = (np.array(column, np.int32) for column in zip(*product(corner_values("s32"), repeat=2)))
    c = np.arange(len(a), dtype=np.int64) * 0x1234567890
    got = apply("mad.wide.s32 {d}, {0}, {1}, {2}", np.int64, a, b, c)
    assert got.tolist() == [wrap(int(x) * int(y) + int(z), "s64") for x, y, z in zip(a, b, c)]


def test_saturating_add_and_subtract() -> None:
    def clip(value: int) -> int:
        return max(-(1 << 31), min((1 << 31) - 1, value))

    check("add.sat.s32 {d}, {0}, {1}", "s32", lambda a, b: clip(a + b), 2)
    check("sub.sat.s32 {d}, {0}, {1}", "s32", lambda a, b: clip(a - b), 2)


@pytest.mark.parametrize("nbits", [16, 32, 64])
def test_logic(nbits: int) -> None:
    name = f"u{nbits}"
    check(f"and.b{nbits} {{d}}, {{0}}, {{1}}", name, lambda a, b: a & b, 2)
    check(f"or.b{nbits} {{d}}, {{0}}, {{1}}", name, lambda a, b: a | b, 2)
    check(f"xor.b{nbits} {{d}}, {{0}}, {{1}}", name, lambda a, b: a ^ b, 2)
    check(f"not.b{nbits} {{d}}, {{0}}", name, lambda a: ~a, 1)
    check(f"cnot.b{nbits} {{d}}, {{0}}", name, lambda a: int(a == 0), 1)


@pytest.mark.parametrize("name", TYPES)
def test_shift_amounts_clamp_to_the_width(name: str) -> None:
    nbits = int(name[1:])
    amounts = [0, 1, 5, nbits - 1, nbits, nbits + 1, 255, 0xFFFFFFFF]
    pairs = list(product(corner_values(name), amounts))
    values, shifts = np.array([a for a, _ in pairs], dtype_of(name)), np.array([s for _, s in pairs], np.uint32)
    right = apply(f"shr.{name} {{d}}, {{0}}, {{1}}", dtype_of(name), values, shifts)
    assert right.tolist() == [a >> s for a, s in pairs]
    left = apply(f"shl.b{nbits} {{d}}, {{0}}, {{1}}", dtype_of(name), values, shifts)
    assert left.tolist() == [wrap(a << s, name) if s < nbits else 0 for a, s in pairs]


@pytest.mark.parametrize("clamp", [True, False])
def test_funnel_shift(clamp: bool) -> None:
    triples = list(product([0x01234567, 0xFFFFFFFF, 0x80000001], [0x89ABCDEF, 0], [0, 1, 8, 31, 32, 33, 64, 300]))
    low, high, amount = (np.array(column, np.uint32) for column in zip(*triples))
    mode = "clamp" if clamp else "wrap"
    moves = [min(n, 32) if clamp else n % 32 for *_, n in triples]
    left = apply(f"shf.l.{mode}.b32 {{d}}, {{0}}, {{1}}, {{2}}", np.uint32, low, high, amount)
    assert left.tolist() == [((b << 32 | a) << n >> 32) & 0xFFFFFFFF for (a, b, _), n in zip(triples, moves)]
    right = apply(f"shf.r.{mode}.b32 {{d}}, {{0}}, {{1}}, {{2}}", np.uint32, low, high, amount)
    assert right.tolist() == [((b << 32 | a) >> n) & 0xFFFFFFFF for (a, b, _), n in zip(triples, moves)]


@pytest.mark.parametrize("table", [0x00, 0xEA, 0x96, 0xE8, 0xCA, 0x6A, 0xF8, 0x80, 0x01, 0xFF])
def test_lop3_looks_each_bit_up(table: int) -> None:
    def law(a: int, b: int, c: int) -> int:
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

    check(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table}", "u32", law, 3)


@pytest.mark.parametrize("nbits", [32, 64])
def test_bit_counts(nbits: int) -> None:
    name = f"u{nbits}"
    check(f"popc.b{nbits} {{d}}, {{0}}", name, lambda a: bin(a).count("1"), 1, "u32")
    check(f"clz.b{nbits} {{d}}, {{0}}", name, lambda a: nbits - a.bit_length(), 1, "u32")
    check(f"brev.b{nbits} {{d}}, {{0}}", name, lambda a: int(f"{a:0{nbits}b}"[::-1], 2), 1)
    check(f"bfind.u{nbits} {{d}}, {{0}}", name, lambda a: a.bit_length() - 1, 1, "u32")
    check(f"bfind.s{nbits} {{d}}, {{0}}", f"s{nbits}", lambda a: (~a if a < 0 else a).bit_length() - 1, 1, "u32")


def extract_by_the_manual(a: int, pos: int, length: int, name: str) -> int:
    """The pseudo code of bfe in the ISA, bit by bit."""
    nbits = int(name[1:])
    msb = nbits - 1
    bit = lambda i: a >> i & 1  # noqa: E731
    sbit = 0 if name[0] == "u" or length == 0 else bit(min(pos + length - 1, msb))
    return sum((bit(pos + i) if i < length and pos + i <= msb else sbit) << i for i in range(nbits))


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract_follows_the_pseudo_code(name: str) -> None:
    nbits = int(name[1:])
    sizes = [0, 1, 7, nbits - 1, nbits, 200]
    triples = list(product(corner_values(name), sizes, sizes))
    value = np.array([t[0] for t in triples], dtype_of(name))
    pos, length = (np.array([t[i] for t in triples], np.uint32) for i in (1, 2))
    got = apply(f"bfe.{name} {{d}}, {{0}}, {{1}}, {{2}}", dtype_of(name), value, pos, length)
    assert got.tolist() == [wrap(extract_by_the_manual(*t, name), name) for t in triples]


@pytest.mark.parametrize("nbits", [32, 64])
def test_bit_field_insert(nbits: int) -> None:
    sizes = [0, 1, 7, nbits - 1, nbits, 200]
    cases = list(product([0x5A5A5A5A, (1 << nbits) - 1], [0, 0x12345678], sizes, sizes))

    def law(a: int, b: int, pos: int, length: int) -> int:
        return sum(((a >> i - pos if pos <= i < pos + length else b >> i) & 1) << i for i in range(nbits))

    a, b = (np.array([c[i] for c in cases], f"u{nbits // 8}") for i in (0, 1))
    pos, length = (np.array([c[i] for c in cases], np.uint32) for i in (2, 3))
    got = apply(f"bfi.b{nbits} {{d}}, {{0}}, {{1}}, {{2}}, {{3}}", a.dtype, a, b, pos, length)
    assert got.tolist() == [law(*c) for c in cases]


def byte_list(a: int, b: int) -> list[int]:
    return list(a.to_bytes(4, "little") + b.to_bytes(4, "little"))


def test_prmt_default_mode_over_every_selector_nibble() -> None:
    a, b = 0x837261F0, 0x05F4E3D2
    selectors = [n << 4 * k for n in range(16) for k in range(4)] + [0x3210, 0x5410, 0xFEDC, 0x7632]
    pool = byte_list(a, b)

    def law(selector: int) -> int:
        picks = [selector >> 4 * k & 15 for k in range(4)]
        values = [255 * (pool[p & 7] >> 7) if p & 8 else pool[p] for p in picks]
        return int.from_bytes(values, "little")

    shape = len(selectors)
    got = apply(
        "prmt.b32 {d}, {0}, {1}, {2}", np.uint32, np.full(shape, a, np.uint32), np.full(shape, b, np.uint32),
        np.array(selectors, np.uint32),
    )  # fmt: skip
    assert got.tolist() == [law(s) for s in selectors]


# The table "prmt" of the ISA: source byte indices for d.b0 .. d.b3, by selector value 0..3.
PRMT_MODES = {
    "f4e": [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)],
    "b4e": [(0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)],
    "rc8": [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)],
    "ecl": [(0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)],
    "ecr": [(0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)],
    "rc16": [(0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)],
}


@pytest.mark.parametrize("mode", PRMT_MODES)
def test_prmt_modes(mode: str) -> None:
    a, b = np.full(4, 0x837261F0, np.uint32), np.full(4, 0x05F4E3D2, np.uint32)
    pool = byte_list(0x837261F0, 0x05F4E3D2)
    got = apply(f"prmt.b32.{mode} {{d}}, {{0}}, {{1}}, {{2}}", np.uint32, a, b, np.arange(4, dtype=np.uint32))
    assert got.tolist() == [int.from_bytes([pool[p] for p in picks], "little") for picks in PRMT_MODES[mode]]


def test_dp4a_signs() -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(0, 1 << 32, 64, np.uint32) for _ in range(3))
    for left, right in product("us", repeat=2):
        result = np.int32 if "s" in (left, right) else np.uint32
        got = apply(f"dp4a.{left}32.{right}32 {{d}}, {{0}}, {{1}}, {{2}}", result, a, b, c)
        x, y = (
            v.view(np.int8 if sign == "s" else np.uint8).reshape(-1, 4).astype(object)
            for v, sign in ((a, left), (b, right))
        )
        want = [wrap(int(c[i]) + sum(x[i] * y[i]), "s32" if result is np.int32 else "u32") for i in range(64)]
        assert got.tolist() == want


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_integer_comparisons(name: str) -> None:
    pairs = list(product(corner_values(name), repeat=2))
    a, b = (np.array([p[i] for p in pairs], dtype_of(name)) for i in (0, 1))
    for operator, law in COMPARE.items():
        assert apply(f"setp.{operator}.{name} {{d}}, {{0}}, {{1}}", np.bool_, a, b).tolist() == [law(*p) for p in pairs]
        got = apply(f"set.{operator}.u32.{name} {{d}}, {{0}}, {{1}}", np.uint32, a, b)
        assert got.tolist() == [0xFFFFFFFF if law(*p) else 0 for p in pairs]


def test_setp_with_a_second_predicate_and_a_complement() -> None:
    a, b = np.array([1, 2, 3, 4], np.uint32), np.array([2, 2, 2, 2], np.uint32)
    for combine, law in (("and", lambda x, c: x and c), ("or", lambda x, c: x or c), ("xor", lambda x, c: x != c)):
        text = "setp.ge.u32 %p2, {0}, 3;\nsetp.lt." + combine + ".u32 %p3|%p4, {0}, {1}, !%p2;\n"
        first = apply(text + "and.pred {d}, %p3, %p3", np.bool_, a, b)
        second = apply(text + "and.pred {d}, %p4, %p4", np.bool_, a, b)
        assert first.tolist() == [law(x < 2, not x >= 3) for x in (1, 2, 3, 4)]
        assert second.tolist() == [law(not x < 2, not x >= 3) for x in (1, 2, 3, 4)]


def test_select_and_predicate_logic() -> None:
    a = np.array([-3, 0, 7], np.int32)
    text = "setp.lt.s32 %p2, {0}, 0;\nnot.pred %p3, %p2;\nxor.pred %p4, %p2, %p3;\n@!%p4 trap;\n"
    assert apply(text + "selp.s32 {d}, 11, {0}, %p2", np.int32, a).tolist() == [11, 0, 7]
    assert apply("slct.s32.s32 {d}, 5, 6, {0}", np.int32, a).tolist() == [6, 5, 5]


def test_moves_pack_and_unpack() -> None:
    a, b = np.array([0x11112222, 0xDEADBEEF], np.uint32), np.array([0x33334444, 0x01234567], np.uint32)
    both = apply("mov.b64 {d}, {{{0}, {1}}}", np.uint64, a, b)
    assert both.tolist() == (b.astype(np.uint64) << np.uint64(32) | a).tolist()
    swapped = apply("mov.b32 {{%h1, %h2}}, {0};\nmov.b32 {d}, {{%h2, %h1}}", np.uint32, a)
    assert swapped.tolist() == [0x22221111, 0xBEEFDEAD]
    halves = apply("mov.b64 {{%r20, %r21}}, {0};\nmov.b64 {d}, {{%r21, %r20}}", np.uint64, both)
    assert halves.tolist() == (a.astype(np.uint64) << np.uint64(32) | b).tolist()
    quarters = apply("mov.b64 {{%h1, %h2, %h3, %h4}}, {0};\nmov.b32 {d}, {{%h4, %h1}}", np.uint32, both)
    assert quarters.tolist() == [0x22223333, 0xBEEF0123]


@pytest.mark.parametrize("target", ["u8", "s8", *TYPES])
@pytest.mark.parametrize("source", TYPES)
def test_integer_conversions_truncate_extend_or_saturate(target: str, source: str) -> None:
    values = corner_values(source)
    array = np.array(values, dtype_of(source))
    low, high = (-(1 << int(target[1:]) - 1), (1 << int(target[1:]) - 1) - 1)
    low, high = (low, high) if target[0] == "s" else (0, (1 << int(target[1:])) - 1)
    held = target if target[1:] != "8" else f"{target[0]}16"  # an 8-bit result is extended to its 16-bit register
    got: npt.NDArray[Any] = apply(f"cvt.{target}.{source} {{d}}, {{0}}", dtype_of(held), array)
    assert got.tolist() == [wrap(v, target) for v in values]
    if any(not low <= v <= high for v in values):  # the modifier is illegal where nothing can saturate
        got = apply(f"cvt.sat.{target}.{source} {{d}}, {{0}}", dtype_of(held), array)
        assert got.tolist() == [max(low, min(high, v)) for v in values]
