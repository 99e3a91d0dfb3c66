"""The instruction families: importing their files fills the table of handlers that `decode` looks up."""

from __future__ import annotations

from tilus.runtime.emulator import (
    alu,
    async_instructions,
    atomics,
    bits,
    bulk_instructions,
    cluster_instructions,
    control,
    convert,
    floating,
    hints,
    matrix,
    mbarrier_instructions,
    memory,
    predicates,
    tensor_instructions,
    warp,
)
from tilus.runtime.emulator.decode import HANDLERS, Handler, Site, Step
from tilus.runtime.emulator.guards import with_guard, with_initialisation
from tilus.runtime.emulator.machine import Machine
from tilus.runtime.emulator.wgmma import with_wgmma_registers

FAMILIES = (
    alu, async_instructions, atomics, bits, bulk_instructions, cluster_instructions, control, convert, floating, hints, matrix,
    mbarrier_instructions, memory, predicates, tensor_instructions, warp,
)  # fmt: skip


def decode(machine: Machine, pc: int) -> Step:
    """The step of one instruction, with its guard and, where needed, its register-initialisation checks.

    Raises: TilusError for an unknown opcode.
    """
    site = Site(machine, pc)
    handler = _handler(site)
    return with_guard(site, with_wgmma_registers(site, with_initialisation(site, handler(site))))


def _handler(site: Site) -> Handler:
    words = [site.name, *site.words]
    for count in (5, 4, 3, 2, 1):
        handler = HANDLERS.get(".".join(words[:count]))
        if handler is not None:
            return handler
    raise site.fault(f"the emulator does not know the instruction `{site.instr.opcode}`")
