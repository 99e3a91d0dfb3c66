"""Tiles from and to global memory: runs along the contiguous dim, with the part outside of a tensor masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from tilus.codegen.c.numbers import code_of_value, is_plain, value_nbytes, value_of_code, value_type
from tilus.dtypes import DataType, f16
from tilus.errors import TilusError
from tilus.ir.expr import Const, Expr, Var
from tilus.ir.ranges import bounds
from tilus.ir.tensor import GlobalTensor
from tilus.layout import SharedLayout, strided

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext


def _is_natural(expr: Expr) -> bool:
    lowest = bounds(expr)[0]
    return lowest is not None and lowest >= 0


def _is_inside(first: Expr, size: int, extent: Expr) -> bool:
    """Whether `size` indices from `first` on are known to be below `extent`."""
    last, least = bounds(first)[1], bounds(extent)[0]
    return _is_natural(first) and last is not None and least is not None and last + size <= least


Run = Callable[[str, str, str], None]
"""Writes the code for a run: element in memory, element of the array, count."""


CODES = 256  # below a byte, that are unpacked together


@dataclass(frozen=True)
class GlobalMemory:
    """The pointers of a kernel. read_only: those through which nothing is written."""

    pointers: Mapping[Var, str]
    read_only: frozenset[Var]

    def pointer(self, tensor: GlobalTensor) -> str:
        if tensor.base not in self.pointers:
            raise TilusError(
                f"the pointer {tensor.base} of {tensor.name} is no parameter, expected a tensor parameter's"
            )
        return self.pointers[tensor.base]


@dataclass(frozen=True)
class Axis:
    """An axis of a tile in global memory.

    stride: in elements. first, extent: where the tile begins along the dim, and how long that is. local: the stride of the
    tile's array.
    """

    size: int
    stride: Expr
    first: Expr
    extent: Expr
    local: int

    @property
    def is_contiguous(self) -> bool:
        return isinstance(self.stride, Const) and self.stride.value == 1


@dataclass(frozen=True)
class Bounds:
    """C expressions for the part of a tile inside of its tensor: all of it, any of it, and the range along each axis."""

    whole: str
    some: str
    ranges: tuple[tuple[str, str], ...]


class Access:
    """A tile of a global tensor: where it is, and the loops over it."""

    def __init__(
        self, ctx: CContext, tensor: GlobalTensor, offsets: Sequence[Expr], shape: Sequence[int], dims: Sequence[int],
        layout: SharedLayout | None = None,
    ) -> None:  # fmt: skip
        """layout: of the tile's array; by default the order of memory."""
        self.ctx = ctx
        self.tensor = tensor
        self.dims = tuple(dims)
        self.offsets = tuple(offsets)
        self.layout = layout or in_memory_order(tensor, shape, dims)
        steps = [sum(d.weight for d in digits[-1:]) for digits in self.layout.digits]
        self.axes = [
            Axis(n, tensor.strides[d], offsets[d], tensor.shape[d], step)
            for n, d, step in zip(shape, dims, steps, strict=True)
        ]
        self.pointer = ctx.memory.pointer(tensor)
        parts = [ctx.scalar(tensor.offset), *(
            f"{ctx.scalar(o)} * {ctx.scalar(s)}" for o, s in zip(offsets, tensor.strides, strict=True)
            if not (isinstance(o, Const) and o.value == 0)
        )]  # fmt: skip
        self.start = ctx.let("int64_t", "at", " + ".join(parts))

    def order(self) -> list[int]:
        """The axes of more than one element, that of the longest steps first."""
        moving = [a for a, axis in enumerate(self.axes) if axis.size > 1]
        return sorted(moving, key=lambda a: -self.axes[a].local)

    def bounds(self) -> Bounds:
        ctx, whole, some, ranges = self.ctx, list[str](), list[str](), list[tuple[str, str]]()
        sizes = {d: axis.size for d, axis in zip(self.dims, self.axes, strict=True)}
        for d, (offset, extent) in enumerate(zip(self.offsets, self.tensor.shape, strict=True)):
            if sizes.get(d, 1) == 1:
                inside = self._inside(offset, extent)
                whole += inside
                some += inside
        for axis in self.axes:
            if axis.size == 1 or _is_inside(axis.first, axis.size, axis.extent):
                ranges.append(("0", str(axis.size)))
                continue
            first, low = ctx.scalar(axis.first), "0"
            if not _is_natural(axis.first):
                low = ctx.let("int64_t", "low", f"tl_max(0, -({first}))")
                whole.append(f"{low} == 0")
            high = ctx.let(
                "int64_t", "high", f"tl_max({low}, tl_min({axis.size}, {ctx.scalar(axis.extent)} - ({first})))"
            )
            whole.append(f"{high} == {axis.size}")
            ranges.append((low, high))
        return Bounds(" && ".join(whole) or "1", " && ".join(some) or "1", tuple(ranges))

    def _inside(self, index: Expr, extent: Expr) -> list[str]:
        if _is_inside(index, 1, extent):
            return []
        tests = [f"{self.ctx.scalar(index)} < {self.ctx.scalar(extent)}"]
        return tests if _is_natural(index) else [f"{self.ctx.scalar(index)} >= 0", *tests]

    def each_run(self, ranges: Sequence[tuple[str, str]] | None, run: Run) -> None:
        """Call `run` in loops over the tile (or the part in `ranges`)."""
        order, writer = self.order(), self.ctx.writer
        memory, local = [self.start], list[str]()
        depth = 0
        while order:
            axis = order.pop(0)
            size, local_step = self.axes[axis].size, self.axes[axis].local
            low, high = ranges[axis] if ranges is not None else ("0", str(size))
            if not order and self.axes[axis].is_contiguous and local_step == 1:
                break
            name = writer.name("i")
            writer.line(f"for (int64_t {name} = {low}; {name} < {high}; {name}++) {{")
            writer.depth += 1
            depth += 1
            memory.append(f"{name} * {self.ctx.scalar(self.axes[axis].stride)}")
            local.append(f"{name} * {local_step}")
        else:
            low, high = "0", "1"
        if low != "0":
            memory.append(low)
            local.append(low)
        count = high if low == "0" else f"({high} - {low})"
        run(" + ".join(memory), " + ".join(local) or "0", count)
        for _ in range(depth):
            writer.depth -= 1
            writer.line("}")


