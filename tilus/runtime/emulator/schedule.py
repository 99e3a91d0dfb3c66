"""Which lanes run next.

Lanes at the same pc run together, whatever warp or block they belong to. Within a team of warps the lowest pc goes
first, so that divergent paths meet again at the first instruction they share. Teams are drawn at random: at the start
and after every barrier the warps of each block are split into two, and one runs ahead until it blocks.

Between basic blocks, asynchronous copies land at random; when no thread can run, the next one lands at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilus.runtime.emulator.control import Barriers, Lanes, Successors, Terminator, decode_control
from tilus.runtime.emulator.decode import Step
from tilus.runtime.emulator.errors import DeadlockError
from tilus.runtime.emulator.families import decode
from tilus.runtime.emulator.machine import WARP
from tilus.runtime.emulator.program import is_control

if TYPE_CHECKING:
    from tilus.runtime.emulator.machine import Machine

SPIN_LIMIT = 64
"""Backward branches in a row after which running lanes must let others run."""
FAIR_TURNS = 256
"""Basic blocks that a team runs in random order, after spinning, before the lowest pc goes first again."""

_IMPATIENCE = 0.125
"""How often waits at mbarriers reach their time limit before the next copy lands, when no thread can run."""


@dataclass(frozen=True, eq=False)
class Block:
    """A decoded basic block: `start` .. `end` (exclusive) in pcs; falls through when it has no terminator.

    synchronises: it has an instruction that the lanes of a warp execute together.
    """

    start: int
    end: int
    steps: tuple[Step, ...]
    terminator: Terminator | None
    synchronises: bool


@dataclass(eq=False)
class Group:
    """Lanes that stand at one pc. Groups of one team merge when they meet."""

    pc: int
    mask: Lanes
    team: int


class Scheduler:
    def __init__(self, machine: Machine, *, interleave: bool, max_blocks: int) -> None:
        """max_blocks: basic blocks to execute before a kernel counts as stuck."""
        self.machine, self.interleave, self.budget = machine, interleave, max_blocks
        self.barriers = Barriers(machine)
        self.groups: list[Group] = []
        self.held: list[Group] = []
        """Lanes before an instruction of the whole warp, of which other lanes wait at an mbarrier."""
        self.ahead = np.zeros(machine.lanes, np.bool_)  # which team the warp of a lane is in
        self.warp_counts = np.zeros(len(machine.program.instrs), np.int64)
        self.blocks = {start: self._decode_block(start) for start in machine.program.leaders}

    def _decode_block(self, start: int) -> Block:
        program = self.machine.program
        end = program.block_end(start)
        ends_here = is_control(program.instrs[end - 1])
        steps = tuple(decode(self.machine, pc) for pc in range(start, end - ends_here))
        terminator = decode_control(self.machine, self.barriers, end - 1) if ends_here else None
        synchronises = any(".sync" in program.instrs[pc].opcode for pc in range(start, end))
        return Block(start, end, steps, terminator, synchronises)

    def run(self) -> None:
        """Run the machine's threads to their exit.

        Raises: DeadlockError when some wait for ever.
        """
        machine = self.machine
        self.barriers.start()
        self.held.clear()
        self._draw(0, machine.alive.copy())
        while True:
            while self.groups:
                teams = sorted({group.team for group in self.groups})
                self._run_team(int(machine.rng.choice(teams)) if len(teams) > 1 else teams[0])
            if not self._pass_idle_time():
                break
            self._release()
        if machine.alive.any():
            raise self._deadlock()

    def _pass_idle_time(self) -> bool:
        """No thread can run: a copy lands, or waits at mbarriers reach their time limit. False when nothing is left."""
        copies, mbarriers = self.machine.bulk_copies, self.machine.mbarriers
        if mbarriers.waiters and self.machine.rng.random() < _IMPATIENCE and mbarriers.expire():
            return True
        return copies.land_one() or mbarriers.expire()

    def _waiting(self) -> str:
        """Who waits for what, a line for each."""
        parts = [self.barriers.deadlock_report(), self.machine.mbarriers.deadlock_report()]
        parts += [self.machine.wgmmas.groups.deadlock_report(), self.machine.clusters.deadlock_report()]
        for group in self.held:
            warps = sorted(set(self.machine.warp_of[np.flatnonzero(group.mask)].tolist()))
            site = self.machine.site_text(self.blocks[group.pc].end - 1)
            parts.append(f"  threads of warps {warps} wait for the other threads of their warp before {site}")
        return "\n".join(part for part in parts if part)

    def _deadlock(self) -> DeadlockError:
        return DeadlockError(
            "deadlock: no thread can go on\n" + self._waiting(),
            hint="every thread of the block (or as many as the barrier says) must reach the same barrier"
            if not self.machine.mbarriers.waiters
            else "every arrival and every byte that the mbarrier counts must come",
        )

    def _release(self) -> None:
        """Make the lanes ready that barriers and mbarriers have let go."""
        mbarriers = self.machine.mbarriers
        for released in (self.barriers.released, self.machine.clusters.released):
            for pc, mask in released:
                self._draw(pc, mask)
            released.clear()
        for pc, mask in mbarriers.released:
            self._rejoin(pc, mask)
        if mbarriers.released:
            self.groups += self.held
            self.held.clear()
        mbarriers.released.clear()

    def _draw(self, pc: int, mask: Lanes) -> None:
        """Whole warps become ready: draw a team for each warp number."""
        if self.interleave and self.machine.warps > 1:
            ahead = (self.machine.rng.random(self.machine.warps) < 0.5)[self.machine.warp_of]
            self.ahead[mask] = ahead[mask]
        self._rejoin(pc, mask)

    def _rejoin(self, pc: int, mask: Lanes) -> None:
        """Lanes become ready, in the team of their warp."""
        for team, part in enumerate((mask & ~self.ahead, mask & self.ahead)):
            if part.any():
                self.groups.append(Group(pc, part, team))

    def _run_team(self, team: int) -> None:
        """Run a team until all of it is blocked or gone, or until it has spun while another could run."""
        fair_turns = 0
        while group := self._take(team, any_pc=fair_turns > 0):
            fair_turns -= fair_turns > 0
            spun = self._run_group(group, single_block=fair_turns > 0)
            self._release()
            if spun and any(other.team != team for other in self.groups):
                return
            if spun:
                fair_turns = FAIR_TURNS

    def _run_group(self, group: Group, *, single_block: bool) -> bool:
        """Run lanes until they part, block, or catch up with others of the team; True when they only spin."""
        pc, mask = group.pc, group.mask
        others = min((other.pc for other in self.groups if other.team == group.team), default=1 << 60)
        active = None if mask.all() else mask
        warps = np.count_nonzero(mask.reshape(-1, WARP).any(axis=1))
        spins = 0
        while True:
            block = self.blocks[pc]
            for step in block.steps:
                step(active)
            self.warp_counts[pc] += warps
            self._spend(block)
            self.machine.bulk_copies.pass_time()
            successors: Successors = [(block.end, mask)] if block.terminator is None else block.terminator(mask)
            if len(successors) != 1 or successors[0][1] is not mask or successors[0][0] >= others or single_block:
                break
            spins += successors[0][0] <= pc and bool(self.groups)
            pc = successors[0][0]
            if spins > SPIN_LIMIT:
                break
        self.groups += [Group(pc, lanes, group.team) for pc, lanes in successors]
        return spins > SPIN_LIMIT

    def _take(self, team: int, *, any_pc: bool) -> Group | None:
        """Remove and merge the lanes of the team at its lowest pc (or at any one of its pcs)."""
        masks: dict[int, list[Lanes]] = {}
        for group in self.groups:
            if group.team == team:
                masks.setdefault(group.pc, []).append(group.mask)
        if not masks:
            return None
        merged = {pc: parts[0] if len(parts) == 1 else np.logical_or.reduce(parts) for pc, parts in masks.items()}
        pcs = sorted(merged)
        pc = int(self.machine.rng.choice(self._ready(pcs, merged))) if any_pc else pcs[0]
        self.groups = [group for group in self.groups if group.team != team or group.pc != pc]
        return self._without_torn(Group(pc, merged[pc], team)) or self._take(team, any_pc=any_pc)

    def _without_torn(self, group: Group) -> Group | None:
        """The group less the lanes that must wait for lanes of their warp which an mbarrier keeps; None if all must."""
        parked = self.machine.mbarriers.parked() if self.blocks[group.pc].synchronises else None
        if parked is None:
            return group
        torn = group.mask & np.repeat(parked.reshape(-1, WARP).any(axis=1), WARP)
        if not torn.any():
            return group
        self.held.append(Group(group.pc, torn, group.team))
        rest = group.mask & ~torn
        return Group(group.pc, rest, group.team) if rest.any() else None

    def _ready(self, pcs: list[int], masks: dict[int, Lanes]) -> list[int]:
        """The pcs at which nobody must wait for lanes of his own warp that are still elsewhere."""
        warps = {pc: mask.reshape(-1, WARP).any(axis=1) for pc, mask in masks.items()}
        torn = {pc: any((warps[pc] & warps[other]).any() for other in pcs if other != pc) for pc in pcs}
        return [pc for pc in pcs if pc == pcs[0] or not (self.blocks[pc].synchronises and torn[pc])]

    def _spend(self, block: Block) -> None:
        self.budget -= 1
        self.machine.wgmmas.advance(1)
        self.machine.advance_clock(block.end - block.start)
        if self.budget < 0:
            raise self.machine.fault(
                block.end - 1,
                "the kernel does not end: the limit of executed basic blocks is reached\n" + self._waiting(),
                hint="a loop that waits for another thread or block, or raise max_blocks",
                kind=DeadlockError,
            )
