"""Views of a thread's bits: tiles by (thread, slot), where layouts of registers decide which bits belong together."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.codegen.c.nest import compacted, nest
from tilus.codegen.c.numbers import code_of_value, value_of_code
from tilus.codegen.c.tile import Array, Leaf, Tile, joined, plain
from tilus.codegen.code_order import CodeOrder, natural_order
from tilus.dtypes import DataType, f16, uint8
from tilus.layout import LayoutError, RegisterLayout, SharedLayout, row_major

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

Table = npt.NDArray[np.int64]


def positions(layout: RegisterLayout) -> Table:
    """The row-major position of what each (thread, slot) holds."""
    table = layout.table()
    if not layout.rank:
        return np.zeros(table.shape[:2], np.int64)
    return np.asarray(np.ravel_multi_index(tuple(np.moveaxis(table, -1, 0)), layout.shape), np.int64)


@lru_cache(maxsize=512)
def _by_thread(layout: SharedLayout, registers: RegisterLayout) -> SharedLayout | None:
    return SharedLayout.try_from_table(layout.table().reshape(-1)[positions(registers)])


@lru_cache(maxsize=512)
def _by_index(layout: SharedLayout, registers: RegisterLayout) -> SharedLayout | None:
    """From a layout of [threads, slots] to one of the tile; of several holders the first counts."""
    flat, addresses = positions(registers).reshape(-1), layout.table().reshape(-1)
    found = np.empty(prod(registers.shape), np.int64)
    found[flat[::-1]] = addresses[::-1]
    return SharedLayout.try_from_table(found.reshape(registers.shape))


def to_threads(ctx: CContext, tile: Tile, registers: RegisterLayout) -> Tile:
    """The tile as [threads, slots]."""
    shape = registers.num_threads, registers.num_locals
    layouts = [_by_thread(leaf.layout, registers) for leaf in tile.leaves]
    if None in layouts:
        tile = ctx.computed(tile, layout=row_major(tile.shape))
        layouts = [_by_thread(leaf.layout, registers) for leaf in tile.leaves]
    return _with_layouts(tile, shape, layouts)


def from_threads(ctx: CContext, tile: Tile, registers: RegisterLayout) -> Tile:
    """The tile that [threads, slots] are the elements of."""
    layouts = [_by_index(leaf.layout, registers) for leaf in tile.leaves]
    if None in layouts:
        tile = ctx.computed(tile, layout=row_major(tile.shape))
        layouts = [_by_index(leaf.layout, registers) for leaf in tile.leaves]
    return _with_layouts(tile, registers.shape, layouts)


def _with_layouts(tile: Tile, shape: tuple[int, ...], layouts: list[SharedLayout | None]) -> Tile:
    leaves = [
        Leaf(leaf.source, layout) for leaf, layout in zip(tile.leaves, layouts, strict=True) if layout is not None
    ]
    if len(leaves) != len(layouts):
        raise LayoutError("the digits of a register layout did not give a memory layout")
    return Tile(tile.dtype, shape, tuple(leaves), tile.combine, tile.unrounded, tile.is_plain)


def thread_bytes(ctx: CContext, tile: Tile, registers: RegisterLayout, unit: int) -> tuple[str, SharedLayout]:
    """The bits of each thread as bytes: an array, and the place of byte (thread, n) in it, units of `unit` bytes in a run."""
    by_thread = to_threads(ctx, tile, registers)
    leaf = by_thread.array
    if tile.dtype == uint8 and leaf is not None and _has_runs(leaf.layout, unit):
        return leaf.name, leaf.layout
    threads, slots = by_thread.shape
    if tile.dtype == uint8:
        made = ctx.computed(by_thread, "bytes", row_major(by_thread.shape))
        return made.leaves[0].name, made.leaves[0].layout
    nbytes = slots * tile.dtype.nbits // 8
    buffer = ctx.array(uint8, threads * nbytes, "bytes")
    ctx.needs_values_of(tile.dtype)
    source = ctx.as_array(by_thread)
    with ctx.writer.loops([threads, slots]) as (t, s):
        place = " + ".join(f"({i}) * {n}" for i, n in ((t, slots), (s, 1)))
        value = source.source.element(address(source.layout, t, s))
        code = code_of_value(tile.dtype, value)
        if tile.dtype.nbits < 8:
            ctx.writer.line(f"tl_set_field({buffer.name}, ({place}) * {tile.dtype.nbits}, {tile.dtype.nbits}, {code});")
        else:
            kind = f"uint{tile.dtype.nbits}_t"
            ctx.writer.line(
                f"{{ {kind} code = {code}; memcpy({buffer.name} + ({place}) * {tile.dtype.nbits // 8}, &code, sizeof code); }}"
            )
    return buffer.name, row_major((threads, nbytes))


def address(layout: SharedLayout, *index: str) -> str:
    """An element's place, of an index in C."""
    parts = [
        f"({i}) / {t.weight} % {t.size} * {t.stride}"
        for i, terms in zip(index, layout.terms)
        for t in terms
        if t.stride
    ]
    return " + ".join([str(layout.origin), *parts])


