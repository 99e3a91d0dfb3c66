"""What copies by the asynchronous proxy have in common: one thread moves a whole tile between global and shared memory.

Bulk copies (`bulk_copy`) move contiguous bytes, tensor copies (`tensor_copy`) boxes of a tensor map. Both exist from sm_90 on.
Copies into shared memory are counted in bytes at an mbarrier; those out of it form groups of the thread that starts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear
from tilus.codegen.shared_access import SharedAccess, shared_access
from tilus.errors import TilusError
from tilus.instructions.eviction import cache_hint, check_eviction, policy
from tilus.instructions.mbarrier import barrier_address, check_barrier, check_index
from tilus.instructions.memory import check_access
from tilus.instructions.shared import SharedOperand, full_offsets
from tilus.ir.builder import IRBuilder
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Const, Expr, as_expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.ranges import divisor
from tilus.ir.tensor import GlobalTensor, SharedTensor
from tilus.layout import SharedLayout
from tilus.ptx.module import Operand
from tilus.target import Target


@dataclass(frozen=True, eq=False)
class SharedCopy(Instruction):
    """A tile of `shape` between a global and a shared tensor, row-major in the order of its axes on both sides.

    Axis a runs along dim `dims[a]` of the global tensor, and along the last dims of the shared one, of which it takes all but
    perhaps the first. evict: what the L2 cache drops `first` or `last`; None leaves it to the cache.
    """

    needs_gpu = True

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    evict: str | None

    # Whether elements outside of the global tensor are left out; else the tile must lie inside.
    clipped: ClassVar[bool]

    @property
    def memory(self) -> GlobalTensor:
        raise NotImplementedError(f"{type(self).__name__}.memory")

    @property
    def buffer(self) -> SharedTensor:
        raise NotImplementedError(f"{type(self).__name__}.buffer")

    @property
    def offsets(self) -> tuple[Expr, ...]:
        """Where the tile starts in global memory."""
        raise NotImplementedError(f"{type(self).__name__}.offsets")

    @property
    def starts(self) -> tuple[Expr, ...]:
        """Where the tile starts in the shared tensor."""
        raise NotImplementedError(f"{type(self).__name__}.starts")

    def legal_layouts(self) -> tuple[SharedLayout, ...]:
        """The layouts of the shared tensor with which the copy works."""
        raise NotImplementedError(f"{type(self).__name__}.legal_layouts")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tile, which an mbarrier counts, also where the tile leaves the global tensor."""
        return math.prod(self.shape) * self.memory.dtype.nbits // 8

    @property
    def shared_dims(self) -> tuple[int, ...]:
        return tuple(range(self.buffer.rank - len(self.shape), self.buffer.rank))

    def verify(self) -> None:
        memory, buffer, what = self.memory, self.buffer, self.mnemonic
        check_access(what, memory, self.offsets, self.shape, self.dims)
        if buffer.dtype != memory.dtype:
            raise TilusError(
                f"{what}: {memory.name} of {memory.dtype.name} and {buffer.name} of {buffer.dtype.name}",
                hint=f"copies do not convert: make the shared tensor one of tilus.{memory.dtype.name}",
            )
        place = tuple(buffer.shape[d] for d in self.shared_dims)
        if self.shape[1:] != place[1:] or self.shape[:1] > place[:1]:
            raise TilusError(
                f"{what}: a tile of shape {list(self.shape)} and {list(place)} elements of {buffer.name}; expected the same "
                "shape, but for a first dim that may be smaller",
                hint="give the shared tensor the shape of what is copied",
            )
        check_eviction(what, self.evict)

    def check_shared_start(self, nbits: int) -> None:
        """Raise unless the tile is known to start at a multiple of so many bits of its shared tensor."""
        buffer = self.buffer
        steps = [math.prod(buffer.shape[d + 1 :]) * buffer.dtype.nbits for d in range(buffer.rank)]
        known = math.gcd(*(divisor(start) * step for start, step in zip(self.starts, steps, strict=True)))
        if known % nbits:
            raise TilusError(
                f"{self.mnemonic}: the tile starts at multiples of {amount(known)} of {buffer.name}, expected {nbits // 8} bytes",
                hint=f"make the parts of the shared tensor multiples of {nbits // 8} bytes",
            )

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        access = shared_access(self.buffer, None, self.starts, self.shared_dims, self.shape, legal=self.legal_layouts())
        return ((self.buffer, access),)


