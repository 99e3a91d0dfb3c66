"""The asynchronous proxy (PTX ISA, "Proxies"): the path to shared memory of bulk copies, tensor copies and wgmma.

It does not see what threads have stored in the ordinary way until the storing thread executes `fence.proxy.async`. It reads
its sources at any time until it is waited for: they are on loan and must not change. And it overtakes ordinary loads: what an
arrival or a barrier orders behind a load may still land before it, unless the loading warp has executed a fence in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.clocks import FIRST_BARRIER, MAX_THREADS
from tilus.runtime.emulator.errors import EmulatorError, RaceError
from tilus.runtime.emulator.program import Program

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]
WARP = 32
_USERS = ("cp.async.bulk", "cp.reduce.async.bulk", "wgmma.")


def uses_async_proxy(program: Program) -> bool:
    return any(instr.opcode.startswith(_USERS) for instr in program.instrs)


class AsyncProxy:
    """When each granule of shared memory was last stored to, and loaded from by each warp of the cluster (-1: never), when each
    thread last fenced for its stores and each warp for its loads, what is on loan, and with which swizzle tensor copies have
    landed (bytes plus 1; 0: something else has written since).

    Granules and warps are numbered as in `SharedShadow`. Times count stores and fences of the whole machine.
    """

    def __init__(self, machine: Machine, granules: int, *, enabled: bool) -> None:
        self.machine, self.enabled = machine, enabled
        self.time = 0
        self.stored = np.zeros(granules if enabled else 0, np.int64)
        self.loaded = np.full(granules * machine.clocks.all_warps if enabled else 0, -1, np.int32)
        self.fenced = np.zeros(machine.lanes, np.int64)
        self.finished = np.zeros(machine.lanes // WARP, np.int64)
        self.loans = np.zeros(granules if enabled else 0, np.int32)
        self.lender = np.zeros(granules if enabled else 0, np.int32)  # pc of the reading instruction
        self.num_loans = 0
        self.swizzles = np.zeros(granules if enabled else 0, np.uint8)

    def reset(self) -> None:
        self.stored[:] = 0
        self.loaded[:] = -1
        self.swizzles[:] = 0
        self.loans[:] = 0
        self.num_loans = 0

    def store(self, granules: Lanes) -> None:
        """Threads have stored to these granules."""
        self.time += 1
        self.stored[granules] = self.time
        self.swizzles[granules] = 0

    def load(self, cells: Lanes) -> None:
        """Warps have begun to load from granules: numbers of the former behind those of the latter."""
        self.loaded[cells] = self.time

    def finish_loads(self, lanes: Lanes) -> None:
        """These threads execute a fence: the loads of their warps are over."""
        self.time += 1
        self.finished[lanes // WARP] = self.time

    def check_finished(self, pc: int, granules: slice, lane: int) -> None:
        """No warp may still be loading from these granules of one block. Raises: RaceError naming the load."""
        machine, warps = self.machine, self.machine.clocks.all_warps
        cluster = granules.start // (len(self.stored) // machine.slots) // machine.cluster
        loaded = self.loaded.reshape(-1, warps)[granules]
        pending = loaded >= self.finished[cluster * warps : (cluster + 1) * warps]
        if not pending.any():
            return
        row, column = np.argwhere(pending)[0].tolist()
        shadow, granule = machine.shared_shadow, granules.start + row
        raise machine.fault(
            pc,
            f"race: writes shared memory at {shadow.place_text(granule)} by a copy, which does not wait for loads that are under "
            f"way\n  read by {shadow.reader_text(granule, column)}",
            lane,
            hint="the loading threads execute a fence (fence.acquire.cta) after their loads and before the barrier",
            kind=RaceError,
        )

    def check_swizzle(self, pc: int, granules: Lanes, swizzle_nbytes: int, lane: int) -> None:
        """Granules are about to be read as a matrix with this swizzle."""
        found = self.swizzles[granules]
        other = (found != 0) & (found != swizzle_nbytes + 1)
        if not other.any():
            return
        granule = int(granules[other][0])
        shadow = self.machine.shared_shadow
        raise self.machine.fault(
            pc,
            f"reads shared memory at {shadow.place_text(granule)} with a swizzle of {swizzle_nbytes} bytes, expected "
            f"that of the tensor copy into it, {int(self.swizzles[granule]) - 1} bytes\n  copied by "
            + shadow.writer_text(granule),
            lane,
            hint="the matrix descriptor and the tensor map must name the same swizzle",
        )

    def fence(self, lanes: Lanes) -> None:
        """All that these threads have stored is visible to the asynchronous proxy."""
        self.time += 1
        self.fenced[lanes] = self.time

    def check_fenced(self, pc: int, granules: Lanes, agents: Lanes, lane: int, verb: str) -> None:
        """Each of the agents that last wrote these granules, if it is a thread, must have fenced since.

        Raises: EmulatorError naming the store and the missing fence.
        """
        machine = self.machine
        first_slot = int(machine.slot_of[lane]) // machine.cluster * machine.cluster
        threads = np.where(agents < FIRST_BARRIER, agents, 0)
        writers = (first_slot + threads // MAX_THREADS) * machine.warps * 32 + threads % MAX_THREADS
        missing = (agents < FIRST_BARRIER) & (self.stored[granules] > self.fenced[writers])
        if not missing.any():
            return
        granule = int(granules[missing][0])
        shadow = machine.shared_shadow
        raise machine.fault(
            pc,
            f"{verb} shared memory at {shadow.place_text(granule)}, which a thread has stored to without a "
            f"fence.proxy.async\n  stored by {shadow.writer_text(granule)}",
            lane,
            hint="the storing thread executes fence.proxy.async after its store and before the barrier",
            kind=EmulatorError,
        )

    def lend(self, pc: int, granules: Lanes) -> None:
        """An asynchronous read of these granules starts."""
        self.loans[granules] += 1
        self.lender[granules] = pc
        self.num_loans += 1

    def give_back(self, granules: Lanes) -> None:
        """The read is known to be over."""
        self.loans[granules] -= 1
        self.num_loans -= 1

    def check_not_lent(self, pc: int, granules: Lanes, lanes: Lanes) -> None:
        """granules: [accesses, granules of each]. Raises: RaceError for a write to bytes that are on loan."""
        lent = self.loans[granules] > 0
        if not lent.any():
            return
        row, column = np.argwhere(lent)[0]
        granule = int(granules[row, column])
        raise self.machine.fault(
            pc,
            f"race: writes shared memory at {self.machine.shared_shadow.place_text(granule)} while an asynchronous "
            f"operation may still read it\n  read by {self.machine.site_text(int(self.lender[granule]))}",
            int(lanes[row]),
            hint="wait for the reader first (cp.async.bulk.wait_group.read, wgmma.wait_group), then synchronise",
            kind=RaceError,
        )
