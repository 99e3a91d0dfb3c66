"""Instructions that rename elements: views of shape, order and type, assignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilus.codegen.c.context import CContext
from tilus.codegen.c.threads import view as c_view
from tilus.codegen.c.tile import broadcast as c_broadcast
from tilus.codegen.context import EmitContext
from tilus.dtypes import DataType, boolean
from tilus.errors import TilusError
from tilus.instructions.elementwise import Pointwise, broadcast_shapes, operand_words
from tilus.instructions.reinterpret import reinterpret
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.instruction import Instruction, expect_same_shape
from tilus.ir.layout_rules import LayoutRule, Renamed, Variable
from tilus.ir.tensor import RegisterTensor
from tilus.layout import LayoutError, RegisterLayout, SharedLayout, row_major, slot_map


@dataclass(frozen=True, eq=False)
class Assign(Pointwise):
    """Write a tile into the storage of a variable that loops or branches share."""

    mnemonic = "assign"

    out: RegisterTensor
    src: RegisterTensor

    def verify(self) -> None:
        expect_same_shape("assignment", self.out, self.src)
        if self.out.dtype != self.src.dtype:
            raise TilusError(
                f"a variable of {self.out.dtype.name} is assigned a tile of {self.src.dtype.name}",
                hint=f"cast it: tilus.cast(x, tilus.{self.out.dtype.name})",
            )

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return Variable(self.out, (self.src,), num_threads)

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.tile(self.src))

    def emit(self, ctx: EmitContext) -> None:
        ctx.define(self.out, operand_words(ctx, self.src, ctx.layout(self.out)))

    def emit_c(self, ctx: CContext) -> None:
        ctx.define(self.out, ctx.read(self.src))


class Renaming(Instruction):
    """Instructions whose result holds the operand's elements under other indices: registers stay where they are."""

    out: RegisterTensor
    src: RegisterTensor

    def forward(self, layout: RegisterLayout) -> RegisterLayout:
        """The result's layout from the operand's; may raise LayoutError."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def backward(self, layout: RegisterLayout) -> RegisterLayout:
        """The operand's layout from the result's; may raise LayoutError."""
        raise NotImplementedError(f"{type(self).__name__}.backward")

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return Renamed(self.out, self.src, self.forward, self.backward, num_threads)

    def emit(self, ctx: EmitContext) -> None:
        ctx.define(self.out, ctx.aligned_words(self.src, self.backward(ctx.layout(self.out))))

    def memory(self, layout: SharedLayout) -> SharedLayout:
        """The layout of the same memory under the result's indices; may raise LayoutError."""
        raise NotImplementedError(f"{type(self).__name__}.memory")

    def emit_c(self, ctx: CContext) -> None:
        tile = ctx.read(self.src)
        try:
            renamed = tile.renamed(self.out.shape, self.memory)
        except LayoutError:  # digits that the new dims would cut
            compact = ctx.computed(tile, self.src.name, row_major(tile.shape))
            renamed = compact.renamed(self.out.shape, self.memory)
        ctx.define(self.out, renamed)


@dataclass(frozen=True, eq=False)
class Reshape(Renaming):
    """The same elements in row-major order under another shape."""

    mnemonic = "reshape"

    out: RegisterTensor
    src: RegisterTensor

    def verify(self) -> None:
        if self.out.size != self.src.size:
            raise TilusError(
                f"reshape from {list(self.src.shape)} ({self.src.size} elements) to {list(self.out.shape)} ({self.out.size})",
                hint="one extent may be -1: it follows from the others",
            )

    def forward(self, layout: RegisterLayout) -> RegisterLayout:
        return layout.reshape(self.out.shape)

    def backward(self, layout: RegisterLayout) -> RegisterLayout:
        return layout.reshape(self.src.shape)

    def memory(self, layout: SharedLayout) -> SharedLayout:
        return layout.reshape(self.out.shape)

    def evaluate(self, env: Evaluation) -> None:
        value = env.tile(self.src)
        env.set_tile(self.out, value.reshape(*value.shape[:3], *self.out.shape))


