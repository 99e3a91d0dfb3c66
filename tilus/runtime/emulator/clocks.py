"""Happens-before between the warps of a block, with one vector clock a warp.

Vector clocks: Lamport 1978; FastTrack, Flanagan and Freund, PLDI 2009. Barriers join the clocks of their warps,
`bar.warp.sync` steps the clock of its own, an arrival at an mbarrier hands the clock of its warp to those who wait for
the phase. An earlier access by warp v at clock c is ordered before warp w now when c < clock[w][v]. Two threads of one
warp are ordered by a step of their clock only: that they run in lockstep is not a promise of the machine.

mbarriers have clocks, too: what lands by an asynchronous copy belongs to no thread, but to a phase of its mbarrier.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Lanes = npt.NDArray[np.int64]
Clock = npt.NDArray[np.int64]
"""How far each agent has been seen, [columns]: the warps of the block, then its mbarriers."""

FIRST_BARRIER = 1024
"""Number of the first mbarrier among the agents; the smaller ones are the threads of the block."""
PHASE_ZERO = 1 << 31
"""Clock of phase 0 of an mbarrier: above all clocks of warps, so that `floor` never takes it for old."""


class WarpClocks:
    """clock[slot, w, v]: how far warp w of the block in `slot` has seen agent v.

    lane_clock[lane, v]: what this thread alone has acquired at an mbarrier; its warp joins in at its next barrier.
    """

    def __init__(self, slots: int, warps: int) -> None:
        self.clock = np.zeros((slots, warps, warps), np.int64)
        self.lane_clock = np.zeros((slots * warps * 32, warps), np.int64)
        self.lanes_ahead = False
        self.own = np.arange(warps)
        self.floor = 0

    @property
    def columns(self) -> int:
        return self.clock.shape[2]

    def reset(self) -> None:
        self.clock[:] = 0
        self.clock[:, self.own, self.own] = 1
        self.lane_clock[:] = 0
        self.lanes_ahead = False
        self.floor = 0 if len(self.own) > 1 else 1

    def add_column(self) -> int:
        """A place for one more mbarrier."""
        self.clock = np.concatenate([self.clock, np.zeros_like(self.clock[:, :, :1])], axis=2)
        self.lane_clock = np.concatenate([self.lane_clock, np.zeros_like(self.lane_clock[:, :1])], axis=1)
        return self.columns - 1

    def column_of(self, agents: Lanes) -> Lanes:
        return np.where(agents < FIRST_BARRIER, agents >> 5, agents - FIRST_BARRIER + len(self.own))

    def seen(self, slots: Lanes, warps: Lanes, lanes: Lanes, columns: Lanes) -> Lanes:
        """How far these lanes have seen the agents of these columns; all four broadcast."""
        seen = self.clock[slots, warps, columns]
        return np.maximum(seen, self.lane_clock[lanes, columns]) if self.lanes_ahead else seen

    def most_seen(self, slot: int, column: int) -> int:
        """How far that thread of a block which has seen the most has seen the agent of a column."""
        lanes = self.lane_clock.reshape(len(self.clock), -1, self.columns)[slot, :, column]
        return max(int(self.clock[slot, :, column].max()), int(lanes.max()))

    def barrier(self, slots: Lanes, arriving: npt.NDArray[np.bool_], leaving: npt.NDArray[np.bool_]) -> None:
        """All that the arriving warps did becomes ordered before what the leaving warps do next.

        slots: the blocks; arriving and leaving: [slots, warps].
        """
        if self.lanes_ahead:
            row, warps = np.nonzero(arriving)
            self._join_lanes(slots[row], warps)
        clock = self.clock[slots]
        clock[:, self.own, self.own] += arriving
        seen = np.where(arriving[:, :, None], clock, 0).max(axis=1, keepdims=True)
        self.clock[slots] = np.where(leaving[:, :, None], np.maximum(clock, seen), clock)

    def warp_barrier(self, slots: Lanes, warps: Lanes) -> None:
        """The threads of each of these warps are ordered among themselves."""
        if self.lanes_ahead:
            self._join_lanes(slots, warps)
        self.clock[slots, warps, warps] += 1

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
        self.clock[slot, warp, warp] += 1
        handed[warp] = self.clock[slot, warp, warp]
        return handed

    def acquire(self, slot: int, warp: int, lanes: Lanes, handed: Clock, *, whole_warp: bool) -> None:
        """What was handed on is ordered before all that these threads of one warp do next."""
        if whole_warp:
            self.clock[slot, warp] = np.maximum(self.clock[slot, warp], handed)
        else:
            self.lane_clock[lanes] = np.maximum(self.lane_clock[lanes], handed)
            self.lanes_ahead = True

    def refresh(self, live: npt.NDArray[np.bool_]) -> None:
        """Recompute `floor`, below which every stamp of a thread is ordered for every live warp. live: [slots, warps]."""
        rows = self.clock[live][:, : len(self.own)]
        self.floor = int(rows.min()) if rows.size else 0
