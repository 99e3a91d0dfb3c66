"""Shared tensors: arrays of values in row-major order, whatever layout a GPU would use."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from tilus.codegen.c.numbers import value_type
from tilus.codegen.c.tile import Array, Leaf, Tile, plain
from tilus.ir.expr import Const, Expr
from tilus.ir.tensor import SharedTensor
from tilus.layout import SharedLayout, strided
from tilus.layout.digits import row_major_strides

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext


def array_of(ctx: CContext, tensor: SharedTensor) -> str:
    """The array of a shared tensor, declared at its first use."""
    name = ctx.shared.get(tensor)
    if name is None:
        name = ctx.shared[tensor] = ctx.hoisted_array(tensor.dtype, prod(tensor.shape), tensor.name, tensor).name
    return name


def part_layout(tensor: SharedTensor, shape: Sequence[int], dims: Sequence[int]) -> SharedLayout:
    """The layout of a tile inside of a shared tensor, from the tile's first element on."""
    steps = row_major_strides(tensor.shape)
    return strided(tuple(shape), [steps[d] for d in dims])


def first_element(ctx: CContext, tensor: SharedTensor, offsets: Sequence[Expr]) -> str:
    """Where a tile begins in its tensor, in elements."""
    steps = row_major_strides(tensor.shape)
    parts = [
        f"{ctx.scalar(o)} * {step}"
        for o, step in zip(offsets, steps, strict=True) if not (isinstance(o, Const) and o.value == 0)
    ]  # fmt: skip
    return " + ".join(parts) or "0"


def part(
    ctx: CContext, tensor: SharedTensor, offsets: Sequence[Expr], shape: Sequence[int], dims: Sequence[int]
) -> Leaf:
    """A tile of a shared tensor where it is."""
    name = ctx.writer.name(tensor.name)
    array = array_of(ctx, tensor)
    kind = value_type(tensor.dtype)
    ctx.writer.line(f"{kind} *const {name} = {array} + ({first_element(ctx, tensor, offsets)});")
    return Leaf(Array(name, tensor), part_layout(tensor, shape, dims))


def load(
    ctx: CContext, tensor: SharedTensor, offsets: Sequence[Expr], shape: Sequence[int], dims: Sequence[int]
) -> Tile:
    """A tile of a shared tensor; nothing is copied until the tensor is overwritten (see `CContext.settle`)."""
    leaf = part(ctx, tensor, offsets, shape, dims)
    return plain(tensor.dtype, tuple(shape), leaf.source, leaf.layout)


def store(ctx: CContext, tensor: SharedTensor, offsets: Sequence[Expr], dims: Sequence[int], tile: Tile) -> None:
    ctx.settle(tensor)
    target = part(ctx, tensor, offsets, tile.shape, dims)
    if any(isinstance(leaf.source, Array) and leaf.source.storage is tensor for leaf in tile.leaves):
        tile = ctx.computed(tile)
    ctx.copy(target, tile)
