"""cp.async (PTX ISA 9.7.9.25.3): the destination is untouchable from the issue until the issuing thread waits.

The source is read when the copy lands, so a source that changes in between is copied changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Copy:
    """The copies of one instruction. Positions are bytes in the data of their spaces; `group` is the number of commits
    each lane had made at the issue; `count` bytes come from the source, the rest of `nbytes` is zero."""

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
        return Copy(self.pc, *pick, self.nbytes, self.group[chosen])


class AsyncCopies:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pending: list[Copy] = []
        self.commits = np.zeros(machine.lanes, np.int64)

    def reset(self) -> None:
        self.pending.clear()
        self.commits[:] = 0

    def issue(self, pc: int, lanes: Lanes, target: Lanes, source: Lanes, count: Lanes, nbytes: int) -> None:
        machine = self.machine
        machine.shared_shadow.issue_copy(pc, target, nbytes, lanes)
        self.pending.append(Copy(pc, lanes, target, source, count, nbytes, self.commits[lanes].copy()))

    def commit(self, lanes: Lanes) -> None:
        self.commits[lanes] += 1

    def wait(self, mask: npt.NDArray[np.bool_], groups_left: int | None) -> None:
        """Land all copies of these lanes but those of the latest `groups_left` groups; None: uncommitted ones too."""
        still: list[Copy] = []
        for copy in self.pending:
            lands = mask[copy.lanes]
            if groups_left is not None:
                lands = lands & (copy.group < self.commits[copy.lanes] - groups_left)
            if lands.any():
                self._land(copy, lands)
            if not lands.all():
                still.append(copy.part(~lands))
        self.pending = still

    def _land(self, copy: Copy, lands: npt.NDArray[np.bool_]) -> None:
        machine = self.machine
        target, source, count = copy.target[lands], copy.source[lands], copy.count[lands]
        size = min(8, copy.nbytes) if (count == copy.nbytes).all() else 1
        piece = np.arange(0, copy.nbytes, size)
        shift = size.bit_length() - 1
        values = machine.memory.views[size].take((source[:, None] + piece) >> shift, mode="clip")
        if size == 1:
            values = np.where(piece < count[:, None], values, np.uint8(0))
        machine.shared.views[size][(target[:, None] + piece) >> shift] = values
        machine.shared_shadow.land_copy(copy.pc, target, copy.nbytes, copy.lanes[lands])
