"""Products that the blocks of a cluster share along K: how many blocks, and how their sums meet in shared memory."""

from __future__ import annotations

import tilus
from tilus.dtypes import DataType

MOST_SPLITS = 4  # of K
CLUSTER_SMS = (
    16  # multiprocessors that clusters share, at least: a GPC's. The others may be too few for a whole cluster
)
STEPS_OF_SPLIT = 4  # at least: below that starting and adding up take longer than the steps


class SharedSums:
    """Adds up the sums [rows, tokens] of the blocks of a cluster, each block some of the rows."""

    def __init__(self, dtype: DataType, shape: list[int], splits: int):
        self.splits = splits
        self.parts = tilus.shared(dtype, shape)
        self.given, self.taken = tilus.mbarrier(arrivals=splits), tilus.mbarrier(arrivals=splits)

    def own_rows(self, total, split, index):
        """The sums of this block's rows of tile number `index`, [rows / splits, tokens]. `parts` holds a block's sums from when
        all have taken their rows of the tile before to when all have taken those of this one."""
        rows, tokens = self.parts.shape
        own = rows // self.splits
        tilus.wait_barrier(self.taken, (index + 1) % 2)
        tilus.store_shared(self.parts, total)
        for block in range(self.splits):
            tilus.arrive(self.given, block=block)
        tilus.wait_barrier(self.given, index % 2)
        summed = tilus.load_shared(self.parts, [split * own, 0], [own, tokens], block=0)
        for block in range(1, self.splits):
            summed = summed + tilus.load_shared(self.parts, [split * own, 0], [own, tokens], block=block)
        for block in range(self.splits):
            tilus.arrive(self.taken, block=block, reads_only=True)
        return summed


def splits_of(tiles: int, steps: int, num_sms: int) -> int:
    """How many blocks of a cluster share each of so many tiles along K, in so many steps, all of them running at once."""
    whole, splits = num_sms // CLUSTER_SMS * CLUSTER_SMS, 1
    while splits < MOST_SPLITS and tiles * splits * 2 <= whole and steps >= STEPS_OF_SPLIT * splits * 2:
        splits *= 2
    return splits
