"""Atomic updates of global memory: whole tiles without a result, and scalars that give the block the old value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilus.codegen.access import Vector as Run
from tilus.codegen.access import global_vector_size, vectors
from tilus.codegen.c.context import CContext
from tilus.codegen.c.scattered import update_scalar, update_tile
from tilus.codegen.context import EmitContext
from tilus.codegen.linear import of_const
from tilus.dtypes import DataType, bf16, f16, f32, int32, uint32
from tilus.errors import TilusError
from tilus.instructions.memory import check_access, global_access, tile_index, vectors_note
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr, Number, Var, as_expr, cast
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.layout_rules import LayoutPriority, LayoutRule
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.ptx.module import Address, Imm, Operand, Reg, RegClass, Vector
from tilus.target import Target

OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch")
_BITWISE = ("and", "or", "xor", "exch")


def _check(op: str, dtype: DataType, allowed: Sequence[DataType], tensor: GlobalTensor) -> None:
    if op not in OPERATIONS:
        raise TilusError(f"atomic operation {op!r}, expected one of {', '.join(OPERATIONS)}")
    names = ", ".join(d.name for d in allowed)
    if tensor.dtype not in allowed:
        raise TilusError(
            f"atomic {op} on {tensor.name} of {tensor.dtype.name}, expected {names}",
            hint="accumulate in a tensor of f32 or int32, and convert it afterwards",
        )
    if dtype != tensor.dtype:
        raise TilusError(
            f"atomic {op} of {dtype.name} on {tensor.name} of {tensor.dtype.name}",
            hint=f"cast it: tilus.cast(x, tilus.{tensor.dtype.name})",
        )
    if dtype.is_float and op not in ("add", "exch"):
        raise TilusError(f"atomic {op} on {tensor.name} of {dtype.name}: floats have add", hint="use an int32 tensor")


@dataclass(frozen=True, eq=False)
class AtomicTile(Instruction):
    """`dst[offsets ...] = op(dst[offsets ...], src)` for every element of a tile, each as one atomic update.

    Order among elements and blocks is not promised, so float sums may differ in the last bits from run to run. f32 sums flush
    subnormals (PTX ISA, red). No ordering with other accesses: relaxed, gpu scope. dims, checked: as in `store`.
    """

    mnemonic = "atomic_tile"
    layout_priority = LayoutPriority.STORE

    dst: GlobalTensor
    src: RegisterTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    op: str
    checked: bool = True

    def effects(self) -> Effects:
        return Effects(reads=(self.dst,), writes=(self.dst,))

    def verify(self) -> None:
        check_access(f"atomic {self.op}", self.dst, self.offsets, self.src.shape, self.dims)
        _check(self.op, self.src.dtype, (int32, uint32, f32, f16, bf16), self.dst)
        if self.op == "exch":
            raise TilusError("atomic exchange of a tile, expected a scalar", hint="use tilus.store")

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return global_access(self.dst, self.src, self.offsets, self.dims, self.checked, num_threads)

    def evaluate(self, env: Evaluation) -> None:
        env.update(self.dst, self.offsets, self.dims, env.tile(self.src), self.op, checked=self.checked)

    def emit(self, ctx: EmitContext) -> None:
        layout, dtype = ctx.layout(self.src), self.src.dtype
        if dtype == bf16 and ctx.target.sm < 90:
            raise TilusError(
                f"atomic add on {self.dst.name} of bf16, which {ctx.target} does not have",
                hint="accumulate in a tensor of f32, or compile for sm_90a",
            )
        size = global_vector_size(self.dst, layout, self.offsets, self.dims, self.checked)
        size = min(size, _widest(dtype, ctx.target))
        starts = tile_index(ctx, layout, self.offsets, self.dims)
        owner = ctx.first_replica(layout)
        words = ctx.words(self.src)
        done: set[tuple[int, ...]] = set()
        for run in vectors(layout, size):
            element = tuple(ctx.local_index(layout, run.slot))
            if element in done:  # an element that a thread holds twice is added once
                continue
            done.add(element)
            index = starts(run.slot)
            inside = None
            if self.checked:
                inside = ctx.in_bounds(self.dst, self.offsets, self.dims, self.src.shape, index)
            address = ctx.global_address(self.dst, index)
            _red(ctx, self.op, dtype, run, address, words, ctx.both(owner, inside))
        ctx.note(self, f"atomic {self.op} {self.dst.name}: {vectors_note(dtype, size, layout.num_locals)}")

    def emit_c(self, ctx: CContext) -> None:
        update_tile(ctx, self.op, self.dst, self.src, self.offsets, self.dims, self.checked)


def _widest(dtype: DataType, target: Target) -> int:
    """Elements that one red may update: vectors are for floats, and since sm_90."""
    if not dtype.is_float:
        return 1
    if dtype == f32:
        return 4 if target.sm >= 90 else 1
    return 8 if target.sm >= 90 else 2


def _red(
    ctx: EmitContext, op: str, dtype: DataType, run: Run, address: Address, words: Sequence[Reg], guard: Reg | None
) -> None:
    """One red instruction on slots `run.slot .. run.slot + run.size`."""
    b = ctx.b
    if dtype.nbits == 16:
        name = f"red.global.{op}.noftz"
        if run.size == 1:
            half = b.emit("cvt.u16.u32", ctx.extract(16, words, run.slot))
            b.emit_to(f"{name}.{dtype.name}", address, half, guard=ctx.guard(guard))
            return
        regs, type_name = words[run.slot // 2 : (run.slot + run.size) // 2], f"{dtype.name}x2"
    else:
        name, type_name = f"red.global.{op}", _ptx_type(op, dtype)
        regs = words[run.slot : run.slot + run.size]
    vec = "" if len(regs) == 1 else f".v{len(regs)}"
    value: Operand = regs[0] if len(regs) == 1 else Vector(tuple(regs))
    b.emit_to(f"{name}{vec}.{type_name}", address, value, guard=ctx.guard(guard))


def _ptx_type(op: str, dtype: DataType) -> str:
    if op in _BITWISE:
        return "b32"
    return "f32" if dtype == f32 else "s32" if dtype == int32 else "u32"


@dataclass(frozen=True, eq=False)
class AtomicScalar(Instruction):
    """`out = dst[index]; dst[index] = op(out, value)` as one atomic update per block; every thread gets the old value.

    Acquires and releases at gpu scope, between two barriers of the block: what the block wrote before is visible to whoever
    sees the update, and what others wrote before their updates is visible to the whole block after it. The index must
    lie inside of the tensor.
    """

    mnemonic = "atomic_scalar"

    out: Var
    dst: GlobalTensor
    index: tuple[Expr, ...]
    op: str
    value: Expr

    def effects(self) -> Effects:
        return Effects(reads=(self.dst,), writes=(self.dst,), barrier=True)

    def verify(self) -> None:
        if len(self.index) != self.dst.rank:
            raise TilusError(f"{len(self.index)} indices for {self.dst.name}, which has rank {self.dst.rank}")
        _check(self.op, self.value.dtype, (int32, uint32, f32), self.dst)

    def evaluate(self, env: Evaluation) -> None:
        env.set_scalar(self.out, env.update(self.dst, self.index, (), env.scalar(self.value), self.op, checked=False))

    def scratch_nbytes(self, num_threads: int) -> int:
        return 4

    def emit(self, ctx: EmitContext) -> None:
        b = ctx.b
        address = ctx.global_address(self.dst, [ctx.scalars.linear(e) for e in self.index])
        value = ctx.scalars.value(self.value)
        mailbox = ctx.scratch_address(of_const(0))
        first = ctx.guard(b.pure("setp.eq.u32", ctx.thread_id(), Imm(0)))
        ctx.barrier()  # the block's accesses so far, and earlier users of the scratch region, are done
        old = b.reg(RegClass.B32)
        b.emit_to(
            f"atom.acq_rel.gpu.global.{self.op}.{_ptx_type(self.op, self.dst.dtype)}", old, address, value, guard=first
        )
        b.emit_to("st.shared.b32", mailbox, old, guard=first)
        ctx.barrier()
        ctx.scalars.variables[self.out] = b.emit("ld.shared.b32", mailbox)

    def emit_c(self, ctx: CContext) -> None:
        update_scalar(ctx, self.op, self.out, self.dst, self.index, self.value)


@dataclass(frozen=True, eq=False)
class Fence(Instruction):
    """Orders each thread's memory accesses before it and after it, as seen by all threads of the GPU (fence.acq_rel.gpu)."""

    mnemonic = "fence"

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def evaluate(self, env: Evaluation) -> None:
        """Nothing: the reference execution is sequentially consistent."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.b.emit_to("fence.acq_rel.gpu")

    def emit_c(self, ctx: CContext) -> None:
        ctx.writer.line("__atomic_thread_fence(__ATOMIC_ACQ_REL);")


def _build(
    b: IRBuilder, op: str, dst: GlobalTensor, offsets: Sequence[Expr | int], value: RegisterTensor | Expr | Number,
    dims: Sequence[int] | None, checked: bool,
) -> Var | None:  # fmt: skip
    start = tuple(as_expr(o) for o in offsets)
    if isinstance(value, RegisterTensor):
        axes = tuple(range(dst.rank - value.rank, dst.rank)) if dims is None else tuple(dims)
        b.emit(AtomicTile(dst, value, start, axes, op, checked))
        return None
    scalar = as_expr(value)
    if scalar.dtype.is_float == dst.dtype.is_float:
        scalar = cast(scalar, dst.dtype)
    out = Var(b.fresh(f"{dst.name.split('[')[0]}_old"), dst.dtype)
    b.emit(AtomicScalar(out, dst, start, op, scalar))
    return out


@builtin
def atomic_add(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], value: RegisterTensor | Expr | Number, *,
    dims: Sequence[int] | None = None, checked: bool = True,
) -> Var | None:  # fmt: skip
    """Add to global memory. A tile: each element atomically, those outside of the tensor are dropped, no result.

    A scalar: once per block; gives the old value to all its threads, with everything the block wrote before made visible to
    whoever sees the sum, and the other way round. So the last of n blocks finds n - 1, and may read what the others wrote.
    """
    return _build(b, "add", dst, offsets, value, dims, checked)


@builtin
def atomic_min(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], value: RegisterTensor | Expr | Number, *,
    dims: Sequence[int] | None = None, checked: bool = True,
) -> Var | None:  # fmt: skip
    """Lower integers in global memory to `value` where that is smaller; tiles and scalars as in `atomic_add`."""
    return _build(b, "min", dst, offsets, value, dims, checked)


@builtin
def atomic_max(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], value: RegisterTensor | Expr | Number, *,
    dims: Sequence[int] | None = None, checked: bool = True,
) -> Var | None:  # fmt: skip
    """Raise integers in global memory to `value` where that is larger; tiles and scalars as in `atomic_add`."""
    return _build(b, "max", dst, offsets, value, dims, checked)


@builtin
def atomic_and(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], value: RegisterTensor | Expr | Number, *,
    dims: Sequence[int] | None = None, checked: bool = True,
) -> Var | None:  # fmt: skip
    """Clear the bits of integers in global memory that `value` lacks; tiles and scalars as in `atomic_add`."""
    return _build(b, "and", dst, offsets, value, dims, checked)


@builtin
def atomic_or(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], value: RegisterTensor | Expr | Number, *,
    dims: Sequence[int] | None = None, checked: bool = True,
) -> Var | None:  # fmt: skip
    """Set the bits of integers in global memory that `value` has; tiles and scalars as in `atomic_add`."""
    return _build(b, "or", dst, offsets, value, dims, checked)


@builtin
def atomic_xor(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], value: RegisterTensor | Expr | Number, *,
    dims: Sequence[int] | None = None, checked: bool = True,
) -> Var | None:  # fmt: skip
    """Flip the bits of integers in global memory that `value` has; tiles and scalars as in `atomic_add`."""
    return _build(b, "xor", dst, offsets, value, dims, checked)


@builtin
def atomic_exchange(b: IRBuilder, dst: GlobalTensor, index: Sequence[Expr | int], value: Expr | Number) -> Var | None:
    """Write a scalar to global memory once per block; gives the old value, with the ordering of `atomic_add`."""
    return _build(b, "exch", dst, index, value, None, checked=False)


@builtin
def fence(b: IRBuilder) -> None:
    """Order each thread's memory accesses before and after it, as seen by the whole GPU. It waits for no other thread."""
    b.emit(Fence())
