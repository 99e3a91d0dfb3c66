"""Bulk copies: contiguous bytes between global and shared memory (PTX ISA, cp.async.bulk; sm_90 and later).

A tile is cut into runs that are contiguous in global memory; each is one copy. All are started by one thread, one after the
other: the hardware takes the operands from registers that a warp has in common, so lanes would only wait for each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const
from tilus.errors import TilusError
from tilus.instructions.eviction import cache_hint, policy
from tilus.instructions.mbarrier import one_barrier
from tilus.instructions.memory import check_access
from tilus.instructions.shared import SharedOperand
from tilus.instructions.shared_copy import (
    CopyFromShared,
    CopyToShared,
    SharedCopy,
    amount,
    beyond,
    mask_of,
    tile_of,
)
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr, as_expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.ranges import divisor
from tilus.ir.tensor import GlobalTensor
from tilus.layout import SharedLayout, row_major
from tilus.ptx.module import Address, Imm, Reg

UNIT_NBITS = 128  # addresses and sizes of bulk copies are multiples of 16 bytes


@dataclass(frozen=True, eq=False)
class CopyBulk(CopyToShared):
    """Start copying a tile of contiguous runs from a global to a shared tensor, which is row-major.

    The tile lies inside of the global tensor. Its runs are multiples of 16 bytes at multiples of 16 bytes.
    """

    mnemonic = "copy_bulk"
    clipped = False

    def verify(self) -> None:
        super().verify()
        check_runs(self.mnemonic, self.src, self.shape, self.dims)
        self.check_shared_start(UNIT_NBITS)

    def evaluate(self, env: Evaluation) -> None:
        check_starts(self.mnemonic, self.src, self.src_offsets, self.shape, self.dims)
        super().evaluate(env)

    def legal_layouts(self) -> tuple[SharedLayout, ...]:
        return (row_major(self.dst.shape),)

    def emit(self, ctx: EmitContext) -> None:
        emit_runs(ctx, self, ctx.elected_in_group(), {}, {})


@dataclass(frozen=True, eq=False)
class StoreBulk(CopyFromShared):
    """Start copying a tile from a row-major shared tensor to contiguous runs of a global one.

    The tile lies inside of the global tensor. Its runs are multiples of 16 bytes at multiples of 16 bytes.
    add: add to what is there, element by element (f32), each of them at once; the order of the additions is open.
    """

    mnemonic = "store_bulk"
    clipped = False

    add: bool = False

    def verify(self) -> None:
        super().verify()
        check_runs(self.mnemonic, self.dst, self.shape, self.dims)
        self.check_shared_start(UNIT_NBITS)
        if self.add and self.dst.dtype.name != "f32":
            raise TilusError(
                f"store_bulk: adds to {self.dst.name} of {self.dst.dtype.name}, expected f32",
                hint="reduce in f32, or use tilus.atomic_add",
            )

    def legal_layouts(self) -> tuple[SharedLayout, ...]:
        return (row_major(self.src.shape),)

    def evaluate(self, env: Evaluation) -> None:
        check_starts(self.mnemonic, self.dst, self.dst_offsets, self.shape, self.dims)
        if self.add:
            value = env.load(self.src, self.src_offsets, self.shape, self.shared_dims, checked=False)
            env.update(self.dst, self.dst_offsets, self.dims, value, "add", checked=False)
        else:
            super().evaluate(env)

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a(f"tilus.{self.mnemonic}")
        opcode = f"cp.{'reduce.' if self.add else ''}async.bulk.global.shared::cta.bulk_group{cache_hint(self.evict)}"
        opcode += ".add.f32" if self.add else ""
        guard, tail = ctx.guard(ctx.elected_in_group()), policy(ctx, self.evict)
        for memory, buffer, nbytes in _runs(ctx, self, {}, {}):
            ctx.b.emit_to(opcode, memory, buffer, nbytes, *tail, guard=guard)


@dataclass(frozen=True, eq=False)
class PrefetchBulk(Instruction):
    """Start bringing a tile of contiguous runs of a global tensor into the L2 cache."""

    mnemonic = "prefetch_bulk"
    needs_gpu = True

    src: GlobalTensor
    offsets: tuple[Expr, ...]
    shape: tuple[int, ...]
    dims: tuple[int, ...]

    def effects(self) -> Effects:
        return Effects(reads=(self.src,), other=True)

    def verify(self) -> None:
        check_access(self.mnemonic, self.src, self.offsets, self.shape, self.dims)
        check_runs(self.mnemonic, self.src, self.shape, self.dims)

    def evaluate(self, env: Evaluation) -> None:
        """The tile must lie inside of the tensor, as for a copy."""
        check_starts(self.mnemonic, self.src, self.offsets, self.shape, self.dims)
        env.load(self.src, self.offsets, self.shape, self.dims, checked=False)

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a(f"tilus.{self.mnemonic}")
        check_starts(self.mnemonic, self.src, self.offsets, self.shape, self.dims)
        outer = self.shape[: len(self.shape) - contiguous_axes(self.src, self.shape, self.dims)]
        nbytes = Imm(math.prod(self.shape) // math.prod(outer) * self.src.dtype.nbits // 8)
        guard = ctx.guard(ctx.elected_in_group())
        for index in _places(beyond(ctx, self.offsets, {}), self.dims, outer):
            ctx.b.emit_to("cp.async.bulk.prefetch.L2.global", ctx.global_address(self.src, index), nbytes, guard=guard)


# ---- groups of stores, and the order of the two proxies


@dataclass(frozen=True, eq=False)
class CommitStores(Instruction):
    """Close the group of all copies out of shared memory started since the last commit."""

    mnemonic = "commit_stores"
    needs_gpu = True

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def evaluate(self, env: Evaluation) -> None:
        """Copies of the reference execution land at once."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a(f"tilus.{self.mnemonic}")
        ctx.b.emit_to("cp.async.bulk.commit_group")


