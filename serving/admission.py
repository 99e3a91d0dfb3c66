"""Which newcomers may start, so that those that run do not run out of pages before they end.

A policy says whether a newcomer may join those that run; whether its own tokens have pages now is asked besides. Tokens are
counted as those that a sequence has of its own: pages that it shares are counted once."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as List

import numpy as np
from numpy.typing import NDArray

from serving.core import Sequence
from serving.kv import PageTables

WINDOW = 1000  # answers that predictions are drawn from
DRAWS = 4  # of all lengths, the worst of which counts
RESERVE = 0.05  # part of the cache that predictions leave free, as they are drawn


class Admission:
    """Whoever fits now starts; those that find no page later lose theirs."""

    def admits(self, running: List[Sequence], newcomer: Sequence, pages: PageTables) -> bool:
        """Whether a newcomer may join those that run."""
        return True

    def learn(self, num_output: int) -> None:
        """An answer has ended with so many tokens."""


class Conservative(Admission):
    """Every answer may become as long as it is allowed to: nobody ever loses pages."""

    def admits(self, running: List[Sequence], newcomer: Sequence, pages: PageTables) -> bool:
        everyone, size = [*running, newcomer], pages.page_size
        most = sum(-(-(len(seq.request.prompt) + seq.max_tokens) // size) - seq.num_shared for seq in everyone)
        return len(everyone) == 1 or most + _uncounted(everyone, pages) <= pages.num_pages


class PastFuture(Admission):
    """The Past-Future scheduler (Gong et al., ASPLOS 2025, arXiv 2507.10150): answers will be as long as those of the past.

    A length is drawn for each sequence from those of the last answers that are longer than what it has already. Memory then peaks
    when one of them ends: the newcomer may start when all peaks, of the worst of a few draws, are within the cache.
    """

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)  # any: it decides when requests start, never what is answered
        self._past = deque[int](maxlen=WINDOW)
        self._sorted: list[int] = []

    def learn(self, num_output: int) -> None:
        if len(self._past) == WINDOW:
            self._sorted.remove(self._past[0])
        self._past.append(num_output)
        insort(self._sorted, num_output)

    def admits(self, running: List[Sequence], newcomer: Sequence, pages: PageTables) -> bool:
        if not running:
            return True
        everyone = [*running, newcomer]
        size = pages.page_size
        # As if the last page of each were not full.
        held = np.array([len(seq.tokens) + size - 1 - seq.num_shared * size for seq in everyone])
        outputs = np.array([seq.num_output for seq in everyone])
        limits = np.array([seq.max_tokens for seq in everyone])
        chances = self._rng.random((DRAWS, len(everyone)))
        remaining = predict_lengths(np.array(self._sorted, np.int64), outputs, limits, chances) - outputs
        peak = max(future_peak(held, draw) for draw in remaining) + _uncounted(everyone, pages) * size
        return peak <= (1 - RESERVE) * pages.capacity


def predict_lengths(
    past: NDArray[np.int64], outputs: NDArray[np.int64], limits: NDArray[np.int64], chances: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Lengths [..., N] of answers that have `outputs` [N] tokens and may have `limits` [N], drawn from P(L | L > outputs).

    past: lengths, sorted. chances: [..., N] in [0, 1), which choose. The limit counts as one more length of the past, so that
    with nothing longer known the answer takes all that it may, and a short past is not trusted too much.
    """
    first = np.searchsorted(past, outputs, side="right")
    chosen = first + (chances * (len(past) + 1 - first)).astype(np.int64)
    return np.minimum(np.append(past, np.iinfo(np.int64).max)[chosen], limits)


def future_peak(held: NDArray[np.int64], remaining: NDArray[np.int64]) -> int:
    """The most tokens that sequences will have together, which hold `held` [N] tokens now and get one a step, `remaining` [N]
    in all.

    Sorted by what remains, descending, it is max_k (held_1 + ... + held_k + k * remaining_k): the k-th ends then, and those
    after it have ended.
    """
    order = np.argsort(-remaining)
    return int((np.cumsum(held[order]) + np.arange(1, len(order) + 1) * remaining[order]).max())


def _uncounted(everyone: List[Sequence], pages: PageTables) -> int:
    """Pages in use that no sequence counts as its own: those whose first owner has ended, while others share them."""
    own = sum(pages.num_pages_of(seq.id) - seq.num_shared for seq in everyone)
    return max(0, pages.num_pages - pages.num_free - own)


def admission_policy(name: str) -> Admission:
    """The policy of an `--admission`."""
    return {"past-future": PastFuture, "aggressive": Admission, "conservative": Conservative}[name]()
