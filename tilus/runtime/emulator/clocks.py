"""Happens-before between the warps of a cluster of blocks, with one vector clock a warp.

Vector clocks: Lamport 1978; FastTrack, Flanagan and Freund, PLDI 2009. Barriers join the clocks of their warps,
`bar.warp.sync` steps the clock of its own, an arrival at an mbarrier hands the clock of its warp to those who wait for
the phase. An earlier access by warp v at clock c is ordered before warp w now when c < clock[w][v]. Two threads of one
warp are ordered by a step of their clock only: that they run in lockstep is not a promise of the machine.

mbarriers have clocks, too: what lands by an asynchronous copy belongs to no thread, but to a phase of its mbarrier.

A warp is two agents: all that it did, and what it read alone. A release or an acquire at the scope of the block says to those of
other blocks nothing about writes. But what was read is read, wherever that is known; so the memory may be written again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Lanes = npt.NDArray[np.int64]
Clock = npt.NDArray[np.int64]
"""How far each agent has been seen, [columns]: the warps of all blocks of the cluster by rank, their reads in the same order,
then the mbarriers."""

MAX_CLUSTER, MAX_THREADS = 8, 1024
FIRST_BARRIER = MAX_CLUSTER * MAX_THREADS
"""Number of the first mbarrier among the agents; the smaller ones are threads: rank of the block * 1024 + thread."""
PHASE_ZERO = 1 << 28
"""Clock of phase 0 of an mbarrier: above all clocks of warps, so that `floor` never takes it for old."""


def join(first: Clock, second: Clock) -> Clock:
    """The later of two clocks in every column; one may lack columns that were added since."""
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    return np.maximum(longer, np.pad(shorter, (0, len(longer) - len(shorter))))


class WarpClocks:
    """clock[slot, w, v]: how far warp w of the block in `slot` has seen agent v of its cluster.

    own[slot, w]: the column of a warp, that of its reads is `all_warps` further. lane_clock[lane, v]: what this thread
    alone has acquired at an mbarrier; its warp joins in at its next barrier. foreign: whether blocks have touched each
    other's shared memory.
    """

    def __init__(self, slots: int, warps: int, cluster: int) -> None:
        self.all_warps = cluster * warps
        self.clock = np.zeros((slots, warps, 2 * self.all_warps), np.int64)
        self.lane_clock = np.zeros((slots * warps * 32, 2 * self.all_warps), np.int64)
        self.lanes_ahead = self.foreign = False
        self.own = np.arange(slots)[:, None] % cluster * warps + np.arange(warps)
        self.at = np.arange(slots)[:, None], np.arange(warps)[None]
        self.floor = 0

    @property
    def columns(self) -> int:
        return self.clock.shape[2]

    def reset(self) -> None:
        self.clock[:] = 0
        for column in self._columns(self.own):
            self.clock[*self.at, column] = 1
        self.lane_clock[:] = 0
        self.lanes_ahead = self.foreign = False
        self.floor = 0 if self.own.shape[1] > 1 else 1

    def _columns(self, own: Lanes) -> tuple[Lanes, Lanes]:
        """Of all that warps did, and of their reads."""
        return own, own + self.all_warps

    def add_column(self) -> int:
        """A place for one more mbarrier."""
        self.clock = np.concatenate([self.clock, np.zeros_like(self.clock[:, :, :1])], axis=2)
        self.lane_clock = np.concatenate([self.lane_clock, np.zeros_like(self.lane_clock[:, :1])], axis=1)
        return self.columns - 1

    def column_of(self, agents: Lanes) -> Lanes:
        warps = self.own.shape[1]
        threads = (agents // MAX_THREADS) * warps + agents % MAX_THREADS // 32
        return np.where(agents < FIRST_BARRIER, threads, agents - FIRST_BARRIER + 2 * self.all_warps)

    def own_clock(self, slots: Lanes, warps: Lanes) -> Lanes:
        """How often these warps have stepped."""
        return self.clock[slots, warps, self.own[slots, warps]]

    def seen(self, slots: Lanes, warps: Lanes, lanes: Lanes, columns: Lanes) -> Lanes:
        """How far these lanes have seen the agents of these columns; all four broadcast."""
        seen = self.clock[slots, warps, columns]
        return np.maximum(seen, self.lane_clock[lanes, columns]) if self.lanes_ahead else seen

    def most_seen(self, slot: int, column: int) -> int:
        """How far that thread of a block which has seen the most has seen the agent of a column."""
        lanes = self.lane_clock.reshape(len(self.clock), -1, self.columns)[slot, :, column]
        return max(int(self.clock[slot, :, column].max()), int(lanes.max()))

    def barrier(
        self,
        slots: Lanes,
        arriving: npt.NDArray[np.bool_],
        leaving: npt.NDArray[np.bool_],
        handed: dict[int, Clock],
    ) -> None:
        """All that the arriving warps did becomes ordered before what the leaving warps do next.

        slots: the blocks; arriving and leaving: [slots, warps]. handed: by slot, what others have released before.
        """
        if self.lanes_ahead:
            row, warps = np.nonzero(arriving)
            self._join_lanes(slots[row], warps)
        clock = self.clock[slots]
        for column in self._columns(self.own[slots]):
            clock[np.arange(len(slots))[:, None], self.at[1], column] += arriving
        seen = np.where(arriving[:, :, None], clock, 0).max(axis=1, keepdims=True)
        for row, slot in enumerate(slots.tolist()):
            if slot in handed:
                seen[row, 0] = join(seen[row, 0], handed[slot])
        self.clock[slots] = np.where(leaving[:, :, None], np.maximum(clock, seen), clock)

    def warp_barrier(self, slots: Lanes, warps: Lanes) -> None:
        """The threads of each of these warps are ordered among themselves."""
        if self.lanes_ahead:
            self._join_lanes(slots, warps)
        for column in self._columns(self.own[slots, warps]):
            self.clock[slots, warps, column] += 1

    def _join_lanes(self, slots: Lanes, warps: Lanes) -> None:
        """What single threads of these warps have acquired now holds for all of them."""
        by_warp = self.lane_clock.reshape(*self.clock.shape[:2], 32, self.columns)
        joined = np.maximum(self.clock[slots, warps], by_warp[slots, warps].max(axis=1))
        self.clock[slots, warps] = joined
        by_warp[slots, warps] = 0
        self.lanes_ahead = bool(self.lane_clock.any())

    def release(self, slot: int, warp: int, lanes: Lanes) -> Clock:
        """What these threads of one warp hand on: all that is ordered before this moment for them."""
        handed = self.clock[slot, warp].copy()
        if self.lanes_ahead:
            handed = np.maximum(handed, self.lane_clock[lanes].max(axis=0))
        for column in self._columns(self.own[slot, warp]):
            self.clock[slot, warp, column] += 1
            handed[column] = self.clock[slot, warp, column]
        return handed

    def reads_only(self, handed: Clock) -> Clock:
        """What of it reaches the threads of another block that are outside of the scope."""
        reads = handed.copy()
        reads[: self.all_warps] = 0
        return reads

    def phases_seen(self, slot: int, warp: int, lane: int) -> Clock:
        """How far a thread has seen the mbarriers, and nothing of the warps."""
        seen = np.maximum(self.clock[slot, warp], self.lane_clock[lane])
        seen[: 2 * self.all_warps] = 0
        return seen

    def acquire(self, slot: int, warp: int, lanes: Lanes, handed: Clock, *, whole_warp: bool) -> None:
        """What was handed on is ordered before all that these threads of one warp do next."""
        if whole_warp:
            self.clock[slot, warp] = np.maximum(self.clock[slot, warp], handed)
        else:
            self.lane_clock[lanes] = np.maximum(self.lane_clock[lanes], handed)
            self.lanes_ahead = True

    def refresh(self, live: npt.NDArray[np.bool_]) -> None:
        """Recompute `floor`, below which every stamp of a thread is ordered for every live warp. live: [slots, warps]."""
        if self.foreign:
            rows = self.clock[live][:, : self.all_warps]
        else:
            rows = self.clock[self.at[0][:, :, None], self.at[1][:, :, None], self.own[:, None, :]][live]
        self.floor = int(rows.min()) if rows.size else 0