def in_memory_order(tensor: GlobalTensor, shape: Sequence[int], dims: Sequence[int]) -> SharedLayout:
    """A compact layout of a tile whose last digit runs along the contiguous dim of the tensor."""

    def step(axis: int) -> tuple[int, int]:
        found = tensor.strides[dims[axis]]
        return (0 if isinstance(found, Const) and found.value == 1 else 1, -dims[axis])

    strides, size = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=step):
        strides[axis] = size
        size *= shape[axis]
    return strided(shape, strides)


def load_into(access: Access, array: str, start: str, checked: bool, size: int | None) -> None:
    """Copy a tile to an array from element `start` on; what is outside of the tensor becomes 0.

    size: of the array to clear, None where the tile is only a part of it.
    """
    ctx, tensor, writer = access.ctx, access.tensor, access.ctx.writer
    ctx.needs_values_of(tensor.dtype)

    def run(memory: str, local: str, count: str) -> None:
        _load_run(
            ctx, tensor.dtype, access.pointer, memory, array, local if start == "0" else f"{start} + {local}", count
        )

    if not checked:
        access.each_run(None, run)
        return
    part = access.bounds()
    with writer.block(f"if ({part.whole})"):
        access.each_run(None, run)
    with writer.block("else"):
        if size is not None:
            writer.line(f"memset({array}, 0, {size} * sizeof *{array});")
        else:
            _clear(access, array, start)
        with writer.block(f"if ({part.some})"):
            access.each_run(part.ranges, run)


def _clear(access: Access, array: str, start: str) -> None:
    writer = access.ctx.writer
    with writer.loops([axis.size for axis in access.axes]) as counters:
        place = " + ".join([start, *(f"{c} * {a.local}" for c, a in zip(counters, access.axes, strict=True))])
        writer.line(f"{array}[{place}] = 0;")


def _load_run(ctx: CContext, dtype: DataType, pointer: str, memory: str, array: str, local: str, count: str) -> None:
    writer = ctx.writer
    if count == "1":
        writer.line(f"{array}[{local}] = {_value(dtype, pointer, memory)};")
    elif dtype == f16:
        writer.line(f"tl_load_f16({array} + {local}, {pointer} + {memory}, {count});")
    elif is_plain(dtype):
        writer.line(f"memcpy({array} + {local}, {pointer} + {memory}, {count} * sizeof({value_type(dtype)}));")
    elif dtype.nbits < 8:
        _load_codes(ctx, dtype, pointer, memory, array, local, count)
    else:
        with writer.block(f"for (int64_t i = 0; i < {count}; i++)"):
            writer.line(f"{array}[{local} + i] = {_value(dtype, pointer, f'{memory} + i')};")


