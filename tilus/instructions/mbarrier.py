"""Barriers in shared memory (mbarrier)."""

from __future__ import annotations

from tilus.codegen.context import EmitContext
from tilus.dtypes import uint64
from tilus.errors import TilusError
from tilus.instructions.shared import SharedOperand
from tilus.ir.expr import Const, Expr, as_expr
from tilus.ir.tensor import SharedTensor, SharedView
from tilus.ptx.module import Address


def barrier_address(ctx: EmitContext, barrier: SharedTensor, index: Expr) -> Address:
    """Where the barrier at an index is in shared memory."""
    return ctx.shared_address(barrier, [ctx.scalars.linear(index)])


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
