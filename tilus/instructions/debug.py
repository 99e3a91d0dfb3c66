"""Printing from kernels, for debugging."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from tilus.codegen.c.context import CContext
from tilus.codegen.c.threads import address
from tilus.codegen.context import EmitContext
from tilus.codegen.linear import of_const, register
from tilus.dtypes import DataType, boolean, f32, int32, uint32
from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.expr import BlockId, Expr, Number, as_expr, cast
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.tensor import RegisterTensor
from tilus.ptx.module import Address, Guard, Imm, Reg, Symbol


def literals(text: str) -> list[str]:
    """The text between the `{}` of a format; `{{` and `}}` are braces.

    Raises: TilusError for anything but an empty pair of braces.
    """
    parts: list[str] = [""]
    try:
        for literal, name, spec, conversion in string.Formatter().parse(text):
            parts[-1] += literal
            if name is None:
                continue
            if name or spec or conversion:
                raise TilusError(f"print format {text!r} has {{{name}{':' + spec if spec else ''}}}, expected {{}}")
            parts.append("")
    except ValueError as error:
        raise TilusError(f"print format {text!r}: {error}", hint="write {{ and }} for braces") from None
    return parts


@dataclass(frozen=True, eq=False)
class Print(Instruction):
    """Print a line per block, or per element of the one tile among `args`, whose place shows its index: `[i, j] value`.

    Integers print as such, booleans as 0 and 1, floats as C's %g. The order of lines of different threads is not promised.
    """

    mnemonic = "print"

    format: str
    args: tuple[Expr | RegisterTensor, ...]

    def effects(self) -> Effects:
        return Effects(other=True)

    def verify(self) -> None:
        count = len(literals(self.format)) - 1
        if count != len(self.args):
            raise TilusError(f"print format {self.format!r} has {count} places, for {len(self.args)} values")
        if len(self.register_operands) > 1:
            names = ", ".join(tile.name for tile in self.register_operands)
            raise TilusError(f"print of the tiles {names}, expected at most one", hint="print them one by one")
        for arg in self.args:
            if arg.dtype.nbits > 32 and isinstance(arg, RegisterTensor):
                raise TilusError(f"print of a tile of {arg.dtype.name}, expected at most 32 bits")

    @property
    def tile(self) -> RegisterTensor | None:
        return next(iter(self.register_operands), None)

    def _line(self, values: Sequence[str]) -> str:
        parts = literals(self.format)
        return parts[0] + "".join(value + part for value, part in zip(values, parts[1:], strict=True))

    def evaluate(self, env: Evaluation) -> None:
        values = [env.tile(a) if isinstance(a, RegisterTensor) else env.scalar(a) for a in self.args]
        active = env.active()
        blocks = [env.scalar(BlockId(axis)) for axis in range(3)]
        masks = [] if active is None else [active]
        extents = np.broadcast_shapes(
            *(b.shape for b in blocks), *(v.shape[:3] for v in values), *(m.shape for m in masks)
        )
        for block in np.ndindex(*extents):
            if active is None or np.broadcast_to(active, extents)[block]:
                for line in self._lines([_of_block(v, block) for v in values]):
                    env.print(line)

    def _lines(self, values: Sequence[Array]) -> Iterator[str]:
        """The lines of one block, elements in row-major order."""
        shape = self.tile.shape if self.tile is not None else None
        for index in product(*map(range, shape)) if shape is not None else [()]:
            texts: list[str] = []
            for arg, value in zip(self.args, values, strict=True):
                text = _text(arg.dtype, value[index] if isinstance(arg, RegisterTensor) else value)
                texts.append(f"[{', '.join(map(str, index))}] {text}" if isinstance(arg, RegisterTensor) else text)
            yield self._line(texts)

    def emit(self, ctx: EmitContext) -> None:
        tile = self.tile
        if tile is None:
            is_first = ctx.b.pure("setp.eq.u32", ctx.thread_id(), Imm(0))
            self._call(ctx, is_first, [])
            return
        layout = ctx.layout(tile)
        owner = ctx.first_replica(layout)
        words = _words(ctx, tile)
        seen: set[tuple[int, ...]] = set()
        for slot, word in enumerate(words):
            local = tuple(ctx.local_index(layout, slot))
            if local in seen:
                continue
            seen.add(local)
            index = [t + of_const(i) for t, i in zip(ctx.thread_index(layout), local, strict=True)]
            self._call(ctx, owner, [*(register(ctx.b, i) for i in index), word])

    def emit_c(self, ctx: CContext) -> None:
        tile = self.tile
        if tile is None:
            self._print_c(ctx, [], "")
            return
        leaf = ctx.read_array(tile)
        with ctx.writer.loops(tile.shape) as counters:
            self._print_c(ctx, counters, leaf.source.element(address(leaf.layout, *counters)))

    def _print_c(self, ctx: CContext, index: Sequence[str], element: str) -> None:
        places, values = list[str](), list[str]()
        for arg in self.args:
            kind = "%g" if arg.dtype.is_float else "%lld"
            wide = "double" if arg.dtype.is_float else "long long"
            if isinstance(arg, RegisterTensor):
                places.append(f"[{', '.join(['%lld'] * len(index))}] {kind}")
                values += [*(f"(long long)({i})" for i in index), f"({wide})({element})"]
            else:
                places.append(kind)
                values.append(f"({wide})({ctx.scalar(arg)})")
        parts = [json.dumps(part.replace("%", "%%"))[1:-1] for part in literals(self.format)]
        text = parts[0] + "".join(place + part for place, part in zip(places, parts[1:], strict=True))
        quoted = f'"{text}\\n"'
        ctx.writer.line(f"printf({', '.join([quoted, *values])}); fflush(stdout);")

    def _call(self, ctx: EmitContext, guard: Reg | None, element: Sequence[Reg]) -> None:
        """One call of vprintf by the threads where `guard` holds; `element`: index and value of the tile's element."""
        b, places, values = ctx.b, list[str](), list[tuple[DataType, Reg]]()
        for arg in self.args:
            if isinstance(arg, RegisterTensor):
                places.append(f"[{', '.join(['%d'] * (len(element) - 1))}] {_conversion(arg.dtype)}")
                values += [(int32, r) for r in element[:-1]] + [(arg.dtype, element[-1])]
            else:
                places.append(_conversion(arg.dtype))
                values.append((arg.dtype, _scalar(ctx, arg)))
        escaped = [part.replace("%", "%%") for part in literals(self.format)]
        text = escaped[0] + "".join(place + part for place, part in zip(places, escaped[1:], strict=True))
        end = b.label("printed")
        with b.scope():
            if guard is not None:
                b.branch(end, Guard(guard, negated=True), uniform=False)
            arguments = _store_arguments(ctx, values)
            text_address = b.emit("cvta.global.u64", b.emit("mov.u64", ctx.string(f"{text}\n")))
            list_address = b.emit("cvta.local.u64", b.emit("mov.u64", arguments))
            b.call("vprintf", text_address, list_address)
            b.place(end)