@dataclass(frozen=True, eq=False)
class CopyToShared(SharedCopy):
    """A copy into shared memory that arrives at an mbarrier with its bytes.

    multicast: a mask of blocks of the cluster. The tile then lands in the shared memory of each of them, and its bytes are
    counted at the barrier of each of them, at the same places as in this block.
    """

    dst: SharedTensor
    src: GlobalTensor
    barrier: SharedTensor
    barrier_index: Expr
    dst_offsets: tuple[Expr, ...]
    src_offsets: tuple[Expr, ...]
    multicast: Expr | None

    @property
    def memory(self) -> GlobalTensor:
        return self.src

    @property
    def buffer(self) -> SharedTensor:
        return self.dst

    @property
    def offsets(self) -> tuple[Expr, ...]:
        return self.src_offsets

    @property
    def starts(self) -> tuple[Expr, ...]:
        return self.dst_offsets

    def effects(self) -> Effects:
        remote = self.multicast is not None
        return Effects(reads=(self.src,), writes=(self.dst, self.barrier), remote=remote, by_proxy=True)

    def verify(self) -> None:
        super().verify()
        check_barrier(self.mnemonic, self.barrier)
        check_index(self.mnemonic, self.barrier, self.barrier_index)

    def evaluate(self, env: Evaluation) -> None:
        """Copies of the reference execution land at once."""
        value = env.load(self.src, self.src_offsets, self.shape, self.dims, checked=self.clipped)
        nbytes, blocks = as_expr(self.nbytes), [None]
        if self.multicast is not None:
            mask = int(env.scalar(self.multicast).item())  # each block of a cluster runs by itself
            blocks = [as_expr(rank) for rank in range(mask.bit_length()) if mask >> rank & 1]
        for block in blocks:
            env.store(self.dst, self.dst_offsets, self.shared_dims, value, checked=False, block=block)
            env.barrier_complete_bytes(self.barrier, self.barrier_index, nbytes, block=block)

    def modifiers(self) -> str:
        """The end of the opcode."""
        multicast = "" if self.multicast is None else ".multicast::cluster"
        return f".mbarrier::complete_tx::bytes{multicast}{cache_hint(self.evict)}"

    def tail(self, ctx: EmitContext) -> list[Operand]:
        """The last operands: barrier, mask of blocks, cache policy."""
        operands: list[Operand] = [barrier_address(ctx, self.barrier, self.barrier_index)]
        if self.multicast is not None:
            operands.append(ctx.b.pure("cvt.u16.u32", ctx.integer(self.multicast)))
        return [*operands, *policy(ctx, self.evict)]


@dataclass(frozen=True, eq=False)
class CopyFromShared(SharedCopy):
    """A copy out of shared memory; it belongs to the group that the next `commit_stores` closes."""

    dst: GlobalTensor
    src: SharedTensor
    dst_offsets: tuple[Expr, ...]
    src_offsets: tuple[Expr, ...]

    @property
    def memory(self) -> GlobalTensor:
        return self.dst

    @property
    def buffer(self) -> SharedTensor:
        return self.src

    @property
    def offsets(self) -> tuple[Expr, ...]:
        return self.dst_offsets

    @property
    def starts(self) -> tuple[Expr, ...]:
        return self.src_offsets

    def effects(self) -> Effects:
        return Effects(reads=(self.src,), writes=(self.dst,), by_proxy=True)

    def evaluate(self, env: Evaluation) -> None:
        """Copies of the reference execution land at once."""
        value = env.load(self.src, self.src_offsets, self.shape, self.shared_dims, checked=False)
        env.store(self.dst, self.dst_offsets, self.dims, value, checked=self.clipped)


def tile_of(
    memory: GlobalTensor,
    place: SharedOperand,
    shape: Sequence[int] | None,
    dims: Sequence[int] | None,
    offsets: Sequence[Expr | int] | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...], SharedTensor, tuple[Expr, ...]]:
    """Shape and dims of the tile that fills a shared tensor or a view of one, or its part at `offsets`; the tensor, and where the
    tile starts in it."""
    tile = tuple(place.shape) if shape is None else tuple(shape)
    tensor, starts = full_offsets(place, offsets, len(tile))
    axes = tuple(range(memory.rank - len(tile), memory.rank)) if dims is None else tuple(dims)
    return tile, axes, tensor, starts


def beyond(ctx: EmitContext, starts: Sequence[Expr], more: Mapping[int, Linear]) -> list[Linear]:
    """One index per dim, with what is added to some of them."""
    forms = [ctx.scalars.linear(start) for start in starts]
    return [form + more[d] if d in more else form for d, form in enumerate(forms)]


def amount(nbits: int) -> str:
    """Bits in words; in bytes where they are whole."""
    return f"{nbits // 8} bytes" if nbits % 8 == 0 else f"{nbits} bits"


def mask_of(b: IRBuilder, what: str, multicast: Expr | int | None) -> Expr | None:
    """The user's mask of blocks of the cluster; None where blocks are alone, so that it can only mean the block itself.

    Raises: TilusError for a constant that names no block, or one outside of the cluster.
    """
    if multicast is None:
        return None
    mask = as_expr(multicast)
    if not mask.dtype.is_integer or (isinstance(mask, Const) and not 0 < mask.value < 1 << b.cluster):
        raise TilusError(
            f"{what}: multicast={mask}, expected a mask of the {b.cluster} blocks of the cluster, 1 to {(1 << b.cluster) - 1}",
            hint="bit r stands for the block of rank r; tilus.grid(..., cluster=n) says how many blocks make a cluster",
        )
    return None if b.cluster == 1 else mask
