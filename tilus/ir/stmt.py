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
class Role:
    """Warps `first_warp` to `first_warp + num_warps - 1` run the body, the others pass it by.

    Roles that follow each other in one sequence run side by side, in warps of their own. Inside of a role, threads are counted
    from its first one, and a barrier waits for its threads only. What the body assigns is known to these warps alone.
    registers: that each of the role's threads may use from here on (setmaxnreg); None leaves what the block was launched with.
    """

    first_warp: int
    num_warps: int
    body: Stmt
    registers: int | None = None
    loc: Loc | None = None

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def warps(self) -> range:
        return range(self.first_warp, self.first_warp + self.num_warps)

    def __str__(self) -> str:
        last = self.warps[-1]
        return f"warp {last}" if self.num_warps == 1 else f"warps {self.first_warp} to {last}"


@dataclass(frozen=True, eq=False)
class Break:
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class Continue:
    loc: Loc | None = None


@dataclass(frozen=True, eq=False)
class Return:
    """Ends the block, or in a role (where nothing may follow the roles) its warps."""

    loc: Loc | None = None


Stmt = Seq | Inst | SetScalar | For | While | If | Role | Break | Continue | Return

EMPTY = Seq(())
