"""Tiles that are not computed from others: one value everywhere, and indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilus.codegen.c.context import CContext
from tilus.codegen.c.numbers import literal, rounded, value_type
from tilus.codegen.c.tile import Counter, constant, plain
from tilus.codegen.context import EmitContext, num_words
from tilus.codegen.linear import materialize, of_const
from tilus.codegen.splat import splat_word
from tilus.dtypes import DataType, boolean, f32, int32
from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Const, Expr, Number, as_expr
from tilus.ir.instruction import Instruction
from tilus.ir.layout_rules import LayoutPriority
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout, strided
from tilus.ptx.module import Reg


@dataclass(frozen=True, eq=False)
class Full(Instruction):
    """A tile with one scalar value everywhere."""

    mnemonic = "full"
    layout_priority = LayoutPriority.CONSTANT

    out: RegisterTensor
    value: Expr

    def evaluate(self, env: Evaluation) -> None:
        value = env.scalar(self.value).astype(self.out.dtype.compute)
        if self.out.dtype.is_float:
            value = self.out.dtype.round(value).astype(self.out.dtype.compute)
        shaped = value.reshape(*value.shape, *(1,) * self.out.rank)
        env.set_tile(self.out, np.broadcast_to(shaped, (*value.shape, *self.out.shape)))

    def emit(self, ctx: EmitContext) -> None:
        dtype, b = self.out.dtype, ctx.b
        count = num_words(dtype, ctx.layout(self.out).num_locals)
        if dtype == boolean:
            ctx.define(self.out, [ctx.scalars.pred(self.value)] * count)
            return
        word = splat_word(ctx, dtype, self.value)
        ctx.define(self.out, [b.emit(f"mov.{word.cls.value}", word, out=word.cls) for _ in range(count)])

    def emit_c(self, ctx: CContext) -> None:
        dtype = self.out.dtype
        if isinstance(self.value, Const):
            ctx.needs_values_of(dtype)
            values = dtype.decode(dtype.encode(np.asarray([self.value.value])))
            text = literal(dtype, float(values[0]) if dtype.is_float else int(values[0]))
        else:
            value = f"({value_type(dtype)})({ctx.scalar(self.value)})"
            text = ctx.let(value_type(dtype), "value", rounded(dtype, value) if dtype.is_float else value)
        ctx.define(self.out, constant(dtype, self.out.shape, text))


@dataclass(frozen=True, eq=False)
class Arange(Instruction):
    """A tile of int32 whose element is its own index along `axis`, plus `start`."""

    mnemonic = "arange"
    layout_priority = LayoutPriority.CONSTANT

    out: RegisterTensor
    axis: int
    start: Expr

    def verify(self) -> None:
        if not 0 <= self.axis < self.out.rank:
            raise TilusError(f"arange: axis {self.axis} of a tile of rank {self.out.rank}")

    def evaluate(self, env: Evaluation) -> None:
        start = env.scalar(self.start)
        shape = [1] * self.out.rank
        shape[self.axis] = -1
        index = np.arange(self.out.shape[self.axis], dtype=np.int32).reshape(shape)
        value = start.reshape(*start.shape, *(1,) * self.out.rank).astype(np.int32) + index
        env.set_tile(self.out, np.broadcast_to(value, (*start.shape, *self.out.shape)))

    def emit(self, ctx: EmitContext) -> None:
        layout, b = ctx.layout(self.out), ctx.b
        form = ctx.scalars.linear(self.start) + ctx.thread_index(layout)[self.axis]
        words: list[Reg] = []
        for slot in range(layout.num_locals):
            value = materialize(b, form + of_const(ctx.local_index(layout, slot)[self.axis]))
            words.append(value if isinstance(value, Reg) else b.const(value.value))
        ctx.define(self.out, words)

    def emit_c(self, ctx: CContext) -> None:
        start = ctx.fixed(self.start, "start")
        steps = [int(d == self.axis) for d in range(self.out.rank)]
        ctx.define(self.out, plain(int32, self.out.shape, Counter(start), strided(self.out.shape, steps)))


@builtin
def full(
    b: IRBuilder,
    shape: Sequence[int],
    value: Expr | Number,
    dtype: DataType = f32,
    *,
    layout: RegisterLayout | None = None,
) -> RegisterTensor:
    """A tile of `shape` with the scalar `value` everywhere."""
    return b.emit(Full(b.tile(dtype, tuple(shape), layout), as_expr(value))).out


@builtin
def zeros(
    b: IRBuilder, shape: Sequence[int], dtype: DataType = f32, *, layout: RegisterLayout | None = None
) -> RegisterTensor:
    """A tile of zeros."""
    return full.build(b, shape, 0.0 if dtype.is_float else 0, dtype, layout=layout)


@builtin
def arange(
    b: IRBuilder, size: int, *, start: Expr | int = 0, shape: Sequence[int] | None = None, axis: int = 0
) -> RegisterTensor:
    """int32 indices `start .. start + size`; with `shape`, a tile of that shape that counts along `axis`."""
    tile_shape = (size,) if shape is None else tuple(shape)
    if tile_shape[axis] != size:
        raise TilusError(f"arange: {size} indices along axis {axis} of a tile of shape {list(tile_shape)}")
    return b.emit(Arange(b.tile(int32, tile_shape, name="index"), axis, as_expr(start))).out
