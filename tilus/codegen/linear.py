"""Index arithmetic as linear forms: a constant plus integer multiples of registers.

Addresses are kept in this form until an instruction needs them. They are then materialised term by term, the terms that
live outermost first, through `Builder.pure`: so each partial sum is computed once, in front of the outermost loop where its
operands live, and the constant ends up in the immediate offset of the memory operand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tilus.ptx.builder import Builder
from tilus.ptx.module import Address, Imm, Reg, RegClass


@dataclass(frozen=True)
class Linear:
    """`const + sum(coefficient * register)` over 32-bit signed registers; no coefficient is zero."""

    terms: tuple[tuple[Reg, int], ...] = ()
    const: int = 0

    def __add__(self, other: Linear) -> Linear:
        coefficients = dict(self.terms)
        for reg, coefficient in other.terms:
            coefficients[reg] = coefficients.get(reg, 0) + coefficient
        return linear(coefficients, self.const + other.const)

    def scaled(self, factor: int) -> Linear:
        return linear({reg: c * factor for reg, c in self.terms}, self.const * factor)

    def __sub__(self, other: Linear) -> Linear:
        return self + other.scaled(-1)

    @property
    def is_const(self) -> bool:
        return not self.terms

    def without_const(self) -> Linear:
        return Linear(self.terms)

    def multiples_of(self, factor: int) -> tuple[Linear, Linear]:
        """(a, b) with `self == factor * a + b`, where b keeps the terms that `factor` does not divide."""
        inside = linear({reg: c // factor for reg, c in self.terms if c % factor == 0}, self.const // factor)
        rest = linear({reg: c for reg, c in self.terms if c % factor}, self.const % factor)
        return inside, rest


def linear(coefficients: Mapping[Reg, int], const: int = 0) -> Linear:
    return Linear(tuple((reg, c) for reg, c in coefficients.items() if c), const)


def of_reg(reg: Reg) -> Linear:
    return Linear(((reg, 1),))


def of_const(value: int) -> Linear:
    return Linear((), value)


def _outermost_first(b: Builder, form: Linear) -> list[tuple[Reg, int]]:
    return sorted(form.terms, key=lambda term: b.level_of(term[0]))


def materialize(b: Builder, form: Linear) -> Reg | Imm:
    """The value as a 32-bit register, or as an immediate when it is constant."""
    if form.is_const:
        return Imm(form.const)
    total: Reg | None = None
    for reg, coefficient in _outermost_first(b, form):
        total = _add_product(b, total, reg, coefficient)
    if total is None:
        raise ValueError("a linear form without terms is constant")
    return b.pure("add.s32", total, Imm(form.const)) if form.const else total


def _add_product(b: Builder, total: Reg | None, reg: Reg, coefficient: int) -> Reg:
    if coefficient == 1:
        return reg if total is None else b.pure("add.s32", total, reg)
    if coefficient == -1 and total is not None:
        return b.pure("sub.s32", total, reg)
    power = coefficient.bit_length() - 1
    if total is None and coefficient > 0 and coefficient == 1 << power:
        return b.pure("shl.b32", reg, Imm(power))
    if total is None:
        return b.pure("mul.lo.s32", reg, Imm(coefficient))
    return b.pure("mad.lo.s32", reg, Imm(coefficient), total)


def register(b: Builder, form: Linear) -> Reg:
    """The value in a 32-bit register, constants included."""
    value = materialize(b, form)
    return value if isinstance(value, Reg) else b.const(value.value)


def address32(b: Builder, base: Reg, form: Linear) -> Address:
    """`[base + form]` in bytes within shared memory."""
    total = base
    for reg, coefficient in _outermost_first(b, form):
        total = _add_product(b, total, reg, coefficient)
    return Address(total, form.const)


def widened(b: Builder, form: Linear) -> Reg:
    """The value sign-extended to a 64-bit register."""
    value = materialize(b, form)
    if isinstance(value, Imm):
        return b.const(value.value, RegClass.B64)
    return b.pure("cvt.s64.s32", value)
