"""Tiles of rows whose keys are shared out among blocks: where tiles are fewer than multiprocessors, or make a bad last turn.

A short chunk of a long sequence has few tiles of rows, and each sees many keys: 128 queries of 32 heads on 8192 tokens are 32
tiles of 65 steps of 1.6 us, for 132 multiprocessors. With four parts each a block has 16 steps; storing and merging partial
results of 32 KB a warpgroup takes as long as two. Blocks do not wait for each other: the last one of a tile to come adds all
parts up, always in the same order.

Sums of parts merged by their log-sum-exp: T. Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import functools
from typing import Any

import tilus
from tilus import int32
from tilus.kernels.online_softmax import NO_SCORE
from tilus.kernels.paged_prefill_softmax import HALF, Kind, Rows, Turns
from tilus.kernels.paged_prefill_stages import Stages
from tilus.kernels.paged_prefill_tiles import PartOfTile

MOST_SPLITS = 16
MOST_TURNS = 2  # of blocks, beyond which the last turn is not much of the whole
LEAST_GAIN = 0.1


@functools.lru_cache(maxsize=4096)
def splits_of(tiles: int, num_sms: int) -> int:
    """Parts of each tile of rows, at most, such that blocks are busy for the shortest time; more only if it gains LEAST_GAIN."""

    def turns(splits: int) -> float:
        return -(-tiles * splits // num_sms) / splits

    best = 1
    if tiles <= MOST_TURNS * num_sms:
        for splits in range(2, MOST_SPLITS + 1):
            if turns(splits) <= (1 - LEAST_GAIN) * turns(best):
                best = splits
    return best


class SplitRows(Rows):
    """64 rows of a tile that other blocks may have a part of, too.

    partials: (results [places, 128, head_dim], log2 of sums of weights [places, 128], tickets: zero, two for each tile of rows,
    and left so). The parts of a tile have places one after another.
    """

    def __init__(
        self, stages: Stages, turns: Turns, outputs: Any, scale_log2: Any, kind: Kind, parameters: Any, bits: Any, partials: Any
    ) -> None:  # fmt: skip
        Rows.__init__(self, stages, turns, outputs, scale_log2, kind, parameters, bits)
        self.results, self.logs, self.tickets = partials

    def compute(self, index: Any, tile: Any) -> None:
        """What the index-th `PartOfTile` of the block adds; the result of the whole tile, if it is the last one to come."""
        self.attend(index, tile)
        complete = 1
        if tile.parts > 1:
            self.store_part(tile)
            ticket = 2 * tile.number + self.turns.half
            complete = 0
            if tilus.atomic_add(self.tickets, [ticket], 1) == tile.parts - 1:
                tilus.store(self.tickets, [ticket], tilus.zeros([1], int32))
                self.merge(tile)
                complete = 1
        if complete == 1:
            self.store(tile)

    def store_part(self, tile: PartOfTile) -> None:
        place, first = tile.place + tile.part, HALF * self.turns.half
        result, log2 = self.partial()
        tilus.store(self.results[place], [first, 0], result)
        tilus.store(self.logs[place], [first], log2)

    def merge(self, tile: PartOfTile) -> None:
        """Add up what all parts have stored."""
        first, shape = HALF * self.turns.half, self.acc.shape
        self.acc, self.total = tilus.zeros(shape), tilus.zeros([HALF, 1])
        highest = tilus.full([HALF, 1], NO_SCORE)
        for part in tilus.range(tile.parts):
            log2 = tilus.load(self.logs[tile.place + part], [first], [HALF]).reshape([HALF, 1])
            values = tilus.load(self.results[tile.place + part], [first, 0], shape)
            higher = tilus.maximum(highest, log2)
            shrink = tilus.exp2(highest - higher)
            factor = tilus.where(log2 > NO_SCORE, tilus.exp2(log2 - higher), 0.0)
            self.acc = self.acc * shrink + values * factor
            self.total = self.total * shrink + factor
            highest = higher
        self.highest = highest * (1.0 / self.unit)
