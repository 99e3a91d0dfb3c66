"""Lowers a function whose tiles all have layouts to a PTX module: statements here, instructions by their own `emit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilus.codegen.addresses import SHARED_SYMBOL
from tilus.codegen.context import LOCAL_SYMBOL, EmitContext, Note
from tilus.codegen.linear import materialize
from tilus.codegen.roles import arriving_warps, entry_registers, met_by_other_blocks, set_registers
from tilus.codegen.scalar import ScalarLowering
from tilus.codegen.shared_plan import SharedPlan, plan_shared
from tilus.codegen.tensor_map import MAP_ALIGNMENT, MAP_NBYTES, TensorMap
from tilus.dtypes import DataType, boolean
from tilus.errors import TilusError
from tilus.ir.clusters import first_meeting
from tilus.ir.dependencies import constants, waits_for_kernels
from tilus.ir.expr import Var
from tilus.ir.function import Function, TensorParam
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import GlobalTensor
from tilus.ir.visit import instructions, register_groups, side_by_side, walk
from tilus.ptx.builder import Builder
from tilus.ptx.module import (
    Address,
    GlobalBytes,
    Guard,
    Imm,
    Instr,
    Kernel,
    LocalArray,
    Module,
    Param,
    Reg,
    RegClass,
    SharedArray,
    Symbol,
)
from tilus.target import Target

MAX_STATIC_SHARED_NBYTES = 48 * 1024


@dataclass(frozen=True)
class Lowered:
    """A PTX module and what the launcher must know about it.

    waits_for_kernels: it may start before the kernel in front of it ends (programmatic dependent launch). tensor_maps:
    parameters behind those of the function.
    """

    module: Module
    shared_nbytes: int
    dynamic_shared: bool
    waits_for_kernels: bool
    notes: tuple[Note, ...]
    tensor_maps: tuple[TensorMap, ...] = ()


def lower(function: Function, target: Target) -> Lowered:
    """PTX for one kernel.

    Raises: TilusError when the kernel needs more shared memory than the target has.
    """
    plan = plan_shared(function)
    _check_limits(function, plan, target)
    b = Builder()
    params = function.kernel_params()
    scalars = ScalarLowering(b)
    names = {var: f"param_{index}_{_identifier(var.name)}" for index, var in enumerate(params)}
    ctx = EmitContext(
        b, function.warps, {function.warps: 0}, function.cluster, scalars, plan, target, _read_only(function), frozenset(params),
        arriving_warps(function), met_by_other_blocks(function), entry_registers(function, target),
        first_meeting(function),
    )  # fmt: skip
    pointers = {param.tensor.base for param in function.params if isinstance(param, TensorParam)}
    for var, name in names.items():
        scalars.variables[var] = _load_param(b, var, name, var in pointers)
    _StmtLowering(ctx).lower_body(function.body, function.ends_alone)
    dynamic = plan.nbytes > MAX_STATIC_SHARED_NBYTES
    shared = (SharedArray(SHARED_SYMBOL, plan.nbytes, plan.alignment, dynamic),) if plan.nbytes else ()
    ordinary = [Param(name, "u64" if var in pointers else _param_type(var.dtype)) for var, name in names.items()]
    maps = [Param(name, "b8", MAP_NBYTES, MAP_ALIGNMENT) for name in ctx.tensor_maps.values()]
    kernel = Kernel(
        name=_identifier(function.name),
        params=(*ordinary, *maps),
        body=b.finish(),
        shared=shared,
        num_threads=function.num_threads,
        # Left to itself the assembler spills a little to fit more blocks; an explicit 1 makes it use what it needs.
        min_blocks_per_sm=function.blocks_per_sm,
        max_registers=ctx.entry_registers,
        local=(LocalArray(LOCAL_SYMBOL, ctx.local_nbytes),) if ctx.local_nbytes else (),
        cluster=function.cluster,
    )
    waits = any(isinstance(item, Instr) and item.opcode == "griddepcontrol.wait" for item in kernel.body)
    strings = tuple(GlobalBytes(name, text.encode() + b"\0") for text, name in ctx.strings.items())
    return Lowered(
        Module(target, (kernel,), strings), plan.nbytes, dynamic, waits, tuple(ctx.notes), tuple(ctx.tensor_maps)
    )


def _check_limits(function: Function, plan: SharedPlan, target: Target) -> None:
    if plan.nbytes > target.max_shared_nbytes:
        parts = ", ".join(f"{t.name} {t.nbytes}" for t in plan.offsets)
        raise TilusError(
            f"kernel {function.name} needs {plan.nbytes} bytes of shared memory ({parts}), "
            f"{target.name} has {target.max_shared_nbytes} per block",
            loc=function.loc,
            hint="use smaller tiles or fewer pipeline stages",
        )
    if function.num_threads > target.max_threads_per_block:
        raise TilusError(
            f"kernel {function.name} has {function.num_warps} warps, at most {target.max_threads_per_block // 32} fit in a block",
            loc=function.loc,
            hint="lower `warps` in tilus.grid",
        )
    if function.cluster > 1 and target.sm < 90:
        raise TilusError(
            f"kernel {function.name} has clusters of {function.cluster} blocks, {target.name} has none",
            loc=function.loc,
            hint="compile it for sm_90a, or with `cluster=1` in tilus.grid",
        )


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


def _param_type(dtype: DataType) -> str:
    if dtype == boolean:
        return "u32"
    return "f32" if dtype.is_float else "s64" if dtype.nbits == 64 else "s32"


def _load_param(b: Builder, var: Var, name: str, pointer: bool) -> Reg:
    address = Address(Symbol(name))
    if pointer:
        generic = b.pure("ld.param.u64", address)
        return b.pure("cvta.to.global.u64", generic)
    if var.dtype.nbits == 64 and not var.dtype.is_float:
        return b.pure("cvt.s32.s64", b.pure("ld.param.s64", address))
    return b.pure(f"ld.param.{_param_type(var.dtype)}", address)


def _read_only(function: Function) -> frozenset[Var]:
    """Pointers to memory that does not change while the kernel runs.

    Earlier kernels may still write what a kernel that waits for them has not been promised to be constant; the assembler
    moves read-only loads over the wait.
    """
    if waits_for_kernels(function):
        return constants(function)
    bases = {param.tensor.base for param in function.params if isinstance(param, TensorParam)}
    for stmt in instructions(function.body):
        bases -= {t.base for t in stmt.inst.effects().writes if isinstance(t, GlobalTensor)}
    return frozenset(bases)


@dataclass
class _Loop:
    continue_label: str
    break_label: str


class _StmtLowering:
    def __init__(self, ctx: EmitContext) -> None:
        self.ctx = ctx
        self.b = ctx.b
        self.scalars = ctx.scalars
        self.loops: list[_Loop] = []
        self.exit_label: str | None = None

    def lower_body(self, body: Stmt, ends_alone: bool) -> None:
        if any(isinstance(stmt, Return) for stmt in walk(body)):
            self.exit_label = self.b.label("exit")
        with self.b.scope():  # so that what is hoisted to the kernel's top never lands behind the exit label
            self.lower(body)
        if self.exit_label:
            self.b.place(self.exit_label)
        if not ends_alone and any(stmt.inst.effects().remote for stmt in instructions(body)):
            self.ctx.cluster_barrier()  # a block's shared memory lives as long as others may touch it
        self.b.emit_to("ret")

    def lower(self, stmt: Stmt) -> None:
        match stmt:
            case Seq():
                for item in side_by_side(stmt.stmts):
                    if isinstance(item, tuple):
                        self._roles(item)
                    else:
                        self.lower(item)
            case Role():
                self._roles((stmt,))
            case Inst():
                self._instruction(stmt)
            case SetScalar():
                self._set_scalar(stmt)
            case For():
                self._for(stmt)
            case While():
                self._while(stmt)
            case If():
                self._if(stmt)
            case Break():
                self.b.branch(self.loops[-1].break_label)
            case Continue():
                self.b.branch(self.loops[-1].continue_label)
            case Return():
                self.b.branch(self.exit_label or "")

    def _instruction(self, stmt: Inst) -> None:
        self.b.loc = stmt.loc
        try:
            stmt.inst.emit(self.ctx)
        except TilusError as error:
            raise error.at(stmt.loc) from None

    def _set_scalar(self, stmt: SetScalar) -> None:
        self.b.loc = stmt.loc
        if stmt.var not in self.scalars.variables:
            self.scalars.variables[stmt.var] = self.b.reg(_scalar_class(stmt.var.dtype))
        self.scalars.assign(stmt.var, stmt.value)

    def _for(self, stmt: For) -> None:
        """Test before the first trip, then at the bottom. Labels and branches stay inside of the loop's scope, so that
        what is hoisted out of the body lands in front of the loop."""
        b = self.b
        b.loc = stmt.loc
        start, stop = self.scalars.linear(stmt.start), self.scalars.linear(stmt.stop)
        limit = materialize(b, stop)
        counter = b.reg(RegClass.B32, b.level + 1)
        b.mov(counter, materialize(b, start))
        loop = _Loop(b.label("next"), b.label("end"))
        head = b.label("loop")
        self.scalars.variables[stmt.var] = counter
        self.loops.append(loop)
        with b.scope():
            enter = b.emit("setp.ge.s32", counter, limit)
            b.branch(loop.break_label, Guard(enter))
            b.place(head)
            self.lower(stmt.body)
            b.loc = stmt.loc
            b.place(loop.continue_label)
            b.emit_to("add.s32", counter, counter, Imm(stmt.step))
            again = b.emit("setp.lt.s32", counter, limit)
            b.branch(head, Guard(again))
            b.place(loop.break_label)
        self.loops.pop()

    def _while(self, stmt: While) -> None:
        b = self.b
        loop = _Loop(b.label("while"), b.label("end"))
        self.loops.append(loop)
        with b.scope():
            b.loc = stmt.loc
            b.place(loop.continue_label)
            b.branch(loop.break_label, Guard(self.scalars.pred(stmt.cond), negated=True))
            self.lower(stmt.body)
            b.branch(loop.continue_label)
            b.place(loop.break_label)
        self.loops.pop()

    def _if(self, stmt: If) -> None:
        b = self.b
        b.loc = stmt.loc
        cond = self.scalars.pred(stmt.cond)
        has_else = not (isinstance(stmt.orelse, Seq) and not stmt.orelse.stmts)
        otherwise, end = b.label("else"), b.label("endif")
        with b.scope():  # around both sides, so that what is hoisted out of the second lands in front of the first, too
            with b.scope():
                b.branch(otherwise if has_else else end, Guard(cond, negated=True))
                self.lower(stmt.then)
                if has_else:
                    b.branch(end)
            with b.scope():
                if has_else:
                    b.place(otherwise)
                    self.lower(stmt.orelse)
                b.place(end)

    def _roles(self, roles: Sequence[Role]) -> None:
        """One chain of branches on the warp's number, the form in which the assembler honours setmaxnreg; in each a chain for
        the roles that set their registers together."""
        b, ctx = self.b, self.ctx
        end = b.label("end_of_roles")
        warp = b.pure("shr.u32", b.thread_id(), Imm(5))
        groups = register_groups(roles)
        with b.scope():
            wholes = [range(group[0].first_warp, group[-1].warps.stop) for group in groups]
            tests = [_is_one_of(b, warp, whole, ctx.warps) for whole in wholes]
            inner = [[_is_one_of(b, warp, role.warps, w) for role in g] for g, w in zip(groups, wholes, strict=True)]
            for group, test, tests_inside in zip(groups, tests, inner, strict=True):
                behind = b.label("next_role")
                b.loc = group[0].loc
                if test is not None:
                    b.branch(behind, Guard(test, negated=True))
                set_registers(ctx, group[0])
                for role, own in zip(group, tests_inside, strict=True):
                    otherwise = behind if role is group[-1] else b.label("next_role")
                    b.loc = role.loc
                    if own is not None:
                        b.branch(otherwise, Guard(own, negated=True))
                    with ctx.role(role.warps):
                        self.lower(role.body)
                    b.branch(end)
                    b.place(otherwise)
            b.place(end)


def _is_one_of(b: Builder, warp: Reg, warps: range, block: range) -> Reg | None:
    """Whether a warp of the block is one of `warps`; None when it always is."""
    if warps == block:
        return None
    number = b.pure("sub.u32", warp, Imm(warps.start)) if warps.start else warp
    return b.pure("setp.lt.u32", number, Imm(len(warps)))


def _scalar_class(dtype: DataType) -> RegClass:
    return RegClass.PRED if dtype == boolean else RegClass.B32
