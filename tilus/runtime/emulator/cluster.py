"""Clusters of blocks: their barrier, and who touches whose shared memory (PTX ISA, "barrier.cluster").

A shared::cluster address is a shared::cta address of the own block, or such an address with the rank of a block of the
cluster, plus one, in its upper bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.clocks import Clock, join
from tilus.runtime.emulator.errors import RaceError

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
RANK_SHIFT = 24
WARP = 32
_IDLE = -1


def rank_field(addresses: Lanes) -> Lanes:
    """Of shared::cluster addresses: rank of the block plus one; 0 for addresses of the own block."""
    return addresses >> RANK_SHIFT & 0xFF


class Clusters:
    """The barrier of every resident cluster, and accesses to shared memory of other blocks."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        count = machine.slots // machine.cluster
        self.phase = np.zeros(count, np.int64)  # completed phases of the barrier
        self.joined = np.full(machine.lanes, _IDLE, np.int64)  # the phase in which a thread arrived, until it waits
        self.waiting = np.zeros(machine.lanes, np.bool_)
        self.resume = np.zeros(machine.lanes, np.int64)
        self.released: list[tuple[int, Mask]] = []
        """Lanes that the barrier has let go since the scheduler last looked, with the pc where they go on."""
        blank = np.zeros(machine.clocks.all_warps, np.int64)
        self.handed: list[Clock] = [blank] * count
        self.completed: list[Clock] = [blank] * count
        self.fenced: dict[int, Clock] = {}  # by warp: what it handed on at its last fence
        shape = (machine.slots, machine.clocks.all_warps)
        self.touched = np.zeros(shape, np.int64)  # clock of the last access of each warp of other blocks
        self.touched_at = np.zeros(shape, np.int64)  # its pc

    def reset(self) -> None:
        self.phase[:] = 0
        self.joined[:] = _IDLE
        self.waiting[:] = False
        self.released.clear()
        self.handed = [np.zeros_like(self.handed[0])] * len(self.handed)
        self.completed = [np.zeros_like(self.completed[0])] * len(self.completed)
        self.fenced.clear()
        self.touched[:] = 0

    def _cluster_of(self, lanes: Lanes) -> Lanes:
        return self.machine.slot_of[lanes] // self.machine.cluster

    def _warps(self, mask: Mask) -> list[Lanes]:
        """The lanes of a mask, warp by warp."""
        lanes = np.flatnonzero(mask)
        return np.split(lanes, np.flatnonzero(np.diff(lanes // WARP)) + 1)

    # The barrier.
    def arrive(self, pc: int, mask: Mask, *, release: bool) -> None:
        again = mask & (self.joined != _IDLE)
        if again.any():
            raise self.machine.fault(
                pc,
                "arrives at the barrier of the cluster a second time",
                int(np.flatnonzero(again)[0]),
                hint="barrier.cluster.wait comes between two arrivals",
            )
        for lanes in self._warps(mask):
            cluster = int(self._cluster_of(lanes[:1])[0])
            clock = self.machine.hand_on(lanes) if release else self._relaxed(lanes)
            self.handed[cluster] = join(self.handed[cluster], clock)
            self.joined[lanes] = self.phase[cluster]
        self.complete()
        self.machine.clocks_moved()

    def _relaxed(self, lanes: Lanes) -> Clock:
        """A relaxed arrival says that the block has started, and what a fence before it says."""
        machine, warp = self.machine, int(lanes[0]) // WARP
        started = np.zeros(machine.clocks.all_warps, np.int64)
        started[machine.column_of[lanes[0]]] = 1
        return join(started, self.fenced[warp]) if warp in self.fenced else started

    def fence(self, lanes: Lanes) -> None:
        """These threads execute a fence of at least cluster scope."""
        mask = np.zeros(self.machine.lanes, np.bool_)
        mask[lanes] = True
        for part in self._warps(mask):
            self.fenced[int(part[0]) // WARP] = self.machine.hand_on(part)
        self.machine.clocks_moved()

    def complete(self) -> None:
        """Complete the phase of clusters of which all threads that are left have arrived."""
        machine = self.machine
        missing = machine.alive & (self.joined != np.repeat(self.phase, machine.lanes // len(self.phase)))
        there = machine.alive & ~missing
        by_cluster = there.reshape(len(self.phase), -1).any(axis=1) & ~missing.reshape(len(self.phase), -1).any(axis=1)
        for cluster in np.flatnonzero(by_cluster).tolist():
            self.phase[cluster] += 1
            self.completed[cluster] = self.handed[cluster]
            self.handed[cluster] = np.zeros_like(self.handed[cluster])
        if by_cluster.any():
            self._wake()

    def _wake(self) -> None:
        ready = np.flatnonzero(self.waiting)
        ready = ready[self.joined[ready] < self.phase[self._cluster_of(ready)]]
        if not ready.size:
            return
        mask = np.zeros(self.machine.lanes, np.bool_)
        mask[ready] = True
        self.waiting &= ~mask
        self._acquire(mask)
        for pc in np.unique(self.resume[ready]).tolist():
            self.released.append((pc, mask & (self.resume == pc)))

    def _acquire(self, mask: Mask) -> None:
        machine = self.machine
        for lanes in self._warps(mask):
            handed = self.completed[int(self._cluster_of(lanes[:1])[0])]
            handed = np.pad(handed, (0, machine.clocks.columns - len(handed)))
            slot, warp = int(machine.slot_of[lanes[0]]), int(machine.warp_of[lanes[0]])
            first = int(lanes[0]) & ~(WARP - 1)
            whole = len(lanes) == np.count_nonzero(machine.alive[first : first + WARP])
            machine.clocks.acquire(slot, warp, lanes, handed, whole_warp=whole)
        self.joined[mask] = _IDLE
        machine.global_shadow.acquire(np.flatnonzero(mask))
        machine.clocks_moved()

    def wait(self, pc: int, mask: Mask) -> list[tuple[int, Mask]]:
        """The lanes that need not wait go on."""
        lanes = np.flatnonzero(mask)
        if (self.joined[lanes] == _IDLE).any():
            raise self.machine.fault(
                pc,
                "waits at the barrier of the cluster without having arrived",
                int(lanes[self.joined[lanes] == _IDLE][0]),
                hint="every barrier.cluster.wait belongs to a barrier.cluster.arrive before it",
            )
        ready = np.zeros_like(mask)
        ready[lanes[self.joined[lanes] < self.phase[self._cluster_of(lanes)]]] = True
        rest = mask & ~ready
        self.waiting |= rest
        self.resume[rest] = pc + 1
        if not ready.any():
            return []
        self._acquire(ready)
        return [(pc + 1, ready if rest.any() else mask)]

    # Shared memory of other blocks.
    def touch(self, pc: int, lanes: Lanes, slots: Lanes, *, remember: bool) -> None:
        """Lanes access the shared memory of blocks that may be others of their cluster. remember: these must not exit
        before they know of it."""
        machine, clocks = self.machine, self.machine.clocks
        foreign = slots != machine.slot_of[lanes]
        if not foreign.any():
            return
        if not clocks.foreign:
            clocks.foreign = True
            machine.clocks_moved()
        pairs = np.unique(np.stack([lanes[foreign] // WARP, slots[foreign], lanes[foreign]]), axis=1)
        firsts = np.flatnonzero(np.any(np.diff(pairs[:2], axis=1, prepend=-1) != 0, axis=0))
        for _, slot, lane in pairs[:, firsts].T.tolist():
            self.check_running(pc, lane, slot)
            if remember:
                column = machine.column_of[lane]
                self.touched[slot, column] = clocks.own_clock(machine.slot_of[lane], machine.warp_of[lane])
                self.touched_at[slot, column] = pc

    def check_running(self, pc: int, lane: int, slot: int) -> None:
        """The accessed block is known to have started and has not exited."""
        machine = self.machine
        of_block = np.flatnonzero(machine.slot_of == slot)
        name = machine.block_name(slot)
        if not machine.alive[of_block].any():
            raise machine.fault(
                pc,
                f"accesses shared memory of block {name}, which has exited",
                lane,
                hint="a block stays until the others are done with its memory: barrier.cluster before the exit",
                kind=RaceError,
            )
        columns, at = np.unique(machine.column_of[of_block]), np.array([[lane]])
        if not machine.clocks.seen(machine.slot_of[at], machine.warp_of[at], at, columns[None]).any():
            raise machine.fault(
                pc,
                f"race: accesses shared memory of block {name}, which need not have started yet",
                lane,
                hint="barrier.cluster.arrive and .wait come first",
                kind=RaceError,
            )

    def check_exit(self, mask: Mask) -> None:
        """Threads have exited; a block that is gone must be ordered after all accesses to its memory."""
        machine = self.machine
        if not machine.clocks.foreign:
            return
        for slot in np.unique(machine.slot_of[np.flatnonzero(mask)]).tolist():
            here = machine.slot_of == slot
            if machine.alive[here].any() or not self.touched[slot].any():
                continue
            known = np.maximum(machine.clocks.clock[slot].max(axis=0), machine.clocks.lane_clock[here].max(axis=0))
            late = np.flatnonzero(self.touched[slot] >= np.maximum(known[: self.touched.shape[1]], 1))
            if late.size:
                raise machine.fault(
                    int(self.touched_at[slot, late[0]]),
                    f"race: accesses shared memory of block {machine.block_name(slot)}, which exits with nothing that "
                    f"orders it after the access",
                    hint="a block stays until the others are done with its memory: barrier.cluster before the exit",
                    kind=RaceError,
                )

    def deadlock_report(self) -> str:
        """Who waits at the barrier of his cluster, and which blocks have not arrived."""
        machine, lines = self.machine, list[str]()
        for cluster in range(len(self.phase)):
            members = machine.slot_of // machine.cluster == cluster
            waiting = np.flatnonzero(self.waiting & members)
            if not waiting.size:
                continue
            missing = machine.alive & members & (self.joined != self.phase[cluster])
            blocks = [machine.block_name(slot) for slot in np.unique(machine.slot_of[missing]).tolist()]
            lines.append(
                f"  barrier of the cluster of block {machine.block_name(cluster * machine.cluster)}: "
                f"{len(waiting)} threads wait at {machine.site_text(int(self.resume[waiting[0]]) - 1)}\n"
                f"    {np.count_nonzero(missing)} threads of blocks {', '.join(blocks)} have not arrived"
            )
        return "\n".join(lines)
