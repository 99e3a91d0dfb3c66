"""Put `finish_loads` where threads hand on shared memory that they may still be loading from, and that copies write to.

A load takes until its registers have what it loads. On a GPU neither an arrival at an mbarrier nor another barrier waits for
that, and where products of warpgroups keep shared memory busy it can take longer than the next copy. What threads store later is
stored after the load; a copy by the asynchronous proxy takes another way into the memory, and may land before it. So the loads
of a group of warps are finished in front of whatever lets others go on, and of its own copies.

Loops are looked at as if they ran twice, so that what a trip leaves on its way meets the next one.

Requires: instructions are selected. Ensures: no thread hands on memory that copies write to while a load from it is on its way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tilus.instructions.barrier import FinishLoads
from tilus.ir.function import Function
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import SharedTensor, Tensor
from tilus.ir.visit import instructions, side_by_side
from tilus.target import Target


def finish_loads(function: Function, target: Target) -> Function:
    if not any(_lands(stmt) or stmt.inst.effects().remote for stmt in instructions(function.body)):
        return function
    body, _ = _Inserter().after(function.body, False)
    return function if body is function.body else replace(function, body=body)


def _lands(stmt: Inst) -> bool:
    """Whether it is a copy into shared memory."""
    effects = stmt.inst.effects()
    return effects.by_proxy and _has_shared(effects.writes)


def _loads(stmt: Inst) -> bool:
    """Whether threads load from shared memory, other than mbarriers."""
    effects = stmt.inst.effects()
    return not effects.by_proxy and not effects.barrier and _has_shared(effects.reads)


def _has_shared(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, SharedTensor) for tensor in tensors)


@dataclass
class _Inserter:
    """jumps: for each loop around the statement, whether loads may be on their way where it is left or goes on early."""

    jumps: list[bool] = field(default_factory=list[bool])

    def after(self, stmt: Stmt, pending: bool) -> tuple[Stmt, bool]:
        """The statement with what it needs, and whether loads may be on their way behind it. pending: before it."""
        match stmt:
            case Seq():
                return self._sequence(stmt, pending)
            case For() | While():
                return self._loop(stmt, pending)
            case If():
                then, left = self.after(stmt.then, pending)
                orelse, right = self.after(stmt.orelse, pending)
                same = then is stmt.then and orelse is stmt.orelse
                return stmt if same else replace(stmt, then=then, orelse=orelse), left or right
            case Role():
                body, pending = self.after(stmt.body, pending)
                return stmt if body is stmt.body else replace(stmt, body=body), pending
            case Inst():
                return self._instruction(stmt, pending)
            case Break() | Continue():
                self.jumps[-1] = self.jumps[-1] or pending
                return stmt, pending
            case SetScalar() | Return():
                return stmt, pending

    def _sequence(self, stmt: Seq, pending: bool) -> tuple[Stmt, bool]:
        """Roles that run side by side know nothing of each other's loads."""
        stmts: list[Stmt] = []
        changed = False
        for item in side_by_side(stmt.stmts):
            before = item if isinstance(item, tuple) else (item,)
            found = [self.after(child, pending) for child in before]
            for old, (new, _) in zip(before, found, strict=True):
                changed = changed or new is not old
                stmts += new.stmts if isinstance(old, Inst) and isinstance(new, Seq) else (new,)
            pending = any(left for _, left in found)
        return Seq(tuple(stmts)) if changed else stmt, pending

    def _loop(self, stmt: For | While, pending: bool) -> tuple[Stmt, bool]:
        body: Stmt = stmt.body
        for _ in range(2):
            self.jumps.append(False)
            body, left = self.after(stmt.body, pending)
            pending = self.jumps.pop() or left or pending
        return stmt if body is stmt.body else replace(stmt, body=body), pending

    def _instruction(self, stmt: Inst, pending: bool) -> tuple[Stmt, bool]:
        if pending and (stmt.inst.effects().hands_on or _lands(stmt)):
            return Seq((Inst(FinishLoads(), stmt.loc), stmt)), False
        return stmt, not isinstance(stmt.inst, FinishLoads) and (pending or _loads(stmt))
