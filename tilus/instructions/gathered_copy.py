"""Copies of tiles that lie here and there in a global tensor, at indices that a register tile holds: the pages of a cache, say.

The warps of a group share the indices out: each starts the copies of its own, by one thread. So the work of starting them is
spread over the schedulers of a multiprocessor, and nobody waits for an index of somebody else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, materialize, of_const, of_reg
from tilus.dtypes import int32
from tilus.errors import TilusError
from tilus.instructions.bulk_copy import CopyBulk, check_starts, emit_runs
from tilus.instructions.mbarrier import one_barrier
from tilus.instructions.memory import check_access
from tilus.instructions.shared import SharedOperand, full_offsets
from tilus.instructions.shared_copy import CopyToShared, amount, beyond
from tilus.instructions.tensor_copy import CopyTensor, check_map, emit_boxes, tensor_map
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr, Var, as_expr, binary
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.layout_rules import LayoutPriority, LayoutRule, OneOf
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.layout import RegisterLayout, local, replicated, spatial
from tilus.ptx.module import Imm, Reg, TensorAddress, Vector

COPY_UNIT_NBYTES = 16
TENSOR_UNIT_NBYTES = 128
_UNKNOWN = Var("index", int32)  # stands for indices of which nothing is known while compiling


@dataclass(frozen=True, eq=False)
class Gathered(CopyToShared):
    """n tiles of `shape`; the i-th starts at index[i] beyond the offset of dim `src_dim`, where each has one element.

    In the shared tensor they lie one after another: along the axis `dst_axis`, `dst_step` elements apart.
    """

    layout_priority = LayoutPriority.MATRIX

    index: RegisterTensor
    src_dim: int
    dst_axis: int
    dst_step: int

    @property
    def count(self) -> int:
        return self.index.shape[0]

    def check_index(self, unit_nbytes: int) -> None:
        what, buffer = self.mnemonic, self.buffer
        check_indices(what, self.index, self.memory, self.src_dim, self.dims)
        room = buffer.shape[self.dst_axis]
        if self.count * self.dst_step > room:
            raise TilusError(
                f"{what}: {self.count} tiles of {self.dst_step} along an axis of {buffer.name} with {room} elements",
                hint="give the shared tensor an axis for the tiles, or make its first axis as long as all of them",
            )
        nbits = math.prod(buffer.shape[self.dst_axis + 1 :]) * self.dst_step * buffer.dtype.nbits
        if self.count > 1 and nbits % (8 * unit_nbytes):
            raise TilusError(f"{what}: tiles lie {amount(nbits)} apart in {buffer.name}, expected {unit_nbytes} bytes")

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return shared_out(self.index, num_threads)

    def each(self, ctx: EmitContext) -> Iterator[tuple[Mapping[int, Linear], Mapping[int, Linear], Reg]]:
        """What is added to places in the shared and the global tensor, by dim, for each of a warp's tiles; and who starts it."""
        for number, index, starter in own_indices(ctx, self.index):
            yield {self.dst_axis: number.scaled(self.dst_step)}, {self.src_dim: index}, starter

    def evaluate_each(self, env: Evaluation, one: type[CopyToShared]) -> None:
        """Each tile by itself, as the copy of one tile means it. Blocks with barriers run alone, so they know their indices."""
        for i, at in enumerate(env.tile(self.index)[0, 0, 0].tolist()):
            src, dst = list(self.src_offsets), list(self.dst_offsets)
            src[self.src_dim] = binary("+", src[self.src_dim], at)
            dst[self.dst_axis] = binary("+", dst[self.dst_axis], i * self.dst_step)
            one.evaluate(replace(self, src_offsets=tuple(src), dst_offsets=tuple(dst)), env)


@dataclass(frozen=True, eq=False)
class GatherTensor(Gathered, CopyTensor):
    """Start copying tiles at indices along a dim of a global tensor into a shared one; elements outside arrive as zeros.

    Tensor, offsets and layouts are as for `copy_tensor`. A tile whose index lies outside of the tensor arrives as zeros, and no
    memory is read.
    """

    mnemonic = "gather_tensor"

    def verify(self) -> None:
        CopyTensor.verify(self)
        self.check_index(TENSOR_UNIT_NBYTES)

    def evaluate(self, env: Evaluation) -> None:
        self.evaluate_each(env, CopyTensor)

    def emit(self, ctx: EmitContext) -> None:
        for place, corner, guard in self.each(ctx):
            emit_boxes(ctx, self, guard, place, corner)


