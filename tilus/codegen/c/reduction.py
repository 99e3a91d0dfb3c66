"""Reductions and scans of tiles along axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tilus.codegen.c.nest import compacted, linear, nest
from tilus.codegen.c.numbers import value_type
from tilus.codegen.c.tile import Leaf, Tile, plain
from tilus.dtypes import DataType, boolean, f32
from tilus.layout import SharedLayout, row_major

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

_COMBINE = {
    "sum": "{0} + {1}", "max": "tl_max({0}, {1})", "min": "tl_min({0}, {1})", "any": "{0} | {1}", "all": "{0} & {1}",
}  # fmt: skip


def combined(op: str, dtype: DataType, a: str, b: str) -> str:
    """Two elements as one, in C."""
    if dtype.is_float and op != "sum":
        return f"tl_f{op}({a}, {b})"
    return f"({value_type(dtype)})({_COMBINE[op].format(a, b)})"


def neutral(op: str, dtype: DataType) -> str:
    """What leaves every element as it is."""
    if dtype.is_float:
        return "-0.0f" if op == "sum" else "TL_NAN"
    if op in ("max", "min") and dtype != boolean:
        value = int(dtype.min_value) if op == "max" else int(dtype.max_value)
        return f"({value_type(dtype)}){value}ll"
    return "1" if op == "all" else "0"


def reduce(ctx: CContext, op: str, tile: Tile, dtype: DataType, axes: Sequence[int]) -> Tile:
    """A tile of `dtype` [.., 1 for each of axes, ..]. dtype: in which elements are combined."""
    source = ctx.as_array(tile, "terms")
    kept = _without(source.layout, axes)
    layout = compacted([kept])
    shape = tuple(1 if d in axes else n for d, n in enumerate(tile.shape))
    target = Leaf(ctx.array(dtype, layout.size, op), layout)
    spread = _spread(layout, tile.shape, axes)
    loops = nest([source.layout, spread])
    inner = loops.loops[-1] if loops.loops else None
    row = inner is not None and not loops.explicit and inner.strides == (1, 0) and dtype == f32 == tile.dtype
    with ctx.writer.block(f"for (int64_t i = 0; i < {layout.size}; i++)"):
        ctx.writer.line(f"{target.name}[i] = {neutral(op, dtype)};")
    outer = loops.loops[:-1] if row else loops.loops
    repeats = _repeats(source.layout, axes)
    with ctx.writer.loops([loop.size for loop in outer]) as counters:
        ends = [*counters, "0"] if row else counters
        place = f"{target.name}[{loops.address(1, ends)}]"
        element = source.source.element(loops.address(0, ends))
        if row and inner is not None:
            element = f"tl_{op}_row(&{element}, {inner.size})"
        ctx.writer.line(f"{place} = {combined(op, dtype, place, f'({value_type(dtype)})({element})')};")
    if op == "sum" and repeats > 1:
        with ctx.writer.block(f"for (int64_t i = 0; i < {layout.size}; i++)"):
            ctx.writer.line(f"{target.name}[i] *= {repeats};")
    return plain(dtype, shape, target.source, layout)


def _without(layout: SharedLayout, axes: Sequence[int]) -> SharedLayout:
    for axis in axes:
        layout = layout.slice(axis, 0, 1)
    return layout


def _spread(layout: SharedLayout, shape: Sequence[int], axes: Sequence[int]) -> SharedLayout:
    for axis in axes:
        layout = layout.expand(axis, shape[axis])
    return layout


def _repeats(layout: SharedLayout, axes: Sequence[int]) -> int:
    """How many indices along the reduced axes share each address: loops leave them out."""
    count = 1
    for axis in axes:
        for digit in layout.digits[axis]:
            if digit.weight == 0:
                count *= digit.size
    return count


def scan(ctx: CContext, op: str, tile: Tile, dtype: DataType, axis: int) -> Tile:
    """Running sums, maxima or minima along an axis, in `dtype`."""
    source = ctx.as_array(tile, "terms")
    layout = row_major(tile.shape)
    target = ctx.array(dtype, layout.size, "scan")
    steps = [layout.terms[d][0].stride if layout.terms[d] else 0 for d in range(layout.rank)]
    order = [*(d for d in range(layout.rank) if d != axis), axis]
    with ctx.writer.loops([tile.shape[d] for d in order]) as counters:
        index = dict(zip(order, counters, strict=True))
        place = linear(0, steps, [index[d] for d in range(layout.rank)])
        parts = [
            f"({index[d]}) / {t.weight} % {t.size} * {t.stride}"
            for d, terms in enumerate(source.layout.terms) for t in terms if t.stride
        ]  # fmt: skip
        element = source.source.element(" + ".join([str(source.layout.origin), *parts]))
        before = f"{target.name}[{place} - {steps[axis]}]"
        value = f"({value_type(dtype)})({element})"
        joined = combined(op, dtype, before, value)
        first = f"({index[axis]}) == 0"
        ctx.writer.line(f"{target.name}[{place}] = {first} ? {value} : {joined};")
    return plain(dtype, tile.shape, target, layout)
