"""The softmax of scores that come tile by tile: the maximum so far, and sums relative to it.

M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
"""

from __future__ import annotations

import math
from typing import Any

import tilus

NO_SCORE = -1e30  # the maximum of no scores; finite, so that differences with it are no NaN


class OnlineSoftmax:
    """Each row's highest score and sum of weights, of the tiles that were weighed.

    shape: of these two, 1 along `axis`, the keys of a tile. unit: what scores are multiplied by in the argument of the
    exponential of base 2, positive; None where they come multiplied.
    """

    def __init__(self, shape: list[int], axis: int, unit: Any = None) -> None:
        self.shape, self.axis, self.unit = shape, axis, unit
        self.highest, self.total = tilus.full(shape, NO_SCORE), tilus.zeros(shape)

    def restart(self) -> None:
        """Nothing was weighed yet."""
        self.highest, self.total = tilus.full(self.shape, NO_SCORE), tilus.zeros(self.shape)

    def weigh(self, scores: Any) -> tuple[Any, Any]:
        """The weights of a tile, and the factor of what was added up before. scores: f32, minus infinity for unseen keys."""
        higher = tilus.maximum(self.highest, tilus.max(scores, self.axis, keepdims=True))
        if self.unit is None:
            weights, shrink = tilus.exp2(scores - higher), tilus.exp2(self.highest - higher)
        else:
            weights = tilus.exp2(tilus.fma(scores, self.unit, -(higher * self.unit)), ftz=True)
            shrink = tilus.exp2((self.highest - higher) * self.unit, ftz=True)
        self.highest = higher
        self.total = self.total * shrink + tilus.sum(weights, self.axis, keepdims=True)
        return weights, shrink


def natural(log2: Any) -> Any:
    """Logarithms of sums of weights, of base e; minus infinity where that of base 2 is NO_SCORE: there was no key."""
    return tilus.where(log2 > NO_SCORE, log2 * math.log(2.0), -math.inf)
