"""A row of logits that a block looks through, tile by tile: who wins a race, where a threshold lies, how much is above a value.

Neighbouring threads have neighbouring fours of tokens. A tile is four parts, one for each place of a four, as one call of Philox
gives four random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import f32, int32, uint32
from tilus.kernels.philox import log2_exponential, philox
from tilus.layout import local, replicated

QUAD = 4  # neighbouring tokens of a thread
NO_TOKEN = 1e9  # more than any index; indices are exact in f32
PIVOTS = 8  # the last one is the upper end of what is left


@dataclass(frozen=True)
class Tiling:
    """How a block goes through a row. quads: fours of tokens of a thread in a tile. unroll: tiles whose reads are under way
    together, where little is done with them. blocks_per_sm: that run beside each other on a multiprocessor."""

    warps: int
    quads: int
    unroll: int = 1
    blocks_per_sm: int = 1

    @property
    def shape(self) -> list[int]:
        """Of a part of a tile."""
        return [self.quads, 32 * self.warps]

    @property
    def width(self) -> int:
        """Tokens of a tile."""
        return QUAD * 32 * self.warps * self.quads


@dataclass(frozen=True, eq=False)
class Dice:
    """The random numbers of a request: key, uint32 [2], and position, uint32 [1], are tiles. rate: log2(e) / temperature."""

    key: Any
    position: Any
    rate: Any

    def scores(self, parts: Any, quads: Any, most: Any) -> list[Any]:
        """What decides the race for a tile. quads: number of each four in the row. most: subtracted first, so that nothing
        overflows."""
        zero = tilus.zeros([1, 1], uint32)
        first, second = [tilus.reshape(tilus.select(self.key, 0, half), [1, 1]) for half in range(2)]
        counter = (quads.to(uint32), tilus.reshape(self.position, [1, 1]), zero, zero)
        words = philox(counter, (first, second))
        return [(part - most) * self.rate - log2_exponential(word) for part, word in zip(parts, words)]


class Row:
    """f32 logits [vocabulary] of a request, minus infinity behind the end. For use in a kernel, by all threads of a block."""

    def __init__(self, logits: Any, row: Any, tiling: Any) -> None:
        self.logits = logits
        self.row = row
        self.tiling = tiling

    def tile(self, index: Any) -> Any:
        """f32 [width]."""
        width, start = self.tiling.width, index * self.tiling.width
        layout = local(self.tiling.quads).spatial(32 * self.tiling.warps).local(QUAD)
        tile = tilus.load(self.logits, [self.row, start], [width], layout=layout).to(f32)
        if start + width > self.logits.shape[1]:  # the last one
            tile = tilus.where(tilus.arange(width, start=start) < self.logits.shape[1], tile, -math.inf)
        return tile

    def parts(self, tile: Any) -> list[Any]:
        """The four parts of a tile."""
        tile = tilus.reshape(tile, [*self.tiling.shape, QUAD])
        return [tilus.select(tile, 2, j) for j in range(QUAD)]

    def logit(self, token: Any) -> Any:
        """A scalar of f32."""
        return tilus.item(tilus.load(self.logits, [self.row, token], [1]).to(f32))

    def quads(self, index: Any) -> Any:
        """The number of each four of a tile in the row, int32."""
        count = self.tiling.width // QUAD
        return tilus.reshape(tilus.arange(count, start=index * count), self.tiling.shape)

    def tiles(self, unroll: Any = 1) -> Any:
        """For a loop over all of them."""
        return tilus.range(tilus.cdiv(self.logits.shape[1], self.tiling.width), unroll=unroll)

    def race(self, dice: Any, most: Any, bound: Any) -> Any:
        """(logit, token) of the winner among the logits that are not below a bound: scalars of f32 and int32."""
        leaders = [Leader(self.tiling.shape) for _ in range(QUAD)]
        for index in self.tiles():
            parts, quads = self.parts(self.tile(index)), self.quads(index)
            for part, score, leader in zip(parts, dice.scores(parts, quads, most), leaders):
                leader.meet(tilus.where(part >= bound, score, -math.inf), quads)
        _, token = winner([leader.score for leader in leaders], [leader.quads.to(f32) for leader in leaders])
        chosen = tilus.item(token.to(int32))
        return self.logit(chosen), chosen

    def above(self, bound: Any, lowest: Any, most: Any, rate: Any) -> Any:
        """Scalars: how many logits are above a bound, what they weigh, what those not below `lowest` weigh, the least logit above
        the bound."""
        zeros = tilus.zeros([self.tiling.width])
        count, higher, kept = zeros, zeros, zeros
        least = zeros + math.inf
        for index in self.tiles(self.tiling.unroll):
            tile = self.tile(index)
            weight, is_above = tilus.exp2((tile - most) * rate), tile > bound
            count = tilus.where(is_above, count + 1.0, count)
            higher = tilus.where(is_above, higher + weight, higher)
            kept = tilus.where(tile >= lowest, kept + weight, kept)
            least = tilus.minimum(least, tilus.where(is_above, tile, math.inf))
        return scalar(tilus.sum(count)), scalar(tilus.sum(higher)), scalar(tilus.sum(kept)), scalar(tilus.min(least))

    def largest(self, count: Any, least: Any, most: Any, finite: Any) -> Any:
        """The greatest bound that at least `count` of the finite logits are not below, a scalar.

        A search over values. It ends when exactly so many are not below the bound, when one logit or none lies between the two
        ends of what is left, or no number does.
        """
        low, high, many, few = least, most, finite, 0.0
        layout = replicated(32 * self.tiling.warps, 1).local(PIVOTS)
        steps = tilus.with_layout((tilus.arange(PIVOTS, start=1)).to(f32) * (1 / PIVOTS), layout)
        middle = low * 0.5 + high * 0.5
        while low < middle and middle < high and many != count and many - few > 1.0:
            points = low * (1.0 - steps) + high * steps
            found = self.not_below(points)
            enough = found >= count
            low, many = (
                scalar(tilus.max(tilus.where(enough, points, low))), scalar(tilus.min(tilus.where(enough, found, many))),
            )  # fmt: skip
            high, few = (
                scalar(tilus.min(tilus.where(enough, high, points))), scalar(tilus.max(tilus.where(enough, few, found))),
            )  # fmt: skip
            middle = low * 0.5 + high * 0.5
        return low

    def not_below(self, points: Any) -> Any:
        """For each of some points, f32 [PIVOTS], how many logits are not below it, f32."""
        counts = tilus.zeros([PIVOTS, *self.tiling.shape])
        points = tilus.reshape(points, [PIVOTS, 1, 1])
        for index in self.tiles(self.tiling.unroll):
            for part in self.parts(self.tile(index)):
                part = tilus.reshape(part, [1, *self.tiling.shape])
                counts = counts + tilus.where(part >= points, tilus.full([1, 1, 1], 1.0), 0.0)
        return tilus.sum(counts, (1, 2))


class Leader:
    """The best scores so far, tile by tile, and the fours that they are in."""

    def __init__(self, shape: Any) -> None:
        self.score = tilus.full(shape, -math.inf)
        self.quads = tilus.zeros(shape, int32)

    def meet(self, score: Any, quads: Any) -> None:
        self.quads = tilus.where(score > self.score, quads, self.quads)
        self.score = tilus.maximum(score, self.score)


def winner(scores: Any, quads: Any) -> Any:
    """(score, token) of the largest of four parts of scores, the lowest token on ties: tiles of f32 [1].

    quads: for each part the number of the four in the row, f32.
    """
    most = tilus.maximum(tilus.maximum(scores[0], scores[1]), tilus.maximum(scores[2], scores[3]))
    most = tilus.reshape(tilus.max(most), [1, 1])
    tokens = [tilus.where(scores[j] == most, quads[j] * QUAD + j, NO_TOKEN) for j in range(QUAD)]
    first = tilus.minimum(tilus.minimum(tokens[0], tokens[1]), tilus.minimum(tokens[2], tokens[3]))
    return tilus.reshape(most, [1]), tilus.reshape(tilus.min(first), [1])


def scalar(tile: Any) -> Any:
    """The only element of a tile that was reduced over all axes."""
    return tilus.item(tilus.reshape(tile, [1]))
