"""Bank conflicts: how many wavefronts warp-wide accesses to shared memory take.

There are 32 banks of 4 bytes. Up to 4 bytes a lane the warp is served at once; 8-byte accesses run as two phases of half
warps, 16-byte accesses as four phases of quarter warps, each of which moves at most 128 bytes. A phase takes as many
wavefronts as the busiest bank has distinct words; lanes that want the same word share it.

Sources: CUDA C++ Programming Guide, "Shared Memory" of compute capability 5.x (banks, words that lanes share; unchanged
since) and of 2.x (64- and 128-bit requests are split into two and four). NVIDIA does not document the phases of later
devices; CUTLASS is built on half and quarter warps (NVIDIA/cutlass issues 328 and 898), and writers of kernels for Maxwell
saw that phases which read the same words may be merged (NervanaSystems/maxas issue 8). Here each phase counts for itself,
so the count is then an upper bound.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tilus.layout.errors import LayoutError

NUM_BANKS = 32
BANK_NBYTES = 4
WARP_SIZE = 32
NOBODY = -1


def wavefronts(
    addresses_nbytes: npt.NDArray[np.int64], access_nbytes: int, active: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int64]:
    """Wavefronts of many accesses at once: [..., lanes] byte addresses, in lane order, to counts [...].

    access_nbytes: 1, 2, 4, 8 or 16 bytes a lane. active: which lanes take part, broadcast to the addresses; all by default.
    A phase without active lanes takes none. One matrix of ldmatrix is an access of 8 lanes, its rows, with 16 bytes each.
    """
    nbytes = max(BANK_NBYTES, access_nbytes)
    lanes_per_phase = WARP_SIZE * BANK_NBYTES // nbytes
    # What a lane moves lies in one word, or in a whole aligned group of 1, 2 or 4 banks: lanes meet in all of it or in none.
    items = addresses_nbytes // nbytes
    if active is not None:
        items = np.where(active, items, NOBODY)
    missing = -items.shape[-1] % lanes_per_phase
    if missing:
        items = np.concatenate([items, np.full((*items.shape[:-1], missing), NOBODY)], axis=-1)
    phases = np.sort(items.reshape(-1, lanes_per_phase), axis=1)
    distinct = phases != NOBODY
    distinct[:, 1:] &= phases[:, 1:] != phases[:, :-1]
    groups = NUM_BANKS * BANK_NBYTES // nbytes
    cells = np.arange(len(phases))[:, None] * groups + phases % groups
    counts = np.bincount(cells[distinct], minlength=len(phases) * groups).reshape(-1, groups).max(axis=1, initial=0)
    return counts.reshape(*items.shape[:-1], -1).sum(axis=-1)


def bank_conflicts(addresses_nbytes: npt.ArrayLike, access_nbytes: int) -> int:
    """Extra wavefronts of one warp-wide shared-memory access beyond those that its size needs: one for each phase.

    addresses_nbytes: the byte address of each lane, [lanes] with at most 32 lanes. access_nbytes: 1, 2, 4, 8 or 16 bytes a lane.
    Raises LayoutError for another size or a misaligned address.
    """
    addresses = np.asarray(addresses_nbytes, dtype=np.int64).reshape(-1)
    if access_nbytes not in (1, 2, 4, 8, 16):
        raise LayoutError(f"an access of {access_nbytes} bytes a lane; expected 1, 2, 4, 8 or 16")
    if len(addresses) > WARP_SIZE:
        raise LayoutError(f"a warp-wide access has {len(addresses)} addresses; expected at most {WARP_SIZE}")
    if np.any(addresses % access_nbytes):
        raise LayoutError(f"an address of a {access_nbytes}-byte access is not a multiple of {access_nbytes}")
    phases = -(-len(addresses) * max(BANK_NBYTES, access_nbytes) // (NUM_BANKS * BANK_NBYTES))
    return int(wavefronts(addresses, access_nbytes)) - phases