def _load_codes(ctx: CContext, dtype: DataType, pointer: str, memory: str, array: str, local: str, count: str) -> None:
    """A run of codes below a byte; what is left to do with floats and signed integers is a loop that vectorises."""
    writer, nbits = ctx.writer, dtype.nbits
    bit = f"({memory}) * {nbits}"
    if dtype.kind == "uint":
        writer.line(f"tl_load_codes({array} + {local}, {pointer}, {bit}, {nbits}, {count});")
        return
    with writer.block(f"for (int64_t done = 0; done < {count}; done += {CODES})"):
        writer.line(f"uint8_t codes[{CODES}];")
        writer.line(f"const int64_t left = tl_min({CODES}, {count} - done);")
        writer.line(f"tl_load_codes(codes, {pointer}, {bit} + done * {nbits}, {nbits}, left);")
        with writer.block("for (int64_t i = 0; i < left; i++)"):
            writer.line(f"{array}[{local} + done + i] = {value_of_code(dtype, 'codes[i]')};")


def _value(dtype: DataType, pointer: str, place: str) -> str:
    if dtype.nbits < 8:
        return value_of_code(dtype, f"tl_field({pointer}, ({place}) * {dtype.nbits}, {dtype.nbits})")
    found = f"{pointer}[{place}]"
    return found if is_plain(dtype) else value_of_code(dtype, found)


def store_from(access: Access, array: str, start: str, checked: bool) -> None:
    """Copy an array to the tile's place in memory; what would be outside of the tensor is dropped."""
    dtype, writer = access.tensor.dtype, access.ctx.writer
    access.ctx.needs_values_of(dtype)

    def run(memory: str, local: str, count: str) -> None:
        _store_run(access.ctx, dtype, access.pointer, memory, array, f"{start} + {local}", count)

    if not checked:
        access.each_run(None, run)
        return
    part = access.bounds()
    with writer.block(f"if ({part.whole})"):
        access.each_run(None, run)
    with writer.block(f"else if ({part.some})"):
        access.each_run(part.ranges, run)


def _store_run(ctx: CContext, dtype: DataType, pointer: str, memory: str, array: str, local: str, count: str) -> None:
    writer = ctx.writer
    if count == "1":
        writer.line(_stored(dtype, pointer, memory, f"{array}[{local}]"))
    elif dtype == f16:
        writer.line(f"tl_store_f16({pointer} + {memory}, {array} + {local}, {count});")
    elif is_plain(dtype):
        writer.line(f"memcpy({pointer} + {memory}, {array} + {local}, {count} * sizeof({value_type(dtype)}));")
    else:
        with writer.block(f"for (int64_t i = 0; i < {count}; i++)"):
            writer.line(_stored(dtype, pointer, f"{memory} + i", f"{array}[{local} + i]"))


def _stored(dtype: DataType, pointer: str, place: str, value: str) -> str:
    if dtype.nbits < 8:
        code = code_of_value(dtype, value)
        return f"tl_set_field({pointer}, ({place}) * {dtype.nbits}, {dtype.nbits}, {code});"
    return f"{pointer}[{place}] = {value if is_plain(dtype) else code_of_value(dtype, value)};"


def borrowed(access: Access, checked: bool) -> str | None:
    """A pointer to the tile where it is, or None where an array has to be made of it.

    Only of memory that nobody writes to, in the form of values, and with the strides of the tile's array. A tile that reaches
    beyond its tensor is copied after all.
    """
    tensor, ctx = access.tensor, access.ctx
    if not is_plain(tensor.dtype) or tensor.base not in ctx.memory.read_only:
        return None
    strides = [(axis.stride, axis.local) for axis in access.axes if axis.size > 1]
    if any(isinstance(stride, Const) and stride.value != local for stride, local in strides):
        return None
    dense = [f"{ctx.scalar(stride)} == {local}" for stride, local in strides if not isinstance(stride, Const)]
    kind, name = value_type(tensor.dtype), ctx.writer.name(tensor.name)
    ctx.borrowed.add(name)
    if not checked and not dense:
        ctx.writer.line(f"const {kind} *const {name} = {access.pointer} + {access.start};")
        return name
    part = access.bounds() if checked else Bounds("1", "1", tuple(("0", str(axis.size)) for axis in access.axes))
    size = prod(axis.size for axis in access.axes)
    edge = ctx.array(tensor.dtype, size, "edge").name
    ctx.writer.line(f"const {kind} *{name} = {edge};")
    with ctx.writer.block(f"if ({' && '.join([part.whole, *dense])})"):
        ctx.writer.line(f"{name} = {access.pointer} + {access.start};")
    with ctx.writer.block("else"):
        ctx.writer.line(f"memset({edge}, 0, {size * value_nbytes(tensor.dtype)});")

        def run(memory: str, local: str, count: str) -> None:
            _load_run(ctx, tensor.dtype, access.pointer, memory, edge, local, count)

        with ctx.writer.block(f"if ({part.some})"):
            access.each_run(part.ranges, run)
    return name
