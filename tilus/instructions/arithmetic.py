"""The operations of elementwise instructions: their numpy meaning and their PTX for every type of 16 bits and more.

f16 and bf16 are written with `.rn`: without it the assembler may contract a multiplication and an addition, which would round
differently from the meaning stated here. f32 may be contracted: it only gets more exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.codegen.context import EmitContext
from tilus.dtypes import DataType, bf16, boolean, f16, f32
from tilus.errors import TilusError
from tilus.ptx.module import FloatImm, Imm, Operand, Reg, RegClass

Array = npt.NDArray[Any]

_COMPARE = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
_NAMES = {"+": "add", "-": "sub", "*": "mul", "min": "min", "max": "max"}
_BITS = {"&": "and", "|": "or", "^": "xor"}


def _divide(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return a / b


def _floor_divide(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return a // b


def _remainder(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return a % b


def _quiet(op: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def run(a: Array, b: Array) -> Array:
        with np.errstate(all="ignore"):
            return op(a, b)

    return run


NUMPY_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "+": _quiet(np.add), "-": _quiet(np.subtract), "*": _quiet(np.multiply), "/": _divide,
    "//": _floor_divide, "%": _remainder, "min": np.fmin, "max": np.fmax,
    "&": np.bitwise_and, "|": np.bitwise_or, "^": np.bitwise_xor,
    "<<": np.left_shift, ">>": np.right_shift,
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal,
}  # fmt: skip


_LEAST_NORMAL = 2.0**-126  # of f32


def _exp2_ftz(a: Array) -> Array:
    found = np.exp2(a)
    return np.where(found < _LEAST_NORMAL, np.zeros_like(found), found)


def _rcp(a: Array) -> Array:
    return 1 / a


NUMPY_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "not": np.logical_not,
    "exp": np.exp, "exp2": np.exp2, "exp2_ftz": _exp2_ftz, "log": np.log, "log2": np.log2, "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": _rcp, "rcp_approx": _rcp, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "floor": np.floor, "ceil": np.ceil, "round": np.rint,
}  # fmt: skip

FLOAT_FUNCTIONS = frozenset(NUMPY_UNARY) - {"neg", "abs", "not"}

# Operands are f32 in 32-bit registers. Constants: log2(e), ln(2).
_F32_FUNCTIONS: dict[str, str] = {
    "exp2": "ex2.approx.f32", "exp2_ftz": "ex2.approx.ftz.f32", "log2": "lg2.approx.f32", "sqrt": "sqrt.rn.f32",
    "rsqrt": "rsqrt.approx.f32", "rcp": "rcp.rn.f32", "rcp_approx": "rcp.approx.f32", "sin": "sin.approx.f32",
    "cos": "cos.approx.f32", "tanh": "tanh.approx.f32",
    "floor": "cvt.rmi.f32.f32", "ceil": "cvt.rpi.f32.f32", "round": "cvt.rni.f32.f32", "abs": "abs.f32", "neg": "neg.f32",
}  # fmt: skip
_LOG2_E = FloatImm(0x3FB8AA3B)
_LN_2 = FloatImm(0x3F317218)


def emit_binary(
    ctx: EmitContext, op: str, dtype: DataType, a: Sequence[Reg], c: Sequence[Reg], count: int
) -> list[Reg]:
    """Words of `a op c`, `count` slots."""
    if dtype == boolean:
        return [ctx.b.emit(f"{_BITS[op]}.pred", x, y) for x, y in zip(a, c, strict=True)]
    if dtype in (f16, bf16):
        return _half_binary(ctx, op, dtype, a, c, count)
    if dtype == f32:
        return [_f32_binary(ctx, op, x, y) for x, y in zip(a, c, strict=True)]
    if dtype.nbits == 16:
        wide = [_extend(ctx, dtype, words, count) for words in (a, c)]
        results = [_integer_binary(ctx, op, dtype, 32, x, y) for x, y in zip(*wide, strict=True)]
        return ctx.pack(16, [ctx.b.emit("and.b32", r, Imm(0xFFFF)) for r in results])
    return [_integer_binary(ctx, op, dtype, dtype.nbits, x, y) for x, y in zip(a, c, strict=True)]


def _half_binary(
    ctx: EmitContext, op: str, dtype: DataType, a: Sequence[Reg], c: Sequence[Reg], count: int
) -> list[Reg]:
    if op == "/":
        wide = [ctx.cast(dtype, f32, words, count) for words in (a, c)]
        quotients = [_f32_binary(ctx, op, x, y) for x, y in zip(*wide, strict=True)]
        return ctx.cast(f32, dtype, quotients, count)
    if op not in _NAMES:
        raise TilusError(f"{op} on tiles of {dtype.name}", hint="cast to f32 first")
    return [packed_half(ctx, op, dtype, x, y) for x, y in zip(a, c, strict=True)]


def packed_half(ctx: EmitContext, op: str, dtype: DataType, x: Reg, y: Reg) -> Reg:
    """Two f16 or bf16 operations in one register."""
    b = ctx.b
    if op in ("min", "max"):
        return b.emit(f"{op}.{dtype.name}x2", x, y)
    if dtype == bf16 and ctx.target.sm < 90:  # only fma exists there for bf16x2
        one, minus_one, minus_zero = b.const(0x3F803F80), b.const(0xBF80BF80), b.const(0x80008000)
        operands = {"+": (x, one, y), "-": (y, minus_one, x), "*": (x, y, minus_zero)}[op]
        return b.emit("fma.rn.bf16x2", *operands)
    return b.emit(f"{_NAMES[op]}.rn.{dtype.name}x2", x, y)


def _f32_binary(ctx: EmitContext, op: str, x: Reg, y: Reg) -> Reg:
    b = ctx.b
    if op in _NAMES:
        return b.emit(f"{_NAMES[op]}.f32", x, y)
    quotient = b.emit("div.rn.f32", x, y)
    if op == "/":
        return quotient
    raise TilusError(f"{op} on tiles of f32", hint="use tilus.floor(x / y)")


def _extend(ctx: EmitContext, dtype: DataType, words: Sequence[Reg], count: int) -> list[Reg]:
    """16-bit integers as 32-bit registers."""
    op = "bfe.s32" if dtype.is_signed else "bfe.u32"
    return [ctx.b.emit(op, words[i // 2], Imm(16 * (i % 2)), Imm(16)) for i in range(count)]


def _integer_binary(ctx: EmitContext, op: str, dtype: DataType, nbits: int, x: Reg, y: Reg) -> Reg:
    b = ctx.b
    sign = f"{'s' if dtype.is_signed else 'u'}{nbits}"
    match op:
        case "*":
            return b.emit(f"mul.lo.{sign}", x, y)
        case "+" | "-" | "min" | "max":
            return b.emit(f"{_NAMES[op]}.{sign}", x, y)
        case "&" | "|" | "^":
            return b.emit(f"{_BITS[op]}.b{nbits}", x, y)
        case "<<" | ">>":
            amount = y if nbits == 32 else b.emit("cvt.u32.u64", y)
            return b.emit(f"shl.b{nbits}" if op == "<<" else f"shr.{sign}", x, amount)
        case _:
            return _floor_division(ctx, op, sign, nbits, x, y)


def _floor_division(ctx: EmitContext, op: str, sign: str, nbits: int, x: Reg, y: Reg) -> Reg:
    """PTX truncates, numpy floors: where the remainder's sign differs from the divisor's, step down by one."""
    b = ctx.b
    quotient = b.emit(f"div.{sign}", x, y)
    remainder = b.emit(f"sub.{sign}", x, b.emit(f"mul.lo.{sign}", quotient, y))
    if sign[0] == "u":
        return quotient if op == "//" else remainder
    differs = b.emit(f"setp.lt.{sign}", b.emit(f"xor.b{nbits}", remainder, y), Imm(0))
    fix = b.emit("and.pred", b.emit(f"setp.ne.{sign}", remainder, Imm(0)), differs)
    if op == "//":
        return b.emit(f"selp.b{nbits}", b.emit(f"sub.{sign}", quotient, Imm(1)), quotient, fix)
    return b.emit(f"selp.b{nbits}", b.emit(f"add.{sign}", remainder, y), remainder, fix)


def emit_compare(
    ctx: EmitContext, op: str, dtype: DataType, a: Sequence[Reg], c: Sequence[Reg], count: int
) -> list[Reg]:
    """One predicate per slot."""
    b = ctx.b
    if dtype == boolean:
        raise TilusError(f"{op} on boolean tiles", hint="use & | ^ and not")
    name = _COMPARE[op]
    if dtype.is_float:
        wide = [ctx.cast(dtype, f32, words, count) for words in (a, c)]
        return [b.emit(f"setp.{'neu' if name == 'ne' else name}.f32", x, y) for x, y in zip(*wide, strict=True)]
    if dtype.nbits == 16:
        wide = [_extend(ctx, dtype, words, count) for words in (a, c)]
        return [b.emit(f"setp.{name}.s32", x, y) for x, y in zip(*wide, strict=True)]
    sign = "s" if dtype.is_signed else "u"
    return [b.emit(f"setp.{name}.{sign}{dtype.nbits}", x, y) for x, y in zip(a, c, strict=True)]


def emit_unary(ctx: EmitContext, op: str, dtype: DataType, words: Sequence[Reg], count: int) -> list[Reg]:
    """Words of `op(x)`, `count` slots."""
    b = ctx.b
    if dtype == boolean:
        return [b.emit("not.pred", w) for w in words]
    if dtype in (f16, bf16):
        if op in ("neg", "abs"):
            mask = Imm(0x80008000 if op == "neg" else 0x7FFF7FFF)
            return [b.emit("xor.b32" if op == "neg" else "and.b32", w, mask) for w in words]
        wide = ctx.cast(dtype, f32, words, count)
        return ctx.cast(f32, dtype, [_f32_unary(ctx, op, x) for x in wide], count)
    if dtype == f32:
        return [_f32_unary(ctx, op, x) for x in words]
    if op == "not":
        raise TilusError(f"not on tiles of {dtype.name}, expected boolean", hint="compare with 0, or use ^ -1")
    if dtype.nbits == 16:
        results = [b.emit(f"{op}.s32", x) for x in _extend(ctx, dtype, words, count)]
        return ctx.pack(16, [b.emit("and.b32", r, Imm(0xFFFF)) for r in results])
    return [b.emit(f"{op}.s{dtype.nbits}", x) for x in words]


def _f32_unary(ctx: EmitContext, op: str, x: Operand) -> Reg:
    b = ctx.b
    if op == "exp":
        return b.emit("ex2.approx.f32", b.emit("mul.f32", x, _LOG2_E))
    if op == "log":
        return b.emit("mul.f32", b.emit("lg2.approx.f32", x), _LN_2)
    return b.emit(_F32_FUNCTIONS[op], x, out=RegClass.B32)
