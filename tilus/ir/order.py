"""What comes before what on the paths of a block: whether its warps have passed certain instructions when they come to others."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from tilus.errors import Loc
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.visit import side_by_side


class Passed(IntEnum):
    """Which of the warps at a place have passed one of the instructions for certain."""

    NONE = 0
    SOME = 1
    ALL = 2


class Order:
    """Follows all paths through a function; those of branches and loops do not depend on each other.

    passes: whether it is one of the instructions to be passed. sees: called with every instruction, whether all warps that run it
    have passed one of those, and where it stands. ends: called with places where a block ends and no warp has passed one.
    """

    def __init__(
        self,
        passes: Callable[[Instruction], bool],
        sees: Callable[[Instruction, bool, Loc | None], None],
        ends: Callable[[Loc | None], None],
    ) -> None:
        self._passes, self._sees, self._ends = passes, sees, ends
        self._role_returns: list[Passed] | None = None  # where the role that is open is left, if one is

    def follow(self, function: Function) -> None:
        if self._after(function.body, Passed.NONE) == Passed.NONE:
            self._ends(function.loc)

    def _after(self, stmt: Stmt, passed: Passed) -> Passed:
        """Who has passed one when a block, or a role, comes out of a statement; `passed`: when it comes to it."""
        match stmt:
            case Seq(stmts):
                for item in side_by_side(stmts):
                    passed = self._roles(item, passed) if isinstance(item, tuple) else self._after(item, passed)
                return passed
            case Role():
                return self._roles((stmt,), passed)
            case Inst(inst, loc):
                self._sees(inst, passed == Passed.ALL, loc)
                return Passed.ALL if self._passes(inst) else passed
            case For() | While():
                self._after(stmt.body, passed)  # which may run never
                return passed
            case If(_, then, orelse):
                return min(self._after(then, passed), self._after(orelse, passed))
            case Return(loc):
                if self._role_returns is not None:
                    self._role_returns.append(passed)
                elif passed == Passed.NONE:
                    self._ends(loc)
                return Passed.ALL  # nothing comes out of it
            case Break() | Continue():
                return Passed.ALL
            case SetScalar():
                return passed

    def _roles(self, roles: tuple[Role, ...], passed: Passed) -> Passed:
        """Each role passes for itself, as nobody knows here whom the barriers between them make wait for whom."""
        outer = self._role_returns
        for role in roles:
            returns = self._role_returns = list[Passed]()
            last = self._after(role.body, Passed.ALL if passed == Passed.ALL else Passed.NONE)
            if min(last, *returns, Passed.ALL) == Passed.ALL:
                passed = max(passed, Passed.SOME)
        self._role_returns = outer
        return passed
