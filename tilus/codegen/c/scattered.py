"""Accesses to global memory element by element: gathers and atomic updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tilus.codegen.c.memory import Access
from tilus.codegen.c.numbers import code_of_value, code_type, is_plain, value_of_code
from tilus.codegen.c.threads import address
from tilus.codegen.c.tile import Array, plain
from tilus.dtypes import DataType
from tilus.ir.expr import Expr, Var
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.layout import row_major
from tilus.layout.digits import row_major_strides

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

_OPERATIONS = {
    "add": "{0} + {1}", "min": "({0} < {1} ? {0} : {1})", "max": "({0} > {1} ? {0} : {1})", "and": "{0} & {1}", "or": "{0} | {1}",
    "xor": "{0} ^ {1}", "exch": "{1}",
}  # fmt: skip


def gather_tile(
    ctx: CContext, out: RegisterTensor, src: GlobalTensor, index: RegisterTensor, offsets: Sequence[Expr], dims: Sequence[int],
    axis: int,
) -> None:  # fmt: skip
    """`out[i, ..., j] = src[offset + i, ..., index[i, ..., j]]`, zero outside of the tensor."""
    writer, pointer = ctx.writer, ctx.memory.pointer(src)
    ctx.needs_values_of(src.dtype)
    indices = ctx.read_array(index)
    array = ctx.array(out.dtype, out.size, out.name).name
    with writer.loops(out.shape) as counters:
        inner = counters[out.rank - index.rank :]
        own = [c if n > 1 else "0" for c, n in zip(inner, index.shape, strict=True)]
        places = [ctx.scalar(o) for o in offsets]
        for a, d in enumerate(dims):
            moved = f"{indices.name}[{address(indices.layout, *own)}]" if a == axis else counters[a]
            places[d] = f"{places[d]} + {moved}"
        names = [ctx.let("int64_t", "at", place) for place in places]
        inside = " && ".join(
            f"{n} >= 0 && {n} < {ctx.scalar(extent)}" for n, extent in zip(names, src.shape, strict=True)
        )
        place = " + ".join(
            [ctx.scalar(src.offset), *(f"{n} * {ctx.scalar(s)}" for n, s in zip(names, src.strides, strict=True))]
        )
        element = f"{pointer}[{place}]"
        value = element if is_plain(src.dtype) else value_of_code(src.dtype, element)
        to = " + ".join(f"{c} * {s}" for c, s in zip(counters, row_major_strides(out.shape), strict=True)) or "0"
        writer.line(f"{array}[{to}] = {inside or '1'} ? {value} : 0;")
    ctx.define(out, plain(out.dtype, out.shape, Array(array), row_major(out.shape)))


def update_tile(
    ctx: CContext, op: str, dst: GlobalTensor, src: RegisterTensor, offsets: Sequence[Expr], dims: Sequence[int], checked: bool
) -> None:  # fmt: skip
    """Each element of a tile as one atomic update; those outside of the tensor are dropped when `checked`."""
    access = Access(ctx, dst, offsets, src.shape, dims)
    values = ctx.read_array(src)
    bounds = access.bounds() if checked else None
    writer = ctx.writer
    with writer.loops(src.shape) as counters:
        steps = [f"{c} * {ctx.scalar(axis.stride)}" for c, axis in zip(counters, access.axes, strict=True)]
        place = " + ".join([access.start, *steps])
        tests: list[str] = []
        if bounds is not None:
            tests.append(bounds.some)
            tests += [f"{c} >= {low} && {c} < {high}" for c, (low, high) in zip(counters, bounds.ranges, strict=True)]
        with writer.block(f"if ({' && '.join(tests)})" if tests else ""):
            _update(
                ctx,
                op,
                dst.dtype,
                f"{access.pointer} + {place}",
                values.source.element(address(values.layout, *counters)),
            )


def update_scalar(
    ctx: CContext, op: str, out: Var, dst: GlobalTensor, index: Sequence[Expr], value: Expr
) -> None:  # fmt: skip
    """One atomic update of a block; `out` is the old value."""
    access = Access(ctx, dst, index, (), ())
    kind = "float" if out.dtype.is_float else "int64_t"
    name = ctx.names[out] = ctx.writer.name(out.name)
    ctx.writer.line(f"{kind} {name};")
    with ctx.writer.block():
        old = _update(ctx, op, dst.dtype, f"{access.pointer} + {access.start}", ctx.scalar(value))
        ctx.writer.line(f"{name} = {old};")


def _update(ctx: CContext, op: str, dtype: DataType, pointer: str, value: str) -> str:
    """A loop of compare and exchange on the element's bits; gives the name of its old value."""
    writer = ctx.writer
    bits, kind = f"uint{dtype.nbits}_t", "float" if dtype.is_float else code_type(dtype)
    place, old, was = writer.name("place"), writer.name("old"), writer.name("was")
    writer.line(f"{bits} *const {place} = ({bits} *)({pointer});")
    new = writer.name("new")
    writer.line(f"{bits} {old} = __atomic_load_n({place}, __ATOMIC_RELAXED), {new};")
    writer.line(f"{kind} {was};")
    with writer.block("do"):
        writer.line(f"{was} = {value_of_code(dtype, old)};")
        result = _OPERATIONS[op].format(was, f"({kind})({value})")
        writer.line(f"{new} = {code_of_value(dtype, f'({kind})({result})')};")
    exchange = f"__atomic_compare_exchange_n({place}, &{old}, {new}, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)"
    writer.line(f"while (!{exchange});")
    return was
