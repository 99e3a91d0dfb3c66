"""Tensor copies (TMA): boxes of a tensor map between global and shared memory (PTX ISA, cp.async.bulk.tensor; sm_90 and later).

The hardware computes addresses and bounds from a map that the launcher encodes: elements outside of the tensor arrive as
zeros and are not written. A tile is one box, or, when its rows are wider than the swizzle of the shared tensor's layout, boxes
side by side.

It stops the kernel with CUDA_ERROR_ILLEGAL_INSTRUCTION when a box starts at no multiple of 16 bytes of a row, and when a box that
is stored has a negative coordinate; loads may have those (both found on an H100).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, materialize, of_const
from tilus.codegen.tensor_map import MAX_BOX, MAX_RANK, UNIT_NBYTES, TensorMap
from tilus.errors import TilusError
from tilus.instructions.eviction import cache_hint, policy
from tilus.instructions.mbarrier import one_barrier
from tilus.instructions.shared import SharedOperand, placed
from tilus.instructions.shared_copy import (
    CopyFromShared,
    CopyToShared,
    SharedCopy,
    beyond,
    mask_of,
    tile_of,
)
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Const, Expr, as_expr
from tilus.ir.ranges import bounds, divisor
from tilus.ir.tensor import GlobalTensor
from tilus.layout import SharedLayout
from tilus.layout.operands import CORE_ROWS, SWIZZLES_NBYTES, tma_tile
from tilus.ptx.module import Address, Reg, TensorAddress, Vector

START_NBITS = 1024  # a tile starts at a multiple of 128 bytes of shared memory


@dataclass(frozen=True, eq=False)
class CopyTensor(CopyToShared):
    """Start copying a tile from a global to a shared tensor; elements outside of the global tensor arrive as zeros.

    Where the tensor lies is known when the kernel is launched; only the offsets vary. Its last dim is contiguous, its other
    strides and its address are multiples of 16 bytes, and so is the tile's last offset. Offsets may be negative.
    """

    mnemonic = "copy_tensor"
    clipped = True

    def verify(self) -> None:
        super().verify()
        check_boxes(self)

    def legal_layouts(self) -> tuple[SharedLayout, ...]:
        return tuple(_swizzles(self))

    def evaluate(self, env: Evaluation) -> None:
        check_start(self)
        super().evaluate(env)

    def emit(self, ctx: EmitContext) -> None:
        emit_boxes(ctx, self, ctx.elected_in_group(), {}, {})


@dataclass(frozen=True, eq=False)
class StoreTensor(CopyFromShared):
    """Start copying a tile from a shared to a global tensor; elements outside of the global tensor are dropped.

    The tensor is as for `copy_tensor`, and so is the last offset; no offset is negative.
    """

    mnemonic = "store_tensor"
    clipped = True

    def verify(self) -> None:
        super().verify()
        check_boxes(self)

    def legal_layouts(self) -> tuple[SharedLayout, ...]:
        return tuple(_swizzles(self))

    def evaluate(self, env: Evaluation) -> None:
        check_start(self)
        check_signs(self)
        active = env.active()
        for d, offset in enumerate(self.dst_offsets):
            least = int(np.where(True if active is None else active, env.scalar(offset), 0).min(initial=0))
            if least < 0:
                raise _negative(self, f"offset {d} of {self.dst.name} is {least}")
        super().evaluate(env)

    def emit(self, ctx: EmitContext) -> None:
        ctx.require_sm_90a(f"tilus.{self.mnemonic}")
        check_signs(self)
        opcode = f"cp.async.bulk.tensor.{self.dst.rank}d.global.shared::cta.tile.bulk_group{cache_hint(self.evict)}"
        guard, tail = ctx.guard(ctx.elected_in_group()), policy(ctx, self.evict)
        for place, box in _boxes(ctx, self, {}, {}):
            ctx.b.emit_to(opcode, box, place, *tail, guard=guard)


def emit_boxes(
    ctx: EmitContext, copy: CopyToShared, starter: Reg, place: Mapping[int, Linear], corner: Mapping[int, Linear]
) -> None:
    """Start the copy of one tile by the thread that is `starter`.

    place, corner: what is added, by dim, to where it starts in shared and in global memory.
    """
    ctx.require_sm_90a(f"tilus.{copy.mnemonic}")
    opcode = f"cp.async.bulk.tensor.{copy.src.rank}d.shared::cluster.global.tile{copy.modifiers()}"
    guard, tail = ctx.guard(starter), copy.tail(ctx)
    for where, box in _boxes(ctx, copy, place, corner):
        ctx.b.emit_to(opcode, where, box, *tail, guard=guard)


def check_map(what: str, memory: GlobalTensor, shape: Sequence[int], dims: Sequence[int]) -> None:
    """Raise unless tiles of a tensor can be boxes of a map, as far as that is known before the launch."""
    if memory.dtype.nbits not in (8, 16, 32, 64):
        raise TilusError(
            f"{what}: {memory.name} of {memory.dtype.name}, expected elements of 8, 16, 32 or 64 bits",
            hint="copy the bytes of packed elements: with tilus.copy_bulk, or from a tensor of uint8",
        )
    if memory.rank > MAX_RANK:
        raise TilusError(
            f"{what}: {memory.name} has rank {memory.rank}, expected at most {MAX_RANK}",
            hint="pass a view in which neighbouring dims are one",
        )
    if tuple(dims) != tuple(sorted(dims)) or tuple(dims[-1:]) != (memory.rank - 1,):
        raise TilusError(
            f"{what}: a tile along dims {list(dims)} of {memory.name}, expected ascending dims, the last one included",
            hint="give the shared tensor's dims the order of the global tensor's",
        )
    _check_strides(what, memory)
    if shape[-1] * memory.dtype.nbytes % UNIT_NBYTES:
        raise _no_box(what, memory, shape)


def _no_box(what: str, memory: GlobalTensor, shape: Sequence[int]) -> TilusError:
    return TilusError(
        f"{what}: a tile of shape {list(shape)} of {memory.dtype.name}, whose rows are {shape[-1] * memory.dtype.nbytes} bytes; "
        f"expected at most {MAX_BOX} elements along each dim and rows of a multiple of {UNIT_NBYTES} bytes",
        hint="copy a part of the tile at a time; longer rows work in multiples of 32 bytes with 8 rows or more",
    )


def check_boxes(copy: SharedCopy) -> None:
    """Raise unless the tile can be boxes of a tensor map, and lie in shared memory where such may."""
    check_map(copy.mnemonic, copy.memory, copy.shape, copy.dims)
    copy.check_shared_start(START_NBITS)
    if not _swizzles(copy):
        raise _no_box(copy.mnemonic, copy.memory, copy.shape)


def check_start(copy: SharedCopy) -> None:
    """Raise unless the tile is known to start at a multiple of 16 bytes of a row of the tensor."""
    memory, offset = copy.memory, copy.offsets[-1]
    known = divisor(offset) * memory.dtype.nbytes
    if known % UNIT_NBYTES:
        raise TilusError(
            f"{copy.mnemonic}: the last offset of {memory.name}, {offset}, is known to be a multiple of {known} bytes, "
            f"expected {UNIT_NBYTES} bytes",
            hint=f"make it a product with {UNIT_NBYTES // memory.dtype.nbytes} elements of {memory.dtype.name}, or use "
            "tilus.copy_async and tilus.store",
        )


def check_signs(store: StoreTensor) -> None:
    """Raise where an offset of a store is known to reach below zero. Of offsets without known bounds nothing is said."""
    for d, offset in enumerate(store.dst_offsets):
        least = bounds(offset)[0]
        if least is not None and least < 0:
            raise _negative(store, f"offset {d} of {store.dst.name}, {offset}, may be {least}")


def _negative(store: StoreTensor, found: str) -> TilusError:
    return TilusError(
        f"{store.mnemonic}: {found}, expected 0 or more",
        hint="only copies into shared memory may start in front of a tensor; store the part that lies inside with tilus.store",
    )


def _check_strides(what: str, memory: GlobalTensor) -> None:
    inner = memory.strides[-1]
    if not (isinstance(inner, Const) and inner.value == 1):
        raise TilusError(
            f"{what}: the last dim of {memory.name} has stride {inner}, expected 1",
            hint="pass a tensor whose last dim is contiguous",
        )
    for d, stride in enumerate(memory.strides[:-1]):
        nbytes = int(stride.value) * memory.dtype.nbytes if isinstance(stride, Const) else 0
        if nbytes % UNIT_NBYTES and memory.shape[d] != as_expr(1):
            raise TilusError(
                f"{what}: dim {d} of {memory.name} has a stride of {nbytes} bytes, expected a multiple of {UNIT_NBYTES}",
                hint="pad the rows of the tensor, or use tilus.copy_async",
            )


def _swizzles(copy: SharedCopy) -> Mapping[SharedLayout, int]:
    shape = copy.buffer.shape
    return _swizzles_of(shape, tuple(shape[d] for d in copy.shared_dims), copy.memory.dtype.nbytes)


@functools.lru_cache(maxsize=1024)  # asked for every copy after every pass
def _swizzles_of(shape: tuple[int, ...], tile: tuple[int, ...], nbytes: int) -> Mapping[SharedLayout, int]:
    """The layouts that the shared tensor may have, wide swizzles first, and the bytes that each of them swizzles.

    The hardware swizzles by the address, whose pattern starts again every 8 rows; parts of the tensor and boxes that lie side by
    side have to start where the pattern does.
    """
    found: dict[SharedLayout, int] = {}
    for swizzle in SWIZZLES_NBYTES:
        width = swizzle // nbytes or tile[-1]
        if tile[-1] % width or tile[-1] * nbytes % UNIT_NBYTES or max((*tile[:-1], width)) > MAX_BOX:
            continue
        if swizzle == 0 or math.prod(tile[:-1]) % CORE_ROWS == 0:
            found[tma_tile(shape, nbytes, swizzle, len(tile))] = swizzle
    return found


def tensor_map(memory: GlobalTensor, shape: Sequence[int], dims: Sequence[int], swizzle: int) -> TensorMap:
    """With boxes for tiles, as wide as the swizzle, if any."""
    box = [1] * memory.rank
    for extent, d in zip(shape, dims, strict=True):
        box[d] = extent
    box[-1] = swizzle // memory.dtype.nbytes or shape[-1]
    return TensorMap(
        memory.name, memory.base, memory.dtype, memory.offset, memory.shape, memory.strides, tuple(box), swizzle
    )  # fmt: skip


def _boxes(
    ctx: EmitContext, copy: SharedCopy, place: Mapping[int, Linear], corner: Mapping[int, Linear]
) -> list[tuple[Address, TensorAddress]]:
    """Where each box of a copy lies in shared memory, and where in global memory; place, corner: so far beyond its starts."""
    check_start(copy)
    memory, swizzle = copy.memory, _swizzles(copy)[placed(copy.buffer)]
    view = tensor_map(memory, copy.shape, copy.dims, swizzle)
    width = view.box[-1]
    base = ctx.tensor_map(view)
    index, origin = beyond(ctx, copy.starts, place), beyond(ctx, copy.offsets, corner)
    places: list[tuple[Address, TensorAddress]] = []
    for column in range(0, copy.shape[-1], width):
        address = ctx.shared_address(copy.buffer, [*index[:-1], index[-1] + of_const(column)], swizzled=False)
        at = [*origin[:-1], origin[-1] + of_const(column)]
        places.append((address, TensorAddress(base, Vector(tuple(materialize(ctx.b, part) for part in reversed(at))))))
    ctx.note(
        copy, f"{copy.mnemonic} {memory.name}: {len(places)} boxes of {list(view.box)}, swizzled by {swizzle} bytes"
    )
    return places


@builtin
def copy_tensor(
    b: IRBuilder, dst: SharedOperand, src: GlobalTensor, offsets: Sequence[Expr | int], *, barrier: SharedOperand,
    shape: Sequence[int] | None = None, dst_offsets: Sequence[Expr | int] | None = None, dims: Sequence[int] | None = None,
    evict: str | None = None, multicast: Expr | int | None = None,
) -> None:  # fmt: skip
    """Start copying the tile at `offsets` of a global tensor into shared memory by a tensor map (TMA).

    dst: a shared tensor or `tensor[i]`, filled whole, or its first rows when `shape` says so, or rows from `dst_offsets` on; it
    gets a layout that the hardware can write, the same as other accesses (wgmma) need. dims: the dims of `src` that the tile's
    axes run along, ascending; by default the last ones. Elements outside of `src` arrive as zeros, and count as bytes, too.
    The last dim of `src` must be contiguous, its address and its other strides multiples of 16 bytes (checked at the launch), and
    rows of the tile multiples of 16 bytes. The last offset has to be a multiple of 16 bytes for the compiler to see, such as
    `64 * i`; offsets may be negative. barrier, evict, multicast: as for `copy_bulk`.
    """
    tile, axes, tensor, starts = tile_of(src, dst, shape, dims, dst_offsets)
    bar, index = one_barrier("copy_tensor", barrier)
    mask = mask_of(b, "copy_tensor", multicast)
    src_offsets = tuple(as_expr(o) for o in offsets)
    b.emit(CopyTensor(tile, axes, evict, tensor, src, bar, index, starts, src_offsets, mask))


@builtin
def store_tensor(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], src: SharedOperand, *,
    shape: Sequence[int] | None = None, dims: Sequence[int] | None = None, evict: str | None = None,
) -> None:  # fmt: skip
    """Start copying shared memory to the tile at `offsets` of a global tensor by a tensor map; `copy_tensor` says of which kind.

    Elements outside of `dst` are not written. No offset may be negative: a GPU stops the kernel; the compiler refuses offsets
    with a lower bound below zero, the reference and the emulator all that turn out to be negative. Write the shared memory with
    ordinary stores, then `fence_async()` and `sync()`; afterwards `commit_stores()`, and `wait_stores()` before it is written
    again or the block ends.
    """
    tile, axes, tensor, starts = tile_of(dst, src, shape, dims)
    b.emit(StoreTensor(tile, axes, evict, dst, tensor, tuple(as_expr(o) for o in offsets), starts))
