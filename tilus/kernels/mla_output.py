"""Latents weighted and added up by two warpgroups, each of which has half of their elements, and where the sums go."""

from __future__ import annotations

from typing import Any

import tilus
from tilus.kernels.mla_stages import ROWS, Exchange, Ring

EIGHT = 8  # rows that are stored and merged together
PART = 256  # elements of a latent that are added up together


def weighted_sum(ring: Ring, exchange: Exchange, tiles: Any) -> Any:
    """(softmax-weighted sums of the first and the second half of the latents, [64, PART] each, their logarithms [64, 1]).

    An instruction's accumulators have to fit into the 128 registers of a thread with which the block starts, so they are halves.
    """
    tile = ring.tiles.shape[1]
    extents = (ROWS, PART, tile)
    first, second = tilus.zeros([ROWS, PART]), tilus.zeros([ROWS, PART])
    for _ in tilus.range(tiles):
        exchange.wait_ready()
        factor = exchange.factor(0)
        first, second = first * factor, second * factor
        tokens, weights = ring.wait_full(), exchange.weights[exchange.slot]
        first = tilus.wgmma(weights, tokens, first, shape=extents, y_transposed=True)
        second = tilus.wgmma(weights, tokens, second, shape=extents, y_offsets=[0, PART], y_transposed=True)
        tilus.wgmma_wait()
        exchange.take()
        ring.give_back()
        ring.advance()
    exchange.wait_ready()
    factor, log2 = exchange.factor(0), exchange.factor(1)
    return (first * factor, second * factor), log2
