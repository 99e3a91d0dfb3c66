"""Every cast, executed by a miniature interpreter of the few opcodes that cast plans use, against `DataType`.

The interpreter is written from the PTX ISA with numpy and ml_dtypes; it shares nothing with the plans or the emulator.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from tilus.codegen.cast_plan import CastPlan, plan_cast, plan_slots
from tilus.codegen.packed_order import packed_order
from tilus.dtypes import (
    DTYPES,
    DataType,
    bf16,
    boolean,
    f16,
    f32,
    float8_e4m3,
    float8_e5m2,
    float8_e8m0,
    int16,
    int32,
    int64,
    pack_bits,
    tf32,
    uint4,
    uint16,
    uint32,
    unpack_bits,
)
from tilus.errors import TilusError
from tilus.ptx.builder import Builder
from tilus.ptx.module import FloatImm, Imm, Instr, Reg, RegClass, Vector
from tilus.target import TARGETS

pytestmark = pytest.mark.slow

Array = npt.NDArray[Any]
SMALL = [dtype for dtype in DTYPES.values() if dtype.is_small]
WIDE = [f16, bf16, f32, tf32, int16, uint16, int32, uint32, float8_e8m0]
SM80, SM90 = TARGETS["sm_80"], TARGETS["sm_90a"]
U32, U64 = np.uint32, np.uint64


def signed(x: Array) -> Array:
    return x.view(np.int32).astype(np.int64)


def single(x: Array) -> Array:
    return x.view(np.float32)


def lanes(x: Array, dtype: Any) -> Array:
    return np.stack([x & U32(0xFFFF), x >> U32(16)], -1).astype(np.uint16).view(dtype).astype(np.float64)


def from_lanes(values: Array, dtype: Any) -> Array:
    codes = values.astype(np.float32).astype(dtype).view(np.uint16).astype(U32)
    return codes[..., 0] | codes[..., 1] << U32(16)


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros_like(a)
    for i in range(8):
        if int(table.flat[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def prmt(a: Array, b: Array, selector: Array) -> Array:
    both = b.astype(U64) << U64(32) | a
    nibbles = [int(selector.flat[0]) >> 4 * i & 15 for i in range(4)]
    assert max(nibbles) < 8, "sign replication is not used"
    return sum(((both >> U64(8 * n) & U64(255)) << U64(8 * i) for i, n in enumerate(nibbles)), U64(0)).astype(U32)


def bfe(x: Array, pos: Array, length: Array, sign: bool) -> Array:
    n = int(length.flat[0])
    bits = (x >> pos & U32((1 << n) - 1)).astype(np.int64)
    return (bits - ((bits >> n - 1 & 1) << n if sign else 0)).astype(np.int32).view(U32)


def to_int(values: Array, low: int, high: int) -> Array:
    return np.nan_to_num(np.clip(values.astype(np.float64), low, high)).astype(np.int64).astype(U32)


def cut(values: Array) -> Array:
    near = values.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(values), np.nextafter(near, np.float32(0)), near).view(U32)


def number(choose: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """min or max in which a NaN, signalling or not, gives way to the other operand."""
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, choose(a, b))).view(U32)


def to_tf32(x: Array) -> Array:
    """11 significant bits, the nearest; ties away from zero."""
    values = single(x).astype(np.float64)
    finite = np.where(np.isfinite(values), values, 0.0)
    place = np.maximum(np.frexp(finite)[1] - 11, -126 - 10)
    steps = np.floor(np.abs(np.ldexp(finite, -place)) + 0.5)
    return np.where(finite == values, np.copysign(np.ldexp(steps, place), values), values).astype(np.float32).view(U32)


def fp8_pair(high: Array, low: Array, dtype: Any, limit: float) -> Array:
    pair = [np.clip(single(x), -limit, limit).astype(dtype).view(np.uint8).astype(np.uint16) for x in (high, low)]
    return pair[0] << 8 | pair[1]


def fp8_of_lanes(x: Array, dtype: Any, limit: float) -> Array:
    pair = (
        np.clip(lanes(x, np.float16), -limit, limit).astype(np.float32).astype(dtype).view(np.uint8).astype(np.uint16)
    )
    return pair[..., 1] << 8 | pair[..., 0]


def unpack_fp8(x: Array, dtype: Any) -> Array:
    pair = np.stack([x & 255, x >> 8], -1).astype(np.uint8).view(dtype)
    return from_lanes(pair.astype(np.float32), np.float16)


E4M3, E5M2, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16
OPCODES: dict[str, Callable[..., Array]] = {
    "mov.b32": lambda x: x,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "shl.b32": lambda a, k: a << k,
    "shr.u32": lambda a, k: a >> k,
    "shf.r.wrap.b32": lambda lo, hi, k: ((hi.astype(U64) << U64(32) | lo) >> k.astype(U64)).astype(U32),
    "bfe.u32": lambda x, pos, n: bfe(x, pos, n, False),
    "bfe.s32": lambda x, pos, n: bfe(x, pos, n, True),
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "min.u32": np.minimum,
    "max.u32": np.maximum,
    "min.s32": lambda a, b: np.minimum(signed(a), signed(b)).astype(U32),
    "max.s32": lambda a, b: np.maximum(signed(a), signed(b)).astype(U32),
    "min.f32": lambda a, b: number(np.minimum, single(a), single(b)),
    "max.f32": lambda a, b: number(np.maximum, single(a), single(b)),
    "add.rn.f32": lambda a, b: (single(a) + single(b)).view(U32),
    "fma.rn.f16x2": lambda a, b, c: from_lanes(
        lanes(a, np.float16) * lanes(b, np.float16) + lanes(c, np.float16), np.float16
    ),
    "fma.rn.bf16x2": lambda a, b, c: from_lanes(lanes(a, BF16) * lanes(b, BF16) + lanes(c, BF16), BF16),
    "cvt.f32.f16": lambda h: h.view(np.float16).astype(np.float32).view(U32),
    "cvt.rn.f16x2.f32": lambda hi, lo: from_lanes(np.stack([single(lo), single(hi)], -1), np.float16),
    "cvt.rn.bf16x2.f32": lambda hi, lo: from_lanes(np.stack([single(lo), single(hi)], -1), BF16),
    "cvt.rna.tf32.f32": to_tf32,
    "cvt.rn.f16x2.e4m3x2": lambda h: unpack_fp8(h, E4M3),
    "cvt.rn.f16x2.e5m2x2": lambda h: unpack_fp8(h, E5M2),
    "cvt.rn.satfinite.e4m3x2.f32": lambda hi, lo: fp8_pair(hi, lo, E4M3, 448.0),
    "cvt.rn.satfinite.e5m2x2.f32": lambda hi, lo: fp8_pair(hi, lo, E5M2, 57344.0),
    "cvt.rn.satfinite.e4m3x2.f16x2": lambda x: fp8_of_lanes(x, E4M3, 448.0),
    "cvt.rn.satfinite.e5m2x2.f16x2": lambda x: fp8_of_lanes(x, E5M2, 57344.0),
    "cvt.rni.s32.f32": lambda x: to_int(np.rint(single(x)), -(2**31), 2**31 - 1),
    "cvt.rni.u32.f32": lambda x: to_int(np.rint(single(x)), 0, 2**32 - 1),
    "cvt.rzi.s32.f32": lambda x: to_int(np.trunc(single(x)), -(2**31), 2**31 - 1),
    "cvt.rzi.u32.f32": lambda x: to_int(np.trunc(single(x)), 0, 2**32 - 1),
    "cvt.rn.f32.s32": lambda x: signed(x).astype(np.float32).view(U32),
    "cvt.rn.f32.u32": lambda x: x.astype(np.float32).view(U32),
    "cvt.rz.f32.s32": lambda x: cut(signed(x).astype(np.float64)),
    "cvt.rz.f32.u32": lambda x: cut(x.astype(np.float64)),
    "setp.ne.s32": lambda a, b: a != b,
    "setp.ne.u32": lambda a, b: a != b,
    "setp.lt.u32": lambda a, b: a < b,
    "setp.nan.f32": lambda a, b: np.isnan(single(a)) | np.isnan(single(b)),
    "selp.b32": lambda a, b, p: np.where(p, a, b),
}


def execute(body: Sequence[Any], registers: dict[Reg, Array]) -> None:
    """Run instructions over the threads' axis; every register is written once, so no source is ever clobbered."""
    threads = len(next(iter(registers.values())))

    def read(operand: Any) -> Array:
        match operand:
            case Reg():
                return registers[operand]
            case Imm(value):
                return np.full(threads, value & 0xFFFFFFFF, U32)
            case FloatImm(bits):
                return np.full(threads, bits, U32)
            case Vector((low, high)):
                return registers[low].astype(U32) | registers[high].astype(U32) << U32(16)
        raise AssertionError(operand)

    for instr in body:
        assert isinstance(instr, Instr) and instr.guard is None
        dst, *sources = instr.operands
        with np.errstate(over="ignore", invalid="ignore"):
            value = OPCODES[instr.opcode](*map(read, sources))
        parts = {dst: value}
        if isinstance(dst, Vector):
            parts = dict(
                zip(dst.elements, [(value & U32(0xFFFF)).astype(np.uint16), (value >> U32(16)).astype(np.uint16)])
            )
        for reg, part in parts.items():
            assert reg not in registers
            registers[reg] = part


