"""A row of logits in the registers of a cluster of blocks, and what its threads find out about it together.

Each block holds a run of the row, each thread four neighbours at a time: `columns[j]` has those at place j of four. What is found
about the row is reduced within warps; each warp writes its part to the shared memory of all blocks, and after one barrier of the
cluster everybody combines all parts by himself, in the same order. So a question costs one barrier, whatever is asked at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import f32
from tilus.layout import local, replicated, spatial

QUAD = 4  # neighbouring tokens of a thread
NO_TOKEN = 1e9  # more than any index; indices are exact in f32


@dataclass(frozen=True)
class RowPlan:
    """Who holds what of a row. cluster: blocks. warps: of a block. quads: fours of tokens that a thread holds, in so many
    `slices` that are worked on one after the other. keeps_weights: whether a search keeps exp(logit) in registers."""

    cluster: int
    warps: int
    quads: int
    slices: int
    keeps_weights: bool = True

    @property
    def width(self) -> int:
        """Tokens that a block holds."""
        return self.quads * self.warps * 32 * QUAD

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shape(self) -> list[int]:
        """Of a tile: its last two dims are the threads."""
        return [self.quads // self.slices, self.warps, 32]


class Row:
    """Logits [vocabulary] of one request, as f32, minus infinity behind the end. For use in a kernel, by all its threads.

    slices: [slice][place in a four], tiles of `plan.shape`. quads: of a slice, the number of each four in the row, int32.
    """

    def __init__(self, logits: Any, row: Any, plan: Any) -> None:
        self.plan = plan
        self.dtype = logits.dtype
        self.rank = tilus.cluster_rank()
        self.one = tilus.full([1, 1, 1], 1.0)
        fours = plan.width // QUAD
        layout = local(plan.quads).spatial(plan.threads).local(QUAD)
        tile = tilus.load(logits, [row, self.rank * plan.width], [plan.width], layout=layout, evict="first").to(f32)
        tokens = tilus.arange(plan.width, start=self.rank * plan.width)
        tile = tilus.where(tokens < logits.shape[1], tile, -math.inf)
        tile = tilus.reshape(tile, [plan.slices, *plan.shape, QUAD])
        self.slices = [[tilus.select(tilus.select(tile, 4, j), 0, i) for j in range(QUAD)] for i in range(plan.slices)]
        quads = tilus.reshape(tilus.arange(fours, start=self.rank * fours), [plan.slices, *plan.shape])
        self.quads = [tilus.select(quads, 0, i) for i in range(plan.slices)]

    def ask(self, parts: Any) -> list[Any]:
        """Parts that warps have, f32 [warps] each, as those of all warps of the cluster, [all] in every thread."""
        return self._gathered(self.box(len(parts)), 0, parts)

    def box(self, count: Any) -> Any:
        """Where answers to `count` questions meet."""
        return tilus.shared(f32, [count, self.plan.cluster * self.plan.warps])

    def ask_again(self, box: Any, trip: Any, parts: Any) -> list[Any]:
        """As `ask`, in a loop. box: for twice as many; they take turns, so that nobody overwrites what others still read."""
        return self._gathered(box, trip % 2 * len(parts), parts)

    def _gathered(self, box: Any, first: Any, parts: Any) -> list[Any]:
        plan = self.plan
        for index in range(len(parts)):
            for block in range(plan.cluster):
                part = tilus.reshape(parts[index], [1, plan.warps])
                tilus.store_shared(box, part, [first + index, self.rank * plan.warps], block=block)
        tilus.cluster_sync()
        count = plan.cluster * plan.warps
        lanes = min(32, count)
        layout = replicated(plan.threads // lanes, 1) * spatial(lanes).local(count // lanes)
        return [
            tilus.reshape(tilus.load_shared(box, [first + index, 0], [1, count], layout=layout.unsqueeze(0)), [count])
            for index in range(len(parts))
        ]

    def survey(self) -> Any:
        """(largest logit, least finite one, how many are finite, how many are NaN or plus infinity), scalars of f32.

        A row without any finite logit counts as one that is broken.
        """
        zeros = tilus.zeros(self.plan.shape)
        most, least, finite, broken = zeros - math.inf, zeros + math.inf, zeros, zeros
        for tiles in self.slices:
            for tile in tiles:
                is_finite = tilus.absolute(tile) < math.inf
                most = tilus.maximum(most, tile)
                least = tilus.minimum(least, tilus.where(is_finite, tile, math.inf))
                finite = finite + tilus.where(is_finite, 1.0, zeros)
                broken = broken + tilus.where(tile < math.inf, zeros, 1.0)
        found = self.ask(
            [tilus.max(most, (0, 2)), tilus.min(least, (0, 2)), tilus.sum(finite, (0, 2)), tilus.sum(broken, (0, 2))]
        )
        number = total(found[2])
        return (
            tilus.item(tilus.max(found[0], 0, keepdims=True)), tilus.item(tilus.min(found[1], 0, keepdims=True)),
            number, total(found[3]) + (0.0 if number > 0.0 else 1.0),
        )  # fmt: skip

    def representable(self, value: Any) -> Any:
        """A scalar rounded to the type of the logits."""
        return tilus.item(tilus.full([1], value).to(self.dtype).to(f32))

    def measure(self, points: Any, weigh: Any = None) -> Any:
        """For each point how many logits are not below it, and what they weigh together: two lists of sums by warps.

        weigh(slice, j): the weights of a tile; None: 1 each.
        """
        counts = [tilus.zeros(self.plan.shape) for _ in points]
        weights = [tilus.zeros(self.plan.shape) for _ in points]
        for i in range(self.plan.slices):
            for j in range(QUAD):
                inside = [self.slices[i][j] >= point for point in points]
                counts = [count + tilus.where(it, self.one, 0.0) for count, it in zip(counts, inside)]
                if weigh is not None:
                    each = weigh(i, j)
                    weights = [weight + tilus.where(it, each, 0.0) for weight, it in zip(weights, inside)]
        counts = [tilus.sum(count, (0, 2)) for count in counts]
        return counts, counts if weigh is None else [tilus.sum(weight, (0, 2)) for weight in weights]

    def winner(self, score: Any) -> Any:
        """The largest score of the row and its token, the lowest one on ties: scalars (f32, int32).

        score(slice): the scores of its four tiles.
        """
        best, where = tilus.full(self.plan.shape, -math.inf), tilus.zeros(self.plan.shape)
        for i in range(self.plan.slices):
            scores = score(i)
            for j in range(QUAD):
                better = scores[j] > best
                best = tilus.where(better, scores[j], best)
                where = tilus.where(better, 1.0 * (i * QUAD + j), where)  # the place among the tiles, a constant
        tile = tilus.floor(where * (1 / QUAD))
        step = self.plan.width // self.plan.slices
        token = (self.quads[0] * QUAD).to(f32) + (where + tile * (step - QUAD))
        most = tilus.max(best, (0, 2))
        is_most = best == tilus.reshape(most, [1, self.plan.warps, 1])
        values, tokens = self.ask([most, tilus.min(tilus.where(is_most, token, NO_TOKEN), (0, 2))])
        most = tilus.max(values, 0, keepdims=True)
        found = tilus.min(tilus.where(values == most, tokens, NO_TOKEN), 0, keepdims=True)
        return tilus.item(most), tilus.item(found.to(tilus.int32))


def total(parts: Any) -> Any:
    """The sum of all parts, a scalar."""
    return tilus.item(tilus.sum(parts, 0, keepdims=True))
