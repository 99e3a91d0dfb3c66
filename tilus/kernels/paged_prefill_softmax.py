"""The rows of a warpgroup of the prefill kernel: products with tiles of keys and values, and the softmax in between.

While the tensor cores multiply the weights of one tile by its values, the softmax of the next one is computed, and the other
warpgroup takes its turn with the tensor cores meanwhile.

Turns of warpgroups: J. Shah et al., "FlashAttention-3", arXiv 2407.08608.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import f32
from tilus.dtypes import DataType
from tilus.kernels.attention_variant import Position, Variant, Words, scaled_logits, seen, sink_log2
from tilus.kernels.online_softmax import NO_SCORE, OnlineSoftmax
from tilus.kernels.paged_prefill_stages import Stages
from tilus.kernels.paged_prefill_tiles import Tile
from tilus.kernels.vectors import by_vector
from tilus.layout import spatial

HALF = 64  # rows of a warpgroup
CONVERTED_ROWS = 16  # of queries, together
STORED_COLUMNS = 16  # of the result, together


class Turns:
    """Who of two warpgroups may begin products: they alternate. barriers: one for each, at which the other one arrives."""

    def __init__(self, barriers: Any, half: int) -> None:
        self.barriers, self.half = barriers, half
        self.parity = 1 - half  # the first warpgroup does not wait for its first turn

    def wait(self) -> None:
        """Until it is this warpgroup's turn."""
        tilus.wait_barrier(self.barriers[self.half], self.parity)
        self.parity = 1 - self.parity

    def give(self) -> None:
        tilus.arrive(self.barriers[1 - self.half])


@dataclass(frozen=True)
class Kind:
    """heads: of a tile of rows. causal: whether queries do not see what comes behind them. words: of the bits of a query. q_type:
    of queries that come as bits of another type, and are converted to it. terms: numbers that a weight is the sum of in the
    products, 1 or 2: bf16 has 8 bits, and what rounding leaves of a weight would be as large as the error of the result."""

    heads: int
    causal: bool
    variant: Variant
    words: int = 0
    q_type: Any = None
    terms: int = 1