@dataclass(frozen=True, eq=False)
class WaitStores(Instruction):
    """Wait until at most `pending` groups are still under way. reads_only: or have not yet read their shared memory."""

    mnemonic = "wait_stores"
    needs_gpu = True

    pending: int
    reads_only: bool

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def verify(self) -> None:
        if self.pending < 0:
            raise TilusError(f"wait_stores({self.pending}): expected 0 or more pending groups")

    def evaluate(self, env: Evaluation) -> None:
        """Copies of the reference execution have landed already."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a(f"tilus.{self.mnemonic}")
        ctx.b.emit_to(f"cp.async.bulk.wait_group{'.read' if self.reads_only else ''}", Imm(self.pending))


@dataclass(frozen=True, eq=False)
class FenceAsync(Instruction):
    """Let asynchronous accesses to shared memory that are started after this see the thread's ordinary ones before it."""

    mnemonic = "fence_async"
    needs_gpu = True

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def evaluate(self, env: Evaluation) -> None:
        """The reference execution has one view of memory."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a(f"tilus.{self.mnemonic}")
        ctx.b.emit_to("fence.proxy.async.shared::cta")


# ---- runs


def contiguous_axes(tensor: GlobalTensor, shape: Sequence[int], dims: Sequence[int]) -> int:
    """How many of a tile's last axes together are one run of memory, as far as strides are known."""
    step = 1
    for axis in reversed(range(len(shape))):
        if shape[axis] > 1:
            if tensor.strides[dims[axis]] != as_expr(step):
                return len(shape) - 1 - axis
            step *= shape[axis]
    return len(shape)


def check_runs(what: str, tensor: GlobalTensor, shape: Sequence[int], dims: Sequence[int]) -> None:
    """Raise unless all runs of a tile are multiples of 16 bytes."""
    run = math.prod(shape[len(shape) - contiguous_axes(tensor, shape, dims) :]) * tensor.dtype.nbits
    if run % UNIT_NBITS:
        raise TilusError(
            f"{what}: a tile of shape {list(shape)} of {tensor.name} has contiguous runs of {amount(run)}, expected a "
            "multiple of 16 bytes",
            hint="take whole rows of a tensor whose extents are known to the compiler (Const), or use tilus.copy_tensor",
        )


def check_starts(
    what: str, tensor: GlobalTensor, offsets: Sequence[Expr], shape: Sequence[int], dims: Sequence[int]
) -> None:
    """Raise unless all runs of a tile are known to start at multiples of 16 bytes. Kernels for a CPU know no such facts."""
    nbits, outer = tensor.dtype.nbits, len(shape) - contiguous_axes(tensor, shape, dims)
    parts = [divisor(tensor.offset), *(divisor(o) * divisor(s) for o, s in zip(offsets, tensor.strides, strict=True))]
    parts += [divisor(tensor.strides[dims[axis]]) for axis in range(outer) if shape[axis] > 1]
    known = math.gcd(8 * tensor.alignment, *(part * nbits for part in parts))
    if known % UNIT_NBITS:
        raise TilusError(
            f"{what}: runs of {tensor.name} are known to start at multiples of {amount(known)}, expected 16 bytes",
            hint="use offsets, strides and an address that are multiples of 16 bytes, or tilus.copy_async",
        )


def emit_runs(
    ctx: EmitContext, copy: CopyToShared, starter: Reg, place: Mapping[int, Linear], corner: Mapping[int, Linear]
) -> None:
    """Start the copy of one tile by the thread that is `starter`.

    place, corner: what is added, by dim, to where it starts in shared and in global memory.
    """
    ctx.require_sm_90a(f"tilus.{copy.mnemonic}")
    opcode, tail = f"cp.async.bulk.shared::cluster.global{copy.modifiers()}", copy.tail(ctx)
    guard = ctx.guard(starter)
    for memory, buffer, nbytes in _runs(ctx, copy, place, corner):
        ctx.b.emit_to(opcode, buffer, memory, nbytes, *tail, guard=guard)


