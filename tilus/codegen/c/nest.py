"""Loops over the elements of a tile, in the order of the memory that is written.

Each dim of the tile is cut into the digits of all layouts that take part, so that every address is linear in the loop counters;
loops that continue each other in all layouts become one, which leaves long runs for the compiler to vectorise.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tilus.layout import Digit, SharedLayout, row_major


@dataclass(frozen=True)
class Loop:
    """A counter of `size` values; strides: what one step adds to the address in each layout. dim, weight: to the index."""

    size: int
    strides: tuple[int, ...]
    dim: int
    weight: int


@dataclass(frozen=True)
class Nest:
    """Loops, outermost first, over the elements of `layouts[0]`. explicit: layouts whose digits do not fit to the others'; their
    addresses are computed from the index."""

    layouts: tuple[SharedLayout, ...]
    loops: tuple[Loop, ...]
    explicit: frozenset[int]

    def address(self, which: int, counters: Sequence[str]) -> str:
        """The address in a layout as a C expression of the counters."""
        layout = self.layouts[which]
        if which not in self.explicit:
            return linear(layout.origin, [loop.strides[which] for loop in self.loops], counters)
        parts: list[str] = []
        for dim, terms in enumerate(layout.terms):
            weights = [loop.weight if loop.dim == dim else 0 for loop in self.loops]
            index = linear(0, weights, counters)
            parts += [f"({index}) / {t.weight} % {t.size} * {t.stride}" for t in terms if t.stride]
        return " + ".join([str(layout.origin), *parts])


def linear(start: int, strides: Sequence[int], counters: Sequence[str]) -> str:
    """start + sum of strides times counters, in C."""
    parts = [
        name if stride == 1 else f"{name} * {stride}"
        for stride, name in zip(strides, counters, strict=True)
        if stride and name != "0"
    ]
    return " + ".join(([str(start)] if start or not parts else []) + parts)


def nest(layouts: Sequence[SharedLayout]) -> Nest:
    """The loops over all elements, of layouts of one shape; the first is the one that is written."""
    loops, explicit = _digits(layouts)
    loops.sort(key=lambda loop: (-loop.strides[0], -max(loop.strides)))
    if not explicit:
        loops = _merged([loop for loop in loops if any(loop.strides)])
    return Nest(tuple(layouts), tuple(loops), explicit)


def compacted(layouts: Sequence[SharedLayout]) -> SharedLayout:
    """The elements one after the other in the order of the first layout; indices that no layout tells apart share an address."""
    loops, explicit = _digits(layouts)
    moving = [loop for loop in loops if any(loop.strides)]
    if explicit:
        return row_major(layouts[0].shape)
    moving.sort(key=lambda loop: (loop.strides[0] or sys.maxsize, *loop.strides[1:], loop.weight))
    steps: dict[tuple[int, int], int] = {}
    size = 1
    for loop in moving:
        steps[loop.dim, loop.weight] = size
        size *= loop.size
    digits = tuple(
        tuple(
            Digit(loop.size, 0, steps.get((dim, loop.weight), 0))
            for loop in sorted((loop for loop in loops if loop.dim == dim), key=lambda loop: -loop.weight)
        )
        for dim in range(layouts[0].rank)
    )
    return SharedLayout(layouts[0].shape, digits)


def _digits(layouts: Sequence[SharedLayout]) -> tuple[list[Loop], frozenset[int]]:
    """A loop for each digit of all layouts that agree, and which ones do not."""
    cuts: list[set[int]] = [{1, extent} for extent in layouts[0].shape]
    explicit: set[int] = set()
    for which, layout in enumerate(layouts):
        finer = [found | _cuts(layout, dim) for dim, found in enumerate(cuts)]
        if all(_is_chain(found) for found in finer):
            cuts = finer
        else:
            explicit.add(which)
    loops = [
        Loop(above // weight, tuple(stride(layout, dim, weight) for layout in layouts), dim, weight)
        for dim, found in enumerate(cuts)
        for weight, above in itertools.pairwise(sorted(found))
    ]
    return loops, frozenset(explicit)


def _cuts(layout: SharedLayout, dim: int) -> set[int]:
    return {place for t in layout.terms[dim] for place in (t.weight, t.weight * t.size)}


def _is_chain(cuts: set[int]) -> bool:
    return all(above % below == 0 for below, above in itertools.pairwise(sorted(cuts)))


def stride(layout: SharedLayout, dim: int, weight: int) -> int:
    """What a step of `weight` along a dim adds to the address, inside of the digit that the weight lies in."""
    for t in layout.terms[dim]:
        if t.weight <= weight < t.weight * t.size:
            return t.stride * (weight // t.weight)
    return 0


def _merged(loops: Sequence[Loop]) -> list[Loop]:
    merged: list[Loop] = []
    for loop in loops:
        outer = merged[-1] if merged else None
        if outer and all(a == b * loop.size for a, b in zip(outer.strides, loop.strides, strict=True)):
            merged[-1] = Loop(outer.size * loop.size, loop.strides, loop.dim, loop.weight)
        else:
            merged.append(loop)
    return merged
