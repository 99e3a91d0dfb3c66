"""Sums [rows, tokens] of wgmma that several warpgroups, or blocks of a cluster, have parts of, always added up in one order."""

from __future__ import annotations

import tilus
from tilus import f32
from tilus.dtypes import DataType


class Sums:
    """Where the first of `count` warpgroups with parts of K, or blocks of a cluster, finds the sums of the others.

    threads: of each of them. turns: there is more than one tile, so that the others wait until their sums are taken.
    """

    def __init__(self, count: int, tokens: int, threads: int, dtype: DataType = f32, turns: bool = False):
        self.count = count
        self.taken = None
        if count > 1:
            self.buffers = tilus.shared(dtype, [count - 1, tokens // 8, threads, 4])
            self.given = tilus.mbarrier(arrivals=count - 1)
            self.taken = tilus.mbarrier() if turns else None

    def give(self, total, giver, turn=0, block=None):
        """Leave the sums of the giver-th, from 1 on, to the first one, which `block` of the cluster has (None: this one)."""
        if self.taken is not None:
            tilus.wait_barrier(self.taken, (turn + 1) % 2)
        tilus.store_shared(self.buffers[giver - 1], by_thread(total), block=block)
        tilus.arrive(self.given, block=block)

    def added_to(self, total, turn=0, across: bool = False):
        """Of the first one, plus those of the others, always in the same order. across: the others are blocks of the cluster."""
        if self.count == 1:
            return total
        tilus.wait_barrier(self.given, turn % 2)
        added = tilus.load_shared(self.buffers[0])
        for other in range(1, self.count - 1):
            added = added + tilus.load_shared(self.buffers[other])
        if self.taken is not None:
            if across:
                for other in range(1, self.count):
                    tilus.arrive(self.taken, block=other, reads_only=True)
            else:
                tilus.arrive(self.taken)
        return total + from_thread(added, total)


def by_thread(total):
    """[rows, tokens] of wgmma as [tokens / 8, threads, 4], so that a thread moves 16 bytes beside those of its neighbours."""
    rows, tokens = total.shape
    split = tilus.reshape(total, [rows // 16, 2, 8, tokens // 8, 4, 2])
    return tilus.reshape(tilus.transpose(split, [3, 0, 2, 4, 1, 5]), [tokens // 8, 2 * rows, 4])


def from_thread(added, total):
    """What `by_thread` made of sums like `total`, back in order."""
    rows, tokens = total.shape
    split = tilus.reshape(added, [tokens // 8, rows // 16, 8, 4, 2, 2])
    return tilus.reshape(tilus.transpose(split, [1, 4, 2, 0, 3, 5]), [rows, tokens])