@dataclass(frozen=True, eq=False)
class Permute(Renaming):
    """Dims in another order: out dim a is source dim `dims[a]`."""

    mnemonic = "permute"

    out: RegisterTensor
    src: RegisterTensor
    dims: tuple[int, ...]

    def verify(self) -> None:
        if sorted(self.dims) != list(range(self.src.rank)):
            raise TilusError(f"transpose by {list(self.dims)} of a tile of rank {self.src.rank}")

    def forward(self, layout: RegisterLayout) -> RegisterLayout:
        return layout.permute(self.dims)

    def backward(self, layout: RegisterLayout) -> RegisterLayout:
        return layout.permute([self.dims.index(d) for d in range(len(self.dims))])

    def memory(self, layout: SharedLayout) -> SharedLayout:
        return layout.permute(self.dims)

    def evaluate(self, env: Evaluation) -> None:
        value = env.tile(self.src)
        env.set_tile(self.out, value.transpose(0, 1, 2, *(3 + d for d in self.dims)))


@dataclass(frozen=True, eq=False)
class Select(Renaming):
    """The part of a tile at `index` along `dim`, which vanishes; each thread keeps the part of what it holds."""

    mnemonic = "select"

    out: RegisterTensor
    src: RegisterTensor
    dim: int
    index: int

    def verify(self) -> None:
        if not 0 <= self.dim < self.src.rank:
            raise TilusError(f"select along dim {self.dim} of a tile of rank {self.src.rank}")
        if not 0 <= self.index < self.src.shape[self.dim]:
            raise TilusError(f"select of index {self.index} along a dim of {self.src.shape[self.dim]} elements")
        expected = tuple(n for d, n in enumerate(self.src.shape) if d != self.dim)
        if self.out.shape != expected or self.out.dtype != self.src.dtype:
            raise TilusError(
                f"select from {self.src.dtype.name}{list(self.src.shape)} along dim {self.dim} gives "
                f"{self.src.dtype.name}{list(expected)}, the result is {self.out.dtype.name}{list(self.out.shape)}"
            )

    def forward(self, layout: RegisterLayout) -> RegisterLayout:
        if any(digit.dim == self.dim for digit in layout.thread_digits):
            raise LayoutError(f"{layout} spreads dim {self.dim} over threads")
        return layout.reduce([self.dim], keepdims=False)

    def backward(self, layout: RegisterLayout) -> RegisterLayout:
        """Every thread holds the whole dim, in its outermost slots."""
        return layout.unsqueeze(self.dim).expand(self.dim, self.src.shape[self.dim])

    def memory(self, layout: SharedLayout) -> SharedLayout:
        return layout.slice(self.dim, self.index, self.index + 1).squeeze(self.dim)

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, np.take(env.tile(self.src), self.index, axis=3 + self.dim))

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.out)
        slots = slot_map(self.backward(layout), ctx.layout(self.src))
        first = self.index * layout.num_locals
        words = ctx.pick(self.src.dtype, ctx.words(self.src), slots[first : first + layout.num_locals])
        ctx.define(self.out, words)


@dataclass(frozen=True, eq=False)
class Broadcast(Pointwise):
    """A tile repeated along dims of size 1."""

    mnemonic = "broadcast"

    out: RegisterTensor
    src: RegisterTensor

    def verify(self) -> None:
        if broadcast_shapes("broadcast", self.src.shape, self.out.shape) != self.out.shape:
            raise TilusError(f"broadcast from {list(self.src.shape)} to {list(self.out.shape)}")

    def evaluate(self, env: Evaluation) -> None:
        value = env.tile(self.src)
        pad = (1,) * (self.out.rank - self.src.rank)
        value = value.reshape(*value.shape[:3], *pad, *value.shape[3:])
        env.set_tile(self.out, np.broadcast_to(value, (*value.shape[:3], *self.out.shape)))

    def emit_c(self, ctx: CContext) -> None:
        ctx.define(self.out, c_broadcast(ctx.read(self.src), self.out.shape))

    def emit(self, ctx: EmitContext) -> None:
        ctx.define(self.out, operand_words(ctx, self.src, ctx.layout(self.out)))


