"""Conversions inside of warps: shuffles in as few rounds as there are, with selects before and behind them.

In one round every lane offers one word and reads one word of another lane. Which word a lane offers, and where it puts the
one that it got, may differ from lane to lane: `ProgramBuilder.by_thread`. A schedule numbers the round of every word that
every lane needs; it is valid when no lane has to offer two words in one round. With n_u lanes that a lane reads from, round
`u ^ w` for the word of the u-th of them is valid where w tells apart the lanes that read different words of one lane (a Latin
square); w = the lane's own u puts what a lane keeps into round 0, which is then no round.

No plan that sends words directly from where they are can have fewer rounds than some lane has words to receive, or distinct
words to offer. For layouts of powers of two without replication a schedule reaches this bound; one with a round more may need
fewer selects, and the cheapest is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilus.layout.links import WARP_SIZE, IntArray, Links, Units, offsets
from tilus.layout.word_program import Program, ProgramBuilder, Shuffle, gather_string, words_of


@dataclass(frozen=True)
class Traffic:
    """Who needs what, [threads, units]: the thread and the unit of the source for each unit of the destination."""

    thread: IntArray
    unit: IntArray

    @property
    def stays(self) -> npt.NDArray[np.bool_]:
        return self.thread == np.arange(len(self.thread))[:, None]


def warp_traffic(units: Units) -> Traffic | None:
    """The traffic when every warp already holds all it needs; None when values must cross warps.

    Of several holders of an element the reading thread itself is taken, or else one in its warp.
    """
    links = units.links
    threads = np.arange(links.num_threads)[:, None]
    thread, slot = links.source(threads, np.array(units.dst_slots)[None])
    if np.any(thread // WARP_SIZE != threads // WARP_SIZE):
        thread = _nearest(links, thread, threads)
        if np.any(thread // WARP_SIZE != threads // WARP_SIZE):
            return None
    return Traffic(thread, np.searchsorted(np.array(units.src_slots), slot))


def _nearest(links: Links, thread: IntArray, reader: IntArray) -> IntArray:
    """The holder of the same element in the reader's warp, where there is one."""
    base = thread
    for stride, size in links.src_replicas:
        base = base - thread // stride % size * stride
    for other in offsets(links.src_replicas):
        found = base + other
        thread = np.where(thread // WARP_SIZE != reader // WARP_SIZE, found, thread)
    return thread


def schedules(traffic: Traffic) -> Iterator[IntArray]:
    """Valid numberings of rounds, [threads, units], those with the least selects first."""
    num_units = traffic.thread.shape[1]
    in_order = np.broadcast_to(np.arange(num_units), traffic.thread.shape)
    if _is_valid(traffic, in_order):
        yield in_order
    groups, lane = np.unique(traffic.thread[0], return_inverse=True)
    if len(groups) > 1 and len(groups) & (len(groups) - 1) == 0:
        order = np.argsort(lane, kind="stable")
        rank = np.empty(num_units, np.int64)
        rank[order] = np.arange(num_units) - np.searchsorted(lane[order], lane[order])
        for key in _reader_keys(traffic, lane):
            if key.max() < len(groups):
                candidate = rank * len(groups) + (lane ^ key[:, None])
                if _is_valid(traffic, candidate):
                    yield candidate


def _reader_keys(traffic: Traffic, lane: IntArray) -> Iterator[IntArray]:
    """Numbers that tell apart the readers of one lane: the group that a thread itself is of, or what it reads first."""
    stays = traffic.stays
    if stays.any(axis=1).all():
        yield lane[stays.argmax(axis=1)]
    yield np.unique(traffic.unit[:, 0], return_inverse=True)[1]


def _is_valid(traffic: Traffic, rounds: IntArray) -> bool:
    """Whether each thread is asked for only one word a round; those that it receives have different rounds by construction."""
    moving = ~traffic.stays
    rounds, asked, unit = rounds[moving], traffic.thread[moving], traffic.unit[moving]
    count = int(rounds.max(initial=-1)) + 1
    offers = np.full(traffic.thread.shape[0] * count, -1)
    offers[asked * count + rounds] = unit
    return bool(np.all(offers[asked * count + rounds] == unit))


def coloured(traffic: Traffic) -> IntArray:
    """A valid schedule for any traffic: every word goes to the first round in which its reader and its holder are free.

    Lanes that want the same word share a round where they can.
    """
    rounds = np.zeros(traffic.thread.shape, np.int64)
    received: list[set[int]] = [set() for _ in rounds]
    offered: list[dict[int, int]] = [{} for _ in rounds]
    for unit in range(traffic.unit.shape[1]):
        for reader, (thread, wanted) in enumerate(
            zip(traffic.thread[:, unit].tolist(), traffic.unit[:, unit].tolist())
        ):
            if thread == reader:
                continue
            number = 0
            while number in received[reader] or offered[thread].get(number, wanted) != wanted:
                number += 1
            rounds[reader, unit] = number
            received[reader].add(number)
            offered[thread][number] = wanted
    return rounds


def plan_in_registers(units: Units, traffic: Traffic, nbits: int, num_slots: int) -> Program:
    """The cheapest program over the known schedules, from the words of the source to those of the destination.

    nbits: of one element. num_slots: of the source.
    """
    words_per_value = 2 if nbits == 64 else 1
    candidates = list(schedules(traffic)) or [coloured(traffic)]
    networks = (False, True) if traffic.stays.any() else (False,)
    programs = [
        program_of(units, traffic, rounds, nbits, num_slots, network) for rounds in candidates for network in networks
    ]
    return min(programs, key=lambda program: program.cycles(words_per_value))


def program_of(
    units: Units, traffic: Traffic, rounds: IntArray, nbits: int, num_slots: int, network: bool = False
) -> Program:
    """The program of a schedule. network: words that stay in their thread are selected by rounds like those that move, which
    shares more selects when there are many."""
    builder = ProgramBuilder(words_of(nbits, num_slots))
    packed = _Packed(builder, units, nbits)
    moving = ~traffic.stays
    choices = np.full(rounds.shape, -1)
    for number in np.unique(rounds if network else rounds[moving]).tolist():
        received, served = _exchange(builder, packed, traffic, (rounds == number), moving)
        choices[served] = received
    for reader, unit in zip(*np.nonzero(choices < 0), strict=True):
        choices[reader, unit] = packed.value(int(traffic.unit[reader, unit]))
    values = [builder.by_thread(column) for column in choices.T.tolist()]
    return builder.finish(unpacked(builder, units, nbits, values))


class _Packed:
    """The units of the source, each in a value of its own, made when first asked for."""

    def __init__(self, builder: ProgramBuilder, units: Units, nbits: int) -> None:
        self.builder, self.units, self.nbits = builder, units, nbits
        self.values: dict[int, int] = {}

    def value(self, unit: int) -> int:
        if unit not in self.values:
            first = self.units.src_slots[unit] * self.nbits
            places = [
                (at * self.nbits, first + offset * self.nbits, self.nbits)
                for at, offset in enumerate(self.units.src_offsets)
            ]
            (self.values[unit],) = gather_string(self.builder, range(self.builder.num_inputs), places, self.nbits)
        return self.values[unit]


def _exchange(
    builder: ProgramBuilder,
    packed: _Packed,
    traffic: Traffic,
    now: npt.NDArray[np.bool_],
    moving: npt.NDArray[np.bool_],
) -> tuple[int, npt.NDArray[np.bool_]]:
    """One round: what a thread gets, and for which of the words that it needs this serves, [threads, units].

    A word that stays in its thread is served too where the thread can offer just that word.
    """
    lanes = np.arange(len(now))
    offers = np.full(len(now), -1)
    reader, unit = np.nonzero(now & moving)
    lanes[reader] = traffic.thread[reader, unit]
    offers[lanes[reader]] = traffic.unit[reader, unit]
    keeper, unit = np.nonzero(now & ~moving & (offers < 0)[:, None])
    offers[keeper] = traffic.unit[keeper, unit]
    offered = builder.by_thread([-1 if u < 0 else packed.value(u) for u in offers.tolist()])
    received = builder.value(Shuffle(offered, tuple((lanes % WARP_SIZE).tolist()))) if len(reader) else offered
    keeps = (lanes == np.arange(len(now)))[:, None] & (offers[:, None] == traffic.unit)
    return received, now & (moving | keeps)


def unpacked(builder: ProgramBuilder, units: Units, nbits: int, values: list[int]) -> list[int]:
    """The words of the destination from one value for each of its units."""
    stride = max(32, nbits)  # each unit starts a word of its own
    places = [
        ((first + offset + copy) * nbits, index * stride + at * nbits, nbits)
        for index, first in enumerate(units.dst_slots)
        for at, offset in enumerate(units.dst_offsets)
        for copy in units.dst_copies
    ]
    return gather_string(builder, values, places, nbits)
