"""Branches, exits and block barriers: what ends a basic block (PTX ISA 9.7.12 and 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tilus.ptx.module import LabelRef, Operand
from tilus.runtime.emulator.clocks import Clock, join
from tilus.runtime.emulator.cluster_instructions import cluster_barrier
from tilus.runtime.emulator.decode import Array, Mask, Site, Step, instruction
from tilus.runtime.emulator.guards import (
    guard_registers,
    guard_row,
    initialisation_check,
    mark_initialised,
    source_registers,
)  # fmt: skip
from tilus.runtime.emulator.machine import WARP, Machine
from tilus.runtime.emulator.mbarrier_instructions import wait_for_phase
from tilus.runtime.emulator.wgmma import decode_wgmma

Lanes = npt.NDArray[np.bool_]
Successors = list[tuple[int, Lanes]]
Terminator = Callable[[Lanes], Successors]
"""Runs the last instruction of a block on a mask; gives the lanes that go on and where."""


def decode_control(machine: Machine, barriers: Barriers, pc: int) -> Terminator:
    """The terminator of a control instruction, guard included."""
    site = Site(machine, pc)
    match site.name:
        case "bra":
            end = _branch(site)
        case "exit" | "ret":
            end = _exit(site, barriers)
        case "trap":
            end = _trap(site)
        case "mbarrier":
            end = wait_for_phase(site)
        case "wgmma":
            end = decode_wgmma(site)
        case "barrier" if site.words[:1] == ["cluster"]:
            end = cluster_barrier(site)
        case _:
            end = _barrier(site, barriers)
    return _guarded(site, end)


def _guarded(site: Site, end: Terminator) -> Terminator:
    guard = guard_row(site)
    check = initialisation_check(site, source_registers(site))
    guard_check = initialisation_check(site, guard_registers(site))
    following = site.pc + 1

    def guarded(mask: Lanes) -> Successors:
        if guard_check is not None:
            guard_check(mask)
        if guard is not None:
            row, negated = guard
            active = mask & ~row if negated else mask & row
            count = np.count_nonzero(active)
            if count == 0:
                return [(following, mask)]
            if count != np.count_nonzero(mask):
                return [*end(active), (following, mask & ~active)]
        if check is not None:
            check(mask)
        return end(mask)

    return guarded


def _branch(site: Site) -> Terminator:
    site.allow("uni")
    target = site.operands[0]
    if not isinstance(target, LabelRef):
        raise site.fault(f"branch to {target}, expected a label")
    pc = site.machine.program.labels[target.name]
    uniform = site.has("uni") and site.instr.guard is not None

    def branch(mask: Lanes) -> Successors:
        return [(pc, mask)]

    def uniform_branch(mask: Lanes) -> Successors:
        site.whole_live_warps(mask)
        return [(pc, mask)]

    return uniform_branch if uniform else branch


def _exit(site: Site, barriers: Barriers) -> Terminator:
    def leave(mask: Lanes) -> Successors:
        onward = barriers.leave(mask)
        site.machine.bulk_copies.check_exit(site.pc, mask)
        return onward

    return leave


def _trap(site: Site) -> Terminator:
    def trap(mask: Lanes) -> Successors:
        raise site.fault("trap executed", int(np.flatnonzero(mask)[0]))

    return trap


def _barrier(site: Site, barriers: Barriers) -> Terminator:
    """bar{.cta}.sync / .arrive / .red and the barrier{.cta} forms."""
    site.allow("cta", "sync", "arrive", "red", "aligned", "popc", "and", "or")
    if site.has("warp"):
        raise site.unsupported("modifier .warp")
    operands = list(site.operands)
    result = operands.pop(0) if site.has("red") else None
    vote = operands.pop() if site.has("red") else None
    aligned = site.name == "bar" or site.has("aligned")
    if not operands or len(operands) > 2:
        raise site.fault(f"{len(operands)} barrier operands, expected a barrier and optionally a number of threads")
    ids = site.source(operands[0], "u32")
    counts = site.source(operands[1], "u32") if len(operands) > 1 else None
    if counts is not None and counts.ndim == 0 and int(counts) % WARP:
        raise site.fault(f"barrier for {int(counts)} threads, expected a multiple of {WARP}")
    reduction = _reduction(site, result, vote) if result is not None and vote is not None else None
    waits = not site.has("arrive")

    def arrive(mask: Lanes) -> Successors:
        if aligned:
            site.whole_live_warps(mask)
        return barriers.arrive(site, mask, ids, counts, waits=waits, reduction=reduction)

    return arrive


def _reduction(site: Site, result: Operand, vote: Operand) -> Callable[[Lanes], None]:
    """What bar.red does with the votes of all lanes that a barrier releases in one block."""
    votes = site.predicate(vote)
    kind = site.one_of("popc", "and", "or")
    out = site.target(result, "u32" if kind == "popc" else "pred")
    mark = mark_initialised(site)

    def reduce(released: Lanes) -> None:
        if mark is not None:
            mark(released)
        ballot = votes()[released]
        out[released] = ballot.sum() if kind == "popc" else ballot.all() if kind == "and" else ballot.any()

    return reduce


class Barriers:
    """The 16 named barriers of every resident block, and who waits at them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        shape = (16, machine.lanes)
        self.waiting = np.zeros(shape, np.bool_)
        self.arrived = np.zeros((16, machine.slots), np.int64)
        self.arrived_warps = np.zeros((16, machine.slots, machine.warps), np.bool_)
        self.expected = np.zeros((16, machine.slots), np.int64)  # 0: all live threads of the block
        self.handed: dict[tuple[int, int], Clock] = {}
        """By barrier and slot: what warps that have arrived without waiting hand on."""
        self.resume = np.zeros(machine.lanes, np.int64)
        self.released: Successors = []
        """Lanes that barriers have let go since the scheduler last looked, with the pc where each goes on."""

    def start(self) -> None:
        self.released.clear()
        self.waiting[:] = False
        self.arrived[:] = 0
        self.arrived_warps[:] = False
        self.expected[:] = 0
        self.handed.clear()
        self.machine.clocks_moved()

    def by_slot(self, mask: Lanes) -> npt.NDArray[np.int64]:
        return np.add.reduce(mask.reshape(self.machine.slots, -1), axis=1, dtype=np.int64)

    def arrive(
        self,
        site: Site,
        mask: Lanes,
        ids: Array,
        counts: Array | None,
        *,
        waits: bool,
        reduction: Callable[[Lanes], None] | None,
    ) -> Successors:
        onward: Successors = []
        for barrier in [int(ids)] if ids.ndim == 0 else np.unique(ids[mask]).tolist():
            if barrier >= 16:
                raise site.fault(f"barrier {barrier}, expected 0 to 15", int(np.flatnonzero(mask)[0]))
            lanes = mask if ids.ndim == 0 else mask & (ids == barrier)
            self._expect(site, barrier, lanes, counts)
            self.arrived[barrier] += self.by_slot(lanes)
            if waits:
                self.arrived_warps[barrier] |= lanes.reshape(self.machine.slots, -1, WARP).any(axis=2)
                self.waiting[barrier] |= lanes
                self.resume[lanes] = site.pc + 1
            else:
                self._hand_on(barrier, lanes)
                onward.append((site.pc + 1, lanes))
            self._complete(barrier, reduction, site)
        self.machine.clocks_moved()
        return onward

    def _hand_on(self, barrier: int, mask: Lanes) -> None:
        """What these threads do after their arrival is no part of what the barrier orders."""
        machine = self.machine
        lanes = np.flatnonzero(mask)
        for warp in np.unique(lanes // WARP).tolist():
            handed = machine.hand_on(lanes[lanes // WARP == warp])
            before = self.handed.get((barrier, warp // machine.warps))
            self.handed[barrier, warp // machine.warps] = handed if before is None else join(before, handed)

    def _expect(self, site: Site, barrier: int, lanes: Lanes, counts: Array | None) -> None:
        if counts is None:
            return
        for slot in np.flatnonzero(self.by_slot(lanes)):
            here = lanes & (self.machine.slot_of == slot)
            wanted = int(counts if counts.ndim == 0 else counts[here].max())
            before = int(self.expected[barrier, slot])
            if self.arrived[barrier, slot] and before != wanted:
                raise site.fault(
                    f"barrier {barrier} is used for {wanted} threads, but others there expect {before or 'all'}",
                    int(np.flatnonzero(here)[0]),
                )
            self.expected[barrier, slot] = wanted

    def _complete(self, barrier: int, reduction: Callable[[Lanes], None] | None, site: Site | None) -> None:
        live = self.by_slot(self.machine.alive)
        wanted = np.where(self.expected[barrier] > 0, self.expected[barrier], live)
        arrived = self.arrived[barrier]
        full = (arrived >= wanted) & (arrived > 0)
        if not full.any():
            return
        over = np.flatnonzero(full & (arrived > wanted))
        if over.size and site is not None:
            slot = int(over[0])
            raise site.fault(
                f"{arrived[slot]} threads arrived at barrier {barrier} of block {self.machine.block_name(slot)}, "
                f"expected {wanted[slot]}"
            )
        lanes = self.waiting[barrier] & full[self.machine.slot_of]
        leaving = lanes.reshape(self.machine.slots, -1, WARP).any(axis=2)
        slots = np.flatnonzero(full)
        handed = {slot: self.handed.pop((barrier, slot)) for slot in slots.tolist() if (barrier, slot) in self.handed}
        self.machine.clocks.barrier(slots, self.arrived_warps[barrier, slots], leaving[slots], handed)
        if reduction is not None:
            for slot in slots:
                reduction(lanes & (self.machine.slot_of == slot))
        self.waiting[barrier] &= ~lanes
        self.arrived[barrier, full] = 0
        self.arrived_warps[barrier, full] = False
        self.expected[barrier, full] = 0
        pcs = set(self.resume[lanes].tolist())
        self.released += [(pc, lanes & (self.resume == pc) if len(pcs) > 1 else lanes) for pc in sorted(pcs)]

    def leave(self, mask: Lanes) -> Successors:
        """Threads exit: barriers that wait for all live threads may complete."""
        machine = self.machine
        machine.alive &= ~mask
        for barrier in np.flatnonzero(self.arrived.any(axis=1)).tolist():
            self._complete(barrier, None, None)
        if machine.cluster > 1:
            machine.clusters.check_exit(mask)
            machine.clusters.complete()
        machine.clocks_moved()
        return []

    def deadlock_report(self) -> str:
        """Who waits for what, one line for each barrier and block."""
        lines: list[str] = []
        for barrier in range(16):
            for slot in np.flatnonzero(self.arrived[barrier]):
                here = self.machine.slot_of == slot
                waiting = np.flatnonzero(self.waiting[barrier] & here)
                wanted = int(self.expected[barrier, slot]) or int(np.count_nonzero(self.machine.alive & here))
                warps = sorted(set(self.machine.warp_of[waiting].tolist()))
                sites = {self.machine.site_text(int(pc) - 1) for pc in self.resume[waiting]}
                lines.append(
                    f"  block {self.machine.block_name(int(slot))}, barrier {barrier}: {self.arrived[barrier, slot]} "
                    f"of {wanted} threads arrived; warps {warps} wait at " + "; ".join(sorted(sites))
                )
        return "\n".join(lines)


@instruction("bar.warp.sync")
def warp_sync(site: Site) -> Step:
    """Orders the memory accesses of the threads of a warp; all live ones must be there (full member mask)."""
    machine = site.machine
    members = site.source(0, "u32")

    def step(mask: Mask) -> None:
        lanes = site.lanes(mask)
        site.check_members(mask, members)
        warps = np.unique(lanes // WARP)
        machine.clocks.warp_barrier(warps // machine.warps, warps % machine.warps)
        machine.shared_shadow.step()

    return step
