"""Tiles of rows whose keys are shared out among blocks: where tiles are fewer than multiprocessors, or make a bad last turn.

A short chunk of a long sequence has few tiles of rows, and each sees many keys: 128 queries of 32 heads on 8192 tokens are 32
tiles of 65 steps of 1.6 us, for 132 multiprocessors. With four parts each a block has 16 steps, and beside them stores and merges
partial results of 32 KB a warpgroup. Blocks do not wait for each other: the last one of a tile to come adds all parts up, always
in the same order.

Partial results lie in memory as threads have them: each stores and loads 16 bytes at a time, neighbouring lanes side by side.
Otherwise these would be pairs of elements of a row.

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
from tilus.layout import RegisterLayout, spatial

MOST_SPLITS = 16
MOST_TURNS = 2  # of blocks, beyond which the last turn is not much of the whole
PART_STEPS = 6  # that storing a part and merging it take as long as
LEAST_GAIN = 0.1
WARPS = 4  # of a warpgroup


@functools.lru_cache(maxsize=4096)
def splits_of(tiles: int, num_sms: int, steps: int) -> int:
    """Parts of each of so many tiles of rows, at most, such that blocks are busy for the shortest time if each tile has so many
    steps; more only if it gains LEAST_GAIN."""

    def busy(splits: int) -> float:
        return -(-tiles * splits // num_sms) * (steps / splits + (PART_STEPS if splits > 1 else 0))

    best = 1
    if tiles <= MOST_TURNS * num_sms:
        for splits in range(2, MOST_SPLITS + 1):
            if busy(splits) <= (1 - LEAST_GAIN) * busy(best):
                best = splits
    return best


def fragments(rows: Any) -> Any:
    """Rows [64, head_dim] by warp and thread, [head_dim, 64]: fours of neighbouring elements of a thread, those of a warp's lanes
    side by side."""
    head_dim = rows.shape[1]
    apart = rows.reshape([WARPS, 2, 8, head_dim // 8, 4, 2])  # a product's lane 4 g + t has pairs of rows g and g + 8
    return tilus.transpose(apart, [0, 3, 2, 4, 1, 5]).reshape([head_dim, HALF])


def rows_of(fragments: Any) -> Any:
    """The inverse of `fragments`."""
    head_dim = fragments.shape[0]
    apart = tilus.transpose(fragments.reshape([WARPS, head_dim // 8, 8, 4, 2, 2]), [0, 4, 2, 1, 3, 5])
    return apart.reshape([HALF, head_dim])


def fragment_layout(head_dim: int) -> RegisterLayout:
    """Of what `rows_of` takes."""
    return (spatial(WARPS, 1).local(1, head_dim // 8).spatial(1, 32).local(1, 4)).reshape((head_dim, HALF))


class SplitRows(Rows):
    """64 rows of a tile that other blocks may have a part of, too.

    partials: (results [places, 2, head_dim, 64], `fragments` of each half, log2 of sums of weights [places, 128], tickets: zero,
    two for each tile of rows, and left so). The parts of a tile have places one after another.
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
        tilus.store(self.results[place, self.turns.half], [0, 0], fragments(result))
        tilus.store(self.logs[place], [first], log2)

    def merge(self, tile: PartOfTile) -> None:
        """Add up what all parts have stored."""
        half, (_, head_dim) = self.turns.half, self.acc.shape
        layout = fragment_layout(head_dim)
        self.acc, self.total = tilus.zeros([HALF, head_dim]), tilus.zeros([HALF, 1])
        highest = tilus.full([HALF, 1], NO_SCORE)
        for part in tilus.range(tile.parts):
            place = tile.place + part
            log2 = tilus.load(self.logs[place], [HALF * half], [HALF]).reshape([HALF, 1])
            values = rows_of(tilus.load(self.results[place, half], [0, 0], [head_dim, HALF], layout=layout))
            higher = tilus.maximum(highest, log2)
            shrink = tilus.exp2(highest - higher)
            factor = tilus.where(log2 > NO_SCORE, tilus.exp2(log2 - higher), 0.0)
            self.acc = self.acc * shrink + values * factor
            self.total = self.total * shrink + factor
            highest = higher
        self.highest = highest * (1.0 / self.unit)
