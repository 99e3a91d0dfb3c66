"""The softmax of a part of a sequence's tokens and the values weighted by it, by each warp for the tokens that it has."""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import bf16, f32, int32
from tilus.kernels.attention_variant import NO_VARIANT, Position, Variant, Words, scaled_logits, seen, sink_log2
from tilus.kernels.online_softmax import OnlineSoftmax
from tilus.kernels.paged_decode_columns import Columns, normalized
from tilus.kernels.paged_decode_operands import ROWS
from tilus.kernels.paged_decode_split import Part
from tilus.kernels.paged_decode_stages import Stages


class Columnwise:
    """A variant, in the columns of a block's products. words: of the bits of a query, see `Words`."""

    def __init__(self, variant: Variant, columns: Columns, parameters: Any, bits: Any, words: int) -> None:
        self.variant, self.columns = variant, columns
        self.parameters, self.bits, self.words = parameters, bits, words

    @staticmethod
    def of(variant: Variant, columns: Columns, parameters: Any, bits: Any, words: int) -> Columnwise | None:
        """None where there is nothing to change."""
        return None if variant == NO_VARIANT else Columnwise(variant, columns, parameters, bits, words)

    def position(self, part: Part, key: Any) -> Position:
        """Of scores of all columns with the keys at these positions."""
        columns, first = self.columns, part.head * self.columns.group
        column = tilus.arange(columns.width, shape=[1, 1, columns.width], axis=2)
        past = part.length + part.passed - columns.q_len
        runs, shape = (columns.heads, columns.tokens), (1, 1, columns.width)
        row = part.sequence * columns.q_len
        words = Words(self.variant, self.bits, self.words, row, runs, shape, token_first=True)
        query, head = column // columns.heads + past, column % columns.heads + first
        return Position(query, key, head, past, self.parameters, first, words)

    def seen(self, allowed: Any, at: Position) -> Any:
        """Those of the allowed keys that are not hidden."""
        if self.variant.window is not None:
            allowed = allowed & (at.key > at.query - self.variant.window)
        if self.variant.mask is not None:
            allowed = seen(self.variant.mask, allowed, at, tuple(allowed.shape))
        return allowed

    def scores(self, scaled: Any, at: Position) -> Any:
        """What the exponential of base 2 is taken of, of scores times log2(e)."""
        return scaled if self.variant.logits is None else scaled_logits(self.variant.logits, scaled, 1.0, at)

    def with_sink(self, result: Any, result_lse: Any, part: Part) -> tuple[Any, Any]:
        """What `normalized` gave, and the sink, whose value is zero."""
        at = self.position(part, tilus.zeros([1, 1, 1], int32))
        sink = sink_log2(self.variant.sink, at, (1, 1, self.columns.width)).reshape([1, self.columns.width])
        higher = tilus.maximum(result_lse, sink)
        weight = tilus.exp2(result_lse - higher)
        total = weight + tilus.exp2(sink - higher)
        return result * (weight * tilus.rcp(total)), tilus.log2(total) + higher


