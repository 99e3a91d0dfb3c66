"""Shadow state of shared memory: what is initialised, what is in flight, who touched it last, and whether that is ordered.

What is ordered by what: `clocks`. A granule is the smallest unit any instruction of the kernel accesses, so tracking is
exact to the byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.clocks import FIRST_BARRIER, MAX_THREADS, PHASE_ZERO
from tilus.runtime.emulator.errors import RaceError
from tilus.runtime.emulator.proxy import AsyncProxy, uses_async_proxy

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]
Stamps = npt.NDArray[np.uint64]
# A stamp: clock in bits 35.., MANY (several threads of the warp) 34, ATOMIC 33, agent (a thread of the cluster, or
# FIRST_BARRIER and up: an mbarrier, for what an asynchronous copy wrote) 19-32, pc 0-18. 0 = never; a clock of all ones:
# an asynchronous copy is in flight, or the bytes are an mbarrier object.
_CLOCK, _AGENT = np.uint64(35), np.uint64(19)
_MANY, _ATOMIC = np.uint64(1 << 34), np.uint64(1 << 33)
_AGENT_MASK, _PC_MASK = np.uint64((1 << 14) - 1), (1 << 19) - 1
_IN_FLIGHT = np.uint64(((1 << 29) - 1) << 35)
_ONE = np.uint64(1)


class SharedShadow:
    """Last writer and last readers of every granule of the shared memory of all resident blocks."""

    def __init__(self, machine: Machine, granule: int) -> None:
        self.machine = machine
        self.shift = granule.bit_length() - 1
        self.warps = machine.clocks.all_warps
        count = machine.shared.data.size >> self.shift
        self.writer = np.zeros(count, np.uint64)
        self.readers = np.zeros(count * self.warps, np.uint64)
        self.columns = np.arange(self.warps)
        self.now = np.zeros(machine.lanes, np.uint64)
        self.touched = np.zeros(machine.lanes, np.uint64)  # the `now` of each thread at its last access
        self.proxy = AsyncProxy(machine, count, enabled=uses_async_proxy(machine.program))

    def reset(self) -> None:
        self.touched[:] = 0
        self.proxy.reset()
        self.writer[:] = 0
        self.readers[:] = 0
        self.step()

    def step(self) -> None:
        """Take over the clocks after any of them moved."""
        machine = self.machine
        clock = machine.clocks.own_clock(machine.slot_of, machine.warp_of).astype(np.uint64)
        self.now = clock << _CLOCK | machine.agent_of.astype(np.uint64) << _AGENT

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
        if int(np.maximum.reduce(stamps - _ONE, axis=None, initial=0)) >> int(_CLOCK) >= self.machine.clocks.floor:
            self._check_present(pc, where, stamps, lanes)
            if not strong:
                self._check_order(pc, stamps, lanes, None, "reads")
        if not strong:
            cells = self._remember_readers(pc, where, lanes, collective=collective)
            if self.proxy.enabled:
                self.proxy.load(cells)

    def _remember_readers(self, pc: int, where: Lanes, lanes: Lanes, *, collective: bool) -> Lanes:
        """Gives the places among `readers`."""
        cell = where * self.warps + self.machine.column_of[lanes][:, None]
        now = self.now[lanes]
        self.touched[lanes] = now
        stamp = (now | np.uint64(pc))[:, None]
        if collective:
            self.readers[cell] = stamp | _MANY
            return cell
        old = self.readers[cell]
        several = ((old ^ stamp) >> _CLOCK == 0) & ((old ^ stamp) >> _AGENT & _AGENT_MASK != 0)
        stamp = np.where(several, stamp | _MANY, stamp)
        self.readers[cell] = stamp
        lost = self.readers[cell] != stamp
        if np.logical_or.reduce(lost, axis=None):
            self.readers[cell[lost]] |= _MANY
        return cell

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
        where = self.granules(flat, nbytes)
        writers = self.writer[where]
        if atomic:
            self._check_present(pc, where, writers, lanes)
        readers = self.readers.reshape(-1, self.warps)[where]
        if self._newest(writers, readers) >= self.machine.clocks.floor:
            equal = None if changes is None else self._equal(flat, nbytes, changes)
            exempt = writers & _ATOMIC != 0 if atomic else equal
            self._check_free(pc, where, writers, readers, lanes, exempt)
        if self.proxy.enabled:
            self.proxy.check_not_lent(pc, where, lanes)
            self.proxy.store(where)
        now = self.now[lanes]
        self.touched[lanes] = now
        self.writer[where] = (now | np.uint64(pc) | (_ATOMIC if atomic else np.uint64(0)))[:, None]

    def _newest(self, writers: Stamps, readers: Stamps) -> int:
        """The latest clock in these stamps."""
        newest = max(
            int(np.maximum.reduce(writers, axis=None, initial=0)), int(np.maximum.reduce(readers, axis=None, initial=0))
        )
        return newest >> int(_CLOCK)

    def _check_free(
        self,
        pc: int,
        where: Lanes,
        writers: Stamps,
        readers: Stamps,
        lanes: Lanes,
        exempt: npt.NDArray[np.bool_] | None,
    ) -> None:
        """A write is ordered after all earlier accesses. readers: [accesses, granules, warps]."""
        machine = self.machine
        self._check_landed(pc, where, writers, lanes, "writes")
        self._check_order(pc, writers, lanes, exempt, "writes")
        slots, warps = machine.slot_of[lanes][:, None], machine.warp_of[lanes][:, None]
        seen = machine.clocks.seen(slots, warps, lanes[:, None], self.columns[None]).min(axis=0)
        newest = readers.max(axis=(0, 1), initial=0) >> _CLOCK
        for warp in np.flatnonzero(newest.astype(np.int64) >= seen).tolist():
            self._check_order(pc, readers[..., warp], lanes, None, "writes", earlier="read")

    def issue_copy(self, pc: int, flat: Lanes, nbytes: int, lanes: Lanes) -> None:
        """An asynchronous copy into these bytes starts: nobody may touch them before it lands."""
        self.write(pc, flat, nbytes, lanes, None)
        self.writer[self.granules(flat, nbytes)] |= _IN_FLIGHT

    def land_copy(self, pc: int, flat: Lanes, nbytes: int, lanes: Lanes) -> None:
        """The thread that issued the copy has waited for it."""
        where = self.granules(flat, nbytes)
        self.writer[where] = (self.now[lanes] | np.uint64(pc))[:, None]
        if self.proxy.enabled:
            self.proxy.store(where)

    def land_in_phase(self, pc: int, flat: Lanes, nbytes: int, agent: int, phase: int) -> None:
        """A copy has landed that belongs to this phase of an mbarrier: who waits for it may touch the bytes."""
        stamp = (PHASE_ZERO + phase) << int(_CLOCK) | agent << int(_AGENT) | pc
        self.writer[self.granules(flat, nbytes)] = np.uint64(stamp)

    def issue_bulk_write(self, pc: int, flat: int, nbytes: int, lane: int) -> None:
        """As `issue_copy` for one range of bytes, written by the asynchronous proxy."""
        span, lanes = slice(flat >> self.shift, (flat + nbytes) >> self.shift), np.array([lane])
        where = np.arange(span.start, span.stop)[None]
        writers, readers = self.writer[span][None], self.readers.reshape(-1, self.warps)[span][None]
        self._check_free(pc, where, writers, readers, lanes, None)
        self.proxy.check_not_lent(pc, where, lanes)
        self.proxy.check_fenced(pc, where[0], self._agents(writers[0]), lane, "writes")
        self.proxy.check_finished(pc, span, lane)
        self.writer[span] = _IN_FLIGHT | self.now[lane] | np.uint64(pc)

    def issue_bulk_read(self, pc: int, flat: int, nbytes: int, lane: int) -> Lanes:
        """The asynchronous proxy starts to read these bytes for a thread; gives the granules that are now on loan."""
        span = slice(flat >> self.shift, (flat + nbytes) >> self.shift)
        where, writers, lanes = np.arange(span.start, span.stop), self.writer[span], np.array([lane])
        self._check_present(pc, where[None], writers[None], lanes)
        self._check_order(pc, writers[None], lanes, None, "reads")
        self.proxy.check_fenced(pc, where, self._agents(writers), lane, "reads")
        self.proxy.lend(pc, where)
        return where

    def end_bulk_read(self, pc: int, granules: Lanes, lane: int) -> None:
        """The thread knows that the read is over."""
        self.proxy.give_back(granules)
        self._remember_readers(pc, granules[None], np.array([lane]), collective=False)

    def mark_swizzle(self, flat: Lanes, nbytes: int, swizzle_nbytes: int | None) -> None:
        """A bulk copy has landed; swizzle_nbytes: None unless it is a tensor copy."""
        self.proxy.swizzles[self.granules(flat, nbytes)] = 0 if swizzle_nbytes is None else swizzle_nbytes + 1

    def issue_wgmma_read(self, pc: int, granules: Lanes, swizzle_nbytes: int, leaders: Lanes) -> None:
        """A wgmma starts to read these granules, each named once. leaders: a lane of every warp that takes part."""
        where, stamps = granules, self.writer[granules]
        if (stamps == stamps[0]).all():
            where, stamps = where[:1], stamps[:1]
        lanes = (leaders[:, None] + np.arange(32)).reshape(-1)  # single threads may have seen more than their warp
        who = lanes if self.machine.clocks.lane_clock[lanes].any() else leaders
        shape = (len(who), len(stamps))
        where, stamps = np.broadcast_to(where, shape), np.broadcast_to(stamps, shape)
        self._check_present(pc, where, stamps, who)
        self._check_order(pc, stamps, who, None, "reads")
        self.proxy.check_fenced(pc, granules, self._agents(self.writer[granules]), int(leaders[0]), "reads")
        self.proxy.check_swizzle(pc, granules, swizzle_nbytes, int(leaders[0]))
        self.proxy.lend(pc, granules)

    def end_wgmma_read(self, pc: int, granules: Lanes, leaders: Lanes) -> None:
        """All threads of these warps know that the read is over."""
        self.proxy.give_back(granules)
        for lane in leaders.tolist():
            cell = granules * self.warps + self.machine.column_of[lane]
            self.readers[cell] = self.now[lane] | np.uint64(pc) | _MANY

    def mark_mbarrier(self, pc: int, flat: int, lane: int) -> None:
        """These 8 bytes become an mbarrier object, which only its own instructions may touch."""
        self.issue_copy(pc, np.array([flat]), 8, np.array([lane]))

    def clear_mbarrier(self, flat: int) -> None:
        self.writer[flat >> self.shift : (flat + 8) >> self.shift] = 0

    def hold_back(self, slot: int, warp: int, lanes: Lanes) -> None:
        """These threads are about to hand on what their warp did: make what its other threads have done since the
        warp's last barrier no part of it, by dating it one step later."""
        machine = self.machine
        first = int(lanes[0]) & ~31
        column = machine.clocks.own[slot, warp]
        clock = np.uint64(machine.clocks.clock[slot, warp, column])
        recent = self.touched[first : first + 32] >> _CLOCK == clock
        recent[lanes - first] = False
        if not recent.any():
            return
        per_slot = machine.shared.nbytes >> self.shift
        block = slot // machine.cluster * machine.cluster if machine.clocks.foreign else slot
        span = slice(block * per_slot, (block + (machine.cluster if machine.clocks.foreign else 1)) * per_slot)
        keep = machine.agent_of[lanes].astype(np.uint64)
        self._date_later(self.writer[span], clock, keep)
        self._date_later(self.readers.reshape(-1, self.warps)[span, column], clock, keep)
        self.touched[first : first + 32][recent] += np.uint64(1) << _CLOCK

    def _date_later(self, stamps: Stamps, clock: np.uint64, keep: Stamps) -> None:
        """keep: threads of one warp whose stamps stay."""
        agents = stamps >> _AGENT & _AGENT_MASK
        recent = (stamps >> _CLOCK == clock) & (agents >> np.uint64(5) == keep[0] >> np.uint64(5))
        shared_by_many = (stamps & _MANY != 0) & (len(keep) == 1)
        stamps[recent & (~np.isin(agents, keep) | shared_by_many)] += np.uint64(1) << _CLOCK

    def _agents(self, stamps: Stamps) -> Lanes:
        return (stamps >> _AGENT & _AGENT_MASK).astype(np.int64)

    def _equal(self, flat: Lanes, nbytes: int, new: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        old = self.machine.shared.data[flat[:, None] + np.arange(nbytes)]
        return (old == new).reshape(len(flat), max(1, nbytes >> self.shift), -1).all(axis=2)

    def _check_present(self, pc: int, where: Lanes, stamps: Stamps, lanes: Lanes) -> None:
        self._check_landed(pc, where, stamps, lanes, "reads")
        if not stamps.all():
            row, column = np.argwhere(stamps == 0)[0]
            raise self.machine.fault(
                pc,
                f"reads uninitialised shared memory at {self.place_text(int(where[row, column]))}",
                int(lanes[row]),
                hint="no thread of this block has stored to these bytes yet: is a barrier missing?",
            )

    def _check_landed(self, pc: int, where: Lanes, stamps: Stamps, lanes: Lanes, verb: str) -> None:
        flying = stamps >= _IN_FLIGHT
        if not flying.any():
            return
        row, column = np.argwhere(flying)[0]
        place = int(where[row, column])
        by = self.machine.program.instrs[int(self.writer[place]) & _PC_MASK].opcode
        what, hint = "while an asynchronous copy into it is in flight\n  copied", "wait for the copy's mbarrier"
        if by.startswith("mbarrier."):
            what, hint = "where an mbarrier object is\n  initialised", "only mbarrier instructions may touch it"
        elif "bulk" not in by:
            hint = "wait for the copy's group (cp.async.wait_group) and then synchronise the block"
        raise self.machine.fault(
            pc,
            f"{verb} shared memory at {self.place_text(place)} {what} by {self.writer_text(place)}",
            int(lanes[row]),
            hint=hint,
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
        agent = self._agents(stamps)
        who, columns = lanes[:, None], machine.clocks.column_of(agent)
        if earlier == "read":
            columns = columns + self.warps
        seen = machine.clocks.seen(machine.slot_of[who], machine.warp_of[who], who, columns)
        own = (agent == machine.agent_of[who]) & (stamps & _MANY == 0)
        race = ((stamps >> _CLOCK).astype(np.int64) >= seen) & ~own & (stamps != 0)
        if exempt is not None:
            race &= ~exempt
        if not race.any():
            return
        row, column = np.argwhere(race)[0]
        lane, stamp = int(lanes[row]), int(stamps[row, column])
        raise machine.fault(
            pc,
            f"race: {verb} shared memory that another thread has {earlier} with nothing in between that orders them"
            f"\n  {earlier} by {self._stamp_text(stamp)}\n  {verb} by:",
            lane,
            hint=self._missing_order(stamp >> int(_AGENT) & int(_AGENT_MASK), lane),
            kind=RaceError,
        )

    def _missing_order(self, agent: int, lane: int) -> str:
        if agent >= FIRST_BARRIER:
            return "wait for the copy's mbarrier (or meet one who has), with its bytes announced by expect_tx"
        if agent >> 5 == int(self.machine.agent_of[lane]) >> 5:
            return "put tilus.sync(), in PTX bar.warp.sync or a barrier, between the two"
        return "put tilus.sync(), in PTX a barrier, between the two"

    def _stamp_text(self, stamp: int) -> str:
        agent, many = stamp >> int(_AGENT) & int(_AGENT_MASK), stamp & int(_MANY)
        rank, thread = divmod(agent, MAX_THREADS)
        if agent >= FIRST_BARRIER:
            who = "an asynchronous copy"
        elif many:
            who = f"warp {thread >> 5}"
        else:
            who = f"thread {thread} (warp {thread >> 5})"
        block = f"block {rank} of the cluster" if self.machine.cluster > 1 and agent < FIRST_BARRIER else "the block"
        return f"{who} of {block} at {self.machine.site_text(stamp & _PC_MASK)}"

    def writer_text(self, granule: int) -> str:
        return self._stamp_text(int(self.writer[granule]))

    def reader_text(self, granule: int, column: int) -> str:
        """column: of the warp among those of the cluster."""
        return self._stamp_text(int(self.readers[granule * self.warps + column]))

    def place_text(self, granule: int) -> str:
        shared = self.machine.shared
        return shared.describe(shared.base + (granule << self.shift) % shared.nbytes)