def _of_block(value: Array, block: Sequence[int]) -> Array:
    """The value of one block of an array [gx, gy, gz, ...] whose leading axes have size 1 where it is the same for all."""
    return value[tuple(0 if n == 1 else i for i, n in zip(block, value.shape[:3], strict=True))]


def _text(dtype: DataType, value: Any) -> str:
    return f"{float(value):g}" if dtype.is_float else str(int(value))


def _conversion(dtype: DataType) -> str:
    return "%g" if dtype.is_float else "%d" if dtype.is_signed else "%u"


def _words(ctx: EmitContext, tile: RegisterTensor) -> list[Reg]:
    """One 32-bit register per slot: f32 or an integer."""
    words = ctx.words(tile)
    if tile.dtype == boolean:
        return [ctx.b.emit("selp.b32", Imm(1), Imm(0), word) for word in words]
    wide = f32 if tile.dtype.is_float else int32 if tile.dtype.is_signed else uint32
    return ctx.cast(tile.dtype, wide, words, ctx.layout(tile).num_locals)


def _scalar(ctx: EmitContext, expr: Expr) -> Reg:
    if expr.dtype == boolean:
        return ctx.b.emit("selp.b32", Imm(1), Imm(0), ctx.scalars.pred(expr))
    value = ctx.scalars.value(cast(expr, f32) if expr.dtype.is_float else expr)
    return value if isinstance(value, Reg) else ctx.b.emit("mov.b32", value)


def _store_arguments(ctx: EmitContext, values: Sequence[tuple[DataType, Reg]]) -> Symbol:
    """The values as C's variable arguments: floats as doubles, each at its natural alignment."""
    memory = ctx.local_memory(8 * max(1, len(values)))
    end = 0
    for dtype, reg in values:
        size = 8 if dtype.is_float else 4
        end = -(-end // size) * size
        word = ctx.b.emit("cvt.f64.f32", reg) if dtype.is_float else reg
        ctx.b.emit_to(f"st.local.b{8 * size}", Address(memory, end), word)
        end += size
    return memory


@builtin
def print(b: IRBuilder, text: str, *args: RegisterTensor | Expr | Number) -> None:
    """Print a line per block, with a value for each `{}`; for debugging.

    With a tile among the values it is a line per element, which shows the element's index in front of its value.
    """
    values = tuple(arg if isinstance(arg, RegisterTensor) else as_expr(arg) for arg in args)
    b.emit(Print(text, values))
