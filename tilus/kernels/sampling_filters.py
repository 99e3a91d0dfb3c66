"""Which token wins among those that top_k, top_p and min_p keep, given what is known of the runs of a row."""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus.kernels.sampling_row import Dice, Row, scalar
from tilus.layout import replicated, spatial

LARGE = 1e38  # scores beyond it may have overflowed
SCORE, TOKEN, MOST, BROKEN, LEAST, FINITE = range(6)  # what is known of a run of a row
FIELDS = 6


class Runs:
    """What is known of all runs of a request's row, of which there are up to `most`; runs: f32 [requests, FIELDS, count]."""

    def __init__(self, runs: Any, request: Any, most: int, warps: int) -> None:
        lanes = min(32, most)
        self.runs, self.request, self.most = runs, request, most
        self.layout = replicated(32 * warps // lanes, 1) * spatial(lanes).local(most // lanes)

    def of(self, field: int, nothing: float) -> Any:
        """f32 [most], each warp having all of it; `nothing` behind the last run."""
        found = tilus.load(self.runs, [self.request, field, 0], [self.most], layout=self.layout)
        return tilus.where(tilus.arange(self.most) < self.runs.shape[2], found, nothing)


class Filters:
    """top_k: int32 [requests], 0 for no limit. top_p, min_p: f32 [requests], 1 and 0 for no limit. All are of one request."""

    def __init__(self, top_k: Any, top_p: Any, min_p: Any, request: Any) -> None:
        self.top_k, self.top_p, self.min_p, self.request = top_k, top_p, min_p, request

    def bound(self, dice: Dice, most: Any) -> Any:
        """The least logit that min_p keeps. most: the largest one."""
        bound = -math.inf
        if self.min_p[self.request] > 0.0:
            share = tilus.item(tilus.log2(tilus.full([1], self.min_p[self.request])))
            bound = min(most + share / dice.rate, most)
        return bound

    def limit(self, runs: Runs) -> Any:
        """(how many logits are finite, how many of them top_k keeps); zeros where it keeps all of them."""
        finite, limit = 0.0, 0.0
        if self.top_k[self.request] > 0:
            finite, limit = scalar(tilus.sum(runs.of(FINITE, 0.0))), float(self.top_k[self.request])
        return finite, limit if limit < finite else 0.0

    def winner(self, row: Row, dice: Dice, runs: Runs, most: Any, score: Any, token: Any) -> Any:
        """The token that wins among what is kept. score [1], token: of the winner among all.

        Races go on until nothing above the winner says that it is not kept: each is among the logits from a higher bound on."""
        bound = self.bound(dice, most)
        logit, lowest = row.logit(token), -math.inf
        racing = logit < bound or abs(tilus.item(score)) > LARGE
        finite, limit = self.limit(runs)  # the limit is zero once the bound of top_k has been looked for
        choosing = True
        while choosing:
            if racing:
                logit, token = row.race(dice, most, bound)
            choosing, racing = False, False
            if limit > 0.0 or self.top_p[self.request] < 1.0:
                count, higher, kept, above = row.above(logit, lowest, most, dice.rate)
                if limit > 0.0:  # what top_k keeps weighs at least as much as what is known of it
                    kept = higher + tilus.item(tilus.exp2(tilus.full([1], (logit - most) * dice.rate)))
                fits = higher < self.top_p[self.request] * kept or logit == most or self.top_p[self.request] >= 1.0
                if limit > 0.0 and (count >= limit or not fits):
                    least = scalar(tilus.min(runs.of(LEAST, math.inf)))
                    lowest = row.largest(limit, least, most, finite)
                    bound, limit = lowest, 0.0
                    choosing, racing = True, logit < bound
                elif not fits:
                    choosing, racing, bound = True, True, above
        return token
