"""Conversions through shared memory: an order of the tile in scratch memory that both sides like.

The units of a tile (see links) lie in mixed-radix order of its links, some of them innermost: a run of links that are slots
makes one access wide. For each choice of the innermost links a few orders are tried, with an XOR swizzle where sizes are
powers of two and with padding; all wavefronts of both sides are counted, and the cheapest order is taken.

Why orders of this kind: let S be the digits of the lanes that store at the same time, and D those of the lanes that load. A
side is free of conflicts when its digits decide the bank. With those of both sides lowest, then the rest of S, then the rest
of D, XOR-ed into S, both sets decide it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from tilus.layout.banks import BANK_NBYTES, NUM_BANKS, wavefronts
from tilus.layout.links import WARP_SIZE, IntArray, Link, Place, Units
from tilus.layout.shared import Swizzle

MAX_ACCESS_NBYTES = 16


@dataclass(frozen=True)
class Side:
    """The stores or the loads of all threads.

    pieces: what each thread digit (stride, size) adds to the address, in units. vectors: for each access of a thread, the
    units of the tile (positions in the list of its slots) that it moves. starts: what the slots add to its address, in units,
    before the swizzle. wavefronts: of all warps together; extra: beyond those that their size needs.
    """

    pieces: tuple[tuple[int, int, int], ...]
    vectors: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    wavefronts: int
    extra: int

    @property
    def width(self) -> int:
        """Units an access moves."""
        return len(self.vectors[0])


@dataclass(frozen=True)
class ScratchPlan:
    """Where the units of a tile lie in scratch memory. unit_nbytes: of one; nbytes: of the whole tile, for one warp if `warps`
    do the same with parts of their own, and else for the block (warps None). replicas: thread digits (stride, size) that must
    be 0 in the thread that stores."""

    unit_nbytes: int
    nbytes: int
    swizzle: Swizzle | None
    store: Side
    load: Side
    replicas: tuple[tuple[int, int], ...]
    num_threads: int

    @property
    def is_per_warp(self) -> bool:
        return self.num_threads == WARP_SIZE

    @property
    def extra_wavefronts(self) -> int:
        return self.store.extra + self.load.extra

    @cached_property
    def wavefronts_per_warp(self) -> float:
        return (self.store.wavefronts + self.load.wavefronts) * WARP_SIZE / self.num_threads

    def access_nbytes(self, side: Side) -> int:
        return self.unit_nbytes * side.width

    @property
    def num_narrow(self) -> int:
        """Accesses below 4 bytes, which need an instruction more to reach the halves or bytes of a register."""
        sides = (self.store, self.load)
        return sum(len(side.vectors) for side in sides if self.access_nbytes(side) < BANK_NBYTES)


@dataclass(frozen=True)
class Order:
    """Links from the innermost to the outermost and the stride of each, in units."""

    links: tuple[Link, ...]
    strides: tuple[int, ...]
    swizzle: Swizzle | None = None


def unit_size(units: Units, nbits: int) -> int:
    """Bytes of a unit in memory: the next power of two."""
    return max(1, 1 << (units.count * nbits - 1).bit_length() >> 3)


def plan_in_scratch(units: Units, nbits: int) -> ScratchPlan:
    """The order of least wavefronts. nbits: of one element; a unit is padded to 1, 2, 4 or 8 bytes."""
    unit_nbytes = unit_size(units, nbits)
    choices = [(_least(units, run, unit_nbytes), run, rest) for run, rest in runs(units, unit_nbytes)]
    best: ScratchPlan | None = None
    for least, run, rest in sorted(choices, key=lambda choice: choice[0]):
        if best is not None and rank(best)[0] <= least:
            break  # not even without conflicts could this run do better
        for order in orders(run, rest, unit_nbytes):
            plan = measured(units, order, unit_nbytes)
            if best is None or rank(plan) < rank(best):
                best = plan
            if plan.extra_wavefronts == 0:
                break
    if best is None:
        raise ValueError("there is always an order")
    return best


def rank(plan: ScratchPlan) -> tuple[float, int]:
    """Narrow accesses count half a wavefront more: the cycles of one more instruction."""
    return plan.wavefronts_per_warp + plan.num_narrow / 2, plan.nbytes


def _least(units: Units, run: Sequence[Link], unit_nbytes: int) -> float:
    """No order with this run has a smaller rank: that of accesses free of conflicts."""
    total = 0.0
    copies = prod(size for _, size in units.links.src_replicas)
    for slots, of_source, holders in ((units.src_slots, True, copies), (units.dst_slots, False, 1)):
        width = _run_width(run, of_source)
        nbytes = width * unit_nbytes
        wavefronts = max(1, nbytes // BANK_NBYTES) / holders
        total += len(slots) / width * (wavefronts + (nbytes < BANK_NBYTES) / 2)
    return total


def _run_width(run: Sequence[Link], of_source: bool) -> int:
    """Units of a run that are slots of a side."""
    width = 1
    for link in run:
        if _place(link, of_source).is_thread:
            break
        width *= link.extent
    return width


# ---- orders


def orders(run: Sequence[Link], rest: Sequence[Link], unit_nbytes: int) -> Iterator[Order]:
    """The orders with these innermost links that are worth a count, the likeliest first."""
    width = prod(link.extent for link in run)
    lanes = {side: _low_lanes(side, run, unit_nbytes) for side in (True, False)}
    cut = _cut_lanes(rest, lanes)
    low = {side: [link for link in cut if _is_lane(link, side, lanes[side])] for side in (True, False)}
    both = [link for link in low[True] if link in low[False]]
    for side in (True, False):
        one, other = ([link for link in low[s] if link not in both] for s in (side, not side))
        others = [link for link in cut if link not in (*both, *one, *other)]
        yield from _variants((*run, *both, *one, *other, *others), width, both, (one, other), unit_nbytes)


def runs(units: Units, unit_nbytes: int) -> Iterator[tuple[list[Link], list[Link]]]:
    """Innermost links of an access and the rest: slots of both sides as far as they go, then of the source, of the destination
    or none, the widest first."""
    room = MAX_ACCESS_NBYTES // unit_nbytes
    both, rest = _take(units.links.links, room, lambda link: link.is_slot_to_slot)
    room //= prod(link.extent for link in both)
    while room > 1:
        for of_source in (True, False):
            more, left = _take(rest, room, lambda link, side=of_source: _is_slot_of(link, side))
            if prod(link.extent for link in more) == room:
                yield both + more, left
        room //= 2
    yield both, rest


def _is_slot_of(link: Link, of_source: bool) -> bool:
    """Whether a link is a slot of one side and a thread of the other."""
    return link.is_whole and not _place(link, of_source).is_thread and _place(link, not of_source).is_thread


def _take(links: Sequence[Link], room: int, wanted: Callable[[Link], bool]) -> tuple[list[Link], list[Link]]:
    """Wanted links of together at most `room` indices, a power of two; those first that are low digits on both sides."""
    taken: list[Link] = []
    rest: list[Link] = []
    for link in sorted(links, key=lambda link: link.src[0].stride + link.dst[0].stride):
        size = min(room, link.extent & -link.extent) if wanted(link) else 1
        if size == 1:
            rest.append(link)
            continue
        outer, inner = link.cut(size)
        taken.append(inner)
        rest += [outer] if outer.extent > 1 else []
        room //= size
    return taken, rest


def _place(link: Link, of_source: bool) -> Place:
    return (link.src if of_source else link.dst)[0]


def _low_lanes(of_source: bool, run: Sequence[Link], unit_nbytes: int) -> int:
    """How many lanes of a side access memory at the same time."""
    return NUM_BANKS * BANK_NBYTES // max(BANK_NBYTES, _run_width(run, of_source) * unit_nbytes)


def _cut_lanes(links: Sequence[Link], lanes: dict[bool, int]) -> list[Link]:
    """The links, cut where the lanes that work at the same time end on either side."""
    result = list(links)
    for of_source in (True, False):
        for count in set(lanes.values()):
            result = [part for link in result for part in _cut_at_lane(link, of_source, count)]
    return sorted(result, key=lambda link: _place(link, True).stride)


def _cut_at_lane(link: Link, of_source: bool, lane: int) -> list[Link]:
    place = _place(link, of_source)
    inside = lane // place.stride if link.is_whole and place.is_thread else 0
    if not 1 < inside < link.extent or link.extent % inside:
        return [link]
    outer, inner = link.cut(inside)
    return [inner, outer]


def _is_lane(link: Link, of_source: bool, lanes: int) -> bool:
    place = _place(link, of_source)
    return link.is_whole and place.is_thread and place.stride < lanes


def _variants(
    links: tuple[Link, ...], width: int, both: Sequence[Link], sets: Sequence[Sequence[Link]], unit_nbytes: int
) -> Iterator[Order]:
    """An order with a swizzle, without, and with padding. sets: the lanes of one side only, which follow `both`."""
    strides = _compact_strides(links)
    compact = 1  # how far the address is a string of bits
    for link in links:
        if not link.is_whole or link.extent & (link.extent - 1):
            break
        compact *= link.extent
    base = width * prod(link.extent for link in both)
    fewer, more = sorted(prod(link.extent for link in part) for part in sets)
    if fewer > 1 and base * fewer * more <= compact:
        # Positions of the first set and of the highest bits of the second one are `more` apart, whichever is larger.
        bits = fewer.bit_length() - 1
        yield Order(links, strides, Swizzle(base.bit_length() - 1, bits, more.bit_length() - 1))
    yield Order(links, strides)
    pads = {max(width, BANK_NBYTES // unit_nbytes), MAX_ACCESS_NBYTES // unit_nbytes}
    for position in range(1, len(links)):
        if strides[position] * unit_nbytes >= NUM_BANKS * BANK_NBYTES // 2:
            yield from (Order(links, _padded_strides(links, strides, position, pad)) for pad in sorted(pads))


def _compact_strides(links: Sequence[Link]) -> tuple[int, ...]:
    """Compact strides."""
    return tuple(prod(link.extent for link in links[:k]) for k in range(len(links)))


def _padded_strides(links: Sequence[Link], strides: Sequence[int], position: int, pad: int) -> tuple[int, ...]:
    """The strides with `pad` units after each block of the links before `position`."""
    result = list(strides[:position])
    stride = strides[position] + pad
    for link in links[position:]:
        result.append(stride)
        stride *= link.extent
    return tuple(result)


# ---- what an order costs


def measured(units: Units, order: Order, unit_nbytes: int) -> ScratchPlan:
    """The accesses of an order and their wavefronts."""
    links = units.links
    store = _side(units.src_slots, order, True, unit_nbytes, links.num_threads, links.src_replicas)
    load = _side(units.dst_slots, order, False, unit_nbytes, links.num_threads, ())
    end = 1 + sum((link.extent - 1) * stride for link, stride in zip(order.links, order.strides, strict=True))
    block = 1 if order.swizzle is None else 1 << (order.swizzle.base + order.swizzle.bits)
    nbytes = -(-end // block) * block * unit_nbytes
    return ScratchPlan(unit_nbytes, nbytes, order.swizzle, store, load, links.src_replicas, links.num_threads)


def _side(
    slots: Sequence[int], order: Order, of_source: bool, unit_nbytes: int, num_threads: int,
    replicas: Sequence[tuple[int, int]],
) -> Side:  # fmt: skip
    places = [
        (place, place.weight * stride)
        for link, stride in zip(order.links, order.strides, strict=True)
        for place in (link.src if of_source else link.dst)
    ]
    pieces = tuple((p.stride, p.size, weight) for p, weight in places if p.is_thread)
    starts = _sums([(p.stride, p.size, weight) for p, weight in places if not p.is_thread], np.array(slots))
    width = _width(order, of_source, MAX_ACCESS_NBYTES // unit_nbytes)
    by_address = np.argsort(starts, kind="stable").reshape(-1, width)
    by_slot = by_address[np.argsort(by_address[:, 0], kind="stable")]
    firsts = starts[by_slot[:, 0]]
    threads = np.arange(num_threads)
    addresses = _sums(pieces, threads)[:, None] + firsts
    if order.swizzle is not None:
        addresses = addresses ^ ((addresses & order.swizzle.mask) >> order.swizzle.shift)
    active = np.all([threads // stride % size == 0 for stride, size in replicas], axis=0) if replicas else threads >= 0
    total, extra = count_wavefronts(addresses.T * unit_nbytes, width * unit_nbytes, active)
    return Side(pieces, tuple(map(tuple, by_slot.tolist())), tuple(firsts.tolist()), total, extra)


def _sums(pieces: Sequence[tuple[int, int, int]], numbers: IntArray) -> IntArray:
    result = np.zeros_like(numbers)
    for stride, size, weight in pieces:
        result += numbers // stride % size * weight
    return result


def _width(order: Order, of_source: bool, room: int) -> int:
    """Units at consecutive aligned addresses in consecutive slots: a power of two. A swizzle moves blocks of 2^base units."""
    if order.swizzle is not None:
        room = min(room, 1 << order.swizzle.base)
    width, consumed = 1, 0
    for link, stride in zip(order.links, order.strides, strict=True):
        if stride != width or not link.is_whole or _place(link, of_source).is_thread:
            break
        size = min(room // width, link.extent & -link.extent)
        width, consumed = width * size, consumed + 1
        if size != link.extent:
            break
    return min([width, *(stride & -stride for stride in order.strides[consumed:])])


def count_wavefronts(addresses_nbytes: IntArray, access_nbytes: int, active: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """(wavefronts, those beyond what the size needs) of accesses [access, thread] by all warps; inactive threads take no part."""
    by_warp = addresses_nbytes.reshape(len(addresses_nbytes), -1, WARP_SIZE)
    total = int(wavefronts(by_warp, access_nbytes, active.reshape(-1, WARP_SIZE)).sum())
    lanes = WARP_SIZE * BANK_NBYTES // max(BANK_NBYTES, access_nbytes)
    phases = len(addresses_nbytes) * int(active.reshape(-1, lanes).any(axis=1).sum())
    return total, total - phases
