"""What instructions ask for while they write C: the values of tiles, arrays for results, scalars, memory."""

from __future__ import annotations

import math
from collections import Counter as Multiset
from collections.abc import Mapping
from dataclasses import dataclass, field

from tilus.codegen.c.memory import GlobalMemory
from tilus.codegen.c.nest import compacted, nest
from tilus.codegen.c.numbers import table_definition, value_nbytes, value_type
from tilus.codegen.c.scalar import scalar
from tilus.codegen.c.tile import Array, Constant, Leaf, Tile, nowhere, plain
from tilus.codegen.c.writer import Writer
from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.ir.expr import Const, Expr, Var
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.layout import SharedLayout, row_major
from tilus.target import CpuTarget

# The thread that launches may have a small stack. Larger arrays than the first, and what would make all of them together larger
# than the second, are static.
MAX_ARRAY_NBYTES = 1 << 17
MAX_STACK_NBYTES = 1 << 19


@dataclass
class CContext:
    """State of the code of one kernel.

    uses: how often each tile is still to be read. layouts: of the storage of mutable tiles. found: in which layouts they were
    assigned, with weights (see `lower`). borrowed: pointers to tiles where they are in global memory. hoisted: declarations
    at the top of the block's function. tables: definitions outside of it.
    """

    target: CpuTarget
    num_threads: int
    writer: Writer
    names: dict[Var, str]
    memory: GlobalMemory
    uses: Multiset[RegisterTensor]
    layouts: Mapping[RegisterTensor, SharedLayout]
    tiles: dict[RegisterTensor, Tile] = field(default_factory=dict[RegisterTensor, Tile])
    found: dict[RegisterTensor, tuple[int, SharedLayout]] = field(
        default_factory=dict[RegisterTensor, tuple[int, SharedLayout]]
    )
    hoisted: list[str] = field(default_factory=list[str])
    tables: dict[str, str] = field(default_factory=dict[str, str])
    shared: dict[SharedTensor, str] = field(default_factory=dict[SharedTensor, str])
    borrowed: set[str] = field(default_factory=set[str])
    loop_depth: int = 0
    stack_nbytes: int = 0

    # ---- scalars

    def scalar(self, expr: Expr) -> str:
        return scalar(expr, self.names)

    def fixed(self, expr: Expr, hint: str = "s") -> str:
        """A scalar as it is now: a literal, or a constant in C that holds it."""
        text = self.scalar(expr)
        if isinstance(expr, Const):
            return text
        return self.let("float" if expr.dtype.is_float else "int64_t", hint, text)

    def let(self, kind: str, hint: str, text: str) -> str:
        """A new C constant."""
        name = self.writer.name(hint)
        self.writer.line(f"const {kind} {name} = {text};")
        return name

    def define_scalar(self, var: Var, text: str) -> None:
        name = self.names[var] = self.writer.name(var.name)
        self.writer.line(f"const {'float' if var.dtype.is_float else 'int64_t'} {name} = {text};")

    # ---- tiles

    def read(self, tensor: RegisterTensor) -> Tile:
        """The tile's value, which may still be an expression."""
        found = self.tiles.get(tensor)
        if found is None:
            raise TilusError(
                f"the tile {tensor.name} is read before it has a value", hint="assign it before the branch or loop"
            )
        self.uses[tensor] -= 1
        return found

    def read_array(self, tensor: RegisterTensor) -> Leaf:
        """The tile as values in memory, under whatever layout."""
        return self.as_array(self.read(tensor), tensor.name)

    def as_array(self, tile: Tile, hint: str = "t") -> Leaf:
        if tile.is_plain:
            tile = self.simplified(tile)
        return tile.array or self.computed(tile, hint).leaves[0]

    def define(self, tensor: RegisterTensor, tile: Tile) -> None:
        """Give a tile its value. An expression that is read once stays one; storage of a variable is written."""
        if tensor.mutable:
            self._assign(tensor, tile)
        elif tile.is_plain or self.uses[tensor] == 1:
            self.tiles[tensor] = tile
        else:
            self.tiles[tensor] = self.computed(tile, tensor.name)

    def computed(self, tile: Tile, hint: str = "t", layout: SharedLayout | None = None) -> Tile:
        """The tile as a new array; by default in the order of its first leaf, so that it is read in runs."""
        tile = self.simplified(tile)
        target = layout or compact_like(tile)
        array = self.array(tile.dtype, target.size, hint)
        self.copy(Leaf(array, target), tile)
        return plain(tile.dtype, tile.shape, array, target)

    def array(self, dtype: DataType, size: int, hint: str, storage: object = None) -> Array:
        """A new array of values in the present scope."""
        name = self.writer.name(hint)
        self.writer.line(self._declaration(dtype, size, name))
        return Array(name, storage)

    def hoisted_array(self, dtype: DataType, size: int, hint: str, storage: object) -> Array:
        """A new array in the scope of the whole block."""
        name = self.writer.name(hint)
        self.hoisted.append(self._declaration(dtype, size, name))
        return Array(name, storage)

    def _declaration(self, dtype: DataType, size: int, name: str) -> str:
        nbytes = size * value_nbytes(dtype)
        where = ""
        if nbytes > MAX_ARRAY_NBYTES or self.stack_nbytes + nbytes > MAX_STACK_NBYTES:
            where = "static _Thread_local "
        else:
            self.stack_nbytes += nbytes
        return f"{where}{value_type(dtype)} {name}[{max(1, size)}] __attribute__((aligned(64)));"

    def storage(self, tensor: RegisterTensor) -> Leaf:
        """Where a variable's tile is kept."""
        known = self.tiles.get(tensor)
        if known is not None and known.array is not None:
            return known.array
        layout = self.layouts.get(tensor, row_major(tensor.shape))
        leaf = Leaf(self.hoisted_array(tensor.dtype, layout.size, tensor.name, tensor), layout)
        self.tiles[tensor] = Tile(tensor.dtype, tensor.shape, (leaf,), lambda e: e[0], is_plain=True)
        return leaf

    def _assign(self, tensor: RegisterTensor, tile: Tile) -> None:
        target = self.storage(tensor)
        self.note_layout(tensor, compact_like(tile))
        self.settle(tensor)
        if any(leaf.source == target.source and leaf.layout != target.layout for leaf in tile.leaves):
            tile = self.computed(tile, tensor.name)
        self.copy(target, tile)

    def note_layout(self, tensor: RegisterTensor, layout: SharedLayout) -> None:
        """Remember in which layout a variable would be written without permuting; innermost loops decide."""
        best = self.found.get(tensor)
        if layout.is_injective() and (best is None or self.loop_depth >= best[0]):
            self.found[tensor] = self.loop_depth, layout

    def settle(self, storage: object) -> None:
        """Compute what is still to be read from storage that is about to be overwritten."""
        for tensor, tile in list(self.tiles.items()):
            if (
                tensor is not storage
                and self.uses[tensor] > 0
                and any(isinstance(leaf.source, Array) and leaf.source.storage is storage for leaf in tile.leaves)
            ):
                self.tiles[tensor] = self.computed(tile, tensor.name)

    # ---- loops

    def copy(self, target: Leaf, tile: Tile) -> None:
        """Write every element of a tile to an array."""
        tile = self.simplified(tile)
        loops = nest([target.layout, *(leaf.layout for leaf in tile.leaves)])
        with self.writer.loops([loop.size for loop in loops.loops]) as counters:
            elements = [
                leaf.source.element(loops.address(which, counters)) for which, leaf in enumerate(tile.leaves, start=1)
            ]
            place = target.source.element(loops.address(0, counters))
            self.writer.line(f"{place} = {tile.text(elements)};")

    def simplified(self, tile: Tile) -> Tile:
        """The tile with leaves that take more than a load (packed codes, f16) as arrays, unless it is just that leaf."""
        leaves: list[Leaf] = []
        for leaf in tile.leaves:
            unpack = getattr(leaf.source, "unpacked", None)
            leaves.append(leaf if unpack is None else unpack(self, leaf))
        return Tile(tile.dtype, tile.shape, tuple(leaves), tile.combine, tile.unrounded, tile.is_plain)

    def table(self, name: str, definition: str) -> str:
        """A constant table outside of the function; gives back its name."""
        self.tables[name] = definition
        return name

    def needs_values_of(self, dtype: DataType) -> None:
        """Define the table of a small float type's values, which conversions look up."""
        if dtype.is_float and dtype.nbits <= 8:
            self.table(dtype.name, table_definition(dtype))


def compact_like(tile: Tile) -> SharedLayout:
    """A compact layout whose elements follow each other as in the tile's densest leaf.

    Dims along which no leaf moves (those of a tile of ones) share addresses.
    """
    layouts = [leaf.layout for leaf in tile.leaves if not isinstance(leaf.source, Constant)]
    layouts.sort(key=_distinct, reverse=True)
    return compacted(layouts) if layouts else nowhere(tile.shape)


def _distinct(layout: SharedLayout) -> int:
    """How many elements have an address of their own."""
    return math.prod(d.size for digits in layout.digits for d in digits if d.weight)
