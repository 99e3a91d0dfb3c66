"""Instructions that steer the hardware and change no value that a kernel may rely on."""

from __future__ import annotations

import numpy as np

from tilus.ptx.module import Imm
from tilus.runtime.emulator.decode import Mask, Site, Step, instruction


@instruction("nanosleep", "griddepcontrol")
def no_effect(site: Site) -> Step:
    """nanosleep; griddepcontrol.{wait, launch_dependents}: here no grid runs before this one."""
    return lambda mask: None


@instruction("setmaxnreg")
def set_registers(site: Site) -> Step:
    """setmaxnreg.{inc,dec}.sync.aligned.u32 count, by whole warps."""
    site.allow("inc", "dec", "sync", "aligned")
    site.expect_operands(1)
    count = site.operands[0]
    if not isinstance(count, Imm) or count.value % 8 or not 24 <= count.value <= 256:
        raise site.fault(f"setmaxnreg of {count}, expected a multiple of 8 from 24 to 256")

    def step(mask: Mask) -> None:
        site.whole_warps(mask)

    return step


@instruction("createpolicy")
def create_policy(site: Site) -> Step:
    """createpolicy.*: an opaque 64-bit value that only cache hints take."""
    out = site.target(0, "b64")

    def step(mask: Mask) -> None:
        np.copyto(out, np.uint64(0x12F0_0000_0000_0000), where=True if mask is None else mask)

    return step
