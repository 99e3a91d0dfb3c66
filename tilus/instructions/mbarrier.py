"""Barriers in shared memory (mbarrier): roles tell each other what is filled and what is free, stage by stage.

A barrier has phases. A phase is complete when all groups of threads have arrived that the barrier waits for, and all bytes
have landed that they announced; then the next one begins. `wait_barrier(b, p)` waits until the phase of parity p is complete:
the first phase has parity 0, and the one before it, which always is complete, has parity 1.

Every warp of a group arrives by itself, so the hardware counts warps: code generation knows how many a group has.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilus.codegen.context import EmitContext
from tilus.dtypes import uint64
from tilus.errors import TilusError
from tilus.instructions.barrier import Sync
from tilus.instructions.shared import SharedOperand, rank_in_cluster
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Const, Expr, as_expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.tensor import SharedTensor, SharedView
from tilus.ptx.module import Address, Guard, Imm, Reg, RegClass, Special

MAX_ARRIVALS = (1 << 20) - 1  # PTX ISA, "mbarrier.init"
DISCARDED = Special("_")


@dataclass(frozen=True, eq=False)
class MBarrier(Instruction):
    """Make all elements of a shared tensor barriers, whose phases wait for `arrivals_per_phase` groups of threads each.

    One thread does it: the others must wait for it (`sync`) before they use the barriers.
    """

    mnemonic = "mbarrier"
    once = True
    needs_gpu = True

    barrier: SharedTensor
    arrivals_per_phase: int

    def effects(self) -> Effects:
        return Effects(writes=(self.barrier,))

    def verify(self) -> None:
        check_barrier("mbarrier", self.barrier)
        if not 1 <= self.arrivals_per_phase <= MAX_ARRIVALS:
            raise TilusError(f"mbarrier of {self.arrivals_per_phase} arrivals, expected 1 to {MAX_ARRIVALS}")

    def evaluate(self, env: Evaluation) -> None:
        env.barrier_init(self.barrier, self.arrivals_per_phase)

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a("tilus.mbarrier")
        count = self.arrivals_per_phase * ctx.arriving_warps.get(self.barrier, 1)
        if count > MAX_ARRIVALS:
            raise TilusError(f"mbarrier for {count} arrivals of warps, expected at most {MAX_ARRIVALS}")
        guard = Guard(ctx.elected_in_group())
        for index in range(self.barrier.shape[0]):
            address = barrier_address(ctx, self.barrier, as_expr(index))
            ctx.b.emit_to("mbarrier.init.shared::cta.b64", address, Imm(count), guard=guard)
        ctx.b.emit_to("fence.mbarrier_init.release.cluster", guard=guard)


@dataclass(frozen=True, eq=False)
class Arrive(Instruction):
    """One arrival of the group of threads that runs it; each of its warps arrives when its threads have come here.

    What the threads wrote and read before is done for those who wait for the phase. nbytes: how many bytes asynchronous copies
    will bring, which the phase waits for, too. block: of the cluster whose barrier it is; None is the own one. reads_only: for
    other blocks what the threads have read is done, and what they wrote is not: no memory has to be fenced for that.
    """

    mnemonic = "arrive"
    needs_gpu = True

    barrier: SharedTensor
    barrier_index: Expr
    nbytes: Expr | None = None
    block: Expr | None = None
    reads_only: bool = False

    def effects(self) -> Effects:
        remote = self.block is not None
        return Effects(
            reads=(self.barrier,),
            writes=(self.barrier,),
            barrier=True,
            remote=remote,
            publishes=remote and not self.reads_only,
            hands_on=True,
        )

    def arrivals(self) -> tuple[SharedTensor, ...]:
        return (self.barrier,)

    def verify(self) -> None:
        check_barrier("arrive", self.barrier)
        check_index("arrive", self.barrier, self.barrier_index)
        if self.reads_only and self.block is None:
            raise TilusError("arrive: reads_only at a barrier of this block, expected one of another block")

    def evaluate(self, env: Evaluation) -> None:
        env.barrier_arrive(self.barrier, self.barrier_index, nbytes=self.nbytes, block=self.block)

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a("tilus.arrive")
        address = barrier_address(ctx, self.barrier, self.barrier_index, self.block)
        place = "shared::cta" if self.block is None else "shared::cluster"
        if self.effects().publishes:  # fences all memory, on an H100 for longer than a step of a product takes
            place = f"release.cluster.{place}"
        ctx.warp_barrier()
        if self.nbytes is None:
            leader: Reg | None = ctx.elected()
        else:
            first, leader = ctx.elected_in_group(), ctx.elected_in_other_warps()
            expect = f"mbarrier.arrive.expect_tx.{place}.b64"
            ctx.b.emit_to(expect, DISCARDED, address, ctx.integer_operand(self.nbytes), guard=Guard(first))
        if leader is not None:
            ctx.b.emit_to(f"mbarrier.arrive.{place}.b64", DISCARDED, address, guard=Guard(leader))


@dataclass(frozen=True, eq=False)
class WaitBarrier(Instruction):
    """Wait until the phase of parity `phase` is complete: what was done before its arrivals, and copies, can be seen then."""

    mnemonic = "wait_barrier"
    needs_gpu = True

    barrier: SharedTensor
    barrier_index: Expr
    phase: Expr

    def effects(self) -> Effects:
        return Effects(reads=(self.barrier,), barrier=True)

    def verify(self) -> None:
        check_barrier("wait_barrier", self.barrier)
        check_index("wait_barrier", self.barrier, self.barrier_index)
        if isinstance(self.phase, Const) and self.phase.value not in (0, 1):
            raise TilusError(f"wait_barrier for phase {self.phase}, expected its parity, 0 or 1")

    def evaluate(self, env: Evaluation) -> None:
        env.barrier_wait(self.barrier, self.barrier_index, self.phase)

    def emit(self, ctx: EmitContext) -> None:
        """All threads wait; the hardware suspends them for a while at each try, so that trying again costs nothing."""
        ctx.require_sm_90a("tilus.wait_barrier")
        b, again = ctx.b, ctx.b.label("wait_barrier")
        address = barrier_address(ctx, self.barrier, self.barrier_index)
        parity = ctx.integer_operand(self.phase)
        # Acquiring for a cluster fences all memory, which waits for copies and for readers can do without.
        scope = ".acquire.cluster" if self.barrier in ctx.met_by_other_blocks else ""
        b.place(again)
        done = b.emit(f"mbarrier.try_wait.parity{scope}.shared::cta.b64", address, parity, out=RegClass.PRED)
        b.branch(again, Guard(done, negated=True))


def barrier_address(ctx: EmitContext, barrier: SharedTensor, index: Expr, block: Expr | None = None) -> Address:
    """Where the barrier at an index is in shared memory; with `block`, in that block of the cluster."""
    return ctx.shared_address(barrier, [ctx.scalars.linear(index)], block)


def check_barrier(what: str, barrier: SharedTensor) -> None:
    if barrier.dtype != uint64 or barrier.rank != 1:
        raise TilusError(
            f"{what}: {barrier.name} is {barrier.dtype.name}{list(barrier.shape)}, expected barriers",
            hint="make them with tilus.mbarrier(stages)",
        )


def check_index(what: str, barrier: SharedTensor, index: Expr) -> None:
    if isinstance(index, Const) and not 0 <= index.value < barrier.shape[0]:
        raise TilusError(f"{what}: {barrier.name}[{index}], expected an index below {barrier.shape[0]}")


def one_barrier(what: str, barrier: SharedOperand) -> tuple[SharedTensor, Expr]:
    """The tensor and the index that the user's `barrier[i]` means."""
    if isinstance(barrier, SharedView) and barrier.rank == 0:
        check_barrier(what, barrier.tensor)
        return barrier.tensor, barrier.prefix[0]
    if isinstance(barrier, SharedTensor) and barrier.shape == (1,):
        return barrier, as_expr(0)
    raise TilusError(f"{what}: {list(barrier.shape)} barriers, expected one", hint="pick one by its index: full[stage]")


