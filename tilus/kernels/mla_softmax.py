"""Scores of 64 rows with a run of latents, and their softmax: the warpgroup that makes weights for those with the results."""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus.kernels.mla_stages import LATENT, PIECE, ROWS, Exchange, Queries, Ring
from tilus.kernels.online_softmax import NO_SCORE, OnlineSoftmax

COLUMNS = 192  # of queries and latents that are multiplied together: more of them take more registers for their places


class Scores(OnlineSoftmax):
    """Of a block's rows, which go through query tokens, then heads. They are scaled in the exponential."""

    def __init__(self, queries: Queries, ring: Ring, exchange: Exchange, scale_log2: Any, heads: int) -> None:
        self.queries, self.ring, self.exchange = queries, ring, exchange
        self.heads = heads
        OnlineSoftmax.__init__(self, [ROWS, 1], 1, scale_log2)

    def attend(self, token: Any, end_token: Any, limit: Any, first_row: Any) -> None:
        """Weights of all tiles of the tokens from `token` to before `end_token`. limit: tokens that the sequence's first query
        sees. first_row: of the sequence's rows, the first one of this block."""
        ring, exchange = self.ring, self.exchange
        tile = ring.tiles.shape[1]
        self.restart()
        limits = (tilus.arange(ROWS, shape=[ROWS, 1]) + first_row) // self.heads + limit
        key = tilus.arange(tile, shape=[1, tile], axis=1)
        exchange.wait_taken()
        count = max(end_token - token, 0)
        exchange.give(numbers=(tilus.cdiv(count, tile), count // tile))
        self.queries.wait_full()
        for first in tilus.range(token, end_token, tile):
            tokens = ring.wait_full()
            scores = self.scores(tokens)
            if first + tile > limit:
                scores = tilus.where(key < limits - first, scores, -math.inf)
            weights, shrink = self.weigh(scores)
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

    def finish(self, numbers: tuple[Any, ...]) -> None:
        """The last message of a part; the logarithm, of base 2, is NO_SCORE where there was no key."""
        found = self.total > 0.0
        total = tilus.where(found, self.total, 1.0)
        log2 = tilus.where(found, tilus.log2(total) + self.highest * self.unit, NO_SCORE)
        self.exchange.wait_taken()
        self.exchange.give((tilus.rcp(total), log2), numbers)


def clear_end(tokens: Any, count: Any) -> None:
    """Behind the first `count` tokens there may be anything in the page, also no number, which a weight of zero does not undo."""
    for start in tilus.range(count // PIECE * PIECE, tokens.shape[0], PIECE):
        piece = tilus.load_shared(tokens, [start, 0], [PIECE, LATENT])
        inside = tilus.arange(PIECE, shape=[PIECE, 1]) < count - start
        tilus.sync()
        tilus.store_shared(tokens, tilus.where(inside, piece, 0.0), [start, 0])