class Softmax(OnlineSoftmax):
    """Each warp's highest score, sum of weights and weighted sum of values, of the tokens that it has seen of a part.

    Scales of keys multiply scores, those of values weights. kinds: of factors; with two of them something is added to each
    element: to a score that times the sum of the query's elements, to each element of the result the sum of it times the weights.
    """

    def __init__(
        self,
        columns: Columns,
        operands: Any,
        queries: Any,
        scale_log2: Any,
        kinds: int | None,
        variant: Columnwise | None,
    ) -> None:
        self.columns, self.operands, self.scale_log2, self.kinds = columns, operands, scale_log2, kinds
        self.variant = variant
        parts, width, head_dim = columns.parts, columns.width, columns.head_dim
        ordered = operands.ordered_queries(queries)
        repeated = tilus.transpose(ordered.reshape([1, width, head_dim]), [0, 2, 1])
        self.queries = tilus.broadcast(repeated, [parts, head_dim, width])
        self.query_sums = tilus.sum(self.queries.to(f32), 1, keepdims=True) * scale_log2 if kinds == 2 else None
        OnlineSoftmax.__init__(self, [parts, 1, width], 1)
        self.acc = tilus.zeros([parts, head_dim, width], layout=columns.layout(head_dim))
        self.added = tilus.zeros([parts, 1, width]) if kinds == 2 else None

    def products(self, keys: Any) -> Any:
        """Of keys [parts, 16, head_dim] with the queries, [parts, 16, width]."""
        parts, _, width = self.queries.shape
        return tilus.dot(keys, self.queries, tilus.zeros([parts, ROWS, width], layout=self.columns.layout(ROWS)))

    def weights(self, stages: Stages, step: Any, seen: Any, valid: Any, at: Position | None) -> Any:
        """Of 16 tokens for each warp, in f32 [parts, 16, width], scales of values included.

        seen [parts, 16, width]: by which columns. valid [parts, 16, 1]: which of the tokens there are; others may be anything,
        also no number. at: where the scores are, if there is a variant.
        """
        count = ROWS * self.columns.parts
        scores = self.scaled(self.products(self.operands.keys(stages, step, count)), stages, step, count)
        if self.variant is not None:
            scores = self.variant.scores(scores, at)
        weights = self.weights_of(scores, seen)
        if self.kinds is not None:
            scales = tilus.where(valid, stages.factor(1, 0, step, count), 0.0)
            if self.kinds == 2:
                added = tilus.where(valid, stages.factor(1, 1, step, count), 0.0)
                self.added = self.added + tilus.sum(weights * added, 1, keepdims=True)
            weights = weights * scales
        return weights

    def add(self, values: Any, weights: Any) -> None:
        """Values [parts, head_dim, 16] times their weights.

        bf16 has 8 bits, so what rounding leaves of a weight is multiplied, too: otherwise it would be half of a result's error.
        """
        dtype = self.queries.dtype
        rounded = weights.to(dtype)
        self.acc = tilus.dot(values, rounded, self.acc)
        if dtype == bf16:
            self.acc = tilus.dot(values, (weights - rounded.to(f32)).to(dtype), self.acc)

    def scaled(self, scores: Any, stages: Stages, step: Any, count: int) -> Any:
        """Scores of numbers, times log2(e)."""
        if self.kinds is None:
            return scores * self.scale_log2
        scores = scores * (stages.factor(0, 0, step, count) * self.scale_log2)
        return scores if self.kinds == 1 else scores + stages.factor(0, 1, step, count) * self.query_sums

    def weights_of(self, scores: Any, seen: Any) -> Any:
        """And what was added up so far, scaled to a new maximum."""
        weights, shrink = self.weigh(tilus.where(seen, scores, -math.inf))
        self.acc = self.acc * shrink
        if self.added is not None:
            self.added = self.added * shrink
        return weights

    def weighted_sum(self) -> Any:
        return self.acc if self.added is None else self.acc + self.added


class Attending:
    """The warps that compute, part by part. operands: of products. kinds: see `Softmax`. variant: None where there is none."""

    def __init__(
        self, columns: Columns, operands: Any, stages: Stages, scale_log2: Any, kinds: int | None, variant: Columnwise | None
    ) -> None:  # fmt: skip
        self.columns, self.operands, self.stages = columns, operands, stages
        self.scale_log2, self.kinds, self.variant = scale_log2, kinds, variant

    def result_of(self, part: Part, q: Any) -> tuple[Any, Any]:
        """What `normalized` gives of all tokens of a part, elements in their natural order; a pair's first part has the sink."""
        queries = self.columns.queries(q[part.sequence], part.head)
        softmax = Softmax(self.columns, self.operands, queries, self.scale_log2, self.kinds, self.variant)
        attend_to_part(part, self.stages, softmax)
        layout = self.operands.ordered_layout(self.columns.result_layout())
        ordered, log2 = normalized(softmax.highest, softmax.total, softmax.weighted_sum(), layout)
        result = self.operands.natural(ordered)
        if self.variant is not None and self.variant.variant.sink is not None and part.begin == part.first:
            result, log2 = self.variant.with_sink(result, log2, part)
        return result, log2


def attend_to_part(part: Part, stages: Stages, softmax: Softmax) -> None:
    """Add all tokens of a part."""
    columns, end = softmax.columns, part.end_token
    tile, count = stages.ring.shape[1] * stages.ring.shape[3], ROWS * columns.parts
    row = tilus.arange(ROWS, shape=[1, ROWS, 1], axis=1)
    token = tilus.arange(columns.parts, shape=[columns.parts, 1, 1]) * ROWS + row
    query = tilus.arange(columns.width, shape=[1, 1, columns.width], axis=2) // columns.heads
    limits = tilus.minimum(part.length - columns.q_len + 1 + query, end)
    for first in tilus.range(part.token, end, tile):
        stages.wait_full()
        for step in tilus.range(tile // count):
            at = first + step * count
            valid = token < end - at
            allowed, position = token < limits - at, None
            if softmax.variant is not None:
                position = softmax.variant.position(part, token + (at + part.passed))
                allowed = softmax.variant.seen(allowed, position)
            weights = softmax.weights(stages, step, allowed, valid, position)
            values = softmax.operands.values(stages, step, count)
            if end - at < count:  # what lies behind the end may be anything, also no number
                values = tilus.where(tilus.transpose(valid, [0, 2, 1]), values, 0.0)
            softmax.add(values, weights)
        tilus.arrive(stages.empty[stages.stage])
        stages.advance()
