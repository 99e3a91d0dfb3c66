"""Asynchronous copies from global to shared memory in commit groups (cp.async, sm_80 and later)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilus.codegen.access import global_vector_size, unit_nbits, vectors
from tilus.codegen.c import shared as c_shared
from tilus.codegen.c.context import CContext
from tilus.codegen.c.memory import Access, load_into
from tilus.codegen.context import EmitContext
from tilus.codegen.shared_access import SharedAccess, shared_access
from tilus.errors import TilusError
from tilus.instructions.memory import check_access, coalesced, offset_by, tile_index, vectors_note
from tilus.instructions.shared import SharedOperand, full_offsets, placed
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr, as_expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.tensor import GlobalTensor, SharedTensor
from tilus.layout import RegisterLayout
from tilus.ptx.module import Imm, Operand
from tilus.target import Target


@dataclass(frozen=True, eq=False)
class CopyAsync(Instruction):
    """Start copying a tile from a global to a shared tensor; elements outside of the global tensor arrive as zeros.

    The data may be read after a `wait` of this thread for its group and a barrier of the block.
    """

    mnemonic = "copy_async"

    dst: SharedTensor
    src: GlobalTensor
    shape: tuple[int, ...]
    dst_offsets: tuple[Expr, ...]
    src_offsets: tuple[Expr, ...]
    dst_dims: tuple[int, ...]
    src_dims: tuple[int, ...]
    checked: bool = True

    def effects(self) -> Effects:
        return Effects(reads=(self.src,), writes=(self.dst,))

    def verify(self) -> None:
        check_access("copy_async", self.src, self.src_offsets, self.shape, self.src_dims)
        if self.dst.dtype != self.src.dtype:
            raise TilusError(
                f"copy_async: {self.src.name} of {self.src.dtype.name} to {self.dst.name} of {self.dst.dtype.name}",
                hint=f"copies do not convert: make the shared tensor one of tilus.{self.src.dtype.name} and cast what is loaded",
            )
        for extent, d in zip(self.shape, self.dst_dims, strict=True):
            if extent > self.dst.shape[d]:
                raise TilusError(
                    f"copy_async: a tile of shape {list(self.shape)} does not fit into {self.dst.name} of {list(self.dst.shape)}",
                    hint="give `shape`, at most that of the shared tensor",
                )

    def evaluate(self, env: Evaluation) -> None:
        value = env.load(self.src, self.src_offsets, self.shape, self.src_dims, checked=self.checked)
        env.store(self.dst, self.dst_offsets, self.dst_dims, value, checked=False)

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.dst, self._access(coalesced(self.src, self.shape, self.src_dims, num_threads))),)

    def _access(self, layout: RegisterLayout) -> SharedAccess:
        """The writes of 4, 8 or 16 bytes (PTX ISA, "cp.async"), no wider than what a thread may read at once."""
        widest = global_vector_size(self.src, layout, self.src_offsets, self.src_dims, self.checked)
        return shared_access(
            self.dst, layout, self.dst_offsets, self.dst_dims, self.shape, writes=True, widest=widest, least_nbytes=4
        )

    def emit(self, ctx: EmitContext) -> None:
        layout = coalesced(self.src, self.shape, self.src_dims, ctx.num_threads)
        access, memory = self._access(layout), placed(self.dst)
        size = access.vector_size(memory)
        nbits = unit_nbits(self.src.dtype, size)
        nbytes = nbits // 8
        if not access.moves_whole_units(memory):
            raise TilusError(
                f"copy_async from {self.src.name}: alignment and masks allow copies of {nbits} bits, "
                "cp.async moves 4, 8 or 16 bytes",
                hint="make the contiguous dim a multiple of 16 bytes, or use tilus.load and tilus.store_shared",
            )
        src_index = tile_index(ctx, layout, self.src_offsets, self.src_dims)
        dst_index = tile_index(ctx, layout, self.dst_offsets, self.dst_dims)
        owner = ctx.first_replica(layout)
        cache = "cg" if nbytes == 16 else "ca"
        for vector in vectors(layout, size):
            index = src_index(vector.slot)
            inside = None
            if self.checked:
                inside = ctx.in_bounds(self.src, self.src_offsets, self.src_dims, self.shape, index)
            dst = ctx.shared_address(self.dst, dst_index(vector.slot))
            src = ctx.global_address(self.src, index)
            tail: list[Operand] = [Imm(nbytes)]
            if inside is not None:  # a source size of 0 fills the destination with zeros and reads nothing
                tail.append(ctx.b.pure("selp.b32", Imm(nbytes), Imm(0), inside))
            for at in range(0, size * self.src.dtype.nbits // 8, nbytes):
                places = offset_by(dst, at), offset_by(src, at)
                ctx.b.emit_to(f"cp.async.{cache}.shared.global", *places, *tail, guard=ctx.guard(owner))
        ctx.note(self, f"copy_async {self.src.name}: {vectors_note(self.src.dtype, size, layout.num_locals)}")

    def emit_c(self, ctx: CContext) -> None:
        """The copy happens where it is started."""
        ctx.settle(self.dst)
        layout = c_shared.part_layout(self.dst, self.shape, self.dst_dims)
        access = Access(ctx, self.src, self.src_offsets, self.shape, self.src_dims, layout)
        start = ctx.let("int64_t", "to", c_shared.first_element(ctx, self.dst, self.dst_offsets))
        load_into(access, c_shared.array_of(ctx, self.dst), start, self.checked, None)


@dataclass(frozen=True, eq=False)
class CommitGroup(Instruction):
    """Close the group of all copies started since the last commit."""

    mnemonic = "commit"

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def evaluate(self, env: Evaluation) -> None:
        """Copies of the reference execution land at once."""

    def emit_c(self, ctx: CContext) -> None:
        """Copies have happened already."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.b.emit_to("cp.async.commit_group")