class Rows(OnlineSoftmax):
    """64 rows of a tile: the highest score, the sum of weights and the weighted sum of values of each, as far as seen.

    Without a variant's logits, scores are not scaled before the exponential: scale_log2, which is positive, is part of its
    argument, `unit`. outputs: (of results, of logarithms or None). parameters, bits: of the variant, or None.
    """

    def __init__(
        self, stages: Stages, turns: Turns, outputs: Any, scale_log2: Any, kind: Kind, parameters: Any, bits: Any
    ) -> None:
        self.stages, self.turns, self.scale_log2 = stages, turns, scale_log2
        self.out, self.lse = outputs
        self.heads, self.causal, self.variant, self.parameters = kind.heads, kind.causal, kind.variant, parameters
        self.bits, self.words, self.q_type, self.terms = bits, kind.words, kind.q_type, kind.terms
        OnlineSoftmax.__init__(self, [HALF, 1], 1, scale_log2 if kind.variant.logits is None else 1.0)
        _, length, head_dim = stages.keys.tiles.shape
        self.acc = tilus.zeros([HALF, head_dim])
        self.factors = tilus.zeros([HALF, length], stages.keys.tiles.dtype)

    @property
    def per_half(self) -> int:
        """Heads of these rows."""
        return max(1, self.heads // 2)

    @property
    def tokens(self) -> int:
        """Query tokens of these rows."""
        return HALF // self.per_half

    @property
    def first_token(self) -> int:
        """The first of a tile's queries that these rows have."""
        return self.tokens * self.turns.half if self.heads == 1 else 0

    def compute(self, index: Any, tile: Tile) -> None:
        """The result of the index-th tile of the block."""
        self.attend(index, tile)
        self.store(tile)

    def attend(self, index: Any, tile: Tile) -> None:
        """All tiles of the cache that these rows see, from the last to the first one."""
        stages, turns, keys, values = self.stages, self.turns, self.stages.keys, self.stages.values
        self.acc = tilus.zeros(self.acc.shape)
        self.begin(tile)
        tilus.wait_barrier(stages.full, index % 2)
        if self.q_type is not None:
            convert_bits(stages.queries[turns.half], self.q_type)
        if tile.steps > 0:
            keys.wait_full()
            turns.wait()
            scores = tilus.wgmma(stages.queries[turns.half], keys.tiles[keys.stage])
            turns.give()
            tilus.wgmma_wait()
            keys.leave()
            weights, _ = self.weights(scores, tile, tile.end - 1, True)
            self.keep(weights)
            masked = min(tile.steps, tile.end - tile.unmasked)
            for step in tilus.range(1, masked):
                self.step(tile, tile.end - 1 - step, True)
            if not self.variant.hides:
                for step in tilus.range(max(masked, 1), tile.steps):
                    self.step(tile, tile.end - 1 - step, False)
        tilus.arrive(stages.empty)
        if tile.steps > 0:
            values.wait_full()
            self.acc = tilus.wgmma(self.factors, values.tiles[values.stage], self.acc, y_transposed=True)
            tilus.wgmma_wait()
            values.leave()

    def begin(self, tile: Tile) -> None:
        """Nothing is seen yet, but the variant's sink."""
        self.restart()
        if self.variant.sink is not None:
            self.highest = sink_log2(self.variant.sink, self.position(tile, 0, 1), (HALF, 1)) * (1.0 / self.unit)
            self.total = tilus.full([HALF, 1], 1.0)

    def step(self, tile: Tile, at: Any, masked: bool) -> None:
        """Add the values of the tile behind the at-th, whose weights are there, and make the weights of the at-th."""
        stages, turns, keys, values = self.stages, self.turns, self.stages.keys, self.stages.values
        keys.wait_full()
        turns.wait()
        scores = tilus.wgmma(stages.queries[turns.half], keys.tiles[keys.stage])
        values.wait_full()
        self.acc = tilus.wgmma(self.factors, values.tiles[values.stage], self.acc, y_transposed=True)
        turns.give()
        tilus.wgmma_wait(1)
        keys.leave()
        weights, shrink = self.weights(scores, tile, at, masked)
        tilus.wgmma_wait()
        values.leave()
        self.keep(weights, shrink)

    def keep(self, weights: Any, shrink: Any = None) -> None:
        """For the product with the next tile of values. That of what rounding leaves is made here: there are no registers for
        both while scores are. shrink: the factor of what has been added up before, if anything has."""
        values, dtype = self.stages.values, self.factors.dtype
        self.factors = weights.to(dtype)
        if shrink is not None:
            self.acc = self.acc * shrink
        if self.terms == 2:
            rest = (weights - self.factors.to(f32)).to(dtype)
            values.wait_full()
            self.acc = tilus.wgmma(rest, values.tiles[values.stage], self.acc, y_transposed=True)
            tilus.wgmma_wait()

    def weights(self, scores: Any, tile: Tile, at: Any, masked: bool) -> Any:
        """The weights of the at-th tile of the cache, and the factor of what has been added up before."""
        length = scores.shape[1]
        if self.variant.logits is not None:
            scores = scaled_logits(
                self.variant.logits, scores, self.scale_log2, self.position(tile, at * length, length)
            )
        if masked:
            scores = tilus.where(self.seen(tile, at * length, length), scores, -math.inf)
        return self.weigh(scores)

    def seen(self, tile: Tile, first: Any, length: int) -> Any:
        """Which of the keys from `first` on a row sees, [64, length]."""
        key = tilus.arange(length, shape=[1, length], axis=1)
        if self.causal:
            query = tilus.arange(HALF, shape=[HALF, 1]) % self.tokens
            limits = query + (tile.limit + self.first_token)
            allowed = key < tilus.minimum(limits, tile.length) - first
            if self.variant.window is not None:
                allowed = allowed & (key >= limits - (first + self.variant.window))
        else:
            allowed = key < tile.length - first
        if self.variant.mask is not None:
            allowed = seen(self.variant.mask, allowed, self.position(tile, first, length), (HALF, length))
        return allowed

    def position(self, tile: Tile, first: Any, length: int) -> Position:
        """Of scores with the keys from `first` on."""
        rows = tilus.arange(HALF, shape=[HALF, 1])
        head = tile.kv_head * self.out.shape[2] + self.first_head(tile)
        query = rows % self.tokens + (tile.limit - 1 + self.first_token)
        key = tilus.arange(length, start=first, shape=[1, length], axis=1)
        runs = self.per_half, self.tokens
        words = Words(self.variant, self.bits, self.words, tile.row + self.first_token, runs, (HALF, 1))
        return Position(query, key, rows // self.tokens + head, tile.past, self.parameters, head, words)

    def first_head(self, tile: Tile) -> Any:
        """The first of the kv head's query heads that these rows have."""
        return tile.head + (self.turns.half * self.per_half if self.heads > 1 else 0)

    def partial(self) -> tuple[Any, Any]:
        """The weighted mean of the values, and log2 of the sum of weights [64], NO_SCORE where there was no key."""
        some = self.total > 0.0
        total = tilus.where(some, self.total, 1.0)
        log2 = tilus.where(some, tilus.log2(total) + self.highest * self.unit, NO_SCORE)
        return self.acc * tilus.rcp(total), log2.reshape([HALF])

    def store(self, tile: Tile) -> None:
        """Rows without any key are zero. Neighbouring lanes exchange columns, so that each has 8 bytes of a row."""
        head_dim, width = self.acc.shape[1], STORED_COLUMNS
        result = self.acc * tilus.rcp(tilus.where(self.total > 0.0, self.total, 1.0))
        parts = result.to(self.out.dtype).reshape([HALF, head_dim // width, width])
        layout = spatial(4, 1).local(2, 1).spatial(8, 4).local(1, width // 4)
        head = self.first_head(tile)
        for part in range(head_dim // width):
            runs = tilus.with_layout(tilus.select(parts, 1, part), layout)
            tilus.store(
                tilus.narrow(self.out, 0, tile.row, tile.queries), [self.first_token, tile.kv_head, head, part * width],
                runs.reshape([self.per_half, self.tokens, width]), dims=[2, 0, 3],
            )  # fmt: skip
        if self.lse is not None:
            logs = natural_lse(self.highest, self.total, self.unit).reshape([self.per_half, self.tokens])
            where = [self.first_token, tile.kv_head, head]
            tilus.store(tilus.narrow(self.lse, 0, tile.row, tile.queries), where, logs, dims=[2, 0])


def convert_bits(rows: Any, source: DataType) -> None:
    """Numbers of the type `source`, whose bits are in shared memory, converted where they are to the type of that memory."""
    count, head_dim = rows.shape
    for first in range(0, count, CONVERTED_ROWS):
        shape, layout = [CONVERTED_ROWS, head_dim], by_vector(CONVERTED_ROWS, head_dim, 8, 4)
        raw = tilus.load_shared(rows, [first, 0], shape, layout=layout)
        if layout.is_replicated_thread:  # what one thread has read, another one is about to
            tilus.sync()
        tilus.store_shared(rows, tilus.view(raw, source, shape, layout).to(rows.dtype), [first, 0])
    tilus.fence_async()
    tilus.sync()


def natural_lse(highest: Any, total: Any, unit: Any) -> Any:
    """Logarithms of the sums of exp(scaled score); minus infinity where there was no key."""
    log2 = tilus.log2(tilus.where(total > 0.0, total, 1.0)) + highest * unit
    return tilus.where(total > 0.0, log2 * math.log(2.0), -math.inf).to(f32)
