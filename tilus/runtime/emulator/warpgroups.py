"""Meeting of the four warps of a warpgroup at an instruction that all of them must execute together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tilus.runtime.emulator.decode import Site
    from tilus.runtime.emulator.machine import Machine

WARP, WARPS = 32, 4
Mask = npt.NDArray[np.bool_]
Action = Callable[[list[int]], None]
"""What happens when these warpgroups (numbered over all slots) have met."""


class Warpgroups:
    """Warpgroup g of a block is its warps 4 g .. 4 g + 3; warps of an incomplete one can execute no such instruction."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.per_block = machine.warps // WARPS
        self.count = machine.slots * self.per_block
        self.at = np.zeros(machine.lanes // WARP, np.int64)
        """For each warp: one more than the pc where it waits for the others, or 0."""

    def reset(self) -> None:
        self.at[:] = 0

    def slot(self, group: int) -> int:
        return group // self.per_block

    def lanes(self, group: int) -> slice:
        first = (group // self.per_block * self.machine.warps + group % self.per_block * WARPS) * WARP
        return slice(first, first + WARPS * WARP)

    def warps(self, group: int) -> slice:
        lanes = self.lanes(group)
        return slice(lanes.start // WARP, lanes.stop // WARP)

    def arrive(self, site: Site, mask: Mask, action: Action) -> list[tuple[int, Mask]]:
        """Lanes arrive; those whose warpgroup is complete go on, after the action."""
        whole = self._grouped(mask).all(axis=1)
        if 4 * WARP * np.count_nonzero(whole) == np.count_nonzero(mask) and not self.at.any():
            action(np.flatnonzero(whole).tolist())
            return [(site.pc + 1, mask)]
        self._check(site, mask)
        self.at[mask.reshape(-1, WARP).any(axis=1)] = site.pc + 1
        by_group = self.at.reshape(self.machine.slots, -1)[:, : WARPS * self.per_block].reshape(-1, WARPS)
        met = (by_group == site.pc + 1).all(axis=1)
        self._check_same(site, by_group)
        if not met.any():
            return []
        action(np.flatnonzero(met).tolist())
        leaving = np.zeros_like(mask)
        for group in np.flatnonzero(met).tolist():
            leaving[self.lanes(group)] = True
            self.at[self.warps(group)] = 0
        return [(site.pc + 1, leaving)]

    def _grouped(self, mask: Mask) -> Mask:
        return mask.reshape(self.machine.slots, -1)[:, : WARPS * WARP * self.per_block].reshape(-1, WARPS * WARP)

    def _check(self, site: Site, mask: Mask) -> None:
        """Every warp that arrives does so with 32 threads, and belongs to a whole warpgroup."""
        site.whole_warps(mask)
        outside = mask & (self.machine.warp_of >= WARPS * self.per_block)
        if outside.any():
            raise site.fault(
                f"warpgroup instruction in a warp without a warpgroup: the block has {self.machine.warps} warps",
                int(np.flatnonzero(outside)[0]),
                hint="all 128 threads of four consecutive warps, the first a multiple of 4, must execute it",
            )

    def _check_same(self, site: Site, at: npt.NDArray[np.int64]) -> None:
        other = (at != 0) & (at != site.pc + 1) & (at == site.pc + 1).any(axis=1, keepdims=True)
        if other.any():
            group, warp = (int(index) for index in np.argwhere(other)[0])
            raise site.fault(
                f"the warps of a warpgroup execute different instructions: warp {warp} of it is at\n"
                f"  {self.machine.site_text(int(at[group, warp]) - 1)}\n  others are at",
                self.lanes(group).start,
                hint="wgmma instructions are for all four warps of a warpgroup, in the same order",
            )

    def deadlock_report(self) -> str:
        """Who waits for the rest of his warpgroup: one line for each of these."""
        lines: list[str] = []
        for group in range(self.count):
            at = self.at[self.warps(group)]
            if not at.any():
                continue
            here = [int(warp) for warp in np.flatnonzero(at)]
            missing = [warp for warp in range(WARPS) if warp not in here]
            lines.append(
                f"  block {self.machine.block_name(self.slot(group))}, warpgroup {group % self.per_block}: its warps "
                f"{here} wait for its warps {missing} at {self.machine.site_text(int(at.max()) - 1)}"
            )
        return "\n".join(lines)
