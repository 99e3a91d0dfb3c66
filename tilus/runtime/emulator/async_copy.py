"""cp.async (PTX ISA 9.7.9.25.3): the destination is untouchable from the issue until the issuing thread waits.

The source is read when the copy lands, so a source that changes in between is copied changed. A copy that an mbarrier
tracks (cp.async.mbarrier.arrive) lands at a random time, and before the phase that it arrives in completes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.mbarrier import Mbarrier

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Copy:
    """The copies of one instruction. Positions are bytes in the data of their spaces; `group` is the number of commits
    each lane had made at the issue; `count` bytes come from the source, the rest of `nbytes` is zero. number: of the
    instruction among all that were issued."""

    number: int
    pc: int
    lanes: Lanes
    target: Lanes
    source: Lanes
    count: Lanes
    nbytes: int
    group: Lanes

    def part(self, chosen: npt.NDArray[np.bool_]) -> Copy:
        """The copies of some of the lanes."""
        pick = (self.lanes[chosen], self.target[chosen], self.source[chosen], self.count[chosen])
        return Copy(self.number, self.pc, *pick, self.nbytes, self.group[chosen])


@dataclass(frozen=True, eq=False)
class Arrival:
    """These lanes arrive at the mbarrier as soon as their copies below `number` have landed."""

    pc: int
    lanes: Lanes
    barrier: Mbarrier
    number: int


class AsyncCopies:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pending: list[Copy] = []
        self.arrivals: list[Arrival] = []
        self.issued = 0
        self.commits = np.zeros(machine.lanes, np.int64)

    def reset(self) -> None:
        self.pending.clear()
        self.arrivals.clear()
        self.commits[:] = 0

    def issue(self, pc: int, lanes: Lanes, target: Lanes, source: Lanes, count: Lanes, nbytes: int) -> None:
        machine = self.machine
        machine.shared_shadow.issue_copy(pc, target, nbytes, lanes)
        self.issued += 1
        self.pending.append(Copy(self.issued, pc, lanes, target, source, count, nbytes, self.commits[lanes].copy()))

    def commit(self, lanes: Lanes) -> None:
        self.commits[lanes] += 1

    def wait(self, mask: npt.NDArray[np.bool_], groups_left: int | None) -> None:
        """Land all copies of these lanes but those of the latest `groups_left` groups; None: uncommitted ones too."""
        for copy in self._take(mask, groups_left, self.issued):
            self._move(copy)
            self.machine.shared_shadow.land_copy(copy.pc, copy.target, copy.nbytes, copy.lanes)

    def arrive_later(self, pc: int, lanes: Lanes, barrier: Mbarrier) -> None:
        self.arrivals.append(Arrival(pc, lanes, barrier, self.issued))

    def arrive(self, arrival: Arrival) -> None:
        """The copies of these lanes land, and they arrive."""
        machine, barrier = self.machine, arrival.barrier
        self.arrivals.remove(arrival)
        mask = np.zeros(machine.lanes, np.bool_)
        mask[arrival.lanes] = True
        agent = machine.mbarriers.agent(barrier)
        for copy in self._take(mask, None, arrival.number):
            self._move(copy)
            machine.shared_shadow.land_in_phase(copy.pc, copy.target, copy.nbytes, agent, barrier.phase)
        machine.mbarriers.arrive(arrival.pc, arrival.lanes, barrier, 1, None)

    def _take(self, mask: npt.NDArray[np.bool_], groups_left: int | None, number: int) -> list[Copy]:
        """Remove the copies of these lanes up to this number, less those of the latest groups."""
        still: list[Copy] = []
        taken: list[Copy] = []
        for copy in self.pending:
            lands = mask[copy.lanes] & (copy.number <= number)
            if groups_left is not None:
                lands = lands & (copy.group < self.commits[copy.lanes] - groups_left)
            if lands.any():
                taken.append(copy.part(lands))
            if not lands.all():
                still.append(copy.part(~lands))
        self.pending = still
        return taken

    def _move(self, copy: Copy) -> None:
        machine = self.machine
        size = min(8, copy.nbytes) if (copy.count == copy.nbytes).all() else 1
        piece = np.arange(0, copy.nbytes, size)
        shift = size.bit_length() - 1
        values = machine.memory.views[size].take((copy.source[:, None] + piece) >> shift, mode="clip")
        if size == 1:
            values = np.where(piece < copy.count[:, None], values, np.uint8(0))
        machine.shared.views[size][(copy.target[:, None] + piece) >> shift] = values
