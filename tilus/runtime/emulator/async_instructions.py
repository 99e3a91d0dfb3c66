"""The cp.async instructions (PTX ISA 9.7.9.25.3): decoding; their effect over time is in `async_copy`."""

from __future__ import annotations

import numpy as np

from tilus.ptx.module import Imm, Reg, RegClass
from tilus.runtime.emulator.decode import Mask, Site, Step, instruction
from tilus.runtime.emulator.mbarrier_instructions import barrier_access, by_place
from tilus.runtime.emulator.memory import Access


@instruction("cp.async")
def copy(site: Site) -> Step:
    """cp.async.{ca,cg}.shared.global [dst], [src], size{, src_size | ignore_src}{, cache_policy}."""
    site.allow(
        "async", "ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B", "L2::cache_hint"
    )  # fmt: skip
    site.expect_operands(3, 4, 5)
    operands = [*site.operands]
    size = operands[2]
    allowed = (16,) if site.has("cg") else (4, 8, 16)
    if not isinstance(size, Imm) or size.value not in allowed:
        raise site.fault(f"cp.async of {size} bytes, expected one of {allowed}")
    nbytes = size.value
    target = Access(site, operands[0], "shared", nbytes)
    machine, pc = site.machine, site.pc
    source_nbytes = np.asarray(nbytes, np.int64)
    ignore = np.asarray(False)
    if len(operands) > 3 + site.has("L2::cache_hint"):
        operand = operands[3]
        if isinstance(operand, Reg) and operand.cls is RegClass.PRED:
            ignore = site.source(operand, "pred")
        else:
            source_nbytes = site.source(operand, "u32")

    whole = Access(site, operands[1], "global", nbytes)
    fixed = source_nbytes.ndim == 0 and ignore.ndim == 0 and int(source_nbytes) == nbytes

    def step(mask: Mask) -> None:
        lanes = site.lanes(mask)
        if fixed:
            where = target.split(lanes)[0][2]
            machine.async_copies.issue(pc, lanes, where, whole.split(lanes)[0][2], np.full(len(lanes), nbytes), nbytes)
            return
        count = np.broadcast_to(source_nbytes, machine.lanes)[lanes].astype(np.int64)
        if (count > nbytes).any():
            index = int(np.flatnonzero(count > nbytes)[0])
            raise site.fault(f"cp.async source size {count[index]}, expected at most {nbytes}", int(lanes[index]))
        count = np.where(np.broadcast_to(ignore, machine.lanes)[lanes], 0, count)
        source = np.zeros(len(lanes), np.int64)
        for part in np.unique(count[count > 0]).tolist():
            chosen = count == part
            access = Access(site, operands[1], "global", part, align=nbytes)
            source[chosen] = access.split(lanes[chosen])[0][2]
        where = target.split(lanes)[0][2]
        machine.async_copies.issue(pc, lanes, where, source, count, nbytes)

    return step


@instruction("cp.async.mbarrier")
def arrive_when_landed(site: Site) -> Step:
    """cp.async.mbarrier.arrive{.noinc}{.space}.b64 [addr]: without .noinc, the phase waits for this arrival, too."""
    site.allow("async", "mbarrier", "arrive", "noinc", "shared", "shared::cta")
    site.expect_operands(1)
    access = barrier_access(site, site.operands[0])
    machine, pc, more = site.machine, site.pc, not site.has("noinc")

    def step(mask: Mask) -> None:
        for place, lanes in by_place(access, site.lanes(mask)):
            barrier = machine.mbarriers.find(pc, int(lanes[0]), place)
            if more:
                machine.mbarriers.expect_more(barrier, len(lanes))
            machine.async_copies.arrive_later(pc, lanes, barrier)

    return step


@instruction("cp.async.commit_group")
def commit_group(site: Site) -> Step:
    copies = site.machine.async_copies
    return lambda mask: copies.commit(site.lanes(mask))


@instruction("cp.async.wait_group")
def wait_group(site: Site) -> Step:
    operand = site.operands[0] if site.operands else None
    if not isinstance(operand, Imm):
        raise site.fault(f"wait_group of {operand}, expected an integer")
    return _wait(site, operand.value)


@instruction("cp.async.wait_all")
def wait_all(site: Site) -> Step:
    return _wait(site, None)


def _wait(site: Site, groups_left: int | None) -> Step:
    machine = site.machine
    everyone = np.ones(machine.lanes, np.bool_)
    return lambda mask: machine.async_copies.wait(everyone if mask is None else mask, groups_left)
