"""What roles need beyond their code: how many threads arrive at a barrier, and how the registers of a block are shared out."""

from __future__ import annotations

from tilus.codegen.context import EmitContext
from tilus.errors import Loc, Note, TilusError
from tilus.ir.function import Function
from tilus.ir.stmt import Role
from tilus.ir.tensor import SharedTensor
from tilus.ir.visit import by_warps, instructions, walk
from tilus.ptx.module import Imm
from tilus.target import Target

REGISTER_UNIT = 8


def arriving_warps(function: Function) -> dict[SharedTensor, int]:
    """How many warps the groups of threads have that arrive at each mbarrier.

    Raises: TilusError with both lines when two groups differ.
    """
    found: dict[SharedTensor, tuple[int, Loc | None]] = {}
    for stmt, warps in by_warps(function.body, function.warps):
        for barrier in stmt.inst.arrivals():
            count, loc = found.setdefault(barrier, (len(warps), stmt.loc))
            if count != len(warps):
                raise TilusError(
                    f"{len(warps)} warps arrive at {barrier.name}, expected {count} as elsewhere",
                    loc=stmt.loc,
                    notes=[Note(f"{count} warps arrive here", loc)],
                    hint="every role that arrives at a barrier has the same number of warps",
                )
    return {barrier: count for barrier, (count, _) in found.items()}


def met_by_other_blocks(function: Function) -> frozenset[SharedTensor]:
    """The mbarriers at which threads of other blocks of the cluster say that what they wrote is there, and must be seen."""
    found = (stmt.inst for stmt in instructions(function.body) if stmt.inst.effects().publishes)
    return frozenset(barrier for inst in found for barrier in inst.arrivals())


def entry_registers(function: Function, target: Target) -> int | None:
    """The registers of a thread at launch where roles change their number; None where they do not.

    As many as fit, but no more than some role wants. Roles that take more wait until others have given enough back, so the
    sum must not grow.

    Raises: TilusError when it does.
    """
    roles = [stmt for stmt in walk(function.body) if isinstance(stmt, Role) and stmt.registers is not None]
    if not roles:
        return None
    threads = function.num_threads
    most = min(target.registers_per_sm // (threads * function.blocks_per_sm), target.max_registers_per_thread)
    at_launch = most // REGISTER_UNIT * REGISTER_UNIT
    others = function.num_warps - sum(role.num_warps for role in roles)
    if others == 0:
        at_launch = min(at_launch, max(role.registers or 0 for role in roles))
    wanted = 32 * (sum(role.num_warps * (role.registers or 0) for role in roles) + others * at_launch)
    if wanted > at_launch * threads:
        raise TilusError(
            f"the roles want {wanted} registers, the {threads} threads of the block have {at_launch} each: "
            f"{at_launch * threads}",
            loc=roles[0].loc,
            hint="give the roles less, or those that only copy 24 or 40",
        )
    return at_launch


def set_registers(ctx: EmitContext, role: Role) -> None:
    """Give back what the role does not need, or wait for what it needs beyond what it was launched with."""
    if role.registers is None or role.registers == ctx.entry_registers:
        return
    ctx.require_sm_90a("tilus.warps with registers=")
    way = "inc" if role.registers > (ctx.entry_registers or 0) else "dec"
    ctx.b.emit_to(f"setmaxnreg.{way}.sync.aligned.u32", Imm(role.registers))
