"""Refuse programs that touch what an asynchronous instruction (wgmma) still works on, where that is certain.

Its results may be read, and written by others, only behind an instruction that awaits it, and its operands may not be written
before that. Only another asynchronous instruction that adds to the same registers may go in between, as the hardware runs them in
order. Loops are looked at as if they ran twice, so that what a trip leaves under way meets the next one; behind a branch, what
both sides leave under way is. What is not certain is left to the assembler, which then says that it would have to wait.

Requires: conversions are inserted. Ensures: the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tilus.errors import Note, TilusError, raise_all
from tilus.ir.function import Function
from tilus.ir.stmt import For, If, Inst, Role, Seq, Stmt, While
from tilus.ir.tensor import RegisterTensor
from tilus.target import Target

UnderWay = tuple[Inst, ...]
"""Asynchronous instructions that were not awaited, in program order."""


def check_under_way(function: Function, target: Target) -> Function:
    checker = _Checker()
    checker.after(function.body, ())
    raise_all(list(checker.errors.values()))
    return function


@dataclass
class _Checker:
    """errors: the first one of each statement."""

    errors: dict[Inst, TilusError] = field(default_factory=dict[Inst, TilusError])

    def after(self, stmt: Stmt, state: UnderWay) -> UnderWay:
        """What is under way behind a statement, if `state` is before it."""
        match stmt:
            case Seq(stmts):
                for child in stmts:
                    state = self.after(child, state)
            case For(body=body) | While(body=body):
                state = self.after(body, self.after(body, state))
            case If(_, then, orelse):
                sides = self.after(then, state), self.after(orelse, state)
                state = tuple(work for work in sides[0] if work in sides[1])
            case Role(body=body):
                self.after(body, state)  # other warps know nothing of what it leaves under way
            case Inst():
                return self._after_instruction(stmt, state)
            case _:
                pass
        return state

    def _after_instruction(self, stmt: Inst, state: UnderWay) -> UnderWay:
        pending = stmt.inst.awaits()
        if pending is not None:
            return state[len(state) - pending :] if pending < len(state) else state
        for error in self._mistakes(stmt, state):
            self.errors.setdefault(stmt, error)
        return (*state, stmt) if stmt.inst.asynchronous else state

    def _mistakes(self, stmt: Inst, state: UnderWay) -> Iterator[TilusError]:
        inst = stmt.inst
        acc = inst.accumulator()
        in_order = set(inst.register_results) if inst.asynchronous else set[RegisterTensor]()
        for work in state:
            results, operands = work.inst.register_results, work.inst.register_operands
            for tile in inst.register_operands:
                if tile in results and not (tile is acc and tile in in_order):
                    yield _mistake(
                        stmt, work, f"{inst.mnemonic} reads {tile.name} while {work.inst.mnemonic} still adds to it"
                    )
            for tile in inst.register_results:
                if tile in (*results, *operands) and tile not in in_order:
                    yield _mistake(
                        stmt, work, f"{inst.mnemonic} writes {tile.name}, on which {work.inst.mnemonic} still works"
                    )


def _mistake(stmt: Inst, work: Inst, message: str) -> TilusError:
    hint = (
        "wait before: tilus.wgmma_wait(n) leaves at most the last n products under way; "
        "assign the result of wgmma at once to the variable that it adds to"
    )
    if stmt is not work and stmt.loc == work.loc:  # a conversion of the result
        hint = f"{work.inst.mnemonic} cannot add in the layout that its result is pinned to: pin another tile, behind the wait"
    return TilusError(message, loc=stmt.loc, notes=[Note(f"{work.inst.mnemonic} is begun here", work.loc)], hint=hint)