@dataclass(frozen=True, eq=False)
class View(Instruction):
    """Each thread's bits of one tile read as elements of another type, in another layout; nothing moves.

    Both tiles have pinned layouts: they decide which element comes from which bits.
    """

    mnemonic = "view"
    reads_layouts = True

    out: RegisterTensor
    src: RegisterTensor

    def verify(self) -> None:
        a, c = self.src.layout, self.out.layout
        if a is None or c is None:
            raise TilusError(
                "view needs the layouts of both tiles",
                hint="load the source with layout=..., and give the result's layout to tilus.view",
            )
        if a.num_threads != c.num_threads:
            raise TilusError(f"view from a layout of {a.num_threads} threads to one of {c.num_threads}")
        have, want = a.num_locals * self.src.dtype.nbits, c.num_locals * self.out.dtype.nbits
        if have != want:
            raise TilusError(
                f"view: a thread holds {have} bits of {self.src.dtype.name} and would hold {want} bits of {self.out.dtype.name}",
                hint="a view keeps each thread's bits: the layout's slots times the dtype's bits must be the same on both sides",
            )

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, reinterpret(env.tile(self.src), self.src, self.out))

    def emit(self, ctx: EmitContext) -> None:
        if boolean in (self.src.dtype, self.out.dtype) or 64 in (self.src.dtype.nbits, self.out.dtype.nbits):
            raise TilusError(f"view between {self.src.dtype.name} and {self.out.dtype.name} is not supported")
        ctx.define(self.out, ctx.words(self.src))

    def emit_c(self, ctx: CContext) -> None:
        if self.src.layout is None or self.out.layout is None:
            raise ValueError("view without layouts passed the verifier")
        ctx.define(self.out, c_view(ctx, ctx.read(self.src), self.src.layout, self.out.dtype, self.out.layout))


@builtin
def reshape(b: IRBuilder, x: RegisterTensor, shape: Sequence[int]) -> RegisterTensor:
    """The elements of a tile in row-major order under another shape; one extent may be -1. No data moves."""
    shape = tuple(shape)
    if -1 in shape:
        known = -math.prod(shape)
        shape = tuple(x.size // known if s == -1 and known and x.size % known == 0 else s for s in shape)
    return b.emit(Reshape(b.tile(x.dtype, shape), x)).out


@builtin
def transpose(b: IRBuilder, x: RegisterTensor, dims: Sequence[int] | None = None) -> RegisterTensor:
    """The dims of a tile in another order (reversed when not given). No data moves."""
    order = tuple(reversed(range(x.rank))) if dims is None else tuple(dims)
    if sorted(order) != list(range(x.rank)):
        raise TilusError(f"transpose by {list(order)} of a tile of rank {x.rank}")
    return b.emit(Permute(b.tile(x.dtype, tuple(x.shape[d] for d in order)), x, order)).out


@builtin
def select(b: IRBuilder, x: RegisterTensor, dim: int, index: int) -> RegisterTensor:
    """The part of a tile at a compile-time index along a dim, which vanishes. Free where each thread holds the whole dim."""
    shape = tuple(n for d, n in enumerate(x.shape) if d != dim)
    return b.emit(Select(b.tile(x.dtype, shape), x, dim, index)).out


@builtin
def broadcast(b: IRBuilder, x: RegisterTensor, shape: Sequence[int]) -> RegisterTensor:
    """A tile repeated along its dims of size 1, and along new dims in front."""
    return b.emit(Broadcast(b.tile(x.dtype, tuple(shape)), x)).out


@builtin
def view(
    b: IRBuilder, x: RegisterTensor, dtype: DataType, shape: Sequence[int], layout: RegisterLayout
) -> RegisterTensor:
    """Read each thread's bits of `x` (whose layout must be pinned) as elements of `dtype` in `layout`. No data moves."""
    return b.emit(View(b.tile(dtype, tuple(shape), layout), x)).out
