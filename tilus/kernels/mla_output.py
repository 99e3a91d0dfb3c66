"""Latents weighted and added up by two warpgroups, and where the sums go: to the output, or to be merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tilus
from tilus import int32
from tilus.kernels.mla_stages import LATENT, OUTPUT_WARPS, ROWS, Exchange, Ring
from tilus.kernels.paged_decode_columns import MERGED_REGISTERS, Columns

EIGHT = 8  # rows that are stored and merged together
HALF = LATENT // 2


def each_result(ring: Ring, exchange: Exchange, count: int, store: Callable[..., None]) -> None:
    """`store(halves, log2, *numbers)` for each part whose weights arrive; numbers: the `count` of its last message."""
    exchange.wait_ready()
    tiles = exchange.number(0)
    while tiles >= 0:
        whole = exchange.number(1)
        exchange.take()
        halves, log2 = weighted_sum(ring, exchange, tiles, whole)
        numbers = [exchange.number(index) for index in range(count)]
        exchange.take()
        store(halves, log2, *numbers)
        exchange.wait_ready()
        tiles = exchange.number(0)


def weighted_sum(ring: Ring, exchange: Exchange, tiles: Any, whole: Any) -> Any:
    """(softmax-weighted sums of the first and the second half of the latents, [64, HALF] each; their logarithms [64, 1]).

    An instruction's accumulators have to fit into the 128 registers of a thread with which the block starts, so they are halves.
    The last message is not taken: it says where the result goes. whole: how many of the tiles end with or before the part.
    """
    extents = (ROWS, HALF, ring.tiles.shape[1])
    first, second = tilus.zeros([ROWS, HALF]), tilus.zeros([ROWS, HALF])
    for index in tilus.range(tiles):
        exchange.wait_ready()
        factor = exchange.factor(0)
        first, second = first * factor, second * factor
        tokens, weights = ring.wait_full(), exchange.weights[exchange.slot]
        first = tilus.wgmma(weights, tokens, first, shape=extents, y_transposed=True)
        second = tilus.wgmma(weights, tokens, second, shape=extents, y_offsets=[0, HALF], y_transposed=True)
        tilus.wgmma_wait()
        exchange.take()
        ring.give_back(index == whole)
        ring.advance()
    exchange.wait_ready()
    factor, log2 = exchange.factor(0), exchange.factor(1)
    return (first * factor, second * factor), log2


class Results:
    """out: [row blocks, eights, 1, 8, latent]. lse: likewise, or None. partial_out: [places, eights, 8, latent]. tickets: one
    for each block of rows."""

    def __init__(self, out: Any, lse: Any, partial_out: Any, partial_lse: Any, tickets: Any, eights: int) -> None:
        self.out, self.lse, self.tickets = out, lse, tickets
        self.partial_out, self.partial_lse = partial_out, partial_lse
        self.columns = Columns(eights, EIGHT, LATENT, OUTPUT_WARPS, 1)

    def store(self, halves: Any, log2: Any, block: Any) -> None:
        for index, half in enumerate(halves):
            rows = half.reshape([EIGHT, EIGHT, HALF]).to(self.out.dtype)
            tilus.store(self.out[block], [0, 0, 0, index * HALF], rows, dims=[0, 2, 3])
        self.columns.store_lse(self.lse, block, 0, 0, log2.reshape([EIGHT, EIGHT]))

    def merge(self, halves: Any, log2: Any, block: Any, count: Any, first_place: Any, index: Any) -> None:
        """Store one of `count` partial results; whoever comes last adds up all of them in order."""
        for part, half in enumerate(halves):
            rows = half.reshape([EIGHT, EIGHT, HALF])
            tilus.store(self.partial_out[first_place + index], [0, 0, part * HALF], rows)
        tilus.store(self.partial_lse[first_place + index], [0, 0], log2.reshape([EIGHT, EIGHT]))
        if tilus.atomic_add(self.tickets, [block], 1) == count - 1:
            tilus.store(self.tickets, [block], tilus.zeros([1], int32))
            outs, logs = (tilus.narrow(t, 0, first_place, count) for t in (self.partial_out, self.partial_lse))
            self.columns.merge([(outs, logs, count, MERGED_REGISTERS)], self.out, self.lse, block, 0)
