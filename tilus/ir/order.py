"""What comes before what on the paths of a block: whether it has passed certain instructions when it comes to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilus.errors import Loc
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Seq, SetScalar, Stmt, While


@dataclass(frozen=True)
class Order:
    """Follows all paths through a function; those of branches and loops do not depend on each other.

    passes: whether it is one of the instructions to be passed. sees: called with every instruction, whether a block has
    passed one of them for certain, and where it stands. ends: the same for places where a block ends.
    """

    passes: Callable[[Instruction], bool]
    sees: Callable[[Instruction, bool, Loc | None], None]
    ends: Callable[[bool, Loc | None], None]

    def follow(self, function: Function) -> None:
        self.ends(self._after(function.body, False), function.loc)

    def _after(self, stmt: Stmt, passed: bool) -> bool:
        """Whether a block has passed one when it comes out of a statement; `passed`: when it comes to it."""
        match stmt:
            case Seq(stmts):
                for child in stmts:
                    passed = self._after(child, passed)
                return passed
            case Inst(inst, loc):
                self.sees(inst, passed, loc)
                return passed or self.passes(inst)
            case For() | While():
                self._after(stmt.body, passed)  # which may run never
                return passed
            case If(_, then, orelse):
                return self._after(then, passed) & self._after(orelse, passed)
            case Return(loc):
                self.ends(passed, loc)
                return True  # nothing comes out of it
            case Break() | Continue():
                return True
            case SetScalar():
                return passed
