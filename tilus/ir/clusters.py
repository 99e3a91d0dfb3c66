"""Clusters: blocks that reach each other's shared memory have to wait for each other first."""

from __future__ import annotations

from tilus.errors import Loc, TilusError
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.order import Order
from tilus.ir.visit import by_warps


def check_cluster(function: Function) -> list[TilusError]:
    """Barriers of the cluster in roles; accesses to other blocks that no such barrier precedes, or in a kernel without clusters.

    Before such a barrier other blocks may not have started yet, and have no shared memory. At the end of a kernel with such
    accesses code generation puts one.
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