@builtin
def mbarrier(b: IRBuilder, stages: int = 1, *, arrivals: int = 1) -> SharedTensor:
    """`stages` barriers in shared memory; each phase of one waits for `arrivals` groups of threads (roles, or the block).

    It stands before the roles, outside of loops and branches. `full[i]` is one of the barriers.
    """
    tensor = SharedTensor(uint64, (stages,), None, b.fresh("mbarrier"))
    b.take_back(Sync)  # several barriers in a row need one
    b.emit(MBarrier(tensor, arrivals))
    b.emit(Sync())
    return tensor


@builtin
def arrive(
    b: IRBuilder, barrier: SharedOperand, *, nbytes: Expr | int | None = None, block: Expr | int | None = None,
    reads_only: bool = False,
) -> None:  # fmt: skip
    """One arrival at a barrier by the group of threads that runs this, a role or the block, when all of them have come here.

    nbytes: the phase also waits for so many bytes of asynchronous copies, which must be started behind this, by the same group.
    block: whose barrier it is, a rank in the cluster (0 to cluster - 1); by default this block's own.
    reads_only: of an arrival with `block`: it tells the other block that these threads have read what they wanted, so that the
    memory may be written again, and hands on nothing that they wrote. It costs no fence of all memory, as others do.
    """
    tensor, index = one_barrier("arrive", barrier)
    if reads_only and block is None:
        raise TilusError(
            "arrive with reads_only=True at a barrier of this block, where it would make no difference",
            hint="name the block of the cluster whose barrier is meant: block=rank",
        )
    owner = None if block is None else rank_in_cluster(b, block)
    only = reads_only and owner is not None  # without clusters, the block is this one
    b.emit(Arrive(tensor, index, None if nbytes is None else as_expr(nbytes), owner, only))


@builtin
def wait_barrier(b: IRBuilder, barrier: SharedOperand, phase: Expr | int) -> None:
    """Wait until the phase of parity `phase` (0 or 1) of a barrier is complete.

    The first phase of a barrier has parity 0. Waiting for parity 1 before it returns at once: so a producer, for whom all
    stages are free at first, starts with phase 1, and a consumer with phase 0; both flip it whenever they come back to a stage.
    """
    tensor, index = one_barrier("wait_barrier", barrier)
    b.emit(WaitBarrier(tensor, index, as_expr(phase)))
