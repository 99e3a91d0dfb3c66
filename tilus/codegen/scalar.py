"""Lowers scalar expressions: integers to linear forms, floats to registers, conditions to predicates.

The assembler turns every division into a reciprocal sequence, so divisions by constants are split exactly, turned into shifts,
or done by a multiplication with a precomputed reciprocal here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tilus.codegen.linear import Linear, materialize, of_const, of_reg, register
from tilus.dtypes import DataType, f32
from tilus.errors import TilusError
from tilus.ir.expr import COMPARISONS, Binary, BlockId, CastExpr, Const, Expr, GridDim, Select, Unary, Var
from tilus.ir.ranges import bounds
from tilus.ptx.builder import Builder
from tilus.ptx.module import FloatImm, Imm, Operand, Reg, RegClass, Special

_AXES = "xyz"
_COMPARE = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
_INTEGER_OPS = {
    "min": "min.s32",
    "max": "max.s32",
    "&": "and.b32",
    "|": "or.b32",
    "^": "xor.b32",
    "<<": "shl.b32",
    ">>": "shr.s32",
}
_FLOAT_OPS = {"+": "add.f32", "-": "sub.f32", "*": "mul.f32", "/": "div.rn.f32", "min": "min.f32", "max": "max.f32"}
_LOG2_E = 0x3FB8AA3B


def float_bits(value: float) -> FloatImm:
    """The f32 immediate nearest to a Python float."""
    return FloatImm(struct.unpack("<I", struct.pack("<f", value))[0])


@dataclass
class ScalarLowering:
    """Scalars of one kernel. `variables` maps each IR variable to the register that holds it (mutable ones included)."""

    b: Builder
    variables: dict[Var, Reg] = field(default_factory=dict[Var, Reg])

    def linear(self, expr: Expr) -> Linear:
        """An integer expression as a linear form over 32-bit registers."""
        match expr:
            case Const(value, _):
                return of_const(int(value))
            case Var():
                return of_reg(self._read(expr))
            case BlockId(axis):
                return of_reg(self.b.pure("mov.u32", Special(f"%ctaid.{_AXES[axis]}")))
            case GridDim(axis):
                return of_reg(self.b.pure("mov.u32", Special(f"%nctaid.{_AXES[axis]}")))
            case Unary("neg", operand):
                return self.linear(operand).scaled(-1)
            case CastExpr(operand, _) if not operand.dtype.is_float:
                return self.linear(operand)
            case CastExpr(operand, _):
                return of_reg(self.b.pure("cvt.rzi.s32.f32", self.value(operand)))
            case Select(cond, on_true, on_false):
                pred = self.pred(cond)
                sides = materialize(self.b, self.linear(on_true)), materialize(self.b, self.linear(on_false))
                return of_reg(self.b.pure("selp.b32", *sides, pred))
            case Binary():
                return self._binary(expr)
            case _:
                raise TilusError(f"cannot use {expr} as an integer")

    def _read(self, var: Var) -> Reg:
        """The variable's register; of a mutable one a snapshot, so that later assignments do not change this value."""
        reg = self.variables[var]
        return self.b.emit(f"mov.{reg.cls.value}", reg, out=reg.cls) if var.mutable else reg

    def _binary(self, expr: Binary) -> Linear:
        if expr.dtype.is_float or expr.op in COMPARISONS or expr.op in ("and", "or"):
            raise TilusError(f"cannot use {expr} as an integer")
        lhs, rhs = self.linear(expr.lhs), self.linear(expr.rhs)
        match expr.op:
            case "+":
                return lhs + rhs
            case "-":
                return lhs - rhs
            case "*" if rhs.is_const:
                return lhs.scaled(rhs.const)
            case "*" if lhs.is_const:
                return rhs.scaled(lhs.const)
            case "*":
                return of_reg(self.b.pure("mul.lo.s32", register(self.b, lhs), register(self.b, rhs)))
            case "//" | "%":
                return self._divide(expr, lhs, rhs)
            case _:
                opcode = _INTEGER_OPS[expr.op]
                return of_reg(self.b.pure(opcode, materialize(self.b, lhs), materialize(self.b, rhs)))

    def _divide(self, expr: Binary, lhs: Linear, rhs: Linear) -> Linear:
        lower, upper = bounds(expr.lhs)
        nonnegative = lower is not None and lower >= 0
        if not rhs.is_const or rhs.const <= 0:
            return self._divide_general(expr.op, lhs, rhs, exact_sign=nonnegative and (bounds(expr.rhs)[0] or 0) > 0)
        m = rhs.const
        whole, rest = lhs.multiples_of(m)
        if rest.is_const:
            return whole if expr.op == "//" else rest
        if lhs == rest and upper is not None and nonnegative and upper < m:
            return of_const(0) if expr.op == "//" else lhs
        value = register(self.b, rest)
        if expr.op == "%" and m & (m - 1) == 0:
            return of_reg(self.b.pure("and.b32", value, Imm(m - 1)))
        # The rest may be negative even if the whole is not (x*m - y): then only exact floor forms are allowed.
        quotient = self._quotient(value, m, nonnegative and lhs == rest)
        if expr.op == "//":
            return whole + quotient
        # In one register: as a sum, a constant part of it would become an address offset and leave a negative base.
        return of_reg(register(self.b, rest - quotient.scaled(m)))

    def _quotient(self, value: Reg, m: int, nonnegative: bool) -> Linear:
        """floor(value / m) for a constant m > 0."""
        if m & (m - 1) == 0:
            return of_reg(self.b.pure("shr.s32", value, Imm(m.bit_length() - 1)))
        if nonnegative:
            return of_reg(divide_nonnegative(self.b, value, m))
        return self._divide_general("//", of_reg(value), of_const(m), exact_sign=False)

    def _divide_general(self, op: str, lhs: Linear, rhs: Linear, *, exact_sign: bool) -> Linear:
        """Division by a run-time value; PTX truncates, Python floors, so mixed signs need a correction."""
        b = self.b
        a, m = register(b, lhs), register(b, rhs)
        quotient = b.pure("div.s32", a, m)
        remainder = of_reg(a) - of_reg(b.pure("mul.lo.s32", quotient, m))
        if not exact_sign:
            rem = register(b, remainder)
            differs = b.pure("setp.lt.s32", b.pure("xor.b32", rem, m), Imm(0))
            fix = b.pure("and.pred", b.pure("setp.ne.s32", rem, Imm(0)), differs)
            quotient = b.pure("sub.s32", quotient, b.pure("selp.b32", Imm(1), Imm(0), fix))
            remainder = of_reg(a) - of_reg(b.pure("mul.lo.s32", quotient, m))
        return of_reg(quotient) if op == "//" else of_reg(register(b, remainder))

    def pred(self, expr: Expr) -> Reg:
        """A condition in a predicate register."""
        b = self.b
        match expr:
            case Const(value, _):
                return b.pure("setp.ne.s32", b.const(int(value)), Imm(0))
            case Unary("not", operand):
                return b.pure("not.pred", self.pred(operand))
            case Binary("and" | "or" as op, lhs, rhs):
                return b.pure(f"{op}.pred", self.pred(lhs), self.pred(rhs))
            case Binary(op, lhs, rhs) if op in COMPARISONS and lhs.dtype.is_float:
                return b.pure(f"setp.{_COMPARE[op] if op != '!=' else 'neu'}.f32", self.value(lhs), self.value(rhs))
            case Binary(op, lhs, rhs) if op in COMPARISONS:
                # Constants move to the right, so that the left side is a sum that other conditions share.
                left, right = self.linear(lhs), self.linear(rhs)
                right = right + of_const(-left.const)
                return b.pure(f"setp.{_COMPARE[op]}.s32", register(b, left.without_const()), materialize(b, right))
            case Select(cond, on_true, on_false):
                picked = self.pred(cond)
                yes = b.pure("and.pred", picked, self.pred(on_true))
                no = b.pure("and.pred", b.pure("not.pred", picked), self.pred(on_false))
                return b.pure("or.pred", yes, no)
            case Var() if self.variables[expr].cls is RegClass.PRED:
                return self._read(expr)
            case _:
                return b.pure("setp.ne.s32", register(b, self.linear(expr)), Imm(0))

    def value(self, expr: Expr) -> Operand:
        """A float (in f32) or integer scalar as an operand of its own width."""
        if not expr.dtype.is_float:
            return materialize(self.b, self.linear(expr))
        match expr:
            case Const(value, _):
                return float_bits(float(value))
            case Var():
                return self._read(expr)
            case CastExpr(operand, dtype):
                return self._to_float(operand, dtype)
            case Unary(op, operand):
                return self._float_unary(op, self.value(operand))
            case Binary(op, lhs, rhs):
                return self.b.pure(_FLOAT_OPS[op], self.value(lhs), self.value(rhs))
            case Select(cond, on_true, on_false):
                return self.b.pure("selp.b32", self.value(on_true), self.value(on_false), self.pred(cond))
            case _:
                raise TilusError(f"cannot use {expr} as a float")

    def _to_float(self, operand: Expr, dtype: DataType) -> Operand:
        if dtype != f32:
            raise TilusError(f"scalars are computed in f32; cannot cast to {dtype.name}")
        if operand.dtype.is_float:
            return self.value(operand)
        return self.b.pure("cvt.rn.f32.s32", register(self.b, self.linear(operand)))

    def _float_unary(self, op: str, x: Operand) -> Reg:
        b = self.b
        match op:
            case "exp":
                return b.pure("ex2.approx.f32", b.pure("mul.f32", x, FloatImm(_LOG2_E)))
            case "exp2":
                return b.pure("ex2.approx.f32", x)
            case "log2":
                return b.pure("lg2.approx.f32", x)
            case "sqrt":
                return b.pure("sqrt.rn.f32", x)
            case "rsqrt":
                return b.pure("rsqrt.approx.f32", x)
            case _:
                return b.pure(f"{op}.f32", x)

    def assign(self, var: Var, expr: Expr) -> None:
        """Write a mutable variable."""
        reg = self.variables[var]
        if reg.cls == RegClass.PRED:
            self.b.mov(reg, self.pred(expr))
        else:
            self.b.mov(reg, self.value(expr))


def divide_nonnegative(b: Builder, value: Reg, m: int) -> Reg:
    """floor(value / m) for 0 <= value < 2^31 and a constant m > 1 (Granlund and Montgomery, PLDI 1994, section 4)."""
    shift = (m - 1).bit_length()
    magic = ((1 << (31 + shift)) + m - 1) // m
    high = b.pure("mul.hi.u32", value, Imm(magic))
    return b.pure("shr.u32", high, Imm(shift - 1)) if shift > 1 else high
