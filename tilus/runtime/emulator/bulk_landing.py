"""Where a bulk or tensor load lands and which mbarriers it completes: in one block of the cluster, or in several."""

from __future__ import annotations

import numpy as np

from tilus.runtime.emulator.bulk_copy import Landing
from tilus.runtime.emulator.decode import Site
from tilus.runtime.emulator.mbarrier import Mbarrier
from tilus.runtime.emulator.mbarrier_instructions import barrier_access, by_place


class Landings:
    """The operands [mbarrier]{, block mask} of a load; the mask goes with .multicast::cluster.

    Without a mask the mbarrier is in the block of the destination. With one, data and completed bytes go to the same
    places in every block whose rank is a bit of the mask.
    """

    def __init__(self, site: Site, index: int) -> None:
        """index: of the mbarrier among the operands."""
        self.site, self.barriers = site, barrier_access(site, site.operands[index], asynchronous=True)
        self.masks = site.source(index + 1, "u16") if site.has("multicast::cluster") else None

    def of(self, lane: int, place: int) -> tuple[Landing, ...]:
        """place: of the destination in the data of shared memory."""
        machine = self.site.machine
        at, _ = next(by_place(self.barriers, np.array([lane])))
        size, own = machine.shared.nbytes, int(machine.slot_of[lane])
        if self.masks is None:
            if at // size != place // size:
                raise self.site.fault(
                    f"lands in block {machine.block_name(place // size)}, but completes an mbarrier of block "
                    f"{machine.block_name(at // size)}",
                    lane,
                    hint="the mbarrier must be in the block of the destination: map both addresses to its rank",
                )
            return (Landing(0, self._barrier(lane, at)),)
        if {at // size, place // size} != {own}:
            raise self.site.fault("a multicast to addresses of another block, expected those of the own one", lane)
        mask = int(self.masks if self.masks.ndim == 0 else self.masks[lane])
        if not 0 < mask < 1 << machine.cluster:
            raise self.site.fault(
                f"a multicast to the blocks of mask {mask:#x}, in a cluster of {machine.cluster} blocks", lane
            )
        landings: list[Landing] = []
        for rank in range(machine.cluster):
            if mask >> rank & 1:
                slot = own - own % machine.cluster + rank
                machine.clusters.check_running(self.site.pc, lane, slot)
                landings.append(Landing((slot - own) * size, self._barrier(lane, at + (slot - own) * size)))
        return tuple(landings)

    def _barrier(self, lane: int, place: int) -> Mbarrier:
        """The mbarrier at a place, which must be visible to the asynchronous proxy."""
        machine = self.site.machine
        barrier = machine.mbarriers.find(self.site.pc, lane, place)
        if not barrier.visible:
            raise self.site.fault(
                f"the mbarrier {machine.mbarriers.name(place)} is not visible to the asynchronous proxy\n"
                f"  initialised at {machine.site_text(barrier.init_pc)}",
                lane,
                hint="the initialising thread executes fence.mbarrier_init or fence.proxy.async after mbarrier.init",
            )
        return barrier
