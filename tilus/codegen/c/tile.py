"""What is known of a tile while C is written: where its elements come from, before anything is computed.

A tile is an expression over *leaves*. Each leaf is a source (an array, a counter, packed codes ...) and a memory layout from the
tile's index to an address in the source. Renaming a tile (reshape, transpose, select, broadcast) changes the layouts only;
elementwise instructions join expressions; so a chain of them becomes one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tilus.codegen.c.numbers import rounded
from tilus.dtypes import DataType, f32
from tilus.layout import SharedLayout, row_major

Combine = Callable[[Sequence[str]], str]


class Source(Protocol):
    """Elements by address."""

    @property
    def is_array(self) -> bool:
        """Whether an element is no more than a load of a value."""
        ...

    def element(self, address: str) -> str:
        """The value at an address, which is a C expression."""
        ...


@dataclass(frozen=True)
class Array:
    """Values in memory. name: of a pointer or array in C. storage: what is overwritten when the array is (see `settle`)."""

    name: str
    storage: object = None
    is_array = True

    def element(self, address: str) -> str:
        return f"{self.name}[{address}]"


@dataclass(frozen=True)
class Counter:
    """The address itself, plus a start: `arange`."""

    start: str
    is_array = False

    def element(self, address: str) -> str:
        return f"(int32_t)({self.start} + {address})"


@dataclass(frozen=True)
class Constant:
    """The same value everywhere: a variable or literal in C."""

    text: str
    is_array = False

    def element(self, address: str) -> str:
        return self.text


@dataclass(frozen=True)
class Leaf:
    source: Source
    layout: SharedLayout

    @property
    def name(self) -> str:
        """The array in C. Raises: TypeError where the source is none."""
        if not isinstance(self.source, Array):
            raise TypeError(f"{self.source} is no array")
        return self.source.name


@dataclass(frozen=True)
class Tile:
    """`combine` of the leaves' elements, then rounded to `dtype` when `unrounded`.

    is_plain: whether `combine` gives the one leaf's element as it is.
    """

    dtype: DataType
    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    combine: Combine
    unrounded: bool = False
    is_plain: bool = False

    def text(self, elements: Sequence[str]) -> str:
        value = self.combine(elements)
        return rounded(self.dtype, value) if self.unrounded else value

    @property
    def array(self) -> Leaf | None:
        """The leaf, where the tile is an array under some layout."""
        return self.leaves[0] if self.is_plain and self.leaves[0].source.is_array else None

    def renamed(self, shape: Sequence[int], rename: Callable[[SharedLayout], SharedLayout]) -> Tile:
        """Under another shape; `rename` gives each leaf's layout. Raises LayoutError where there is none."""
        leaves = tuple(Leaf(leaf.source, rename(leaf.layout)) for leaf in self.leaves)
        return replace(self, shape=tuple(shape), leaves=leaves)


def plain(dtype: DataType, shape: Sequence[int], source: Source, layout: SharedLayout) -> Tile:
    """A tile whose elements are a source's."""
    return Tile(dtype, tuple(shape), (Leaf(source, layout),), first, is_plain=True)


def first(elements: Sequence[str]) -> str:
    """The `combine` of a tile that is just its leaf."""
    return elements[0]


def constant(dtype: DataType, shape: Sequence[int], text: str) -> Tile:
    """A tile with one value everywhere."""
    return plain(dtype, shape, Constant(text), nowhere(shape))


def nowhere(shape: Sequence[int]) -> SharedLayout:
    """The layout in which all elements have address 0."""
    layout = row_major((1,) * len(shape))
    for dim, extent in enumerate(shape):
        layout = layout.expand(dim, extent)
    return layout


def joined(
    dtype: DataType, shape: Sequence[int], operands: Sequence[Tile], combine: Combine, *, unrounded: bool = False
) -> Tile:
    """An elementwise expression over operands, which are broadcast to `shape`."""
    aligned = [broadcast(tile, shape) for tile in operands]
    counts = [len(tile.leaves) for tile in aligned]

    def join(elements: Sequence[str]) -> str:
        texts: list[str] = []
        start = 0
        for tile, count in zip(aligned, counts, strict=True):
            texts.append(tile.text(elements[start : start + count]))
            start += count
        return combine(texts)

    leaves = tuple(leaf for tile in aligned for leaf in tile.leaves)
    return Tile(dtype, tuple(shape), leaves, join, unrounded and dtype != f32)


def broadcast(tile: Tile, shape: Sequence[int]) -> Tile:
    """The tile repeated along dims of size 1, and along new dims in front."""
    if tile.shape == tuple(shape):
        return tile

    def rename(layout: SharedLayout) -> SharedLayout:
        for _ in range(len(shape) - layout.rank):
            layout = layout.unsqueeze(0)
        for dim, extent in enumerate(shape):
            if layout.shape[dim] != extent:
                layout = layout.expand(dim, extent)
        return layout

    return tile.renamed(shape, rename)
