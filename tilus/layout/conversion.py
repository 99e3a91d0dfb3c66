"""How a tile moves from one register layout to another: every way with its cost, and the cheapest of them.

A tile is renamed or permuted inside of its threads, shuffled inside of its warps, or goes through scratch memory. Costs are the
cycles in which a warp occupies its quarter of a multiprocessor. Registers: see word_program. Shared memory moves 128 bytes a
clock and multiprocessor (CUDA C++ Best Practices Guide, "Shared Memory and Memory Banks"), so that a wavefront is 4 cycles of
each quarter. The weights of barriers stand for the wait of a warp that has nothing else to do; they are estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tilus.layout.broadcast import slot_map
from tilus.layout.errors import LayoutError
from tilus.layout.links import WARP_SIZE, Units, group_units, link_layouts, within_warp
from tilus.layout.register import RegisterLayout
from tilus.layout.scratch_plan import ScratchPlan, Side, plan_in_scratch
from tilus.layout.shuffle_plan import plan_in_registers, warp_traffic
from tilus.layout.word_program import (
    ALU_CYCLES,
    WORD_NBITS,
    Program,
    ProgramBuilder,
    Select,
    gather_string,
    pick_fields,
    words_of,
)

WAVEFRONT_CYCLES = 4
BLOCK_BARRIER_CYCLES = 32
WARP_BARRIER_CYCLES = 8


@dataclass(frozen=True)
class RegisterWay:
    """A conversion that needs no memory: one program."""

    program: Program
    nbits: int

    @property
    def cycles(self) -> float:
        return self.program.cycles(2 if self.nbits == 64 else 1)

    @property
    def name(self) -> str:
        if not self.program.operations:
            return "renaming"
        if self.program.rounds:
            return "shuffles"
        return "selects" if self.program.count(Select) else "permutes"

    def __str__(self) -> str:
        rounds, selects = self.program.rounds, self.program.count(Select)
        others = len(self.program.operations) - rounds - selects
        counts = [("shuffle", rounds), ("select", selects), ("permute", others)]
        what = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts if n)
        return f"{what}, {self.cycles:g} cycles" if what else "free: registers are renamed"


@dataclass(frozen=True)
class ScratchWay:
    """A conversion through scratch memory: a program that makes the words of every store, vector after vector, and one that
    makes the tile of the loaded words."""

    scratch: ScratchPlan
    pack: Program
    unpack: Program

    @property
    def cycles(self) -> float:
        barrier = WARP_BARRIER_CYCLES if self.scratch.is_per_warp else BLOCK_BARRIER_CYCLES
        operations = len(self.pack.operations) + len(self.unpack.operations) + self.scratch.num_narrow
        return ALU_CYCLES * operations + WAVEFRONT_CYCLES * self.scratch.wavefronts_per_warp + 2 * barrier

    name = "shared memory"

    def __str__(self) -> str:
        plan = self.scratch
        stores, loads = (f"{plan.access_nbytes(side)}-byte" for side in (plan.store, plan.load))
        conflicts = f"{plan.extra_wavefronts} extra wavefronts" if plan.extra_wavefronts else "no bank conflicts"
        place = f"{plan.nbytes} bytes of shared memory{' a warp' if plan.is_per_warp else ''}"
        return f"{place}, {stores} stores, {loads} loads, {conflicts}, {self.cycles:g} cycles"


Way = RegisterWay | ScratchWay


@dataclass(frozen=True)
class ConversionPlan:
    """All ways of one conversion, the cheapest first. slots: the slot of the source for each slot of the destination where one
    map serves all threads; else None."""

    ways: tuple[Way, ...]
    slots: tuple[int, ...] | None

    @property
    def chosen(self) -> Way:
        return self.ways[0]

    def __str__(self) -> str:
        others = "".join(f"; {way.name} would cost {way.cycles:g}" for way in self.ways[1:])
        return f"{self.chosen}{others}"

    @property
    def block_scratch_nbytes(self) -> int:
        """Scratch memory of the whole block that the chosen way needs."""
        way = self.chosen
        return way.scratch.nbytes if isinstance(way, ScratchWay) and not way.scratch.is_per_warp else 0

    @property
    def warp_scratch_nbytes(self) -> int:
        """Scratch memory of its own that each warp needs."""
        way = self.chosen
        return way.scratch.nbytes if isinstance(way, ScratchWay) and way.scratch.is_per_warp else 0


@lru_cache(maxsize=4096)
def plan_conversion(src: RegisterLayout, dst: RegisterLayout, nbits: int) -> ConversionPlan:
    """The ways from `src` to `dst` for a tile of `nbits`-bit elements (1 to 32, or 64), cheapest first.

    Raises LayoutError where the layouts are not of the same tile and threads, or the threads are not whole warps.
    """
    if src.shape != dst.shape or src.num_threads != dst.num_threads:
        raise LayoutError(
            f"a conversion from shape {src.shape} over {src.num_threads} threads to shape {dst.shape} over "
            f"{dst.num_threads} threads; expected the same shape and threads"
        )
    if src.num_threads % WARP_SIZE or not (1 <= nbits <= WORD_NBITS or nbits == 64):
        raise LayoutError(
            f"a conversion of {nbits}-bit elements over {src.num_threads} threads; expected 1 to 32 or 64 bits, and a "
            f"multiple of {WARP_SIZE} threads"
        )
    if (
        src.thread_digits == dst.thread_digits
    ):  # then every thread has all that it needs, in the same slot as the others
        slots = slot_map(dst, src)
        return ConversionPlan((RegisterWay(pick_fields(nbits, words_of(nbits, src.num_locals), slots), nbits),), slots)
    links = link_layouts(src, dst)
    links = within_warp(links) or links
    units = group_units(links, max(1, WORD_NBITS // nbits))
    ways: list[Way] = [through_scratch(units, plan_in_scratch(units, nbits), nbits, src.num_locals)]
    traffic = warp_traffic(units)
    if traffic is not None:
        ways.append(RegisterWay(plan_in_registers(units, traffic, nbits, src.num_locals), nbits))
    return ConversionPlan(tuple(sorted(ways, key=lambda way: way.cycles)), None)


def through_scratch(units: Units, plan: ScratchPlan, nbits: int, num_slots: int) -> ScratchWay:
    """A conversion by a plan of its accesses. nbits: of one element; num_slots: of the source."""
    num_words = words_of(nbits, num_slots)
    packer = ProgramBuilder(num_words)
    stored = [
        (at, units.src_slots[unit] + offset)
        for unit, first in _vector_bits(plan, plan.store)
        for at, offset in zip(_field_bits(units, nbits, first), units.src_offsets, strict=True)
    ]
    pack = packer.finish(
        gather_string(packer, range(num_words), [(at, slot * nbits, nbits) for at, slot in stored], nbits)
    )
    loaded = [
        (units.dst_slots[unit] + offset + copy, at)
        for unit, first in _vector_bits(plan, plan.load)
        for at, offset in zip(_field_bits(units, nbits, first), units.dst_offsets, strict=True)
        for copy in units.dst_copies
    ]
    unpacker = ProgramBuilder(len(plan.load.vectors) * words_per_access(plan, plan.load))
    words = gather_string(
        unpacker, range(unpacker.num_inputs), [(slot * nbits, at, nbits) for slot, at in loaded], nbits
    )
    return ScratchWay(plan, pack, unpacker.finish(words))


def words_per_access(plan: ScratchPlan, side: Side) -> int:
    """Registers of an access: of 64 bits for units of 8 bytes, else of 32."""
    return max(1, plan.access_nbytes(side) // max(4, plan.unit_nbytes))


def _vector_bits(plan: ScratchPlan, side: Side) -> list[tuple[int, int]]:
    """(unit, its first bit in the string of all accessed words); an access starts a word of its own."""
    access_nbits = max(WORD_NBITS, 8 * plan.access_nbytes(side))
    return [
        (unit, number * access_nbits + position * 8 * plan.unit_nbytes)
        for number, vector in enumerate(side.vectors)
        for position, unit in enumerate(vector)
    ]


def _field_bits(units: Units, nbits: int, first: int) -> Sequence[int]:
    return range(first, first + units.count * nbits, nbits)
