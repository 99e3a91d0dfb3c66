"""Shadow state of memory: what is initialised, what is in flight, who touched it last, and whether that is ordered.

Happens-before is tracked by one vector clock a warp (Lamport 1978; FastTrack, Flanagan and Freund, PLDI 2009): barriers
join the clocks of their warps, `bar.warp.sync` steps the clock of its own. An earlier access by warp v at clock c is
ordered before warp w now when c < clock[w][v]. Two threads of one warp are ordered by a step of their clock only: that
they run in lockstep is not a promise of the machine.

A granule is the smallest unit any instruction of the kernel accesses, so tracking is exact to the byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.errors import RaceError

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]
Stamps = npt.NDArray[np.uint64]
# A stamp: clock in bits 32.., MANY (several threads of the warp) 31, ATOMIC 30, thread 20-29, pc 0-19. 0 = never; a
# clock of all ones: an asynchronous copy is in flight.
_CLOCK, _THREAD = np.uint64(32), np.uint64(20)
_MANY, _ATOMIC = np.uint64(1 << 31), np.uint64(1 << 30)
_THREAD_MASK, _PC_MASK = np.uint64(1023), (1 << 20) - 1
_IN_FLIGHT = np.uint64(0xFFFFFFFF << 32)
_ONE = np.uint64(1)


class WarpClocks:
    """clock[slot, w, v]: how far warp w of the block in `slot` has seen warp v."""

    def __init__(self, slots: int, warps: int) -> None:
        self.clock = np.zeros((slots, warps, warps), np.int64)
        self.own = np.arange(warps)
        self.floor = 0

    def reset(self) -> None:
        self.clock[:] = 0
        self.clock[:, self.own, self.own] = 1
        self.floor = 0 if len(self.own) > 1 else 1

    def barrier(self, slots: Lanes, arriving: npt.NDArray[np.bool_], leaving: npt.NDArray[np.bool_]) -> None:
        """All that the arriving warps did becomes ordered before what the leaving warps do next.

        slots: the blocks; arriving and leaving: [slots, warps].
        """
        clock = self.clock[slots]
        clock[:, self.own, self.own] += arriving
        seen = np.where(arriving[:, :, None], clock, 0).max(axis=1, keepdims=True)
        self.clock[slots] = np.where(leaving[:, :, None], np.maximum(clock, seen), clock)

    def warp_barrier(self, slots: Lanes, warps: Lanes) -> None:
        """The threads of each of these warps are ordered among themselves."""
        self.clock[slots, warps, warps] += 1

    def refresh(self, live: npt.NDArray[np.bool_]) -> None:
        """Recompute `floor`, below which every stamp is ordered for every live warp. live: [slots, warps]."""
        rows = self.clock[live]
        self.floor = int(rows.min()) if rows.size else 0


class SharedShadow:
    """Last writer and last readers of every granule of the shared memory of all resident blocks."""

    def __init__(self, machine: Machine, granule: int) -> None:
        self.machine = machine
        self.shift = granule.bit_length() - 1
        self.warps = machine.warps
        count = machine.shared.data.size >> self.shift
        self.writer = np.zeros(count, np.uint64)
        self.readers = np.zeros(count * self.warps, np.uint64)
        self.columns = np.arange(self.warps)
        self.now = np.zeros(machine.lanes, np.uint64)

    def reset(self) -> None:
        self.writer[:] = 0
        self.readers[:] = 0
        self.step()

    def step(self) -> None:
        """Take over the clocks after any of them moved."""
        machine, own = self.machine, self.machine.clocks.own
        clock = machine.clocks.clock[:, own, own][machine.slot_of, machine.warp_of].astype(np.uint64)
        self.now = clock << _CLOCK | machine.thread_of.astype(np.uint64) << _THREAD

    def granules(self, flat: Lanes, nbytes: int) -> Lanes:
        """Granule indices [accesses, granules of each] of accesses at these bytes of the shared data."""
        first = (flat >> self.shift)[:, None]
        count = nbytes >> self.shift
        return first if count <= 1 else first + np.arange(count)

    def read(
        self, pc: int, flat: Lanes, nbytes: int, lanes: Lanes, *, strong: bool = False, collective: bool = False
    ) -> None:
        """Check a read and remember it.

        strong: volatile, relaxed and acquiring accesses take no part in races. collective: the data go to all threads
        of the warp (ldmatrix).
        """
        where = self.granules(flat, nbytes)
        stamps = self.writer[where]
        # Zero (uninitialised) wraps to the newest possible stamp, so that one comparison finds all trouble.
        if int(np.maximum.reduce(stamps - _ONE, axis=None, initial=0)) >> 32 >= self.machine.clocks.floor:
            self._check_present(pc, where, stamps, lanes)
            if not strong:
                self._check_order(pc, stamps, lanes, None, "reads")
        if not strong:
            self._remember_readers(pc, where, lanes, collective=collective)

    def check_async_read(self, pc: int, flat: Lanes, lanes: Lanes) -> None:
        """Check an asynchronous read of 16-byte pieces on behalf of the warps of these lanes; remembered later."""
        where = self.granules(flat, 16)
        stamps = self.writer[where]
        if int(np.maximum.reduce(stamps - _ONE, axis=None, initial=0)) >> 32 < self.machine.clocks.floor:
            return
        if (stamps == stamps[0, 0]).all():
            where, stamps = where[:1], stamps[:1]
        for lane in lanes:
            who = np.full(len(where), lane)
            self._check_present(pc, where, stamps, who)
            self._check_order(pc, stamps, who, None, "reads")

    def read_by_warps(self, pc: int, flat: Lanes, lanes: Lanes) -> None:
        """Remember that the warps of these lanes have read 16-byte pieces."""
        where = self.granules(flat, 16)
        for lane in lanes:
            self._remember_readers(pc, where, np.full(len(where), lane), collective=True)

    def _remember_readers(self, pc: int, where: Lanes, lanes: Lanes, *, collective: bool) -> None:
        cell = where * self.warps + self.machine.warp_of[lanes][:, None]
        stamp = (self.now[lanes] | np.uint64(pc))[:, None]
        if collective:
            self.readers[cell] = stamp | _MANY
            return
        old = self.readers[cell]
        several = ((old ^ stamp) >> _CLOCK == 0) & ((old ^ stamp) >> _THREAD & _THREAD_MASK != 0)
        stamp = np.where(several, stamp | _MANY, stamp)
        self.readers[cell] = stamp
        lost = self.readers[cell] != stamp
        if np.logical_or.reduce(lost, axis=None):
            self.readers[cell[lost]] |= _MANY

    def write(
        self,
        pc: int,
        flat: Lanes,
        nbytes: int,
        lanes: Lanes,
        changes: npt.NDArray[np.uint8] | None,
        *,
        atomic: bool = False,
    ) -> None:
        """Check a write and remember it. changes: the new bytes [accesses, nbytes], to tell a write of equal bytes."""
        if self.machine.wgmmas.pending:
            self.machine.wgmmas.check_write(pc, flat, nbytes, lanes)
        where = self.granules(flat, nbytes)
        writers = self.writer[where]
        if atomic:
            self._check_present(pc, where, writers, lanes)
        readers = self.readers.reshape(-1, self.warps)[where]
        newest = max(
            int(np.maximum.reduce(writers, axis=None, initial=0)), int(np.maximum.reduce(readers, axis=None, initial=0))
        )
        if newest >> 32 >= self.machine.clocks.floor:
            self._check_landed(pc, where, writers, lanes, "writes")
            equal = None if changes is None else self._equal(flat, nbytes, changes)
            exempt = writers & _ATOMIC != 0 if atomic else equal
            self._check_order(pc, writers, lanes, exempt, "writes")
            for warp in range(self.warps):
                self._check_order(pc, readers[..., warp], lanes, None, "writes", earlier="read")
        stamp = (self.now[lanes] | np.uint64(pc) | (_ATOMIC if atomic else np.uint64(0)))[:, None]
        self.writer[where] = stamp

    def issue_copy(self, pc: int, flat: Lanes, nbytes: int, lanes: Lanes) -> None:
        """An asynchronous copy into these bytes starts: nobody may touch them before it lands."""
        self.write(pc, flat, nbytes, lanes, None)
        self.writer[self.granules(flat, nbytes)] |= _IN_FLIGHT

    def land_copy(self, pc: int, flat: Lanes, nbytes: int, lanes: Lanes) -> None:
        """The thread that issued the copy has waited for it."""
        self.writer[self.granules(flat, nbytes)] = (self.now[lanes] | np.uint64(pc))[:, None]

    def _equal(self, flat: Lanes, nbytes: int, new: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        old = self.machine.shared.data[flat[:, None] + np.arange(nbytes)]
        return (old == new).reshape(len(flat), max(1, nbytes >> self.shift), -1).all(axis=2)

    def _check_present(self, pc: int, where: Lanes, stamps: Stamps, lanes: Lanes) -> None:
        self._check_landed(pc, where, stamps, lanes, "reads")
        if not stamps.all():
            row, column = np.argwhere(stamps == 0)[0]
            raise self.machine.fault(
                pc,
                f"reads uninitialised shared memory at {self._name(int(where[row, column]))}",
                int(lanes[row]),
                hint="no thread of this block has stored to these bytes yet: is a barrier missing?",
            )

    def _check_landed(self, pc: int, where: Lanes, stamps: Stamps, lanes: Lanes, verb: str) -> None:
        flying = stamps >= _IN_FLIGHT
        if not flying.any():
            return
        row, column = np.argwhere(flying)[0]
        place = int(where[row, column])
        raise self.machine.fault(
            pc,
            f"{verb} shared memory at {self._name(place)} while an asynchronous copy into it is in flight"
            f"\n  copied by {self._stamp_text(int(self.writer[place]), int(lanes[row]))}",
            int(lanes[row]),
            hint="wait for the copy's group (cp.async.wait_group) and then synchronise the block",
            kind=RaceError,
        )

    def _check_order(
        self,
        pc: int,
        stamps: Stamps,
        lanes: Lanes,
        exempt: npt.NDArray[np.bool_] | None,
        verb: str,
        earlier: str = "written",
    ) -> None:
        """Every stamp [accesses, granules] must be ordered before the access of its lane, or be its own."""
        machine = self.machine
        thread = (stamps >> _THREAD & _THREAD_MASK).astype(np.int64)
        seen = machine.clocks.clock[machine.slot_of[lanes][:, None], machine.warp_of[lanes][:, None], thread >> 5]
        own = (thread == machine.thread_of[lanes][:, None]) & (stamps & _MANY == 0)
        race = ((stamps >> _CLOCK).astype(np.int64) >= seen) & ~own & (stamps != 0)
        if exempt is not None:
            race &= ~exempt
        if not race.any():
            return
        row, column = np.argwhere(race)[0]
        lane, stamp = int(lanes[row]), int(stamps[row, column])
        same_warp = (stamp >> 20 & 1023) >> 5 == int(machine.warp_of[lane])
        raise machine.fault(
            pc,
            f"race: {verb} shared memory that another thread has {earlier} with nothing in between that orders them"
            f"\n  {earlier} by {self._stamp_text(stamp, lane)}\n  {verb} by:",
            lane,
            hint="put bar.warp.sync (or a barrier) between the two" if same_warp else "put a barrier between the two",
            kind=RaceError,
        )

    def _stamp_text(self, stamp: int, lane: int) -> str:
        thread = stamp >> 20 & 1023
        who = f"warp {thread >> 5}" if stamp & int(_MANY) else f"thread {thread} (warp {thread >> 5})"
        return f"{who} of the block at {self.machine.site_text(stamp & _PC_MASK)}"

    def _name(self, granule: int) -> str:
        shared = self.machine.shared
        return shared.describe(shared.base + (granule << self.shift) % shared.nbytes)


class GlobalShadow:
    """Last plain writer block of every granule of global memory: two blocks must not write different values.

    A block that has acquired (a fence, an acquiring load or atomic) since the other one's write may overwrite it.
    """

    def __init__(self, machine: Machine, granule: int) -> None:
        self.machine = machine
        self.shift = granule.bit_length() - 1
        count = -(-machine.memory.data.size // granule)
        self.block = np.zeros(count, np.int32)  # block id plus one
        self.stamp = np.zeros(count, np.int64)  # time in the upper bits, pc below
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
        foreign = (before != 0) & (before != block) & (self.stamp[where] >> 20 >= self.acquired[slots][:, None])
        if foreign.any():
            old = self.machine.memory.data[offsets[:, None] + np.arange(nbytes)]
            foreign &= (old != new).reshape(len(offsets), count, -1).any(axis=2)
            if foreign.any():
                self._fail(pc, where, foreign, offsets, lanes)
        self.block[where] = block
        self.stamp[where] = self.time << 20 | pc

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
