"""Tiles from and to shared memory, in vectors; the forms that move matrices are in `matrix`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from tilus.codegen.access import MAX_VECTOR_NBITS, vectors
from tilus.codegen.c import shared as c_shared
from tilus.codegen.c.context import CContext
from tilus.codegen.context import EmitContext
from tilus.codegen.shared_access import SharedAccess, shared_access
from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.instructions.memory import assemble, check_whole_bytes, load_vector, store_vector, tile_index, vectors_note
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Const, Expr, as_expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.layout_rules import Access, LayoutPriority, LayoutRule
from tilus.ir.tensor import RegisterTensor, SharedTensor, SharedView
from tilus.layout import RegisterLayout, SharedLayout, auto, row_major
from tilus.ptx.module import Reg
from tilus.target import Target

SharedOperand = SharedTensor | SharedView


def full_offsets(
    view: SharedOperand, offsets: Sequence[Expr | int] | None, rank: int
) -> tuple[SharedTensor, tuple[Expr, ...]]:
    """The tensor under a view and one offset per dim of it; the dims that `offsets` leaves out start at 0."""
    tensor, prefix = (view.tensor, view.prefix) if isinstance(view, SharedView) else (view, ())
    given = tuple(as_expr(o) for o in offsets) if offsets is not None else ()
    missing = tensor.rank - len(prefix) - len(given)
    if missing < 0 or (offsets is not None and missing > 0):
        raise TilusError(f"{len(given)} offsets for {tensor.name}, which has {tensor.rank - len(prefix)} dims here")
    if rank > tensor.rank - len(prefix):
        raise TilusError(f"a tile of rank {rank} from {tensor.name}, which has {tensor.rank - len(prefix)} dims here")
    return tensor, (*prefix, *given, *(as_expr(0) for _ in range(missing)))


@dataclass(frozen=True, eq=False)
class LoadShared(Instruction):
    """A tile of a shared tensor. Tile axis a runs along tensor dim `dims[a]`; the tile must lie inside of the tensor."""

    mnemonic = "load_shared"
    layout_priority = LayoutPriority.SHARED_LOAD

    out: RegisterTensor
    src: SharedTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def verify(self) -> None:
        check_shared_access(self.mnemonic, self.src, self.out, self.offsets, self.dims)

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return _access_rule(self.src, self.out, self.offsets, self.dims, num_threads)

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.src, self.access()),)

    def access(self) -> SharedAccess:
        return moving(self.out, self.src, self.offsets, self.dims, writes=False, by_matrices=True)

    def specialized(self, target: Target) -> Instruction | None:
        from tilus.instructions.matrix import LdMatrix

        matrices = self.access().matrices(placed(self.src))
        if matrices is None:
            return None
        return LdMatrix(
            self.out, self.src, self.offsets, self.dims, matrices.row_axis, matrices.transposed, matrices.groups
        )

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.load(self.src, self.offsets, self.out.shape, self.dims, checked=False))

    def emit(self, ctx: EmitContext) -> None:
        self.move(ctx, "ld.shared", None)

    def move(self, ctx: EmitContext, opcode: str, block: Expr | None) -> None:
        """Emit the loads. block: of the cluster, in whose shared memory the tile is; None is the own one."""
        layout = ctx.layout(self.out)
        size = self.access().vector_size(placed(self.src))
        check_whole_bytes(self.mnemonic, self.src, size)
        starts = tile_index(ctx, layout, self.offsets, self.dims)
        pieces: list[Reg] = []
        for vector in vectors(layout, size):
            address = ctx.shared_address(self.src, starts(vector.slot), block)
            pieces += load_vector(ctx, opcode, self.src.dtype, size, address, None)
        ctx.note(self, f"shared load {self.src.name}: {vectors_note(self.src.dtype, size, layout.num_locals)}")
        ctx.define(self.out, assemble(ctx, self.src.dtype, size, pieces))

    def emit_c(self, ctx: CContext) -> None:
        ctx.define(self.out, c_shared.load(ctx, self.src, self.offsets, self.out.shape, self.dims))


@dataclass(frozen=True, eq=False)
class StoreShared(Instruction):
    """Write a tile to a shared tensor; it must lie inside."""

    mnemonic = "store_shared"
    layout_priority = LayoutPriority.STORE

    dst: SharedTensor
    src: RegisterTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]

    def effects(self) -> Effects:
        return Effects(writes=(self.dst,))

    def verify(self) -> None:
        check_shared_access(self.mnemonic, self.dst, self.src, self.offsets, self.dims)

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return _access_rule(self.dst, self.src, self.offsets, self.dims, num_threads)

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.dst, self.access(target)),)

    def access(self, target: Target) -> SharedAccess:
        return moving(self.src, self.dst, self.offsets, self.dims, writes=True, by_matrices=target.sm >= 90)

    def specialized(self, target: Target) -> Instruction | None:
        from tilus.instructions.matrix import StMatrix

        matrices = self.access(target).matrices(placed(self.dst))
        if matrices is None:
            return None
        return StMatrix(
            self.dst, self.src, self.offsets, self.dims, matrices.row_axis, matrices.transposed, matrices.groups
        )

    def evaluate(self, env: Evaluation) -> None:
        env.store(self.dst, self.offsets, self.dims, env.tile(self.src), checked=False)

    def emit(self, ctx: EmitContext) -> None:
        self.move(ctx, "st.shared", None)

    def move(self, ctx: EmitContext, opcode: str, block: Expr | None) -> None:
        """Emit the stores. block: of the cluster, to whose shared memory the tile goes; None is the own one."""
        layout = ctx.layout(self.src)
        size = self.access(ctx.target).vector_size(placed(self.dst))
        check_whole_bytes(self.mnemonic, self.dst, size)
        starts = tile_index(ctx, layout, self.offsets, self.dims)
        owner, words = ctx.first_replica(layout), ctx.words(self.src)
        for vector in vectors(layout, size):
            address = ctx.shared_address(self.dst, starts(vector.slot), block)
            store_vector(ctx, opcode, self.dst.dtype, vector.slot, size, address, words, owner)
        ctx.note(self, f"shared store {self.dst.name}: {vectors_note(self.dst.dtype, size, layout.num_locals)}")

    def emit_c(self, ctx: CContext) -> None:
        c_shared.store(ctx, self.dst, self.offsets, self.dims, ctx.read(self.src))


def moving(
    tile: RegisterTensor, tensor: SharedTensor, offsets: Sequence[Expr], dims: Sequence[int], *, writes: bool,
    by_matrices: bool,
) -> SharedAccess:  # fmt: skip
    """The access of a tile, in the layout that it has, to a shared tensor."""
    return shared_access(tensor, tile.layout, offsets, dims, tile.shape, writes=writes, by_matrices=by_matrices)


def placed(tensor: SharedTensor) -> SharedLayout:
    """The layout of a shared tensor, which `layout_shared` has chosen."""
    if tensor.layout is None:
        raise TilusError(f"shared tensor {tensor.name} has no layout")
    return tensor.layout


def _access_rule(
    tensor: SharedTensor, tile: RegisterTensor, offsets: Sequence[Expr], dims: Sequence[int], num_threads: int
) -> LayoutRule:
    """The layouts in which a tile meets shared memory.

    How wide accesses get depends on the layout of the tensor, which is chosen afterwards to suit them. Only for elements below
    a byte it matters here; where the tensor has no layout yet, row-major is taken for it.
    """
    memory = row_major(tensor.shape) if tensor.layout is None else tensor.layout

    @functools.cache
    def access_nbits(layout: RegisterLayout) -> int:
        if tensor.dtype.nbits % 8 == 0:
            return MAX_VECTOR_NBITS
        access = shared_access(tensor, layout, offsets, dims, tile.shape)
        return access.vector_size(memory) * tensor.dtype.nbits

    return Access(tile, vectorized(tile, num_threads, dims), access_nbits, loads=False)


def vectorized(tile: RegisterTensor, num_threads: int, dims: Sequence[int]) -> RegisterLayout:
    """16 bytes per thread along the axis that runs along the last tensor dim."""
    inner = max(range(tile.rank), key=lambda a: dims[a]) if tile.rank else 0
    order = (inner, *(a for a in reversed(range(tile.rank)) if a != inner)) if tile.rank else ()
    per_thread = max(1, tile.size // num_threads)
    nbits = tile.dtype.nbits
    whole_bytes = 8 if nbits & (nbits - 1) else max(1, 8 // nbits)
    vector = (
        whole_bytes if nbits & (nbits - 1) else min(128 // nbits, max(whole_bytes, 1 << (per_thread.bit_length() - 1)))
    )
    return auto(tile.shape, num_threads, vector, order)


def check_shared_access(
    what: str, tensor: SharedTensor, tile: RegisterTensor, offsets: Sequence[Expr], dims: Sequence[int]
) -> None:
    if tile.dtype != tensor.dtype:
        raise TilusError(f"{what}: tile of {tile.dtype.name} and {tensor.name} of {tensor.dtype.name}")
    if len(offsets) != tensor.rank or len(dims) != tile.rank:
        raise TilusError(
            f"{what}: {len(offsets)} offsets and dims {list(dims)} for {tensor.name} of rank {tensor.rank}"
        )
    for axis, d in enumerate(dims):
        if tile.shape[axis] > tensor.shape[d]:
            raise TilusError(
                f"{what}: a tile of shape {list(tile.shape)} does not fit into {tensor.name} of {list(tensor.shape)}",
                hint="use a smaller tile, or a larger shared tensor",
            )


def rank_in_cluster(b: IRBuilder, block: Expr | int) -> Expr | None:
    """The user's `block=` as a rank; None where blocks are alone, so that it can only mean the block itself.

    Raises: TilusError for a constant outside of the cluster, or what is no integer.
    """
    rank = as_expr(block)
    if not rank.dtype.is_integer:
        raise TilusError(f"block is {rank} of {rank.dtype.name}, expected the rank of a block in its cluster")
    if isinstance(rank, Const) and not 0 <= rank.value < b.cluster:
        raise TilusError(
            f"block is {rank}, expected 0 to {b.cluster - 1}: the cluster has {b.cluster} blocks",
            hint="tilus.grid(..., cluster=n) says how many blocks make a cluster",
        )
    return None if b.cluster == 1 else rank


@builtin
def shared(
    b: IRBuilder, dtype: DataType, shape: Sequence[int], *, layout: SharedLayout | None = None, name: str = "shared"
) -> SharedTensor:
    """A buffer in shared memory; its content is undefined until it is written. `layout` pins how elements are placed."""
    if layout is not None and layout.shape != tuple(shape):
        raise TilusError(
            f"layout {layout} has shape {list(layout.shape)}, the shared tensor {list(shape)}",
            hint="padding is part of a layout, not of its shape: tilus.layout.padded(shape, pad)",
        )
    return SharedTensor(dtype, tuple(shape), layout, b.fresh(name))


@builtin
def load_shared(
    b: IRBuilder, src: SharedOperand, offsets: Sequence[Expr | int] | None = None, shape: Sequence[int] | None = None, *,
    dims: Sequence[int] | None = None, layout: RegisterLayout | None = None, block: Expr | int | None = None,
) -> RegisterTensor:  # fmt: skip
    """A tile of shared memory: all of `src` (a tensor, or `tensor[i]`), or the part of `shape` at `offsets`.

    dims: the dims of the whole tensor that the tile's axes run along; by default the last ones. block: in whose shared memory
    it is, a rank in the cluster (0 to cluster - 1); by default this block's own.
    """
    from tilus.instructions.cluster import LoadCluster

    rank = src.rank if shape is None else len(shape)
    tensor, starts = full_offsets(src, offsets, rank)
    tile_shape = tuple(src.shape) if shape is None else tuple(shape)
    axes = tuple(range(tensor.rank - rank, tensor.rank)) if dims is None else tuple(dims)
    out = b.tile(tensor.dtype, tile_shape, layout)
    owner = None if block is None else rank_in_cluster(b, block)
    if owner is not None:
        return b.emit(LoadCluster(out, tensor, starts, axes, owner)).out
    return b.emit(LoadShared(out, tensor, starts, axes)).out


@builtin
def store_shared(
    b: IRBuilder, dst: SharedOperand, value: RegisterTensor, offsets: Sequence[Expr | int] | None = None, *,
    dims: Sequence[int] | None = None, block: Expr | int | None = None,
) -> None:  # fmt: skip
    """Write a tile to shared memory at `offsets` (default: the start). Other warps see it after `tilus.sync()`.

    block: to whose shared memory, a rank in the cluster (0 to cluster - 1); by default this block's own. That block sees it after
    `tilus.cluster_sync()`.
    """
    from tilus.instructions.cluster import StoreCluster

    tensor, starts = full_offsets(dst, offsets, value.rank)
    axes = tuple(range(tensor.rank - value.rank, tensor.rank)) if dims is None else tuple(dims)
    owner = None if block is None else rank_in_cluster(b, block)
    if owner is not None:
        b.emit(StoreCluster(tensor, value, starts, axes, owner))
    else:
        b.emit(StoreShared(tensor, value, starts, axes))
