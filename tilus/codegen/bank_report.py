"""Bank conflicts of a kernel's accesses to shared memory, counted from the layouts over the addresses of every warp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import numpy.typing as npt

from tilus.codegen.access import unit_nbits
from tilus.codegen.context import SharedSite
from tilus.errors import TilusError
from tilus.ir.expr import Const, Expr
from tilus.ir.ranges import divisor
from tilus.layout import SharedLayout, bank_conflicts

WARP_SIZE = 32
MATRIX_ROW_NBYTES = 16
MAX_POSITIONS = 64


@dataclass(frozen=True)
class SiteConflicts:
    """What one site costs a block. accesses: warp-wide accesses (matrices, for ldmatrix). extra_wavefronts: beyond those that
    the data need; 0 is free of conflicts."""

    accesses: int
    extra_wavefronts: int


def site_conflicts(site: SharedSite) -> SiteConflicts:
    """The conflicts of one execution of a site by all warps, at its worst position.

    An offset that varies at run time takes every multiple of its known divisor at which the tile lies inside of the tensor,
    up to 64 positions. Threads that hold the same element count once, as they do in hardware.
    """
    memory = site.tensor.layout
    if memory is None:
        raise TilusError(f"shared tensor {site.tensor.name} has no layout")
    tile = site.layout.table()
    counts = [_at(site, memory, tile, position) for position in _positions(site)]
    return max(counts, key=lambda count: count.extra_wavefronts)


def _positions(site: SharedSite) -> Iterator[tuple[int, ...]]:
    """Where the tile may start, one index per dim of the tensor."""
    extents = dict(zip(site.dims, site.layout.shape, strict=True))
    choices = [
        _starts(offset, extent - extents.get(dim, 1))
        for dim, (offset, extent) in enumerate(zip(site.offsets, site.tensor.shape, strict=True))
    ]
    return islice(product(*choices), MAX_POSITIONS)


def _starts(offset: Expr, last: int) -> Sequence[int]:
    if isinstance(offset, Const):
        return (int(offset.value),)
    return range(0, last + 1, divisor(offset) or last + 1)


def _at(
    site: SharedSite, memory: SharedLayout, tile: npt.NDArray[np.int64], position: tuple[int, ...]
) -> SiteConflicts:
    index = np.broadcast_to(np.array(position), (*tile.shape[:2], len(position))).copy()
    index[..., list(site.dims)] += tile
    addresses_nbits = memory.table()[tuple(np.moveaxis(index, -1, 0))] * site.tensor.dtype.nbits
    accesses = extra = 0
    for warp in range(0, tile.shape[0], WARP_SIZE):
        for addresses_nbytes, nbytes in _warp_accesses(site, addresses_nbits[warp : warp + WARP_SIZE] // 8):
            accesses += 1
            extra += bank_conflicts(addresses_nbytes, nbytes)
    return SiteConflicts(accesses, extra)


def _warp_accesses(
    site: SharedSite, addresses_nbytes: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """(address of each lane, bytes a lane) of each access of one warp; the addresses given are [lane, slot]."""
    for slot in range(0, addresses_nbytes.shape[1], site.size):
        if site.rows_of_16_bytes:  # a register of the warp is one matrix: the rows are where its elements lie
            rows = np.unique(addresses_nbytes[:, slot : slot + site.size] // MATRIX_ROW_NBYTES)
            yield rows * MATRIX_ROW_NBYTES, MATRIX_ROW_NBYTES
            continue
        unit = unit_nbits(site.tensor.dtype, site.size) // 8
        for byte in range(0, site.size * site.tensor.dtype.nbits // 8, unit):
            yield addresses_nbytes[:, slot] + byte, unit
