"""Clusters: blocks that reach each other's shared memory have to wait for each other first."""

from __future__ import annotations

from collections.abc import Iterator

from tilus.errors import Loc, TilusError
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.order import Order
from tilus.ir.stmt import Inst, Seq, SetScalar, Stmt
from tilus.ir.tensor import SharedTensor
from tilus.ir.visit import by_warps


def check_cluster(function: Function) -> list[TilusError]:
    """Barriers of the cluster in roles; accesses to other blocks that no such barrier precedes, or in a kernel without clusters.

    Before such a barrier other blocks may not have started yet, and have no shared memory. At the end of a kernel with such
    accesses code generation puts one, unless its blocks end alone.
    """
    errors: list[TilusError] = []

    def sees(inst: Instruction, together: bool, loc: Loc | None) -> None:
        if not inst.effects().remote:
            return
        if function.cluster == 1:
            errors.append(
                TilusError(
                    f"{inst.mnemonic} touches another block of the cluster, the blocks of kernel {function.name} are alone",
                    loc=loc,
                    hint="give the kernel clusters: tilus.grid(..., cluster=2)",
                )
            )
        elif not together:
            errors.append(
                TilusError(
                    f"{inst.mnemonic} touches another block of the cluster before tilus.cluster_sync: it may not have started",
                    loc=loc,
                    hint="call tilus.cluster_sync() first, on every path: after barriers are made, and before roles begin",
                )
            )

    for stmt, warps in by_warps(function.body, function.warps):
        if stmt.inst.effects().cluster_barrier and warps != function.warps:
            errors.append(
                TilusError(
                    "tilus.cluster_sync in a role, which only some warps would come to; it waits for all threads of the cluster",
                    loc=stmt.loc,
                    hint="put it before or behind the roles; inside, arrive at an mbarrier of the other block",
                )
            )
    Order(lambda inst: inst.effects().cluster_barrier, sees, lambda loc: None).follow(function)
    return errors


def first_meeting(function: Function) -> Instruction | None:
    """The first barrier of the cluster, where a block has nothing to hand on at it, as all that it has done is to make mbarriers,
    which are handed on as they are made."""
    for stmt in _in_front(function.body):
        if not isinstance(stmt, Inst):
            return None
        effects = stmt.inst.effects()
        if effects.cluster_barrier:
            return stmt.inst
        if (effects.writes and not stmt.inst.once) or any(isinstance(read, SharedTensor) for read in effects.reads):
            return None
    return None


def _in_front(stmt: Stmt) -> Iterator[Stmt]:
    """Statements in order, those of sequences by themselves, without those that set scalars."""
    if isinstance(stmt, Seq):
        for child in stmt.stmts:
            yield from _in_front(child)
    elif not isinstance(stmt, SetScalar):
        yield stmt
