"""The mbarrier instructions (PTX ISA, "mbarrier"): decoding; the objects are in `mbarrier`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tilus.ptx.module import Operand, Special
from tilus.runtime.emulator.clocks import PHASE_ZERO
from tilus.runtime.emulator.decode import Mask, Site, Step, instruction
from tilus.runtime.emulator.guards import mark_initialised
from tilus.runtime.emulator.machine import WARP
from tilus.runtime.emulator.mbarrier import MAX_COUNT, Handed, Mbarrier, Waiter
from tilus.runtime.emulator.memory import Access

Lanes = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
_SPACES = ("shared", "shared::cta")
_REMOTE = (*_SPACES, "shared::cluster")
_SCOPES = ("release", "acquire", "cta", "cluster")


def barrier_access(site: Site, operand: Operand, *, asynchronous: bool = False) -> Access:
    """The operand that names an mbarrier object; asynchronous: of a copy that completes it later."""
    spaces = [word for word in site.words if word.startswith("shared")]
    space = ("shared::cluster" if "shared::cluster" in spaces else "shared") if spaces else None
    return Access(site, operand, space, 8, by_warp=False, asynchronous=asynchronous)


def _distinct(values: npt.NDArray[np.generic]) -> list[int]:
    """The different values, ascending: in most warps there is one only, for which this is fast."""
    return [int(values[0])] if (values == values[0]).all() else np.unique(values).tolist()


def by_place(access: Access, lanes: Lanes) -> Iterator[tuple[int, Lanes]]:
    """(place of the object in shared memory, lanes) for each object that these lanes name and each warp of them."""
    for shared, who, where in access.split(lanes):
        if not shared:
            raise access.site.fault("an mbarrier in global memory, expected one in shared memory", int(who[0]))
        for place in _distinct(where):
            here = who[where == place]
            for warp in _distinct(here // WARP):
                yield place, here[here // WARP == warp]


@instruction("mbarrier.init")
def init(site: Site) -> Step:
    site.allow("init", *_SPACES)
    site.expect_operands(2)
    access, counts = barrier_access(site, site.operands[0]), site.source(1, "u32")
    machine, pc = site.machine, site.pc

    def step(mask: Mask) -> None:
        for place, lanes in by_place(access, site.lanes(mask)):
            for lane in lanes.tolist():
                machine.mbarriers.init(pc, lane, place, int(np.broadcast_to(counts, machine.lanes)[lane]))

    return step


@instruction("mbarrier.inval")
def invalidate(site: Site) -> Step:
    site.allow("inval", *_SPACES)
    site.expect_operands(1)
    access = barrier_access(site, site.operands[0])

    def step(mask: Mask) -> None:
        for place, lanes in by_place(access, site.lanes(mask)):
            for lane in lanes.tolist():
                site.machine.mbarriers.inval(site.pc, lane, place)

    return step


@instruction("mbarrier.arrive")
def arrive(site: Site) -> Step:
    """mbarrier.arrive{.expect_tx}{.sem.scope}{.space}.b64 state|_, [addr]{, count or bytes}."""
    site.allow("arrive", "expect_tx", "relaxed", *_SCOPES, *_REMOTE)
    expects = site.has("expect_tx")
    site.expect_operands(*((3,) if expects else (2, 3)))
    if site.has("shared::cluster") and site.operands[0] != Special("_"):
        raise site.fault("an arrival at an mbarrier in shared::cluster gives no state, expected _ as destination")
    out = site.target(0, "b64")
    access = barrier_access(site, site.operands[1])
    numbers = site.source(2, "u32") if len(site.operands) > 2 else np.asarray(1, np.uint32)
    numbers = np.broadcast_to(numbers, site.machine.lanes)
    machine, pc, releases = site.machine, site.pc, not site.has("relaxed")

    def one(place: int, lanes: Lanes) -> None:
        barrier = machine.mbarriers.find(pc, int(lanes[0]), place)
        out[lanes] = np.uint64(barrier.phase | place << 32)
        handed = _released(site, lanes, barrier) if releases else None
        values = numbers[lanes]
        if not expects and (values == values[0]).all():
            machine.mbarriers.arrive(pc, lanes, barrier, _count(site, int(values[0]), lanes), handed)
            return
        for at, value in enumerate(values.tolist()):
            if expects:
                machine.mbarriers.expect_bytes(pc, int(lanes[at]), barrier, value)
            machine.mbarriers.arrive(pc, lanes[at : at + 1], barrier, 1 if expects else value, handed)

    def step(mask: Mask) -> None:
        for place, lanes in by_place(access, site.lanes(mask)):
            one(place, lanes)
        machine.clocks_moved()

    return step


def _released(site: Site, lanes: Lanes, barrier: Mbarrier) -> Handed:
    """What an arrival hands on. What threads wrote, those of other blocks see when both sides have the scope of the cluster."""
    machine = site.machine
    clock = machine.hand_on(lanes)
    if int(machine.slot_of[lanes[0]]) == barrier.slot:
        return Handed(clock, clock)
    reads = machine.clocks.reads_only(clock)
    return Handed(reads, clock if site.has("cluster") else reads)


def _count(site: Site, count: int, lanes: Lanes) -> int:
    if not 1 <= count <= MAX_COUNT:
        raise site.fault(f"arrives {count} times, expected 1 to {MAX_COUNT}", int(lanes[0]))
    return count


@instruction("mbarrier.expect_tx", "mbarrier.complete_tx")
def count_bytes(site: Site) -> Step:
    """mbarrier.{expect,complete}_tx{.relaxed.scope}{.space}.b64 [addr], bytes."""
    site.allow("expect_tx", "complete_tx", "relaxed", "cta", "cluster", *_REMOTE)
    site.expect_operands(2)
    access, numbers = barrier_access(site, site.operands[0]), site.source(1, "u32")
    machine, pc = site.machine, site.pc
    count = machine.mbarriers.expect_bytes if site.has("expect_tx") else machine.mbarriers.complete_bytes

    def step(mask: Mask) -> None:
        for place, lanes in by_place(access, site.lanes(mask)):
            barrier = machine.mbarriers.find(pc, int(lanes[0]), place)
            for lane in lanes.tolist():
                count(pc, lane, barrier, int(np.broadcast_to(numbers, machine.lanes)[lane]))

    return step


def wait_for_phase(site: Site) -> Callable[[Flags], list[tuple[int, Flags]]]:
    """mbarrier.{test,try}_wait{.parity}{.sem.scope}{.space}.b64 p, [addr], state or parity{, time}."""
    site.allow("test_wait", "try_wait", "parity", *_SCOPES, *_SPACES)
    site.expect_operands(3, 4) if site.has("try_wait") else site.expect_operands(3)
    by_parity, by_cluster = site.has("parity"), site.has("cluster")
    out, access = site.target(0, "pred"), barrier_access(site, site.operands[1])
    values = np.broadcast_to(site.source(2, "u32" if by_parity else "b64"), site.machine.lanes)
    machine, pc, mark = site.machine, site.pc, mark_initialised(site)

    def resume(lanes: Flags, done: bool) -> None:
        if mark is not None:
            mark(lanes)
        out[lanes] = done

    def one(place: int, lanes: Lanes, value: int, mask: Flags) -> bool:
        """Whether the lanes go on."""
        barrier = machine.mbarriers.find(pc, int(lanes[0]), place)
        phase = _phase_by_parity(site, lanes, barrier, value) if by_parity else _phase(site, lanes, barrier, value)
        done = phase < barrier.phase
        if done:
            machine.mbarriers.acquire(mask, barrier, by_cluster=by_cluster)
        elif machine.mbarriers.wait(
            Waiter(mask, barrier, phase, pc, by_cluster, resume), int(machine.warp_of[lanes[0]])
        ):
            return False
        resume(mask, done)
        return True

    def wait(mask: Flags) -> list[tuple[int, Flags]]:
        parked = np.zeros_like(mask)
        for place, lanes in by_place(access, np.flatnonzero(mask)):
            wanted = values[lanes]
            for value in _distinct(wanted):
                part = np.zeros_like(mask)
                part[lanes[wanted == value]] = True
                if not one(place, lanes[wanted == value], value, part):
                    parked |= part
        machine.clocks_moved()
        if not parked.any():
            return [(pc + 1, mask)]
        onward = mask & ~parked
        return [(pc + 1, onward)] if onward.any() else []

    return wait


def _phase(site: Site, lanes: Lanes, barrier: Mbarrier, state: int) -> int:
    """The phase that a state of mbarrier.arrive stands for."""
    mbarriers, phase = site.machine.mbarriers, state & 0xFFFFFFFF
    if state >> 32 != barrier.place or phase > barrier.phase:
        raise site.fault(
            f"waits at the mbarrier {mbarriers.name(barrier.place)} with a state that no arrival there gave",
            int(lanes[0]),
        )
    if phase < barrier.phase - 1:
        raise _late(site, lanes, barrier, phase)
    return phase


def _phase_by_parity(site: Site, lanes: Lanes, barrier: Mbarrier, parity: int) -> int:
    """The phase with this parity among the current one and the one before."""
    if parity > 1:
        raise site.fault(f"waits for a phase of parity {parity}, expected 0 or 1", int(lanes[0]))
    if barrier.phase & 1 != parity:
        return barrier.phase - 1
    machine, first = site.machine, lanes[:1]
    column = np.array([barrier.column])
    seen = int(machine.clocks.seen(machine.slot_of[first], machine.warp_of[first], first, column)[0])
    following = max(0, seen - PHASE_ZERO)  # the phase after the last one whose completion the warp knows of
    if following & 1 == parity and following < barrier.phase:
        raise _late(site, lanes, barrier, following)
    return barrier.phase


def _late(site: Site, lanes: Lanes, barrier: Mbarrier, phase: int) -> Exception:
    return site.fault(
        f"waits at the mbarrier {site.machine.mbarriers.name(barrier.place)} for phase {phase} (parity {phase & 1}) "
        f"when phase {barrier.phase} has begun: it has missed phase {phase + 1}",
        int(lanes[0]),
        hint="the phases of an mbarrier must not go on until all who wait for one have seen it",
    )
