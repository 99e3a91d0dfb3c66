"""Clusters: blocks that run at the same time and reach each other's shared memory (PTX ISA, "Cluster of Cooperative Thread
Arrays"; barrier.cluster, mapa and the state space shared::cluster). docs/language.md says what a program has to observe."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.codegen.context import EmitContext
from tilus.codegen.shared_access import SharedAccess
from tilus.instructions.barrier import Sync
from tilus.instructions.shared import LoadShared, StoreShared, moving
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import BlockId, Expr, binary
from tilus.ir.instruction import Effects, Instruction
from tilus.target import Target


@dataclass(frozen=True, eq=False)
class ClusterSync(Instruction):
    """Wait for all threads of all blocks of the cluster; what they wrote is then visible to each other."""

    mnemonic = "cluster_sync"
    needs_gpu = True

    def effects(self) -> Effects:
        return Effects(barrier=True, cluster_barrier=True, hands_on=True)

    def evaluate(self, env: Evaluation) -> None:
        env.cluster_sync()

    def emit(self, ctx: EmitContext) -> None:
        ctx.cluster_barrier(bare=self is ctx.first_meeting)


@dataclass(frozen=True, eq=False)
class LoadCluster(LoadShared):
    """A tile of a shared tensor of block `block` of the cluster (see `load_shared`)."""

    mnemonic = "load_cluster"
    needs_gpu = True

    block: Expr

    def effects(self) -> Effects:
        return Effects(reads=(self.src,), remote=True)

    def access(self) -> SharedAccess:
        return moving(self.out, self.src, self.offsets, self.dims, writes=False, by_matrices=False)

    def specialized(self, target: Target) -> Instruction | None:
        """Matrices are loaded from the block's own shared memory only."""

    def evaluate(self, env: Evaluation) -> None:
        tile = env.load(self.src, self.offsets, self.out.shape, self.dims, checked=False, block=self.block)
        env.set_tile(self.out, tile)

    def emit(self, ctx: EmitContext) -> None:
        self.move(ctx, "ld.shared::cluster", self.block)


@dataclass(frozen=True, eq=False)
class StoreCluster(StoreShared):
    """Write a tile to a shared tensor of block `block` of the cluster; it must lie inside."""

    mnemonic = "store_cluster"
    needs_gpu = True

    block: Expr

    def effects(self) -> Effects:
        return Effects(writes=(self.dst,), remote=True)

    def access(self, target: Target) -> SharedAccess:
        return moving(self.src, self.dst, self.offsets, self.dims, writes=True, by_matrices=False)

    def specialized(self, target: Target) -> Instruction | None:
        """Matrices are stored to the block's own shared memory only."""

    def evaluate(self, env: Evaluation) -> None:
        env.store(self.dst, self.offsets, self.dims, env.tile(self.src), checked=False, block=self.block)

    def emit(self, ctx: EmitContext) -> None:
        self.move(ctx, "st.shared::cluster", self.block)


@builtin
def cluster_rank(b: IRBuilder) -> Expr:
    """The number of this block in its cluster: `block_id(0) % cluster`."""
    return binary("%", BlockId(0), b.cluster)


@builtin
def cluster_sync(b: IRBuilder) -> None:
    """Barrier of the cluster: what the threads of its blocks wrote before, all of them may read afterwards.

    All threads of all blocks of the cluster must come to it, so it stands outside of roles, and in branches that all blocks
    take alike. One is needed before the first access to another block, which may not have started before. In a kernel without
    clusters it is `tilus.sync()`.
    """
    b.emit(Sync() if b.cluster == 1 else ClusterSync())