@dataclass(frozen=True, eq=False)
class WaitGroup(Instruction):
    """Wait until at most `pending` of this thread's groups are still under way."""

    mnemonic = "wait"

    pending: int

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def verify(self) -> None:
        if self.pending < 0:
            raise TilusError(f"wait({self.pending}): expected 0 or more pending groups")

    def evaluate(self, env: Evaluation) -> None:
        """Copies of the reference execution have landed already."""

    def emit_c(self, ctx: CContext) -> None:
        """Copies have happened already."""

    def emit(self, ctx: EmitContext) -> None:
        ctx.b.emit_to("cp.async.wait_group", Imm(self.pending))


@builtin
def copy_async(
    b: IRBuilder, src: GlobalTensor, offsets: Sequence[Expr | int], dst: SharedOperand, *, shape: Sequence[int] | None = None,
    dst_offsets: Sequence[Expr | int] | None = None, dims: Sequence[int] | None = None, checked: bool = True,
) -> None:  # fmt: skip
    """Start copying the tile at `offsets` of a global tensor into shared memory (all of `dst` unless `shape` says less).

    dims: the dims of `src` that the tile's axes run along; by default the last ones. Elements outside of `src` arrive as zeros.
    Group copies with `commit()`, wait for them with `wait(n)`, and `sync()` before other threads read.
    """
    tile_shape = tuple(dst.shape) if shape is None else tuple(shape)
    tensor, starts = full_offsets(dst, dst_offsets, len(tile_shape))
    rank = len(tile_shape)
    dst_dims = tuple(range(tensor.rank - rank, tensor.rank))
    src_dims = tuple(range(src.rank - rank, src.rank)) if dims is None else tuple(dims)
    src_offsets = tuple(as_expr(o) for o in offsets)
    b.emit(CopyAsync(tensor, src, tile_shape, starts, src_offsets, dst_dims, src_dims, checked))


@builtin
def commit(b: IRBuilder) -> None:
    """Close the group of all asynchronous copies started since the last commit."""
    b.emit(CommitGroup())


@builtin
def wait(b: IRBuilder, pending: int = 0) -> None:
    """Wait until at most `pending` groups of copies are still under way. `sync()` before other threads' data is read."""
    b.emit(WaitGroup(pending))
