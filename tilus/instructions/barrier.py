"""Synchronisation of the threads of a block or role."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.codegen.c.context import CContext
from tilus.codegen.context import EmitContext
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.instruction import Effects, Instruction


@dataclass(frozen=True, eq=False)
class Sync(Instruction):
    """Wait for all threads of the block, or of the role; what they wrote to memory is then visible to each other."""

    mnemonic = "sync"

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def evaluate(self, env: Evaluation) -> None:
        """A block of the reference execution is one sequential program."""

    def emit_c(self, ctx: CContext) -> None:
        """A block is one sequential program."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.barrier()


@builtin
def sync(b: IRBuilder) -> None:
    """Barrier of the block, in a role of the role: what its threads wrote before, all of them may read afterwards."""
    b.emit(Sync())
