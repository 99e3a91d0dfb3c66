"""What surrounds every instruction: its guard, and the checks that registers are written before they are read."""

from __future__ import annotations

import numpy as np

from tilus.ptx.module import Reg
from tilus.runtime.emulator.decode import Array, Mask, Site, Step
from tilus.runtime.emulator.program import accumulators, read, written


def guard_row(site: Site) -> tuple[Array, bool] | None:
    if site.instr.guard is None:
        return None
    return site.row(site.instr.guard.reg), site.instr.guard.negated


def with_guard(site: Site, step: Step) -> Step:
    guard = guard_row(site)
    if guard is None:
        return step
    row, negated = guard
    check = initialisation_check(site, guard_registers(site))

    def guarded(mask: Mask) -> None:
        if check is not None:
            check(mask)
        active = ~row if negated else row
        active = active.copy() if mask is None else active & mask
        if active.any():
            step(active)

    return guarded


def guard_registers(site: Site) -> frozenset[Reg]:
    return frozenset({site.instr.guard.reg}) if site.instr.guard else frozenset()


def source_registers(site: Site) -> frozenset[Reg]:
    """What the instruction reads always when it executes."""
    return read(site.instr) - guard_registers(site) - accumulators(site.instr)


def initialisation_check(site: Site, sources: frozenset[Reg]) -> Step | None:
    """A step that raises when an executing lane reads one of these registers and has not written it; None when none
    can."""
    unproven = site.machine.program.unproven.get(site.pc, frozenset())
    regs = sorted(unproven & sources, key=lambda reg: (reg.cls.value, reg.index))
    if not regs:
        return None
    flags = [(reg, site.machine.initialised[reg]) for reg in regs]

    def check(mask: Mask) -> None:
        for reg, flag in flags:
            missing = ~flag if mask is None else mask & ~flag
            if missing.any():
                name = f"{reg.cls.prefix}{reg.index}"
                raise site.fault(f"reads uninitialised register {name}", int(np.flatnonzero(missing)[0]))

    return check


def mark_initialised(site: Site) -> Step | None:
    """A step that notes that the executing lanes have written the result; None when no read depends on it."""
    flags = [site.machine.initialised[reg] for reg in written(site.instr) if reg in site.machine.initialised]
    if not flags:
        return None

    def mark(mask: Mask) -> None:
        for flag in flags:
            if mask is None:
                flag[:] = True
            else:
                flag |= mask

    return mark


def with_initialisation(site: Site, step: Step) -> Step:
    check, mark = initialisation_check(site, source_registers(site)), mark_initialised(site)
    if check is None and mark is None:
        return step

    def checked(mask: Mask) -> None:
        if check is not None:
            check(mask)
        step(mask)
        if mark is not None:
            mark(mask)

    return checked
