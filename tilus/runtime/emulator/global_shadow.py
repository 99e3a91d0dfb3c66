"""Shadow state of global memory: which block wrote last, so that blocks which write different values to one place are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.errors import RaceError

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]
# A stamp: time from bit 20 on, pc below.
_TIME = 20
_PC_MASK = (1 << _TIME) - 1


class GlobalShadow:
    """Last plain writer block of every granule of global memory: two blocks must not write different values.

    A block that has acquired (a fence, an acquiring load or atomic) since the other one's write may overwrite it.
    """

    def __init__(self, machine: Machine, granule: int) -> None:
        self.machine = machine
        self.shift = granule.bit_length() - 1
        count = -(-machine.memory.data.size // granule)
        self.block = np.zeros(count, np.int32)  # block id plus one
        self.stamp = np.zeros(count, np.int64)  # of that write
        self.time = 1
        self.acquired = np.zeros(machine.slots, np.int64)

    def next_wave(self) -> None:
        self.acquired[:] = 0

    def acquire(self, lanes: Lanes) -> None:
        self.time += 1
        self.acquired[self.machine.slot_of[lanes]] = self.time

    def write(self, pc: int, offsets: Lanes, nbytes: int, lanes: Lanes, new: npt.NDArray[np.uint8]) -> None:
        """new: the bytes to be written, [accesses, nbytes]."""
        count = max(1, nbytes >> self.shift)
        where = (offsets >> self.shift)[:, None] + np.arange(count)
        slots = self.machine.slot_of[lanes]
        block = (self.machine.block_ids[slots] + 1).astype(np.int32)[:, None]
        before = self.block[where]
        foreign = (before != 0) & (before != block) & (self.stamp[where] >> _TIME >= self.acquired[slots][:, None])
        if foreign.any():
            old = self.machine.memory.data[offsets[:, None] + np.arange(nbytes)]
            foreign &= (old != new).reshape(len(offsets), count, -1).any(axis=2)
            if foreign.any():
                self._fail(pc, where, foreign, offsets, lanes)
        self.block[where] = block
        self.stamp[where] = self.time << _TIME | pc

    def _fail(self, pc: int, where: Lanes, foreign: Any, offsets: Lanes, lanes: Lanes) -> None:
        row, column = np.argwhere(foreign)[0]
        place, memory, machine = int(where[row, column]), self.machine.memory, self.machine
        x, y, _ = machine.grid
        other = int(self.block[place]) - 1
        raise machine.fault(
            pc,
            f"race: two blocks write different values to one address:"
            f" {memory.describe(memory.base + int(offsets[row]))}"
            f"\n  first written by block ({other % x}, {other // x % y}, {other // (x * y)})"
            f" at {machine.site_text(int(self.stamp[place]) & _PC_MASK)}\n  then by:",
            int(lanes[row]),
            hint="blocks run in any order; use atomics or write to separate places",
            kind=RaceError,
        )
