"""Bank conflicts of shared memory: of one access, and of a register tile that is loaded or stored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tilus.layout.errors import LayoutError

NUM_BANKS = 32
BANK_NBYTES = 4


def bank_conflicts(addresses_nbytes: npt.ArrayLike, access_nbytes: int) -> int:
    """Extra wavefronts of one warp-wide shared-memory access beyond those that its size needs.

    addresses_nbytes: the byte address of each active lane, [lanes] with at most 32 lanes, in lane order.
    access_nbytes: 1, 2, 4, 8 or 16 bytes a lane.

    There are 32 banks of 4 bytes. Up to 4 bytes the warp is served at once, 8-byte accesses by half warps, 16-byte
    accesses by quarter warps; each group takes as many wavefronts as the busiest bank has distinct words (lanes that
    read the same word share it). One matrix of ldmatrix is an access of its 8 row addresses with 16 bytes each.
    Raises LayoutError for another size or a misaligned address.
    """
    addresses = np.asarray(addresses_nbytes, dtype=np.int64).reshape(-1)
    if access_nbytes not in (1, 2, 4, 8, 16):
        raise LayoutError(f"an access of {access_nbytes} bytes a lane; expected 1, 2, 4, 8 or 16")
    if len(addresses) > 32:
        raise LayoutError(f"a warp-wide access has {len(addresses)} addresses; expected at most 32")
    if np.any(addresses % access_nbytes):
        raise LayoutError(f"an address of a {access_nbytes}-byte access is not a multiple of {access_nbytes}")
    words_per_lane = max(1, access_nbytes // BANK_NBYTES)
    lanes_per_group = 32 // words_per_lane
    extra = 0
    for start in range(0, len(addresses), lanes_per_group):
        first_words = addresses[start : start + lanes_per_group] // BANK_NBYTES
        words = np.unique(first_words[:, None] + np.arange(words_per_lane))
        extra += int(np.bincount(words % NUM_BANKS).max()) - 1
    return extra
