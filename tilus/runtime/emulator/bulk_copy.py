"""Bulk and tensor copies over time (PTX ISA, "cp.async.bulk").

A copy is issued, and each of its effects happens at a random later time: a load lands in shared memory and completes
bytes at its mbarrier; a store reads shared memory, later it lands in global memory. At the latest an effect happens
when its waiter cannot go on without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.async_copy import Arrival
from tilus.runtime.emulator.clocks import Clock
from tilus.runtime.emulator.errors import RaceError
from tilus.runtime.emulator.mbarrier import Handed, Mbarrier

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]
_CHANCE = 0.125
"""That some effect happens after a basic block."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """Which bytes go where: element i is at `shared_at[i]` in the data of shared memory, and at `global_at[i]` in
    global memory where `inside[i]` (None: everywhere). Positions are multiples of the `size` bytes of an element.
    place, nbytes: the range of shared memory that all of it occupies. swizzle_nbytes: of a tensor copy."""

    place: int
    nbytes: int
    size: int
    shared_at: Lanes
    global_at: Lanes
    inside: npt.NDArray[np.bool_] | None = None
    swizzle_nbytes: int | None = None


@dataclass(frozen=True, eq=False)
class Landing:
    """Where a load lands: the place in shared memory to which the transfer is moved, and the mbarrier it completes."""

    shift: int
    barrier: Mbarrier


@dataclass(eq=False)
class Load:
    """Into shared memory of one block or (multicast) of several, from global memory or (`loan`: granules) from shared
    memory, whose positions are `global_at` then. phases: how far the thread has seen the mbarriers at the issue; who
    waits for this load has seen them as far."""

    pc: int
    lane: int
    transfer: Transfer
    landings: tuple[Landing, ...]
    loan: Lanes | None
    phases: Clock


Reduce = Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]]
"""(old, new) -> sum, raw elements."""


@dataclass(eq=False)
class Store:
    """Shared to global memory. group: commits of the thread before it; loan: granules of shared memory; values: what
    was read, once it was. The thread gives the loan back when it has waited for the read."""

    pc: int
    lane: int
    transfer: Transfer
    group: int
    loan: Lanes
    reduce: Reduce | None
    values: npt.NDArray[Any] | None = None
    landed: bool = False
    returned: bool = False


class BulkCopies:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.loads: list[Load] = []
        self.stores: list[Store] = []
        """Those that have not landed, or whose loan is not returned."""
        self.commits = np.zeros(machine.lanes, np.int64)

    def reset(self) -> None:
        self.loads.clear()
        self.stores.clear()
        self.commits[:] = 0

    # Loads.
    def load(
        self, pc: int, lane: int, transfer: Transfer, landings: tuple[Landing, ...], *, from_shared: bool = False
    ) -> None:
        loan = None
        if from_shared:
            loan = self.machine.shared_shadow.issue_bulk_read(pc, int(transfer.global_at[0]), transfer.nbytes, lane)
        for landing in landings:
            self.machine.shared_shadow.issue_bulk_write(pc, transfer.place + landing.shift, transfer.nbytes, lane)
            landing.barrier.landing.append(pc)
        phases = self.machine.clocks.phases_seen(int(self.machine.slot_of[lane]), int(self.machine.warp_of[lane]), lane)
        self.loads.append(Load(pc, lane, transfer, landings, loan, phases))

    def _land(self, load: Load) -> None:
        machine, transfer = self.machine, load.transfer
        self.loads.remove(load)
        source = (machine.memory if load.loan is None else machine.shared).views[transfer.size]
        shift = transfer.size.bit_length() - 1
        values = source.take(transfer.global_at >> shift, mode="clip")
        if transfer.inside is not None:
            values = np.where(transfer.inside, values, source.dtype.type(0))
        if load.loan is not None:
            machine.shared_shadow.end_bulk_read(load.pc, load.loan, load.lane)
        for landing in load.landings:
            barrier = landing.barrier
            barrier.arrived = barrier.arrived.joined(Handed(load.phases, load.phases))
            machine.shared.views[transfer.size][(transfer.shared_at + landing.shift) >> shift] = values
            place = np.array([transfer.place + landing.shift])
            agent = machine.mbarriers.agent(barrier)
            machine.shared_shadow.land_in_phase(load.pc, place, transfer.nbytes, agent, barrier.phase)
            machine.shared_shadow.mark_swizzle(place, transfer.nbytes, transfer.swizzle_nbytes)
            barrier.landing.remove(load.pc)
            barrier.landed = (barrier.phase, load.pc)
            machine.mbarriers.complete_bytes(load.pc, load.lane, barrier, transfer.nbytes)

    # Stores.
    def store(self, pc: int, lane: int, transfer: Transfer, reduce: Reduce | None) -> None:
        loan = self.machine.shared_shadow.issue_bulk_read(pc, transfer.place, transfer.nbytes, lane)
        self.stores.append(Store(pc, lane, transfer, int(self.commits[lane]), loan, reduce))

    def _read(self, store: Store) -> None:
        transfer = store.transfer
        shift = transfer.size.bit_length() - 1
        store.values = self.machine.shared.views[transfer.size][transfer.shared_at >> shift]

    def _write(self, store: Store) -> None:
        machine, transfer, values = self.machine, store.transfer, store.values
        store.landed = True
        self._forget(store)
        if values is None:
            raise ValueError("a store lands before it has read")
        at = transfer.global_at
        if transfer.inside is not None:
            at, values = at[transfer.inside], values[transfer.inside]
        index = at >> transfer.size.bit_length() - 1
        memory = machine.memory.views[transfer.size]
        if store.reduce is not None:
            memory[index] = store.reduce(memory[index], values)
            return
        lanes, new = np.full(len(at), store.lane), values.reshape(-1, 1).view(np.uint8)
        machine.global_shadow.write(store.pc, at, transfer.size, lanes, new)
        memory[index] = values

    def commit(self, lanes: Lanes) -> None:
        self.commits[lanes] += 1

    def wait(self, lanes: Lanes, groups_left: int, *, read: bool) -> None:
        """These threads wait for all their stores but those of the latest `groups_left` groups and uncommitted ones:
        until they have read their source, or until they have landed."""
        left = self.commits - groups_left
        waiting = np.zeros(self.machine.lanes, np.bool_)
        waiting[lanes] = True
        for store in [s for s in self.stores if waiting[s.lane] and s.group < left[s.lane]]:
            if store.values is None:
                self._read(store)
            if not store.returned:
                store.returned = True
                self.machine.shared_shadow.end_bulk_read(store.pc, store.loan, store.lane)
                self._forget(store)
            if not read and not store.landed:
                self._write(store)

    def _forget(self, store: Store) -> None:
        if store.landed and store.returned:
            self.stores.remove(store)

    def check_read(self, pc: int, offsets: Lanes, nbytes: int, lanes: Lanes) -> None:
        """Threads read global memory: a store of their block to these bytes must have landed."""
        machine = self.machine
        for store in self.stores:
            at = store.transfer.global_at
            if store.landed or offsets.max() + nbytes <= at.min() or offsets.min() >= at.max() + store.transfer.size:
                continue
            written = at if store.transfer.inside is None else at[store.transfer.inside]
            touched = np.isin(offsets[:, None] + np.arange(nbytes), written[:, None] + np.arange(store.transfer.size))
            stale = touched.any(axis=1) & (machine.slot_of[lanes] == machine.slot_of[store.lane])
            if stale.any():
                raise machine.fault(
                    pc,
                    "race: reads global memory that a bulk copy of this block has perhaps not yet written\n  copied at "
                    + machine.site_text(store.pc),
                    int(lanes[stale][0]),
                    hint="cp.async.bulk.wait_group without .read waits until the results are there",
                    kind=RaceError,
                )

    # Time.
    def _outstanding(self) -> list[Load | Store | Arrival]:
        stores = (store for store in self.stores if not store.landed)
        return [*self.loads, *stores, *self.machine.async_copies.arrivals]

    def pass_time(self) -> None:
        """After a basic block: perhaps something happens."""
        if (self.loads or self.stores or self.machine.async_copies.arrivals) and self.machine.rng.random() < _CHANCE:
            self.land_one()

    def land_one(self) -> bool:
        """One effect that is outstanding happens, drawn at random; False when there is none."""
        outstanding = self._outstanding()
        if not outstanding:
            return False
        match outstanding[int(self.machine.rng.integers(len(outstanding)))]:
            case Load() as load:
                self._land(load)
            case Arrival() as arrival:
                self.machine.async_copies.arrive(arrival)
            case Store(values=None) as store:
                self._read(store)
            case Store() as store:
                self._write(store)
        return True

    def check_exit(self, pc: int, mask: npt.NDArray[np.bool_]) -> None:
        """Threads exit: shared memory that copies still read or write must outlive them."""
        machine = self.machine
        for store in self.stores:
            if mask[store.lane] and not store.returned:
                raise machine.fault(
                    pc,
                    "exits while a bulk copy of this thread may still read shared memory\n  copied at "
                    + machine.site_text(store.pc),
                    store.lane,
                    hint="cp.async.bulk.commit_group and cp.async.bulk.wait_group.read 0 come first",
                )
        for slot in np.unique(machine.slot_of[mask]).tolist():
            if machine.alive[machine.slot_of == slot].any():
                continue
            lent = (load.pc for load in self.loads if load.loan is not None and machine.slot_of[load.lane] == slot)
            if (reader := next(lent, None)) is not None:
                raise machine.fault(
                    pc,
                    "the last thread of a block exits while a bulk copy may still read its shared memory\n  copied at "
                    + machine.site_text(reader),
                    int(np.flatnonzero(mask)[0]),
                    hint="stay until the block that the copy goes to has waited for it: barrier.cluster before the exit",
                )
            flying = [load.pc for load in self.loads if any(at.barrier.slot == slot for at in load.landings)]
            copy = flying[0] if flying else machine.mbarriers.unseen_copy(slot)
            if copy is not None:
                raise machine.fault(
                    pc,
                    "the last thread of a block exits while a bulk copy into its shared memory may be in flight\n  copied "
                    f"at {machine.site_text(copy)}",
                    int(np.flatnonzero(mask)[0]),
                    hint="wait for the mbarrier of every copy",
                )
