"""Instructions of clusters: barrier.cluster, mapa, getctarank (PTX ISA); their effect over time is in `cluster`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.cluster import RANK_SHIFT, rank_field
from tilus.runtime.emulator.decode import Mask, Site, Step, instruction

Flags = npt.NDArray[np.bool_]


def cluster_barrier(site: Site) -> Callable[[Flags], list[tuple[int, Flags]]]:
    """barrier.cluster.arrive{.release, .relaxed}{.aligned}, barrier.cluster.wait{.acquire}{.aligned}."""
    arrives = site.has("arrive")
    site.allow("cluster", "aligned", *(("arrive", "release", "relaxed") if arrives else ("wait", "acquire")))
    site.expect_operands(0)
    clusters, pc, aligned = site.machine.clusters, site.pc, site.has("aligned")
    release = not site.has("relaxed")

    def barrier(mask: Flags) -> list[tuple[int, Flags]]:
        if aligned:
            site.whole_live_warps(mask)
        if not arrives:
            return clusters.wait(pc, mask)
        clusters.arrive(pc, mask, release=release)
        return [(pc + 1, mask)]

    return barrier


@instruction("mapa")
def map_address(site: Site) -> Step:
    """mapa{.shared::cluster}.type d, a, rank: the same place in the block of this rank."""
    site.allow("shared::cluster")
    site.expect_operands(3)
    out, address, rank = site.target(0, site.type()), site.source(1, site.type()), site.source(2, "u32")
    machine = site.machine
    own = out.dtype.type((1 << RANK_SHIFT) - 1 | -1 << RANK_SHIFT + 8 & (1 << 8 * out.itemsize) - 1)

    def step(mask: Mask) -> None:
        lanes = site.lanes(mask)
        ranks = np.broadcast_to(rank, machine.lanes)[lanes].astype(np.int64)
        if (ranks >= machine.cluster).any():
            index = int(np.flatnonzero(ranks >= machine.cluster)[0])
            raise site.fault(
                f"maps an address to block {ranks[index]} of a cluster of {machine.cluster}", int(lanes[index])
            )
        field = (ranks + 1 << RANK_SHIFT).astype(out.dtype)
        out[lanes] = np.broadcast_to(address, machine.lanes)[lanes] & own | field

    return step


@instruction("getctarank")
def rank_of_address(site: Site) -> Step:
    """getctarank{.shared::cluster}.type d, a: rank of the block that an address belongs to."""
    site.allow("shared::cluster")
    site.expect_operands(2)
    out, address = site.target(0, "u32"), site.source(1, site.type())
    machine = site.machine

    def rank(addresses: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
        field = rank_field(np.broadcast_to(addresses, machine.lanes).astype(np.int64))
        return np.where(field > 0, field - 1, machine.rank_of).astype(np.uint32)

    return site.elementwise(rank, out, address)