def to_words(codes: Array, dtype: DataType) -> list[Array]:
    data = pack_bits(codes, dtype)
    padded = np.zeros((len(data), -(-data.shape[1] // 4) * 4), np.uint8)
    padded[:, : data.shape[1]] = data
    return list(np.ascontiguousarray(padded).view(U32).T)


def run_cast(src: DataType, dst: DataType, target: Any, codes: Array, slots: Sequence[int]) -> Array:
    """The result codes, [threads, len(slots)], of a cast of source codes [threads, count]."""
    b = Builder()
    words = [b.reg(RegClass.B32) for _ in to_words(codes, src)]
    registers = {reg: word.copy() for reg, word in zip(words, to_words(codes, src))}
    results = plan_slots(src, dst, target, len(words), slots).emit(b, words)
    assert len(results) == math.ceil(len(slots) * dst.nbits / 32)
    execute(b.finish(), registers)
    data = np.ascontiguousarray(np.stack([registers[reg] for reg in results], -1)).view(np.uint8)
    return unpack_bits(data, dst, len(slots))


def check(src: DataType, dst: DataType, target: Any, codes: Array, slots: Sequence[int]) -> None:
    """The law: result slot i is dst.encode(src.decode(slot slots[i])); any NaN code stands for NaN.

    A cast to the same type keeps the code (encode would saturate an inf of the small types).
    """
    found = run_cast(src, dst, target, codes, slots)
    taken = codes[:, list(slots)]
    expected = taken if src == dst else dst.encode(src.decode(taken))
    nan = np.isnan(dst.decode(expected)) if dst.is_float else np.zeros(expected.shape, np.bool_)
    if dst.is_float:
        np.testing.assert_array_equal(np.isnan(dst.decode(found)), nan)
    np.testing.assert_array_equal(found[~nan], expected[~nan], f"{src} -> {dst} on {target}, slots {slots}")


def every_code_in_every_slot(dtype: DataType, count: int) -> Array:
    """Rows in which every slot takes every code, with different neighbours, and random rows."""
    n = dtype.num_codes
    t, i = np.arange(n)[:, None], np.arange(count)[None]
    random = np.random.default_rng(n).integers(0, n, (64, count))
    return np.concatenate([(t + i) % n, (t - 5 * i) % n, random]).astype(dtype.storage)


def orders(src: DataType, count: int) -> list[tuple[int, ...]]:
    shuffled = tuple(int(i) for i in np.random.default_rng(0).integers(0, count, count))
    return [tuple(range(count)), shuffled]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("src", SMALL, ids=str)
def test_every_code_in_every_slot(src: DataType) -> None:
    codes = every_code_in_every_slot(src, 32)
    for dst in WIDE:
        for target in (SM80, SM90):
            for slots in orders(src, 32):
                check(src, dst, target, codes, slots)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("src", SMALL, ids=str)
def test_small_to_small(src: DataType) -> None:
    codes = every_code_in_every_slot(src, 8)
    for dst in SMALL:
        hardware = {src, dst} & {float8_e4m3, float8_e5m2}  # only these have other instructions on newer targets
        for target in (SM80, SM90) if hardware else (SM80,):
            check(src, dst, target, codes, range(8))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 12])
@pytest.mark.parametrize("src", SMALL, ids=str)
def test_odd_counts(src: DataType, count: int) -> None:
    codes = every_code_in_every_slot(src, count)
    for dst in (f16, bf16, f32, int32, uint4, src):
        check(src, dst, SM90, codes, range(count))
        check(src, dst, SM80, codes, tuple(reversed(range(count))))


@pytest.mark.parametrize("src", [f16, bf16], ids=str)
@pytest.mark.parametrize("target", [SM80, SM90], ids=str)
def test_every_16_bit_float_to_everything(src: DataType, target: Any) -> None:
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 8)
    for dst in SMALL + WIDE:
        check(src, dst, target, codes, (0, 1, 2, 3, 7, 6, 5, 4))


