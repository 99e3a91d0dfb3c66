"""mbarrier objects (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier").

An object counts the arrivals and the bytes that its current phase still waits for; when both are zero the phase
completes and the next one begins. A warp that tests an incomplete phase is first told "not yet", so that it must come
back, and then kept waiting: both are what hardware does. Threads that wait cost nothing until the phase completes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.clocks import FIRST_BARRIER, PHASE_ZERO, Clock, join

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
MAX_COUNT = (1 << 20) - 1
"""Of pending arrivals, and of pending bytes in both directions (PTX ISA, "Contents of the mbarrier object")."""


@dataclass(frozen=True, eq=False)
class Handed:
    """What is handed on to threads that acquire it at the scope of the block, and to those that do at that of the cluster."""

    block: Clock
    cluster: Clock

    def joined(self, other: Handed) -> Handed:
        return Handed(join(self.block, other.block), join(self.cluster, other.cluster))


@dataclass(eq=False)
class Mbarrier:
    """One object. place: byte in the data of shared memory; column: its place among the clocks; count: arrivals that a
    phase needs; pending, nbytes: arrivals and bytes that phase number `phase` still waits for (bytes below zero: more
    have landed than were expected so far); landing: the copies on their way, as pcs. arrived, completed: what the arrivals
    of the phase and of all completed ones hand on."""

    place: int
    slot: int
    column: int
    count: int
    init_pc: int
    init_lane: int
    init_clock: int
    pending: int
    arrived: Handed
    completed: Handed
    phase: int = 0
    nbytes: int = 0
    visible: bool = False
    """Whether a fence has made the initialisation visible to the asynchronous proxy."""
    landing: list[int] = field(default_factory=list[int])
    landed: tuple[int, int] | None = None
    """Phase and pc of the last copy that has landed here."""
    known_to: set[int] = field(default_factory=set[int])
    """Warps that are ordered after the initialisation."""
    told: dict[int, int] = field(default_factory=dict[int, int])
    """For each warp, the last phase of which it has been told that it is incomplete."""


@dataclass(eq=False)
class Waiter:
    """Lanes that wait at one instruction for a phase; `resume(lanes, whether it completed)`. by_cluster: acquire at its scope."""

    mask: Mask
    barrier: Mbarrier
    phase: int
    pc: int
    by_cluster: bool
    resume: Callable[[Mask, bool], None]


class Mbarriers:
    """All mbarrier objects of the resident blocks, and who waits at them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.table: dict[int, Mbarrier] = {}
        self.columns: dict[int, int] = {}
        self.waiters: list[Waiter] = []
        self.released: list[tuple[int, Mask]] = []
        """Lanes that go on, with the pc where they do, since the scheduler last looked."""
        self.changes = 0
        self.expired_at = -1

    def reset(self) -> None:
        self.table.clear()
        self.waiters.clear()
        self.released.clear()
        self.changes, self.expired_at = 0, -1

    # Objects.
    def init(self, pc: int, lane: int, place: int, count: int) -> None:
        machine = self.machine
        if place in self.table:
            old = self.machine.site_text(self.table[place].init_pc)
            raise machine.fault(
                pc,
                f"initialises the mbarrier {self.name(place)} a second time\n  first initialised at {old}",
                lane,
                hint="mbarrier.inval comes first",
            )
        if not 1 <= count <= MAX_COUNT:
            raise machine.fault(pc, f"mbarrier for {count} arrivals, expected 1 to {MAX_COUNT}", lane)
        machine.shared_shadow.mark_mbarrier(pc, place, lane)
        slot, warp = int(machine.slot_of[lane]), int(machine.warp_of[lane])
        column = self._column(pc, place)
        blank = Handed(*np.zeros((2, machine.clocks.columns), np.int64))
        clock = int(machine.clocks.clock[slot, warp, machine.clocks.own[slot, warp]])
        self.table[place] = Mbarrier(place, slot, column, count, pc, lane, clock, count, blank, blank)

    def _column(self, pc: int, place: int) -> int:
        """Objects at one place in blocks of different clusters share a column."""
        offset = place % (self.machine.shared.nbytes * self.machine.cluster)
        if offset not in self.columns:
            if len(self.columns) == FIRST_BARRIER:
                raise self.machine.fault(pc, f"more than {FIRST_BARRIER} mbarriers in a block")
            self.columns[offset] = self.machine.clocks.add_column()
            longer = Handed(*np.zeros((2, self.machine.clocks.columns), np.int64))
            for barrier in self.table.values():
                barrier.arrived, barrier.completed = longer.joined(barrier.arrived), longer.joined(barrier.completed)
        return self.columns[offset]

    def inval(self, pc: int, lane: int, place: int) -> None:
        barrier = self.find(pc, lane, place)
        if waiting := [waiter for waiter in self.waiters if waiter.barrier is barrier]:
            raise self.machine.fault(
                pc,
                f"invalidates the mbarrier {self.name(place)} while threads wait at it: "
                + self.machine.site_text(waiting[0].pc),
                lane,
            )
        del self.table[place]
        self.machine.shared_shadow.clear_mbarrier(place)

    def find(self, pc: int, lane: int, place: int) -> Mbarrier:
        """The object at a place, for a thread that is ordered after its initialisation."""
        barrier, machine = self.table.get(place), self.machine
        if barrier is None:
            raise machine.fault(
                pc,
                f"no mbarrier is initialised at {self.name(place)}",
                lane,
                hint="mbarrier.init by one thread and a barrier of the block come first",
            )
        warp, first = lane // 32, int(machine.column_of[barrier.init_lane])
        if warp in barrier.known_to or lane == barrier.init_lane:
            return barrier
        at = np.array([lane])
        seen = machine.clocks.seen(machine.slot_of[at], machine.warp_of[at], at, np.array([first]))
        if int(seen[0]) <= barrier.init_clock:
            raise machine.fault(
                pc,
                f"race: uses the mbarrier {self.name(place)} with nothing that orders it after its initialisation"
                f"\n  initialised by {machine.place(barrier.init_lane)} at {machine.site_text(barrier.init_pc)}",
                lane,
                hint="put a barrier of the block between the two",
            )
        barrier.known_to.add(warp)
        return barrier

    def unseen_copy(self, slot: int) -> int | None:
        """The pc of a copy into a block for whose phase no thread has waited, if there is one."""
        for barrier in self.table.values():
            if barrier.slot != slot or barrier.landed is None:
                continue
            phase, pc = barrier.landed
            if self.machine.clocks.most_seen(slot, barrier.column) <= PHASE_ZERO + phase:
                return pc
        return None

    def agent(self, barrier: Mbarrier) -> int:
        return FIRST_BARRIER + barrier.column - 2 * self.machine.clocks.all_warps

    def publish(self, lanes: Lanes) -> None:
        """These threads fence: what they initialised becomes visible to the asynchronous proxy."""
        for barrier in self.table.values():
            barrier.visible = barrier.visible or bool((lanes == barrier.init_lane).any())

    def name(self, place: int) -> str:
        shared = self.machine.shared
        offset = place % shared.nbytes
        for buffer in shared.buffers:
            if buffer.start <= offset < buffer.start + buffer.nbytes:
                return f"{buffer.name}+{offset - buffer.start}"
        return shared.describe(shared.base + offset)

    # Arrivals and bytes.
    def arrive(self, pc: int, lanes: Lanes, barrier: Mbarrier, count: int, handed: Handed | None) -> None:
        """All of these threads arrive `count` times, one after the other. handed: what they hand on, if anything."""
        left = len(lanes) * count
        while left > 0:
            if handed is not None:
                self._check_in_turn(pc, int(lanes[0]), barrier, handed.block)
            now = min(left, barrier.pending)
            if now == 0 or now % count:
                raise self.machine.fault(
                    pc,
                    f"{left} more arrivals at the mbarrier {self.name(barrier.place)}, but phase {barrier.phase} waits "
                    f"for {barrier.pending} of {barrier.count} only (and for {barrier.nbytes} bytes)",
                    int(lanes[0]),
                    hint="the count of mbarrier.init is too small, or a thread arrives without having waited",
                )
            barrier.pending -= now
            left -= now
            if handed is not None:
                barrier.arrived = barrier.arrived.joined(handed)
            self._settle(pc, barrier, int(lanes[0]))

    def _check_in_turn(self, pc: int, lane: int, barrier: Mbarrier, clock: Clock) -> None:
        """Who arrives must know that the phase before has completed: else the arrival might count for that one."""
        if barrier.phase and clock[barrier.column] < PHASE_ZERO + barrier.phase:
            raise self.machine.fault(
                pc,
                f"race: arrives in phase {barrier.phase} of the mbarrier {self.name(barrier.place)} with nothing that "
                f"orders it after phase {barrier.phase - 1}: it might have arrived in that one",
                lane,
                hint="wait for the phase before, or for something that its waiters signal; or too many threads arrive",
            )

    def expect_more(self, barrier: Mbarrier, count: int) -> None:
        """The current phase waits for more arrivals (cp.async.mbarrier.arrive without .noinc)."""
        barrier.pending += count

    def expect_bytes(self, pc: int, lane: int, barrier: Mbarrier, nbytes: int) -> None:
        barrier.nbytes += nbytes
        self._check_bytes(pc, lane, barrier)
        self._settle(pc, barrier, lane)

    def complete_bytes(self, pc: int, lane: int, barrier: Mbarrier, nbytes: int) -> None:
        barrier.nbytes -= nbytes
        self._check_bytes(pc, lane, barrier)
        self._settle(pc, barrier, lane)

    def _check_bytes(self, pc: int, lane: int, barrier: Mbarrier) -> None:
        if abs(barrier.nbytes) > MAX_COUNT:
            raise self.machine.fault(
                pc,
                f"the mbarrier {self.name(barrier.place)} counts {barrier.nbytes} bytes in phase {barrier.phase}, "
                f"expected {-MAX_COUNT} to {MAX_COUNT}",
                lane,
            )

    def _settle(self, pc: int, barrier: Mbarrier, lane: int) -> None:
        """Complete the phase if nothing is missing any more."""
        self.changes += 1
        if barrier.pending or barrier.nbytes > 0:
            return
        name = self.name(barrier.place)
        if barrier.nbytes < 0:
            raise self.machine.fault(
                pc,
                f"{-barrier.nbytes} bytes more than expected have landed at the mbarrier {name} in phase "
                f"{barrier.phase}, and all have arrived",
                lane,
                hint="the bytes of mbarrier.arrive.expect_tx must be the sum over the copies",
            )
        if barrier.landing:
            raise self.machine.fault(
                pc,
                f"phase {barrier.phase} of the mbarrier {name} completes while copies for it are on their way:\n  "
                + self.machine.site_text(barrier.landing[0]),
                lane,
                hint="mbarrier.arrive.expect_tx must announce the bytes of all copies",
            )
        phase = np.zeros(self.machine.clocks.columns, np.int64)
        phase[barrier.column] = PHASE_ZERO + barrier.phase + 1
        barrier.completed = barrier.completed.joined(barrier.arrived).joined(Handed(phase, phase))
        barrier.arrived = Handed(*np.zeros((2, len(phase)), np.int64))
        barrier.phase += 1
        barrier.pending = barrier.count
        self._wake(barrier)

    # Waiting.
    def _wake(self, barrier: Mbarrier) -> None:
        ready = [waiter for waiter in self.waiters if waiter.barrier is barrier and waiter.phase < barrier.phase]
        if not ready:
            return
        self.waiters = [waiter for waiter in self.waiters if waiter not in ready]
        for waiter in ready:
            self.acquire(waiter.mask, barrier, by_cluster=waiter.by_cluster)
            waiter.resume(waiter.mask, True)
            self.released.append((waiter.pc + 1, waiter.mask))
        self.machine.clocks_moved()

    def acquire(self, mask: Mask, barrier: Mbarrier, *, by_cluster: bool) -> None:
        """What was handed on by the completed phases is ordered before what these lanes of one block do next."""
        machine = self.machine
        handed = barrier.completed.cluster if by_cluster else barrier.completed.block
        lanes = np.flatnonzero(mask)
        for warp in np.unique(machine.warp_of[lanes]).tolist():
            mine = lanes[machine.warp_of[lanes] == warp]
            whole = len(mine) == int(machine.alive[mine[0] & ~31 : (mine[0] & ~31) + 32].sum())
            machine.clocks.acquire(barrier.slot, warp, mine, handed, whole_warp=whole)

    def wait(self, waiter: Waiter, warp: int) -> bool:
        """Threads of one warp find a phase incomplete. False: they are told so and go on."""
        if waiter.barrier.told.get(warp) != waiter.phase:
            waiter.barrier.told[warp] = waiter.phase
            return False
        self.waiters.append(waiter)
        return True

    def parked(self) -> Mask | None:
        """The lanes that wait; None when there are none."""
        masks = [waiter.mask for waiter in self.waiters]
        return np.logical_or.reduce(masks) if masks else None

    def expire(self) -> bool:
        """Nobody can run: waiting threads are told "not yet" once more. False when that has not helped before."""
        if not self.waiters or self.expired_at == self.changes:
            return False
        self.expired_at = self.changes
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.resume(waiter.mask, False)
            self.released.append((waiter.pc + 1, waiter.mask))
        return True

    def deadlock_report(self) -> str:
        """Who waits for which phase, and what it lacks, one line for each waiting instruction and block."""
        machine, lines = self.machine, list[str]()
        for waiter in self.waiters:
            barrier = waiter.barrier
            warps = sorted(set(machine.warp_of[np.flatnonzero(waiter.mask)].tolist()))
            lines.append(
                f"  block {machine.block_name(barrier.slot)}, mbarrier {self.name(barrier.place)}: warps {warps} wait "
                f"for phase {waiter.phase} (parity {waiter.phase & 1}) at {machine.site_text(waiter.pc)}\n"
                f"    phase {barrier.phase} lacks {barrier.pending} of {barrier.count} arrivals and {barrier.nbytes} "
                "bytes"
            )
        return "\n".join(lines)
