"""Elements of a global tensor at indices that a tile holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilus.codegen.c.context import CContext
from tilus.codegen.c.scattered import gather_tile
from tilus.codegen.context import EmitContext
from tilus.codegen.linear import of_const, of_reg
from tilus.dtypes import int32
from tilus.errors import TilusError
from tilus.instructions.elementwise import Pointwise, broadcast_shapes, operand_words
from tilus.instructions.memory import assemble, check_access, coalesced, load_vector
from tilus.instructions.view import reshape
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr, Var, as_expr
from tilus.ir.instruction import Effects
from tilus.ir.layout_rules import Elementwise, LayoutPriority, LayoutRule, Way
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.layout import RegisterLayout
from tilus.ptx.module import Reg

_UNKNOWN = Var("index", int32)  # stands for indices of which nothing is known while compiling


@dataclass(frozen=True, eq=False)
class Coalesced(Elementwise):
    """Elementwise in the indices; when nothing else decides, neighbouring threads read what may lie side by side."""

    preferred: RegisterLayout

    def defaults(self) -> Sequence[Way]:
        return [self._way(self.preferred)]


@dataclass(frozen=True, eq=False)
class Gather(Pointwise):
    """`out[i, ..., j] = src[offset + i, ..., index[i, ..., j]]`, where the index runs along tensor dim `dims[axis]`.

    Tile axis a runs along tensor dim `dims[a]` as in `load`. Elements outside of the tensor, negative indices too, read as zero.
    """

    mnemonic = "gather"
    layout_priority = LayoutPriority.LOAD

    out: RegisterTensor
    src: GlobalTensor
    index: RegisterTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    axis: int

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def verify(self) -> None:
        check_access("gather", self.src, self.offsets, self.out.shape, self.dims)
        if self.out.dtype != self.src.dtype:
            raise TilusError(f"gather: tile of {self.out.dtype.name} from {self.src.name} of {self.src.dtype.name}")
        if self.src.dtype.nbits % 8:
            raise TilusError(
                f"gather from {self.src.name} of {self.src.dtype.name}: single elements are read, expected whole bytes"
            )
        if self.index.dtype != int32:
            raise TilusError(f"gather: indices of {self.index.dtype.name}, expected int32")
        if not 0 <= self.axis < self.out.rank:
            raise TilusError(f"gather along axis {self.axis} of a tile of rank {self.out.rank}")
        if broadcast_shapes("gather", self.index.shape, self.out.shape) != self.out.shape:
            raise TilusError(f"gather: indices of shape {list(self.index.shape)} for a tile of {list(self.out.shape)}")

    def layout_rule(self, num_threads: int) -> LayoutRule:
        preferred = coalesced(self.src, self.out.shape, self.dims, num_threads)
        return Coalesced(self.out, (self.index,), num_threads, preferred)

    def evaluate(self, env: Evaluation) -> None:
        dim = self.dims[self.axis]
        extent = int(env.scalar(self.src.shape[dim]).max())
        shape = tuple(extent if a == self.axis else n for a, n in enumerate(self.out.shape))
        offsets = tuple(as_expr(0) if d == dim else offset for d, offset in enumerate(self.offsets))
        values = env.load(self.src, offsets, shape, self.dims, checked=True)
        start = env.scalar(self.offsets[dim])
        index = env.tile(self.index) + start.reshape(*start.shape, *(1,) * self.index.rank)
        index = index.reshape(*index.shape[:3], *(1,) * (self.out.rank - self.index.rank), *index.shape[3:])
        lead = np.broadcast_shapes(values.shape[:3], index.shape[:3])
        index = np.broadcast_to(index, (*lead, *self.out.shape))
        inside = (index >= 0) & (index < extent)
        values = np.broadcast_to(values, (*lead, *shape))
        found = np.take_along_axis(values, np.where(inside, index, 0), 3 + self.axis)
        env.set_tile(self.out, np.where(inside, found, values.dtype.type(0)))

    def emit(self, ctx: EmitContext) -> None:
        layout, dtype = ctx.layout(self.out), self.src.dtype
        dim = self.dims[self.axis]
        base = [ctx.scalars.linear(e) for e in self.offsets]
        for axis, part in enumerate(ctx.thread_index(layout)):
            if axis != self.axis:
                base[self.dims[axis]] = base[self.dims[axis]] + part
        indices = operand_words(ctx, self.index, layout)
        facts = tuple(_UNKNOWN if d == dim else offset for d, offset in enumerate(self.offsets))
        cache = ".nc" if self.src.base in ctx.read_only else ""
        pieces: list[Reg] = []
        for slot in range(layout.num_locals):
            place = list(base)
            for axis, part in enumerate(ctx.local_index(layout, slot)):
                moved = of_reg(indices[slot]) if axis == self.axis else of_const(part)
                place[self.dims[axis]] = place[self.dims[axis]] + moved
            guard = ctx.in_bounds(self.src, facts, self.dims, self.out.shape, place)
            pieces += load_vector(ctx, f"ld.global{cache}", dtype, 1, ctx.global_address(self.src, place), guard)
        ctx.note(self, f"gather {self.src.name}: {layout.num_locals} x {dtype.nbits} bits per thread")
        ctx.define(self.out, assemble(ctx, dtype, 1, pieces))

    def emit_c(self, ctx: CContext) -> None:
        gather_tile(ctx, self.out, self.src, self.index, self.offsets, self.dims, self.axis)


@builtin
def gather(
    b: IRBuilder, src: GlobalTensor, offsets: Sequence[Expr | int], index: RegisterTensor, shape: Sequence[int], *,
    axis: int = -1, dims: Sequence[int] | None = None,
) -> RegisterTensor:  # fmt: skip
    """A tile of a global tensor whose elements along `axis` stand at indices that a tile of int32 [n] holds.

    offsets, shape, dims: as in `load`; the offset of the gathered dim is added to the indices. An index outside of the tensor,
    also a negative one, reads as zero.
    """
    shape = tuple(shape)
    axis %= len(shape)
    axes = tuple(range(src.rank - len(shape), src.rank)) if dims is None else tuple(dims)
    if index.rank == 1:
        index = reshape.build(b, index, [index.size if a == axis else 1 for a in range(len(shape))])
    out = b.tile(src.dtype, shape, None, src.name.split("[")[0])
    return b.emit(Gather(out, src, index, tuple(as_expr(o) for o in offsets), axes, axis)).out