def special_singles(dst: DataType) -> Array:
    """Ties of `dst`, their neighbours, limits and beyond, subnormals, signed zeros, inf and NaN; some random bits."""
    values = dst.decode(np.arange(min(dst.num_codes, 1 << 16), dtype=dst.storage))
    values = np.unique(values[np.isfinite(values)].astype(np.float64))
    points = np.concatenate(
        [values, (values[1:] + values[:-1]) / 2, values * 2, np.array([2.0**e for e in range(-149, 128)])]
    )
    points = np.concatenate([points, [0.5, 1.5, 2.5, 2147483647.5, 4294967296.0, 3.4e38, math.inf, math.nan]])
    with np.errstate(over="ignore"):
        singles = np.concatenate([points, -points]).astype(np.float32)
        singles = np.concatenate(
            [singles, np.nextafter(singles, np.float32(0)), np.nextafter(singles, np.float32(math.inf))]
        )
    random = np.random.default_rng(1).integers(0, 1 << 32, 4096, np.uint32)
    bits = np.concatenate([singles.view(U32), random])
    return bits[: len(bits) // 8 * 8].reshape(-1, 8)


@pytest.mark.parametrize("dst", SMALL + WIDE, ids=str)
def test_special_singles(dst: DataType) -> None:
    for target in (SM80, SM90):
        check(f32, dst, target, special_singles(dst), range(8))


@pytest.mark.parametrize("src", [int16, uint16, int32, uint32], ids=str)
def test_wide_integers_to_everything(src: DataType) -> None:
    near = np.array([(1 << e) + d for e in range(src.nbits) for d in range(-3, 4)], np.int64)
    ties = np.array(
        [(1 << e) + (1 << e - 8) * k + d for e in range(9, 31) for k in (1, 3) for d in (-1, 0, 1)], np.int64
    )
    random = np.random.default_rng(2).integers(0, 1 << src.nbits, 4096)
    codes = np.concatenate([near, -near, ties, -ties, random]) & ((1 << src.nbits) - 1)
    codes = codes[: len(codes) // 4 * 4].reshape(-1, 4).astype(src.storage)
    for dst in SMALL + WIDE:
        for target in (SM80, SM90):
            check(src, dst, target, codes, (0, 3, 1, 2))


def run_plan(plan: CastPlan, codes: Array) -> Array:
    """The results, as float64 or integer values, of a plan over packed codes [threads, count]."""
    b = Builder()
    strings = plan.order.pack(codes).view(U32)
    words = [b.reg(RegClass.B32) for _ in range(strings.shape[1])]
    registers = {reg: strings[:, i].copy() for i, reg in enumerate(words)}
    results = plan.emit(b, words)
    execute(b.finish(), registers)
    data = np.ascontiguousarray(np.stack([registers[reg] for reg in results], -1)).view(np.uint8)
    return unpack_bits(data, plan.dst, codes.shape[1])


@pytest.mark.sampled(6)
@pytest.mark.parametrize("src", SMALL, ids=str)
def test_plans_of_packed_codes(src: DataType) -> None:
    """Every code in every place of a chunk; what is left to the caller is a power of two and the same on every target."""
    codes = every_code_in_every_slot(src, 32)
    values = src.decode(codes).astype(np.float64)
    for packed_for, dst in itertools.product((f16, bf16), (*WIDE, float8_e4m3)):
        for target, scaled in ((SM80, False), (SM90, False), (SM80, True), (SM90, True)):
            if (scaled or packed_for == bf16) and dst not in (f16, bf16):
                continue
            plan = plan_cast(src, dst, target, order=packed_order(src, packed_for), scaled=scaled)
            found = run_plan(plan, codes)
            assert plan.scale_exponent == (plan_cast(src, dst, SM80, scaled=True).scale_exponent if scaled else 0)
            expected = dst.encode(np.ldexp(values, -plan.scale_exponent))
            numbers = dst.decode(expected).astype(np.float64)
            with np.errstate(invalid="ignore"):  # signalling NaN
                same = (found == expected) | np.isnan(numbers) & np.isnan(dst.decode(found).astype(np.float64))
            assert same.all(), f"{plan}\n{np.argwhere(~same)[:4]}"
            if scaled:  # nothing is lost: the caller's multiplication by 2^r gives the value back
                with np.errstate(invalid="ignore"):
                    kept = np.ldexp(dst.decode(found).astype(np.float64), plan.scale_exponent)
                np.testing.assert_array_equal(kept, values)


# Instructions a value to f16 with the exponent bias left to the scale, on sm_80 except where hardware casts: upper limits.
LIMITS = {"int": [1.0, 1.07, 1.16, 1.125, 1.3, 1.45, 1.57, 1.25], "float": [0, 0, 1.2, 1.125, 1.5, 1.7, 1.7, 1.75]}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("src", SMALL, ids=str)
def test_what_packed_codes_cost(src: DataType) -> None:
    """No plan is dearer than its limit, than the plain cast, or than the cast of little-endian codes; orders are permutations."""
    for target, dst in itertools.product((SM80, SM90), (f16, bf16)):
        order = packed_order(src, dst)
        scaled, plain = (plan_cast(src, dst, target, order=order, scaled=s) for s in (True, False))
        assert sorted(order.bits) == list(range(order.chunk * src.nbits)) and len(order.bits) % 32 == 0
        assert scaled.cost <= plain.cost <= plan_cast(src, dst, target).cost
    hardware = src in (float8_e4m3, float8_e5m2)
    plan = plan_cast(src, f16, SM90, order=packed_order(src), scaled=True)
    assert plan.cost <= (0.5 if hardware else LIMITS["float" if src.is_float else "int"][src.nbits - 1])


def test_known_methods_come_out_of_the_search() -> None:
    """Marlin's int4: one shift, and a lop3 with 0x6400 and an fma a pair; FP6-LLM's floats: no arithmetic at all."""
    marlin = plan_cast(uint4, f16, SM80, order=packed_order(uint4))
    opcodes = Counter(instr.opcode for instr in marlin.body if not instr.opcode.startswith("mov"))
    assert opcodes == {"lop3.b32": 4, "fma.rn.f16x2": 4, "shr.u32": 1}
    assert {instr.operands[3] for instr in marlin.body if instr.opcode == "lop3.b32"} == {Imm(0x64006400)}
    fp6 = plan_cast(DTYPES["float6_e3m2"], f16, SM80, order=packed_order(DTYPES["float6_e3m2"]), scaled=True)
    assert {instr.opcode.split(".")[0] for instr in fp6.body} <= {"and", "lop3", "shl", "shr"}
    assert fp6.scale_exponent == 12


def test_a_plan_prints() -> None:
    plan = plan_cast(uint4, f16, SM80, order=packed_order(uint4))
    lines = str(plan).splitlines()
    assert lines[0] == "uint4 to f16: 1.12 instructions a value, 8 at a time"
    assert lines[1] == "w0: c7[3:0] c5[3:0] c3[3:0] c1[3:0] c6[3:0] c4[3:0] c2[3:0] c0[3:0]"
    assert lines[2] == "r0 = lop3.b32 w0, 0xf000f, 0x64006400, 0x6a"
    assert lines[-1].startswith("results r")


@pytest.mark.parametrize("src", SMALL, ids=str)
def test_packing_is_what_the_order_says(src: DataType) -> None:
    """Bit by bit, in Python's integers."""
    order = packed_order(src)
    codes = np.random.default_rng(0).integers(0, src.num_codes, (3, 2 * order.chunk)).astype(np.uint8)
    data = order.pack(codes)
    for row, packed in zip(codes.tolist(), data, strict=True):
        for chunk in range(2):
            natural = sum(
                code << i * src.nbits for i, code in enumerate(row[chunk * order.chunk : (chunk + 1) * order.chunk])
            )
            found = int.from_bytes(packed.tobytes(), "little") >> chunk * len(order.bits)
            assert all(found >> p & 1 == natural >> bit & 1 for p, bit in enumerate(order.bits))
    np.testing.assert_array_equal(order.unpack(data), codes)


def test_what_cannot_be_packed_is_named() -> None:
    order = packed_order(uint4)
    with pytest.raises(TilusError, match="12 codes of uint4 cannot be packed, expected a multiple of 8"):
        order.pack(np.zeros(12, np.uint8))
    with pytest.raises(TilusError, match="code 16 does not fit uint4, expected less than 16"):
        order.pack(np.full(8, 16, np.uint8))
    with pytest.raises(TilusError, match="codes of f16 packed for f16, expected a type of 1 to 8 bits"):
        packed_order(f16)


@pytest.mark.parametrize("src", SMALL, ids=str)
def test_packed_codes_come_out_in_order(src: DataType) -> None:
    codes = every_code_in_every_slot(src, 32)
    found = run_plan(plan_cast(src, src, SM80, order=packed_order(src)), codes)
    np.testing.assert_array_equal(found, codes)


def test_the_same_type_in_the_same_order_is_free() -> None:
    b = Builder()
    words = [b.reg(RegClass.B32)]
    assert plan_slots(uint4, uint4, SM90, 1, range(8)).emit(b, words) == words
    assert b.finish() == ()


@pytest.mark.parametrize(("src", "dst"), [(boolean, f16), (f16, boolean), (int64, f32), (f32, int64)])
def test_types_without_a_register_cast_are_refused(src: DataType, dst: DataType) -> None:
    with pytest.raises(TilusError, match=f"cast from {src} to {dst}"):
        plan_slots(src, dst, SM90, 2, [0])


def test_a_slot_outside_of_the_words_is_refused() -> None:
    with pytest.raises(ValueError, match="slot 8 of uint4"):
        plan_slots(uint4, f16, SM90, 1, [8])
