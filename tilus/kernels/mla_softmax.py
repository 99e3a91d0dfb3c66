"""Scores of 64 rows with the latents of a part, and their softmax: the warpgroup that makes weights for those with the results.

Online softmax: M. Milakov and N. Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus.kernels.attention import NO_SCORE
from tilus.kernels.mla_stages import PIECE, ROWS, Exchange, Ring
from tilus.kernels.paged_decode_split import Part

COLUMNS = 192  # of queries and latents that are multiplied together


class Scores:
    """Each row's highest score, before it is scaled, and sum of weights. q_len, heads: of the queries, which rows go through."""

    def __init__(self, ring: Ring, exchange: Exchange, queries: Any, scale_log2: Any, q_len: int, heads: int) -> None:
        self.ring, self.exchange, self.queries, self.scale_log2 = ring, exchange, queries, scale_log2
        self.q_len, self.heads = q_len, heads
        self.highest, self.total = tilus.full([ROWS, 1], NO_SCORE), tilus.zeros([ROWS, 1])

    def attend(self, part: Part, first_row: Any, latent: int) -> None:
        """Weights of all tiles of a part. first_row: of the sequence's rows, the first one of this block."""
        ring, exchange = self.ring, self.exchange
        tile = ring.tiles.shape[1]
        self.highest, self.total = tilus.full([ROWS, 1], NO_SCORE), tilus.zeros([ROWS, 1])
        query = (tilus.arange(ROWS, shape=[ROWS, 1]) + first_row) // self.heads
        limits = query + (part.length - self.q_len + 1)
        key = tilus.arange(tile, shape=[1, tile], axis=1)
        exchange.wait_taken()
        exchange.give(numbers=(tilus.cdiv(part.end_token - part.token, tile),))
        for first in tilus.range(part.token, part.end_token, tile):
            tokens = ring.wait_full()
            scores = self.scores(tokens)
            if first + tile > part.length - self.q_len + 1:
                scores = tilus.where(key < limits - first, scores, -math.inf)
            weights, shrink = self.weights(scores)
            if first + tile > part.end_token:
                clear_end(tokens, part.end_token - first, latent)
            exchange.wait_taken()
            tilus.store_shared(exchange.weights[exchange.slot], weights.to(self.queries.dtype))
            exchange.give((shrink,))
            ring.advance()

    def scores(self, tokens: Any) -> Any:
        """[64, tokens], not scaled. Of some columns at a time, so that few places of operands are held in registers."""
        rows, width = self.queries.shape
        scores = tilus.zeros([rows, tokens.shape[0]])
        for block in tilus.range(width // COLUMNS):
            start, extents = [0, block * COLUMNS], (rows, tokens.shape[0], COLUMNS)
            scores = tilus.wgmma(self.queries, tokens, scores, shape=extents, x_offsets=start, y_offsets=start)
        tilus.wgmma_wait()
        return scores

    def weights(self, scores: Any) -> Any:
        """The weights of a tile, and the factor of what has been added up before."""
        higher = tilus.maximum(self.highest, tilus.max(scores, 1, keepdims=True))
        weights = tilus.exp2(tilus.fma(scores, self.scale_log2, -(higher * self.scale_log2)), ftz=True)
        shrink = tilus.exp2((self.highest - higher) * self.scale_log2, ftz=True)
        self.highest = higher
        self.total = self.total * shrink + tilus.sum(weights, 1, keepdims=True)
        return weights, shrink

    def finish(self, numbers: tuple[Any, ...]) -> None:
        """What the result is divided by, and the logarithm of base 2 of the sum of exp(scaled score), NO_SCORE without keys."""
        found = self.total > 0.0
        log2 = tilus.where(found, tilus.log2(tilus.where(found, self.total, 1.0)) + self.highest * self.scale_log2, NO_SCORE)
        self.exchange.wait_taken()
        self.exchange.give((tilus.rcp(tilus.where(found, self.total, 1.0)), log2), numbers)


def clear_end(tokens: Any, count: Any, latent: int) -> None:
    """Behind the first `count` tokens there may be anything in the page, also no number, which a weight of zero does not undo."""
    for start in tilus.range(count // PIECE * PIECE, tokens.shape[0], PIECE):
        piece = tilus.load_shared(tokens, [start, 0], [PIECE, latent])
        inside = tilus.arange(PIECE, shape=[PIECE, 1]) < count - start
        tilus.sync()
        tilus.store_shared(tokens, tilus.where(inside, piece, 0.0), [start, 0])
