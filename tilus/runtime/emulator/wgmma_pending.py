"""wgmma operations between their issue and the wait that covers them, and what must not be touched in between.

The product is computed at a random time in this interval, from what registers and memory hold then. An operation is in
flight until a wait_group covers it, whether it has been computed or not: until then its accumulators and A registers
belong to it, and nobody may write the shared memory that it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.ptx.module import Instr, Reg, RegClass, Vector
from tilus.runtime.emulator.errors import EmulatorError, RaceError
from tilus.runtime.emulator.program import read, written
from tilus.runtime.emulator.warpgroups import WARP, Warpgroups
from tilus.runtime.emulator.wgmma_product import Multiply, SharedMatrix, multiply

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

Lanes = npt.NDArray[np.int64]
_NEVER_FENCED = -1


@dataclass(eq=False)
class Pending:
    """One operation of one warpgroup. `commit` is the number of groups that its warpgroup had committed before; it is
    computed when the time is `due`."""

    op: Multiply
    group: int
    sequence: int
    commit: int
    due: float
    add: bool
    a: SharedMatrix | None
    b: SharedMatrix
    done: bool = False

    @property
    def matrices(self) -> list[SharedMatrix]:
        return [self.b] if self.a is None else [self.a, self.b]


class Wgmmas:
    def __init__(self, machine: Machine, *, random_times: bool) -> None:
        """random_times: products are computed at random times; otherwise when they are waited for."""
        self.machine, self.random_times = machine, random_times
        self.groups = Warpgroups(machine)
        self.row_of = _registers_of(machine)
        self.row_of_index = np.zeros(max(self.row_of, default=0) + 1, np.int64)
        self.row_of_index[list(self.row_of)] = list(self.row_of.values())
        shape = (len(self.row_of), machine.lanes // WARP)
        # By register and warp: the instruction (pc + 1) other than wgmma that touched it since the last fence, and the
        # sequence numbers of the last operations that use it as accumulator and as A.
        self.touched = np.full(shape, _NEVER_FENCED, np.int64)
        self.as_d, self.as_a = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.waited = np.zeros(machine.lanes // WARP, np.int64)  # sequence number that each warp has waited for
        self.pending: dict[int, list[Pending]] = {}
        self.commits = np.zeros(self.groups.count, np.int64)
        self.sequence, self.time, self.next_due = 0, 0, np.inf

    def reset(self) -> None:
        self.groups.reset()
        self.touched[:] = _NEVER_FENCED
        for array in (self.as_d, self.as_a, self.waited, self.commits):
            array[:] = 0
        self.pending.clear()
        self.sequence, self.next_due = 0, np.inf

    # Life of an operation.
    def fence(self, groups: list[int]) -> None:
        for group in groups:
            self.touched[:, self.groups.warps(group)] = 0

    def issue(self, op: Multiply, group: int, a: SharedMatrix | None, b: SharedMatrix, *, add: bool) -> None:
        """Start an operation of a warpgroup. a: None when A is in registers."""
        self._check_registers(op, group)
        self.sequence += 1
        queue = self.pending.setdefault(group, [])
        due = max(self._due(), queue[-1].due if queue else 0.0)
        new = Pending(op, group, self.sequence, int(self.commits[group]), due, add, a, b)
        for matrix in new.matrices:
            self.machine.shared_shadow.issue_wgmma_read(
                op.pc, matrix.granules, matrix.swizzle_nbytes, self._leaders(group)
            )
        warps = self.groups.warps(group)
        self.as_d[self._rows(op.d), warps] = self.sequence
        self.as_a[self._rows(op.a), warps] = self.sequence
        queue.append(new)
        self.next_due = min(self.next_due, due)
        self.advance(0)

    def _due(self) -> float:
        """At once, some basic blocks later, or when it is waited for."""
        if not self.random_times:
            return np.inf
        kind = int(self.machine.rng.integers(3))
        return np.inf if kind == 0 else self.time + (0 if kind == 1 else int(self.machine.rng.geometric(0.05)))

    def advance(self, blocks: int) -> None:
        """So many basic blocks have run: compute what is due."""
        self.time += blocks
        if self.time < self.next_due:
            return
        waiting = [item for queue in self.pending.values() for item in queue if not item.done]
        for item in waiting:
            if item.due <= self.time:
                self._compute(item)
        self.next_due = min((item.due for item in waiting if not item.done), default=np.inf)

    def _compute(self, item: Pending) -> None:
        machine, op = self.machine, item.op
        lanes = self.groups.lanes(item.group)
        multiply(op, machine.regs[RegClass.B32], lanes, machine.shared.views[4], item.a, item.b, add=item.add)
        item.done = True

    def commit(self, groups: list[int]) -> None:
        self.commits[groups] += 1

    def wait(self, groups: list[int], left: int) -> None:
        """Finish all committed groups of operations but the latest `left`."""
        for group in groups:
            queue = self.pending.get(group, [])
            covered = [item for item in queue if item.commit < self.commits[group] - left]
            for item in covered:
                if not item.done:
                    self._compute(item)
                for matrix in item.matrices:
                    self.machine.shared_shadow.end_wgmma_read(item.op.pc, matrix.granules, self._leaders(group))
            if covered:
                self.waited[self.groups.warps(group)] = covered[-1].sequence
                self.pending[group] = queue[len(covered) :]

    def _leaders(self, group: int) -> Lanes:
        """The first lane of each warp."""
        return np.arange(*self.groups.lanes(group).indices(self.machine.lanes))[::WARP]

    # Registers.
    def rows_of(self, instr: Instr) -> Lanes:
        """Rows of the tracking of the registers that an instruction accesses."""
        registers = read(instr) | written(instr) if self.row_of else frozenset[Reg]()
        rows = [self.row_of.get(reg.index) for reg in registers if reg.cls is RegClass.B32]
        return np.array(sorted(row for row in rows if row is not None), np.int64)

    def _rows(self, registers: Lanes) -> Lanes:
        return self.row_of_index[registers]

    def _check_registers(self, op: Multiply, group: int) -> None:
        warps = self.groups.warps(group)
        d, a = self._rows(op.d), self._rows(op.a)
        rows = np.concatenate([d, a])
        touched = self.touched[rows, warps]
        if touched.any():
            self._fail_unfenced(op, group, rows, touched)
        waited = self.waited[warps.start]
        busy = self.as_d[d, warps.start]
        for sequence in sorted(set(busy[busy > waited].tolist())):
            other = self._find(group, sequence)
            if other.op.n != op.n or other.op.k != op.k or not np.array_equal(other.op.d, op.d):
                raise self._overlap(
                    op, other, group, "accumulates into registers of", "of the same shape and registers"
                )
        sequence = int(self.as_a[d, warps.start].max())
        if sequence > waited:
            raise self._overlap(op, self._find(group, sequence), group, "accumulates into A registers of", "")
        sequence = int(self.as_d[a, warps.start].max(initial=0))
        if sequence > waited:
            raise self._overlap(op, self._find(group, sequence), group, "has accumulators as A of", "")

    def _find(self, group: int, sequence: int) -> Pending:
        return next(item for item in self.pending[group] if item.sequence == sequence)

    def _overlap(self, op: Multiply, other: Pending, group: int, what: str, allowed: str) -> EmulatorError:
        return self.machine.fault(
            op.pc,
            f"{what} another wgmma that is still in flight\n  the other: {self.machine.site_text(other.op.pc)}",
            self.groups.lanes(group).start,
            hint="wait for it with wgmma.wait_group" + (f"; only accumulation {allowed} may chain" if allowed else ""),
        )

    def _fail_unfenced(self, op: Multiply, group: int, rows: Lanes, touched: Lanes) -> None:
        row, warp = np.argwhere(touched)[0]
        pc = int(touched[row, warp])
        name = f"%r{list(self.row_of)[int(rows[row])]}"
        since = "has had no wgmma.fence before" if pc == _NEVER_FENCED else "was accessed after the last wgmma.fence by"
        where = "" if pc == _NEVER_FENCED else f"\n  {self.machine.site_text(pc - 1)}"
        raise self.machine.fault(
            op.pc,
            f"register {name} of a wgmma {since}{where}",
            self.groups.lanes(group).start + WARP * int(warp),
            hint="put wgmma.fence.sync.aligned between the two",
        )

    def touch(self, pc: int, rows: Lanes, warps: Lanes) -> None:
        """Another instruction accesses registers (rows of the tracking) of these warps."""
        if self.pending:
            busy = np.maximum(self.as_d[rows[:, None], warps], self.as_a[rows[:, None], warps])
            flying = busy > self.waited[warps]
            if flying.any():
                self._fail_in_flight(pc, rows, warps, busy, flying)
        self.touched[rows[:, None], warps] = pc + 1

    def _fail_in_flight(self, pc: int, rows: Lanes, warps: Lanes, busy: Lanes, flying: npt.NDArray[np.bool_]) -> None:
        row, column = np.argwhere(flying)[0]
        sequence = int(busy[row, column])
        item = next(item for queue in self.pending.values() for item in queue if item.sequence == sequence)
        raise self.machine.fault(
            pc,
            f"accesses register %r{list(self.row_of)[int(rows[row])]} of a wgmma that is still in flight"
            f"\n  in flight: {self.machine.site_text(item.op.pc)}",
            int(warps[column]) * WARP,
            hint="wait for it first (wgmma.commit_group, then wgmma.wait_group)",
            kind=RaceError,
        )


def _registers_of(machine: Machine) -> dict[int, int]:
    """Row of the tracking for each 32-bit register that some wgmma accumulates into or reads A from."""
    indices: set[int] = set()
    for instr in machine.program.instrs:
        if instr.opcode.startswith("wgmma.mma_async"):
            vectors = [operand for operand in instr.operands if isinstance(operand, Vector)]
            indices |= {reg.index for vector in vectors for reg in vector.elements if isinstance(reg, Reg)}
    return {index: row for row, index in enumerate(sorted(indices))}
