"""Put `finish_loads` where threads hand on shared memory that they may still be loading from, and that copies write to.

A load takes until its registers have what it loads. On a GPU neither an arrival at an mbarrier nor another barrier waits for
that, and where products of warpgroups keep shared memory busy it can take longer than the next copy. What threads store later is
stored after the load; a copy by the asynchronous proxy and a store of another block take other ways into the memory, and may land
before it. So the loads of a group of warps from memory that these write to, and from other blocks, are finished in front of
whatever lets others go on, and of its own copies.

Loops are looked at as if they ran twice, so that what a trip leaves on its way meets the next one.

Requires: instructions are selected. Ensures: no thread hands on such memory while a load from it is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tilus.instructions.barrier import FinishLoads
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import SharedTensor, Tensor
from tilus.ir.visit import instructions, side_by_side
from tilus.target import Target


def finish_loads(function: Function, target: Target) -> Function:
    insts = [stmt.inst for stmt in instructions(function.body)]
    written = {tensor for inst in insts if _writes_unordered(inst) for tensor in inst.effects().writes}
    if not written and not any(inst.effects().remote for inst in insts):
        return function
    body, _ = _Inserter(written).after(function.body, False)
    return function if body is function.body else replace(function, body=body)


def _writes_unordered(inst: Instruction) -> bool:
    """Whether it writes to memory that a load which was begun before may still read: that of threads of the block cannot."""
    return inst.effects().by_proxy or inst.effects().remote


@dataclass
class _Jumps:
    """Whether loads may be on their way where a loop is left, or goes on with its next trip, early."""

    out: bool = False
    on: bool = False


@dataclass
class _Inserter:
    """written: what copies and other blocks write to. jumps: of each loop around the statement."""

    written: set[Tensor]
    jumps: list[_Jumps] = field(default_factory=list[_Jumps])

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
            case Break():
                self.jumps[-1].out = self.jumps[-1].out or pending
                return stmt, False  # nobody comes behind it
            case Continue():
                self.jumps[-1].on = self.jumps[-1].on or pending
                return stmt, False
            case Return():
                return stmt, False
            case SetScalar():
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
        body, jumps = stmt.body, _Jumps()
        for _ in range(2):
            self.jumps.append(jumps)
            body, left = self.after(stmt.body, pending)
            on = self.jumps.pop().on
            pending = pending or left or on
        return stmt if body is stmt.body else replace(stmt, body=body), pending or jumps.out

    def _instruction(self, stmt: Inst, pending: bool) -> tuple[Stmt, bool]:
        effects = stmt.inst.effects()
        copies = effects.by_proxy and any(isinstance(tensor, SharedTensor) for tensor in effects.writes)
        if pending and (effects.hands_on or copies):
            return Seq((Inst(FinishLoads(), stmt.loc), stmt)), False
        return stmt, not isinstance(stmt.inst, FinishLoads) and (pending or self._loads(stmt.inst))

    def _loads(self, inst: Instruction) -> bool:
        """Whether threads load what copies or other blocks write to, or what is another block's."""
        effects = inst.effects()
        if effects.by_proxy or effects.barrier:
            return False
        return any(isinstance(t, SharedTensor) and (effects.remote or t in self.written) for t in effects.reads)
