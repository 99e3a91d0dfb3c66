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
        return Effects(barrier=True, hands_on=True)

    def evaluate(self, env: Evaluation) -> None:
        """A block of the reference execution is one sequential program."""

    def emit_c(self, ctx: CContext) -> None:
        """A block is one sequential program."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.barrier()


@dataclass(frozen=True, eq=False)
class FinishLoads(Instruction):
    """Wait until what the thread has begun to load from shared memory is in its registers.

    Inserted by `finish_loads` in front of arrivals and barriers behind which copies may land in that memory: they do not wait.
    """

    mnemonic = "finish_loads"
    needs_gpu = True

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def evaluate(self, env: Evaluation) -> None:
        """Loads of the reference execution are done at once."""

    def emit(self, ctx: EmitContext) -> None:
        """Reads before an acquiring fence come before everything behind it. ptxas makes of it an empty instruction that waits
        for all registers that are on their way; a proxy fence waits for stores, too, and takes longer."""
        ctx.b.emit_to("fence.acquire.cta")


@builtin
def sync(b: IRBuilder) -> None:
    """Barrier of the block, in a role of the role: what its threads wrote before, all of them may read afterwards."""
    b.emit(Sync())
