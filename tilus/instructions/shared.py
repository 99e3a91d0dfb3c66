"""Tiles from and to shared memory, ldmatrix included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilus.codegen.access import vectors
from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const
from tilus.codegen.shared_access import Matrices, SharedAccess, shared_access
from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.instructions.memory import assemble, load_vector, store_vector, tile_index, vectors_note
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr, as_expr
from tilus.ir.instruction import Effects, Instruction, Layouts
from tilus.ir.tensor import RegisterTensor, SharedTensor, SharedView
from tilus.layout import RegisterLayout, SharedLayout, auto
from tilus.ptx.module import Reg, RegClass, Vector
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
    layout_priority = 15

    out: RegisterTensor
    src: SharedTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def verify(self) -> None:
        _check("load_shared", self.src, self.out, self.offsets, self.dims)

    def default_layouts(self, known: Layouts, num_threads: int) -> Layouts:
        return {} if self.out in known else {self.out: vectorized(self.out, num_threads, self.dims)}

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.src, _reading(self.out, self.src, self.offsets, self.dims)),)

    def specialized(self, target: Target) -> Instruction | None:
        if self.out.layout is None or self.src.layout is None:
            return None
        matrices = _reading(self.out, self.src, self.offsets, self.dims).matrices(self.src.layout)
        if matrices is None:
            return None
        return LdMatrix(self.out, self.src, self.offsets, self.dims, matrices.transposed)

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.load(self.src, self.offsets, self.out.shape, self.dims, checked=False))

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.out)
        size = _vector_size("load_shared", self.src, _reading(self.out, self.src, self.offsets, self.dims))
        starts = tile_index(ctx, layout, self.offsets, self.dims)
        pieces: list[Reg] = []
        for vector in vectors(layout, size):
            address = ctx.shared_address(self.src, starts(vector.slot))
            pieces += load_vector(ctx, "ld.shared", self.src.dtype, size, address, None)
        ctx.note(self, f"shared load {self.src.name}: {vectors_note(self.src.dtype, size, layout.num_locals)}")
        ctx.define(self.out, assemble(ctx, self.src.dtype, size, pieces))


@dataclass(frozen=True, eq=False)
class StoreShared(Instruction):
    """Write a tile to a shared tensor; it must lie inside."""

    mnemonic = "store_shared"

    dst: SharedTensor
    src: RegisterTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]

    def effects(self) -> Effects:
        return Effects(writes=(self.dst,))

    def verify(self) -> None:
        _check("store_shared", self.dst, self.src, self.offsets, self.dims)

    def default_layouts(self, known: Layouts, num_threads: int) -> Layouts:
        return {} if self.src in known else {self.src: vectorized(self.src, num_threads, self.dims)}

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.dst, self._access()),)

    def _access(self) -> SharedAccess:
        return shared_access(self.dst, self.src.layout, self.offsets, self.dims, self.src.shape, writes=True)

    def evaluate(self, env: Evaluation) -> None:
        env.store(self.dst, self.offsets, self.dims, env.tile(self.src), checked=False)

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.src)
        size = _vector_size("store_shared", self.dst, self._access())
        starts = tile_index(ctx, layout, self.offsets, self.dims)
        owner, words = ctx.first_replica(layout), ctx.words(self.src)
        for vector in vectors(layout, size):
            address = ctx.shared_address(self.dst, starts(vector.slot))
            store_vector(ctx, "st.shared", self.dst.dtype, vector.slot, size, address, words, owner)
        ctx.note(self, f"shared store {self.dst.name}: {vectors_note(self.dst.dtype, size, layout.num_locals)}")


@dataclass(frozen=True, eq=False)
class LdMatrix(Instruction):
    """A tile of a shared tensor as fragments, eight 16-byte rows a matrix, up to four matrices an instruction.

    Every lane gives the address of one row (PTX ISA, "ldmatrix"). trans: each matrix arrives transposed.
    """

    mnemonic = "ldmatrix"

    out: RegisterTensor
    src: SharedTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    trans: bool = False

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def verify(self) -> None:
        _check("ldmatrix", self.src, self.out, self.offsets, self.dims)

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.load(self.src, self.offsets, self.out.shape, self.dims, checked=False))

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.src, _reading(self.out, self.src, self.offsets, self.dims)),)

    def emit(self, ctx: EmitContext) -> None:
        memory = placed(self.src)
        matrices = _reading(self.out, self.src, self.offsets, self.dims).matrices(memory)
        if matrices is None or matrices.transposed != self.trans:
            raise TilusError(
                f"ldmatrix of {self.src.name} in layout {memory}, expected matrices with rows of 16 aligned bytes",
                hint="use load_shared, which becomes ldmatrix where that fits",
            )
        regs: list[Reg] = []
        for count in matrices.groups:
            regs += self._load(ctx, matrices, matrices.starts[len(regs) : len(regs) + count])
        ctx.note(self, f"ldmatrix {self.src.name}: {len(regs)} matrices per warp{', transposed' if self.trans else ''}")
        ctx.define(self.out, regs)

    def _load(self, ctx: EmitContext, matrices: Matrices, starts: Sequence[tuple[int, ...]]) -> list[Reg]:
        """One instruction: lane 8j + r addresses row r of the matrix that begins at `starts[j]`."""
        count = len(starts)
        index = [ctx.scalars.linear(e) for e in self.offsets]
        lane_part = _matrix_index(ctx, starts)
        for axis, part in enumerate(_warp_index(ctx, ctx.layout(self.out))):
            index[self.dims[axis]] = index[self.dims[axis]] + part + lane_part[axis]
        row_dim = self.dims[matrices.row_axis]
        index[row_dim] = index[row_dim] + ctx.digit(1, 8)
        address = ctx.shared_address(self.src, index)
        trans = ".trans" if self.trans else ""
        regs = [ctx.b.reg(RegClass.B32) for _ in range(count)]
        ctx.b.emit_to(f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16", Vector(tuple(regs)), address)
        return regs


def _warp_index(ctx: EmitContext, layout: RegisterLayout) -> list[Linear]:
    """The part of the tile index that the warp decides."""
    index = [of_const(0) for _ in layout.shape]
    for term in layout.thread_terms:
        # A digit may span lanes and warps: split it at the warp boundary.
        if term.dim is None or term.stride * term.size <= 32:
            continue
        inside = max(1, 32 // term.stride) if term.stride < 32 else 1
        digit = ctx.digit(term.stride * inside, term.size // inside)
        index[term.dim] = index[term.dim] + digit.scaled(term.weight * inside)
    return index


def _matrix_index(ctx: EmitContext, starts: Sequence[tuple[int, ...]]) -> list[Linear]:
    """Where the matrix begins whose row a lane addresses: lanes 8j .. 8j + 7 serve matrix j."""
    index = [of_const(part) for part in starts[0]]
    for bit in (1, 2):
        if bit < len(starts):
            group = ctx.digit(8 * bit, 2)
            for axis, (begin, first) in enumerate(zip(starts[bit], starts[0], strict=True)):
                index[axis] = index[axis] + group.scaled(begin - first)
    return index


def _reading(out: RegisterTensor, src: SharedTensor, offsets: Sequence[Expr], dims: Sequence[int]) -> SharedAccess:
    return shared_access(src, out.layout, offsets, dims, out.shape, by_matrices=True)


def placed(tensor: SharedTensor) -> SharedLayout:
    """The layout of a shared tensor, which `layout_shared` has chosen."""
    if tensor.layout is None:
        raise TilusError(f"shared tensor {tensor.name} has no layout")
    return tensor.layout


def _vector_size(what: str, tensor: SharedTensor, access: SharedAccess) -> int:
    memory = placed(tensor)
    size = access.vector_size(memory)
    if not access.moves_whole_units(memory):
        raise TilusError(
            f"{what}: threads hold runs of {size} elements of {tensor.dtype.name} of {tensor.name}, "
            f"which is {size * tensor.dtype.nbits} bits; memory is accessed in whole bytes",
            hint="give the tile a layout with longer runs along the contiguous dim, or move bytes and use tilus.view",
        )
    return size


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


def _check(what: str, tensor: SharedTensor, tile: RegisterTensor, offsets: Sequence[Expr], dims: Sequence[int]) -> None:
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
    dims: Sequence[int] | None = None, layout: RegisterLayout | None = None,
) -> RegisterTensor:  # fmt: skip
    """A tile of shared memory: all of `src` (a tensor, or `tensor[i]`), or the part of `shape` at `offsets`.

    dims: the dims of the whole tensor that the tile's axes run along; by default the last ones.
    """
    rank = src.rank if shape is None else len(shape)
    tensor, starts = full_offsets(src, offsets, rank)
    tile_shape = tuple(src.shape) if shape is None else tuple(shape)
    axes = tuple(range(tensor.rank - rank, tensor.rank)) if dims is None else tuple(dims)
    return b.emit(LoadShared(b.tile(tensor.dtype, tile_shape, layout), tensor, starts, axes)).out


@builtin
def store_shared(
    b: IRBuilder, dst: SharedOperand, value: RegisterTensor, offsets: Sequence[Expr | int] | None = None, *,
    dims: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Write a tile to shared memory at `offsets` (default: the start). Other warps see it after `tilus.sync()`."""
    tensor, starts = full_offsets(dst, offsets, value.rank)
    axes = tuple(range(tensor.rank - value.rank, tensor.rank)) if dims is None else tuple(dims)
    b.emit(StoreShared(tensor, value, starts, axes))
