"""Scores of 64 rows with a run of latents, and their softmax: the warpgroup that makes weights for those with the results.

Online softmax: M. Milakov and N. Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus.kernels.mla_stages import LATENT, PIECE, ROWS, Exchange, Queries, Ring
from tilus.kernels.online_softmax import NO_SCORE

COLUMNS = 192  # of queries and latents that are multiplied together: more of them take more registers for their places


class Scores:
    """Each row's highest score, before it is scaled, and sum of weights. Rows go through query tokens, then heads."""

    def __init__(self, queries: Queries, ring: Ring, exchange: Exchange, scale_log2: Any, heads: int) -> None:
        self.queries, self.ring, self.exchange = queries, ring, exchange
        self.scale_log2, self.heads = scale_log2, heads
        self.highest, self.total = tilus.full([ROWS, 1], NO_SCORE), tilus.zeros([ROWS, 1])

    def attend(self, token: Any, end_token: Any, limit: Any, first_row: Any) -> None:
        """Weights of all tiles of the tokens from `token` to before `end_token`. limit: tokens that the sequence's first query
        sees. first_row: of the sequence's rows, the first one of this block."""
        ring, exchange = self.ring, self.exchange
        tile = ring.tiles.shape[1]
        self.highest, self.total = tilus.full([ROWS, 1], NO_SCORE), tilus.zeros([ROWS, 1])
        limits = (tilus.arange(ROWS, shape=[ROWS, 1]) + first_row) // self.heads + limit
        key = tilus.arange(tile, shape=[1, tile], axis=1)
        exchange.wait_taken()
        exchange.give(numbers=(tilus.cdiv(max(end_token - token, 0), tile),))
        self.queries.wait_full()
        for first in tilus.range(token, end_token, tile):
            tokens = ring.wait_full()
            scores = self.scores(tokens)
            if first + tile > limit:
                scores = tilus.where(key < limits - first, scores, -math.inf)
            weights, shrink = self.weights(scores)
            if first + tile > end_token:
                clear_end(tokens, end_token - first)
            exchange.wait_taken()
            tilus.store_shared(exchange.weights[exchange.slot], weights.to(self.queries.tile.dtype))
            exchange.give((shrink,))
            ring.advance()
        self.queries.give_back()

    def scores(self, tokens: Any) -> Any:
        """[64, tokens], not scaled."""
        rows, width = self.queries.tile.shape
        scores = tilus.zeros([rows, tokens.shape[0]])
        for block in tilus.range(width // COLUMNS):
            start, extents = [0, block * COLUMNS], (rows, tokens.shape[0], COLUMNS)
            scores = tilus.wgmma(self.queries.tile, tokens, scores, shape=extents, x_offsets=start, y_offsets=start)
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
        """The last message of a part; the logarithm, of base 2, is NO_SCORE where there was no key."""
        found = self.total > 0.0
        total = tilus.where(found, self.total, 1.0)
        log2 = tilus.where(found, tilus.log2(total) + self.highest * self.scale_log2, NO_SCORE)
        self.exchange.wait_taken()
        self.exchange.give((tilus.rcp(total), log2), numbers)


def clear_end(tokens: Any, count: Any) -> None:
    """Behind the first `count` tokens there may be anything in the page, also no number, which a weight of zero does not undo."""
    for start in tilus.range(count // PIECE * PIECE, tokens.shape[0], PIECE):
        piece = tilus.load_shared(tokens, [start, 0], [PIECE, LATENT])
        inside = tilus.arange(PIECE, shape=[PIECE, 1]) < count - start
        tilus.sync()
        tilus.store_shared(tokens, tilus.where(inside, piece, 0.0), [start, 0])
