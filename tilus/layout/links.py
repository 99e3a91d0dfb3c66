"""Two layouts of one tile in digits that both share: what a conversion is planned with.

Every dimension is cut where the digits of both layouts allow it. Each piece, a `Link`, then says where its index is found in
the thread or slot number of the source and of the destination. Where both layouts have one digit for a piece (always, when
all sizes are powers of two), its index moves as a whole from one number to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from tilus.layout.digits import Term
from tilus.layout.register import RegisterLayout

WARP_SIZE = 32
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Place:
    """`(n // stride) % size` of the thread or slot number n adds `weight` times its value to the index of a link."""

    is_thread: bool
    stride: int
    size: int
    weight: int

    def read(self, number: IntArray) -> IntArray:
        return number // self.stride % self.size * self.weight

    def write(self, index: IntArray) -> IntArray:
        """The part of the number that an index of the link decides."""
        return index // self.weight % self.size * self.stride


@dataclass(frozen=True, slots=True)
class Link:
    """A piece of a dimension with `extent` indices, and the places that hold it in both layouts."""

    extent: int
    src: tuple[Place, ...]
    dst: tuple[Place, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the index is one digit on either side."""
        return len(self.src) == len(self.dst) == 1

    @property
    def is_slot_to_slot(self) -> bool:
        return self.is_whole and not self.src[0].is_thread and not self.dst[0].is_thread

    def cut(self, inner: int) -> tuple[Link, Link]:
        """(outer, inner) of a whole link, the inner one with `inner` indices."""
        parts: list[tuple[Place, Place]] = []
        for place in (self.src[0], self.dst[0]):
            outer = Place(place.is_thread, place.stride * inner, place.size // inner, 1)
            parts.append((outer, Place(place.is_thread, place.stride, inner, 1)))
        (outer_src, inner_src), (outer_dst, inner_dst) = parts
        return (
            Link(self.extent // inner, (outer_src,), (outer_dst,)),
            Link(inner, (inner_src,), (inner_dst,)),
        )


@dataclass(frozen=True)
class Links:
    """All links of a conversion, and what replicates: (stride, size) of digits of thread and slot numbers without index."""

    links: tuple[Link, ...]
    num_threads: int
    src_replicas: tuple[tuple[int, int], ...]
    dst_replicas: tuple[tuple[int, int], ...]
    dst_slot_replicas: tuple[tuple[int, int], ...]

    def source(self, threads: IntArray, slots: IntArray) -> tuple[IntArray, IntArray]:
        """(thread, slot) of the source for destination numbers that broadcast together.

        Of the replicas in threads it is the one with the reading thread's own replica digits: the thread itself if that
        holds the element.
        """
        shape = np.broadcast_shapes(threads.shape, slots.shape)
        thread, slot = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for stride, size in self.src_replicas:
            thread = thread + threads // stride % size * stride
        for link in self.links:
            index = sum((p.read(threads if p.is_thread else slots) for p in link.dst), np.zeros((), np.int64))
            for place in link.src:
                if place.is_thread:
                    thread = thread + place.write(index)
                else:
                    slot = slot + place.write(index)
        return thread, slot


def link_layouts(src: RegisterLayout, dst: RegisterLayout) -> Links:
    """The links of two layouts of the same tile and threads."""
    links: list[Link] = []
    for dim, extent in enumerate(src.shape):
        places = [
            [(thread, t) for thread, terms in ((True, x.thread_terms), (False, x.local_terms)) for t in terms if t.dim == dim]
            for x in (src, dst)
        ]  # fmt: skip
        cuts = _cuts(places[0] + places[1], extent)
        for low, high in pairwise(cuts):
            links.append(Link(high // low, _between(places[0], low, high), _between(places[1], low, high)))
    return Links(
        tuple(links),
        src.num_threads,
        _replicas(src.thread_terms),
        _replicas(dst.thread_terms),
        _replicas(dst.local_terms),
    )


def _replicas(terms: Iterable[Term]) -> tuple[tuple[int, int], ...]:
    """Replication digits, cut at the end of the warp where that is possible."""
    return tuple(part for t in terms if t.dim is None for part in _cut_at_warp(t.stride, t.size))


def _cut_at_warp(stride: int, size: int) -> list[tuple[int, int]]:
    inside = _lanes(stride, size)
    return [(stride, size)] if inside is None else [(stride, inside), (stride * inside, size // inside)]


def _lanes(stride: int, size: int) -> int | None:
    """The part of a thread digit inside of a warp, if it can be cut there."""
    if stride >= WARP_SIZE or stride * size <= WARP_SIZE or WARP_SIZE % stride:
        return None
    inside = WARP_SIZE // stride
    return None if size % inside else inside


def _cuts(digits: Sequence[tuple[bool, Term]], extent: int) -> list[int]:
    """Where a dimension can be cut: 1, ..., extent, each a multiple of the one before it."""
    points = {w for _, t in digits for w in (t.weight, t.weight * t.size)}
    for is_thread, t in digits:
        inside = _lanes(t.stride, t.size) if is_thread else None
        if inside is not None:
            points.add(t.weight * inside)
    cuts = [1]
    for point in sorted(points):
        if point % cuts[-1] == 0 and point > cuts[-1] and all(_can_cut(t, point) for _, t in digits):
            cuts.append(point)
    return cuts if cuts[-1] == extent else [*cuts, extent]


def _can_cut(term: Term, point: int) -> bool:
    low, high = term.weight, term.weight * term.size
    if low >= point:
        return low % point == 0
    if high <= point:
        return point % high == 0
    return point % low == 0 and high % point == 0


def _between(digits: Sequence[tuple[bool, Term]], low: int, high: int) -> tuple[Place, ...]:
    """The places of the piece between two cuts, innermost first."""
    places: list[Place] = []
    for is_thread, term in sorted(digits, key=lambda digit: digit[1].weight):
        start, end = max(term.weight, low), min(term.weight * term.size, high)
        if start < end:
            places.append(Place(is_thread, term.stride * (start // term.weight), end // start, start // low))
    return tuple(places)


def within_warp(links: Links) -> Links | None:
    """The conversion of one warp's part of the tile, where all warps do the same with parts of their own; else None.

    That is so when the digits that number the warps are the same in both layouts.
    """
    rest: list[Link] = []
    for link in links.links:
        threads = [p for p in (*link.src, *link.dst) if p.is_thread and p.stride * p.size > WARP_SIZE]
        if not threads:
            rest.append(link)
        elif not link.is_whole or len(threads) != 2 or threads[0] != threads[1] or threads[0].stride < WARP_SIZE:
            return None
    src_outer, src_inner = _split_replicas(links.src_replicas)
    dst_outer, dst_inner = _split_replicas(links.dst_replicas)
    if src_outer != dst_outer or any(stride < WARP_SIZE for stride, _ in src_outer):
        return None
    return Links(tuple(rest), WARP_SIZE, src_inner, dst_inner, links.dst_slot_replicas)


Replicas = tuple[tuple[int, int], ...]


def _split_replicas(replicas: Replicas) -> tuple[Replicas, Replicas]:
    """Those that reach beyond a warp, and those inside."""
    outer = tuple((stride, size) for stride, size in replicas if stride * size > WARP_SIZE)
    return outer, tuple(part for part in replicas if part not in outer)


@dataclass(frozen=True)
class Units:
    """Elements that travel together: `count` of them, in one slot run of the source and one of the destination.

    links: what is left to move, unit by unit. src_slots, dst_slots: the first slot of every unit. src_offsets, dst_offsets:
    of the elements of a unit relative to it. dst_copies: of a unit in one destination thread, relative to the first.
    """

    links: Links
    count: int
    src_slots: tuple[int, ...]
    dst_slots: tuple[int, ...]
    src_offsets: tuple[int, ...]
    dst_offsets: tuple[int, ...]
    dst_copies: tuple[int, ...]


def group_units(links: Links, max_count: int) -> Units:
    """Join up to `max_count` elements, those first that are neighbours in both layouts.

    Slots of the source that hold an element twice are read once.
    """
    units: list[Link] = []
    rest: list[Link] = []
    for link in sorted(links.links, key=_distance):
        inner = 1
        if link.is_slot_to_slot:
            room = max_count // prod(unit.extent for unit in units)
            inner = max(n for n in range(1, room + 1) if link.extent % n == 0)
        if inner == 1:
            rest.append(link)
            continue
        outer, unit = link.cut(inner)
        units.append(unit)
        rest += [outer] if outer.extent > 1 else []
    units.sort(key=lambda unit: unit.src[0].stride)
    return Units(
        Links(tuple(rest), links.num_threads, links.src_replicas, links.dst_replicas, links.dst_slot_replicas),
        prod(unit.extent for unit in units),
        _numbers((p.stride, p.size) for link in rest for p in link.src if not p.is_thread),
        _numbers((p.stride, p.size) for link in rest for p in link.dst if not p.is_thread),
        offsets((unit.src[0].stride, unit.extent) for unit in units),
        offsets((unit.dst[0].stride, unit.extent) for unit in units),
        _numbers(links.dst_slot_replicas),
    )


def _distance(link: Link) -> int:
    return link.src[0].stride + link.dst[0].stride


def offsets(digits: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The numbers that digits (stride, size) count through, the first digit fastest."""
    result = [0]
    for stride, size in digits:
        result = [base + stride * value for value in range(size) for base in result]
    return tuple(result)


def _numbers(digits: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    return offsets(sorted(digits))