@dataclass(frozen=True, eq=False)
class GatherBulk(Gathered, CopyBulk):
    """Start copying tiles of contiguous runs at indices along a dim of a global tensor into a row-major shared one.

    All of them lie inside of the tensor. Their runs are multiples of 16 bytes at multiples of 16 bytes.
    """

    mnemonic = "gather_bulk"

    def verify(self) -> None:
        CopyBulk.verify(self)
        self.check_index(COPY_UNIT_NBYTES)

    def evaluate(self, env: Evaluation) -> None:
        self.evaluate_each(env, CopyBulk)

    def emit(self, ctx: EmitContext) -> None:
        anywhere = tuple(binary("+", o, _UNKNOWN) if d == self.src_dim else o for d, o in enumerate(self.src_offsets))
        check_starts(self.mnemonic, self.src, anywhere, self.shape, self.dims)
        for place, corner, guard in self.each(ctx):
            emit_runs(ctx, self, guard, place, corner)


@dataclass(frozen=True, eq=False)
class PrefetchGathered(Instruction):
    """Start bringing tiles of `shape` at indices along a dim of a global tensor into the L2 cache, by a tensor map.

    Tensor, offsets and indices are as for `gather_tensor`. No memory is changed, and nobody can wait for it.
    """

    mnemonic = "prefetch_gathered"
    needs_gpu = True
    layout_priority = LayoutPriority.MATRIX

    src: GlobalTensor
    index: RegisterTensor
    offsets: tuple[Expr, ...]
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    src_dim: int

    def effects(self) -> Effects:
        """No read: what is written afterwards, the cache sees, too."""
        return Effects(other=True)

    def verify(self) -> None:
        check_access(self.mnemonic, self.src, self.offsets, self.shape, self.dims)
        check_indices(self.mnemonic, self.index, self.src, self.src_dim, self.dims)
        check_map(self.mnemonic, self.src, self.shape, self.dims)

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return shared_out(self.index, num_threads)

    def evaluate(self, env: Evaluation) -> None:
        """There are no caches in the reference execution."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a(f"tilus.{self.mnemonic}")
        view = tensor_map(self.src, self.shape, self.dims, swizzle=0)
        for _, index, starter in own_indices(ctx, self.index):
            corner = beyond(ctx, self.offsets, {self.src_dim: index})
            box = TensorAddress(ctx.tensor_map(view), Vector(tuple(materialize(ctx.b, at) for at in reversed(corner))))
            ctx.b.emit_to(
                f"cp.async.bulk.prefetch.tensor.{self.src.rank}d.L2.global.tile", box, guard=ctx.guard(starter)
            )


def check_indices(what: str, index: RegisterTensor, memory: GlobalTensor, dim: int, dims: Sequence[int]) -> None:
    if index.dtype != int32 or index.rank != 1:
        raise TilusError(f"{what}: indices are {index.dtype.name}{list(index.shape)}, expected int32 of rank 1")
    if not 0 <= dim < memory.rank or dim in dims:
        raise TilusError(
            f"{what}: indices along dim {dim} of {memory.name}, whose tiles run along {list(dims)}; expected another dim",
            hint="each tile has one element along the dim of the indices",
        )


def shared_out(index: RegisterTensor, num_threads: int) -> LayoutRule:
    layout = issuers(num_threads, index.shape[0])
    return OneOf(lambda known: [({index: layout}, 0)])


def issuers(num_threads: int, count: int) -> RegisterLayout:
    """Indices shared out evenly among as many warps as divide them; all lanes of a warp know those of the warp."""
    warps = num_threads // 32
    share = math.gcd(warps, count)
    return replicated(warps // share, 1) * spatial(share) * replicated(32, 1) * local(count // share)


def own_indices(ctx: EmitContext, index: RegisterTensor) -> Iterator[tuple[Linear, Linear, Reg]]:
    """(number of the tile, its index, who starts its copy) for each of a warp's tiles."""
    layout = ctx.layout(index)
    share = math.gcd(ctx.num_threads // 32, index.shape[0])
    starter, own = ctx.elected(), ctx.thread_index(layout)[0]
    if 32 * share < ctx.num_threads:
        starter = ctx.b.pure("and.pred", ctx.b.pure("setp.lt.u32", ctx.thread_id(), Imm(32 * share)), starter)
    for slot, word in enumerate(ctx.words(index)):
        yield own + of_const(ctx.local_index(layout, slot)[0]), of_reg(word), starter


# ---- the language


@builtin
def gather_tensor(
    b: IRBuilder, dst: SharedOperand, src: GlobalTensor, index: RegisterTensor, offsets: Sequence[Expr | int], *,
    dims: Sequence[int], barrier: SharedOperand, dim: int = 0, evict: str | None = None,
) -> None:  # fmt: skip
    """Start copying n tiles of a global tensor into shared memory by a tensor map (TMA), at n indices along one of its dims.

    index: a register tile of int32 [n]. The i-th tile starts at `offsets`, with index[i] added to that of `dim`; there it has one
    element, and extends along `dims`, ascending, the last dim of `src` included. dst: a shared tensor or `tensor[i]`, with an
    axis of n tiles in front of those of a tile, or as many axes as a tile, of which the first one has room for all of them one
    behind the other. A tile with an index outside of `src` arrives as zeros. The warps of the group share the tiles out. All else
    is as for `copy_tensor`; announce the bytes of all tiles.
    """
    b.emit(GatherTensor(*_gathered(b, "gather_tensor", dst, src, index, offsets, dims, barrier, dim, evict)))


@builtin
def gather_bulk(
    b: IRBuilder, dst: SharedOperand, src: GlobalTensor, index: RegisterTensor, offsets: Sequence[Expr | int], *,
    dims: Sequence[int], barrier: SharedOperand, dim: int = 0, evict: str | None = None,
) -> None:  # fmt: skip
    """Start copying n tiles of contiguous runs of a global tensor into shared memory, at n indices along one of its dims.

    index, offsets, dims, dim, dst: as for `gather_tensor`. All tiles lie inside of `src`. All else is as for `copy_bulk`.
    """
    b.emit(GatherBulk(*_gathered(b, "gather_bulk", dst, src, index, offsets, dims, barrier, dim, evict)))


@builtin
def prefetch_gathered(
    b: IRBuilder, src: GlobalTensor, index: RegisterTensor, offsets: Sequence[Expr | int], shape: Sequence[int], *,
    dims: Sequence[int], dim: int = 0,
) -> None:  # fmt: skip
    """Start bringing n tiles of `shape` of a global tensor into the L2 cache by a tensor map (TMA), at n indices along a dim.

    index, offsets, dims, dim: as for `gather_tensor`. What a kernel may not read yet because the one in front may still write it
    (`wait_dependencies`) it may ask for: the cache sees the writes.
    """
    axes = tuple(dims)
    b.emit(PrefetchGathered(src, index, tuple(as_expr(o) for o in offsets), tuple(shape), axes, dim))


def _gathered(
    b: IRBuilder, what: str, dst: SharedOperand, src: GlobalTensor, index: RegisterTensor, offsets: Sequence[Expr | int],
    dims: Sequence[int], barrier: SharedOperand, dim: int, evict: str | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The fields of an instruction."""
    rank, count = len(dims), index.shape[0]
    if dst.rank not in (rank, rank + 1):
        raise TilusError(
            f"{what}: tiles along {rank} dims into a shared tensor with {dst.rank} dims here, expected {rank} or {rank + 1}",
            hint="of one more dim, the first one counts the tiles",
        )
    stacked = dst.rank == rank + 1
    shape = dst.shape[1:] if stacked else (dst.shape[0] // count, *dst.shape[1:])
    tensor, starts = full_offsets(dst, None, dst.rank)
    bar, place = one_barrier(what, barrier)
    src_offsets = tuple(as_expr(o) for o in offsets)
    axis = tensor.rank - dst.rank
    return (
        shape, tuple(dims), evict, tensor, src, bar, place, starts, src_offsets, None, index, dim, axis,
        1 if stacked else shape[0],
    )  # fmt: skip