def _runs(
    ctx: EmitContext, copy: SharedCopy, place: Mapping[int, Linear], corner: Mapping[int, Linear]
) -> Iterator[tuple[Address, Address, Imm]]:
    """Global address, shared address and bytes of each run of a copy; place, corner: so far beyond its starts."""
    check_starts(copy.mnemonic, copy.memory, copy.offsets, copy.shape, copy.dims)
    outer = copy.shape[: len(copy.shape) - contiguous_axes(copy.memory, copy.shape, copy.dims)]
    count = math.prod(outer)
    ctx.note(copy, f"{copy.mnemonic} {copy.memory.name}: {count} x {copy.nbytes // count} bytes")
    memory = _places(beyond(ctx, copy.offsets, corner), copy.dims, outer)
    buffer = _places(beyond(ctx, copy.starts, place), copy.shared_dims, outer)
    for index, own in zip(memory, buffer, strict=True):
        yield (
            ctx.global_address(copy.memory, index),
            ctx.shared_address(copy.buffer, own),
            Imm(copy.nbytes // count),
        )


def _places(start: Sequence[Linear], dims: Sequence[int], outer: Sequence[int]) -> Iterator[list[Linear]]:
    """The index of the first element of each run of a tile, whose axes `outer` are along the first of `dims`."""
    for place in itertools.product(*map(range, outer)):
        index = list(start)
        for d, part in zip(dims, place):
            index[d] = index[d] + of_const(part)
        yield index


# ---- the language


@builtin
def copy_bulk(
    b: IRBuilder, dst: SharedOperand, src: GlobalTensor, offsets: Sequence[Expr | int], *, barrier: SharedOperand,
    shape: Sequence[int] | None = None, dims: Sequence[int] | None = None, evict: str | None = None,
    multicast: Expr | int | None = None,
) -> None:  # fmt: skip
    """Start copying the tile at `offsets` of a global tensor into shared memory, as contiguous bytes.

    dst: a shared tensor or `tensor[i]`, filled whole, or its first rows when `shape` says so; it becomes row-major. dims: the
    dims of `src` that the tile's axes run along; by default the last ones. The tile must lie inside of `src`, and consist of
    contiguous runs of multiples of 16 bytes at multiples of 16 bytes: whole rows, or whole blocks of a tensor of blocks.
    barrier: the mbarrier that counts the bytes (`full[stage]`): announce them first, `arrive(full[stage], nbytes=...)`.
    evict: "first" for data that is read once, "last" for data that the L2 cache shall keep. multicast: a mask of the blocks of
    the cluster that all get the tile, at the same place and counted at the same barrier.
    """
    tile, axes, tensor, starts = tile_of(src, dst, shape, dims)
    bar, index = one_barrier("copy_bulk", barrier)
    mask = mask_of(b, "copy_bulk", multicast)
    src_offsets = tuple(as_expr(o) for o in offsets)
    b.emit(CopyBulk(tile, axes, evict, tensor, src, bar, index, starts, src_offsets, mask))


@builtin
def store_bulk(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], src: SharedOperand, *,
    shape: Sequence[int] | None = None, dims: Sequence[int] | None = None, evict: str | None = None, add: bool = False,
) -> None:  # fmt: skip
    """Start copying shared memory to the tile at `offsets` of a global tensor, as contiguous bytes; `copy_bulk` says which.

    add: add to what is there instead (f32), atomically for each element. Write the shared memory with ordinary stores, then
    `fence_async()` and `sync()`; afterwards `commit_stores()`, and `wait_stores()` before it is written again or the block ends.
    """
    tile, axes, tensor, starts = tile_of(dst, src, shape, dims)
    b.emit(StoreBulk(tile, axes, evict, dst, tensor, tuple(as_expr(o) for o in offsets), starts, add))


@builtin
def prefetch_bulk(
    b: IRBuilder, src: GlobalTensor, offsets: Sequence[Expr | int], shape: Sequence[int], *,
    dims: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Start bringing the tile of `shape` at `offsets` of a global tensor into the L2 cache.

    It lies inside of the tensor and is made of runs, as for `copy_bulk`.
    """
    axes = tuple(range(src.rank - len(shape), src.rank)) if dims is None else tuple(dims)
    b.emit(PrefetchBulk(src, tuple(as_expr(o) for o in offsets), tuple(shape), axes))


@builtin
def commit_stores(b: IRBuilder) -> None:
    """Close the group of all `store_bulk` and `store_tensor` since the last commit."""
    b.emit(CommitStores())


@builtin
def wait_stores(b: IRBuilder, pending: int = 0, *, reads_only: bool = False) -> None:
    """Wait until at most `pending` groups of stores are still under way; `sync()` before other threads rely on it.

    reads_only: wait only until their shared memory has been read, so that it may be written again.
    """
    b.emit(WaitStores(pending, reads_only))


@builtin
def fence_async(b: IRBuilder) -> None:
    """Make this thread's stores to shared memory visible to tensor copies, bulk copies and wgmma that start afterwards.

    Follow it with a barrier (`sync()`) when other threads start them.
    """
    b.emit(FenceAsync())
