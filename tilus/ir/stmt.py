"""Statements: a closed set. They name places in a program, so they compare by identity."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.errors import Loc
from tilus.ir.expr import Expr, Var
from tilus.ir.instruction import Instruction


@dataclass(frozen=True, eq=False)
class Seq:
    """Statements one after the other."""

    stmts: tuple[Stmt, ...]


@dataclass(frozen=True, eq=False)
class Inst:
    """One tile instruction."""

    inst: Instruction
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class SetScalar:
    """Assigns a mutable scalar variable."""

    var: Var
    value: Expr
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class For:
    """`for var in range(start, stop, step)` with a positive constant step; `var` is read-only in the body.

    unroll: copies of the body per trip that code generation makes (1 = none).
    """

    var: Var
    start: Expr
    stop: Expr
    step: int
    body: Stmt
    unroll: int = 1
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class While:
    cond: Expr
    body: Stmt
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class If:
    """A branch that all threads of the block take alike."""

    cond: Expr
    then: Stmt
    orelse: Stmt
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class Break:
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class Continue:
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class Return:
    """Ends the block."""

    loc: Loc | None = None


Stmt = Seq | Inst | SetScalar | For | While | If | Break | Continue | Return

EMPTY = Seq(())