def _has_runs(layout: SharedLayout, unit: int) -> bool:
    table = layout.table()
    if table.shape[1] % unit:
        return False
    units = table.reshape(table.shape[0], -1, unit)
    return bool((np.diff(units, axis=-1) == 1).all())


class Words:
    """Values whose codes of 16 or 32 bits start at any byte of an array; addresses count bytes."""

    is_array = False

    def __init__(self, array: str, dtype: DataType) -> None:
        self.array = array
        self.dtype = dtype

    def element(self, address: str) -> str:
        return value_of_code(self.dtype, f"tl_u{self.dtype.nbits}({self.array} + {address})")

    def unpacked(self, ctx: CContext, leaf: Leaf) -> Leaf:
        """Runs of f16 as values, since scalar conversions of f16 do not vectorise."""
        if self.dtype != f16:
            return leaf
        return unpacked_words(ctx, self, leaf)


def unpacked_words(ctx: CContext, words: Words, leaf: Leaf) -> Leaf:
    layout = compacted([leaf.layout])
    array = ctx.array(words.dtype, layout.size, "values")
    loops = nest([layout, leaf.layout])
    inner = loops.loops[-1] if loops.loops and not loops.explicit else None
    runs = inner is not None and inner.strides == (1, 2)
    outer = loops.loops[:-1] if runs else loops.loops
    with ctx.writer.loops([loop.size for loop in outer]) as counters:
        if runs and inner is not None:
            ends = [*counters, "0"]
            source = f"(const uint16_t *)({words.array} + {loops.address(1, ends)})"
            ctx.writer.line(f"tl_load_f16({array.name} + {loops.address(0, ends)}, {source}, {inner.size});")
        else:
            value = words.element(f"({loops.address(1, counters)})")
            ctx.writer.line(f"{array.name}[{loops.address(0, counters)}] = {value};")
    return Leaf(array, layout)


def pack(
    ctx: CContext, tile: Tile, src: RegisterLayout, order: CodeOrder, dtype: DataType, out: RegisterLayout
) -> Tile:
    """Each thread's codes, in the order of its slots, as the bits of their packed order (`tilus.pack_codes`)."""
    nbits, slots, threads = tile.dtype.nbits, src.num_locals, src.num_threads
    ctx.needs_values_of(tile.dtype)
    codes = ctx.as_array(to_threads(ctx, tile, src))
    nbytes = slots * nbits // 8
    buffer = ctx.array(uint8, threads * nbytes, "packed").name
    name = f"places_{tile.dtype.name}_{hashlib.sha256(repr(order.places).encode()).hexdigest()[:8]}"
    ctx.table(name, f"static const uint16_t {name}[] = {{{', '.join(map(str, order.places))}}};")
    ctx.writer.line(f"memset({buffer}, 0, {threads * nbytes});")
    with ctx.writer.loops([threads, slots]) as (t, s):
        code = code_of_value(tile.dtype, codes.source.element(address(codes.layout, t, s)))
        ctx.writer.line(f"const uint32_t code = {code};")
        with ctx.writer.block(f"for (int64_t bit = 0; bit < {nbits}; bit++)"):
            chunk = f"({s}) / {order.chunk} * {order.chunk * nbits}"
            place = f"({t}) * {8 * nbytes} + {chunk} + {name}[({s}) % {order.chunk} * {nbits} + bit]"
            ctx.writer.line(f"const int64_t place = {place};")
            ctx.writer.line(f"{buffer}[place >> 3] |= (uint8_t)((code >> bit & 1) << (place & 7));")
    return _elements(ctx, buffer, row_major((threads, nbytes)), dtype, out)


def view(ctx: CContext, tile: Tile, src: RegisterLayout, dtype: DataType, out: RegisterLayout) -> Tile:
    """Each thread's bits of a tile as elements of another type and layout (`tilus.view`)."""
    ctx.needs_values_of(tile.dtype)
    if dtype.nbits != tile.dtype.nbits:
        unit = 4 if dtype.nbits < 8 else dtype.nbits // 8
        return _elements(ctx, *thread_bytes(ctx, tile, src, unit), dtype, out)
    by_thread, old = to_threads(ctx, tile, src), tile.dtype
    if dtype != old:
        ctx.needs_values_of(dtype)
        by_thread = joined(
            dtype, by_thread.shape, [by_thread], lambda e: value_of_code(dtype, code_of_value(old, e[0]))
        )
    return from_threads(ctx, by_thread, out)


def _elements(ctx: CContext, array: str, place: SharedLayout, dtype: DataType, out: RegisterLayout) -> Tile:
    """The bits of threads, whose byte n is at place (thread, n) of an array, as elements of a type."""
    from tilus.codegen.c.codes import Codes

    ctx.needs_values_of(dtype)
    shape = out.num_threads, out.num_locals
    if dtype.nbits < 8:
        codes = Codes.of(array, place, dtype, natural_order(dtype), out.num_locals)
        return from_threads(ctx, plain(dtype, shape, codes, row_major(shape)), out)
    firsts = SharedLayout.try_from_table(place.table()[:, :: dtype.nbits // 8])
    if firsts is None:
        raise LayoutError("the bytes of threads are in no layout")
    source = Array(array) if dtype == uint8 else Words(array, dtype)
    return from_threads(ctx, plain(dtype, shape, source, firsts), out)
