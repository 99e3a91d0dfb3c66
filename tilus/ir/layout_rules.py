"""What an instruction asks of the layouts of its tiles, as data.

A rule lists the *ways* in which its instruction can run; a way gives a layout to every tile of the rule. `infer_layouts`
spreads, chooses and converts by these lists alone: which layouts follow from the known ones, which one an instruction takes
when nothing follows, and what has to be converted are all the question "which way moves the fewest bits?".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from tilus.dtypes import DataType, boolean
from tilus.ir.tensor import RegisterTensor
from tilus.layout import (
    ConversionPlan,
    LayoutError,
    RegisterLayout,
    auto,
    broadcast_operand,
    plan_conversion,
    replicated,
)
from tilus.layout.conversion import WAVEFRONT_CYCLES
from tilus.layout.word_program import ALU_CYCLES, WORD_NBITS

Layouts = Mapping[RegisterTensor, RegisterLayout]
Way = dict[RegisterTensor, RegisterLayout]

# An access of memory takes an addition for its address and a test of its bounds.
OPERATIONS_PER_ACCESS = 2


class LayoutPriority(IntEnum):
    """Whose turn it is to choose when nothing follows from anything: first those that can do with the fewest layouts."""

    MATRIX = 0
    LOAD = 1
    SHARED_LOAD = 2
    STORE = 3
    MOVE = 4
    COMPUTE = 5
    CONSTANT = 6


@dataclass(frozen=True, eq=False)
class LayoutRule:
    """Base of the rules.

    propagates: one known layout decides the others at once; otherwise the instruction waits for its turn to choose.
    renames: a layout in which every thread holds the same elements in another order will do just as well.
    """

    propagates: ClassVar[bool] = False
    renames: ClassVar[bool] = True

    def ways(self, known: Layouts) -> Sequence[Way]:
        """The ways that the known layouts suggest, most natural first; none where they suggest nothing."""
        raise NotImplementedError(f"{type(self).__name__}.ways")

    def defaults(self) -> Sequence[Way]:
        """The ways to choose from when the known layouts suggest none; at least one."""
        return self.ways({})

    def cost(self, way: Layouts) -> int:
        """Cycles in which a warp occupies its quarter of a multiprocessor (see layout.conversion) to run in this way, without
        conversions: an estimate to compare ways."""
        return 0

    def insists(self, known: Layouts) -> Way:
        """The layouts that the instruction would choose before all others, had it known what it gets now."""
        return {}

    def contradiction(self) -> tuple[RegisterTensor, RegisterTensor] | None:
        """Two tiles whose pinned layouts may not differ and do; other tiles are converted when they have to be."""
        return None


@dataclass(frozen=True, eq=False)
class AnyLayout(LayoutRule):
    """Every layout will do, for each tile by itself; a tile that nobody else decides gets the automatic one."""

    tiles: tuple[RegisterTensor, ...]
    num_threads: int

    def ways(self, known: Layouts) -> Sequence[Way]:
        return ({t: known[t] if t in known else auto(t.shape, self.num_threads) for t in self.tiles},)


@dataclass(frozen=True, eq=False)
class Elementwise(LayoutRule):
    """Each element of the result comes from the same (broadcast) element of every operand."""

    propagates = True

    out: RegisterTensor
    operands: tuple[RegisterTensor, ...]
    num_threads: int

    def ways(self, known: Layouts) -> Sequence[Way]:
        anchors = [self.out, *(t for t in self.operands if t.shape == self.out.shape)]
        return [self._way(layout) for layout in dict.fromkeys(known[t] for t in anchors if t in known)]

    def defaults(self) -> Sequence[Way]:
        return [self._way(auto(self.out.shape, self.num_threads))]

    def cost(self, way: Layouts) -> int:
        return num_words(self.out, way[self.out])

    def _way(self, layout: RegisterLayout) -> Way:
        return {**{t: operand_layout(layout, t.shape) for t in self.operands}, self.out: layout}


@dataclass(frozen=True, eq=False)
class Variable(Elementwise):
    """An assignment to the storage of a variable, which has one layout: what the program pins must agree."""

    def contradiction(self) -> tuple[RegisterTensor, RegisterTensor] | None:
        (src,) = self.operands
        if self.out.layout is None or src.layout is None or same_owners(self.out.layout, src.layout):
            return None
        return self.out, src


@dataclass(frozen=True, eq=False)
class Renamed(LayoutRule):
    """The result holds the operand's elements under other indices.

    forward: the result's layout from the operand's; backward: the other way round. Both may raise LayoutError.
    """

    propagates = True

    out: RegisterTensor
    src: RegisterTensor
    forward: Callable[[RegisterLayout], RegisterLayout]
    backward: Callable[[RegisterLayout], RegisterLayout]
    num_threads: int

    def ways(self, known: Layouts) -> Sequence[Way]:
        return list(self._possible(known))

    def _possible(self, known: Layouts) -> Iterator[Way]:
        if self.out in known and (src := _or_none(self.backward, known[self.out])) is not None:
            yield {self.out: known[self.out], self.src: src}
        if self.src in known and (out := _or_none(self.forward, known[self.src])) is not None:
            yield {self.out: out, self.src: known[self.src]}

    def defaults(self) -> Sequence[Way]:
        """The automatic layout of either side, or else threads only along what the first and the last dims have in common."""
        for tile in (self.out, self.src):
            if ways := self.ways({tile: auto(tile.shape, self.num_threads)}):
                return ways
        inner = math.gcd(self.num_threads, self.out.shape[-1], self.src.shape[-1])
        outer = math.gcd(self.num_threads // inner, self.out.shape[0], self.src.shape[0])
        rest = self.out.size // (outer * inner)
        flat = replicated(self.num_threads // (outer * inner), 1).spatial(outer).local(rest).spatial(inner)
        return self.ways({self.out: flat.reshape(self.out.shape)})


@dataclass(frozen=True, eq=False)
class Derived(LayoutRule):
    """The result's layout follows from the operand's; the instruction itself moves its result into any other layout.

    exchange: cycles in which threads exchange what they have of the result, from the layouts of the operand and the result.
    """

    propagates = True

    out: RegisterTensor
    src: RegisterTensor
    forward: Callable[[RegisterLayout], RegisterLayout]
    exchange: Callable[[RegisterLayout, RegisterLayout], int]
    num_threads: int

    def ways(self, known: Layouts) -> Sequence[Way]:
        if self.src not in known:
            return ()
        out = known[self.out] if self.out in known else self.forward(known[self.src])
        return ({self.out: out, self.src: known[self.src]},)

    def cost(self, way: Layouts) -> int:
        return num_words(self.src, way[self.src]) + self.exchange(way[self.src], way[self.out])

    def defaults(self) -> Sequence[Way]:
        return self.ways({self.src: auto(self.src.shape, self.num_threads)})


@dataclass(frozen=True, eq=False)
class Moved(LayoutRule):
    """Both layouts are free: moving the elements from one to the other is what the instruction does."""

    out: RegisterTensor
    src: RegisterTensor
    num_threads: int

    def ways(self, known: Layouts) -> Sequence[Way]:
        if self.out not in known and self.src not in known:
            return ()
        same = known[self.src] if self.src in known else known[self.out]
        return ({self.out: known.get(self.out, same), self.src: same},)

    def cost(self, way: Layouts) -> int:
        return conversion_cost(self.out.dtype, way[self.src], way[self.out])

    def defaults(self) -> Sequence[Way]:
        return self.ways({self.src: auto(self.src.shape, self.num_threads)})


@dataclass(frozen=True, eq=False)
class Access(LayoutRule):
    """A tile that meets memory, in any layout whose threads hold runs of whole bytes.

    preferred: the layout with the widest accesses. access_nbits: the bits that one access of a thread moves in a layout.
    loads: whether the tile comes from memory; only then there is something to gain from choosing early.
    """

    renames = False

    tile: RegisterTensor
    preferred: RegisterLayout
    access_nbits: Callable[[RegisterLayout], int]
    loads: bool

    def ways(self, known: Layouts) -> Sequence[Way]:
        """Where no layout will do, the one that the tile has: the instruction then says what is wrong with it."""
        if self.tile not in known:
            return ({self.tile: self.preferred},)
        candidates = [layout for layout in (known[self.tile], self.preferred) if self.access_nbits(layout) % 8 == 0]
        return [{self.tile: layout} for layout in candidates or [known[self.tile]]]

    def cost(self, way: Layouts) -> int:
        layout = way[self.tile]
        nbits = self.access_nbits(layout)
        count = -(-layout.num_locals * self.tile.dtype.nbits // nbits)
        operations = OPERATIONS_PER_ACCESS + (nbits < WORD_NBITS)  # what is narrow is put into a register by one more
        return count * (ALU_CYCLES * operations + WAVEFRONT_CYCLES * max(1, nbits // WORD_NBITS))

    def insists(self, known: Layouts) -> Way:
        """Single bytes, where the preferred layout has words."""
        narrow = self.loads and self.access_nbits(known[self.tile]) < 16
        return {self.tile: self.preferred} if narrow and self.access_nbits(self.preferred) >= 32 else {}


@dataclass(frozen=True, eq=False)
class OneOf(LayoutRule):
    """A few ways and no other. choices: those for the layouts known so far, best first, each with its cost."""

    choices: Callable[[Layouts], Sequence[tuple[Way, int]]]

    def ways(self, known: Layouts) -> Sequence[Way]:
        return [way for way, _ in self.choices(known)]

    def cost(self, way: Layouts) -> int:
        return next(cost for choice, cost in self.choices(way) if choice == way)


@functools.lru_cache(maxsize=4096)
def operand_layout(layout: RegisterLayout, shape: tuple[int, ...]) -> RegisterLayout:
    """What a result of `layout` needs of an operand of `shape` that broadcasts to it: reduced where that has size 1."""
    pad = layout.rank - len(shape)
    dims = [d for d, n in enumerate((*(1,) * pad, *shape)) if n == 1 and layout.shape[d] != 1]
    result = broadcast_operand(layout, dims) if dims else layout
    for _ in range(pad):
        result = result.squeeze(0)
    return result


def same_owners(a: RegisterLayout, b: RegisterLayout) -> bool:
    """Whether every thread holds the same elements in both layouts of a tile, so that registers need at most new numbers.

    The digits of the threads decide which ones are left to the slots: then `slot_map` exists, in both directions.
    """
    return a.thread_digits == b.thread_digits


def moved(way: Layouts, known: Layouts) -> list[RegisterTensor]:
    """The tiles that must be converted for an instruction to run in this way: operands before it, results after it."""
    return [tile for tile, layout in way.items() if tile in known and not same_owners(known[tile], layout)]


def moved_nbits(way: Layouts, known: Layouts) -> int:
    """The bits of those tiles."""
    return sum(tile.dtype.nbits * tile.size for tile in moved(way, known))


def num_words(tile: RegisterTensor, layout: RegisterLayout) -> int:
    """32-bit registers of a thread that a tile fills in a layout."""
    return -(-layout.num_locals * tile.dtype.nbits // 32)


def tile_conversion(dtype: DataType, src: RegisterLayout, dst: RegisterLayout) -> ConversionPlan:
    """The plan for a tile of `dtype`. Predicates travel as bytes, so that prmt and narrow accesses can move them."""
    return plan_conversion(src, dst, 8 if dtype == boolean else dtype.nbits)


def conversion_cost(dtype: DataType, src: RegisterLayout, dst: RegisterLayout) -> int:
    """Cycles of a warp for the conversion of a tile of `dtype`: what the cheapest way of its plan takes."""
    return math.ceil(tile_conversion(dtype, src, dst).chosen.cycles)


def _or_none(function: Callable[[RegisterLayout], RegisterLayout], layout: RegisterLayout) -> RegisterLayout | None:
    try:
        return function(layout)
    except LayoutError:
        return None
