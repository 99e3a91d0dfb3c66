"""How long a step takes, as a small model that is fitted to steps that were measured; and how many tokens fit into a time.

A step's seconds are a constant and what a row, a key read and a pair of a query and a key cost, on the device and of the host's
time, and what steps of just so many rows take more or less than that: those that are padded have few numbers of rows, whose
kernels differ. Where steps overlap, one is prepared while the one before runs, and the longer of the two counts. No factor is
below 0, and relative errors are squared, so that short steps count as much as long ones and a disturbed one counts little: it
cannot be wrong by more than itself.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.core import Batch

_LOG = logging.getLogger("serving")
NUM_FEATURES = 4
WINDOW = 512  # the last steps of each kind (with and without prompts) that count
REFIT = 32  # steps between two fits, at first
WAITED = 0.1  # part of a step's time from which on the host has waited for the device
# Tokens of a prompt that a step may always take: else a limit that cannot be kept would stop all prompts.
LEAST_CHUNK = 16


class StepWork(NamedTuple):
    """What a step does. tokens: that go through the model. kv_tokens: whose keys and values are read, summed over sequences.
    pairs: of a query and a key, summed over sequences. prompts, prompt_tokens: sequences that do not just decode, and their
    tokens; all others decode, a token each."""

    tokens: int = 0
    kv_tokens: int = 0
    pairs: int = 0
    prompts: int = 0
    prompt_tokens: int = 0

    def with_prompt(self, start: int, count: int) -> StepWork:
        """With `count` more tokens, of a prompt that has `start` in the cache."""
        pairs = count * start + count * (count + 1) // 2
        return StepWork(
            self.tokens + count, self.kv_tokens + start + count, self.pairs + pairs, self.prompts + 1,
            self.prompt_tokens + count,
        )  # fmt: skip

    @classmethod
    def of(cls, batch: Batch) -> StepWork:
        decodes = len(batch.items) - len(batch.others)
        kv_tokens = decodes + sum([item.start for item in batch.items]) - sum([item.start for item in batch.others])
        work = cls(decodes, kv_tokens, kv_tokens)
        for item in batch.others:
            work = work.with_prompt(item.start, len(item.token_ids))
        return work


Rows = Callable[[StepWork], int]


def unpadded(work: StepWork) -> int:
    """Rows of a step that is computed as it is."""
    return work.tokens


@dataclass(frozen=True)
class StepLaw:
    """Seconds as factors of features, and what steps of so many rows take besides."""

    factors: tuple[float, ...] = (0.0,) * NUM_FEATURES
    besides: Mapping[int, float] = field(default_factory=dict[int, float])

    def __call__(self, rows: float, kv_tokens: float, pairs: float) -> float:
        step, row, kv_token, pair = self.factors
        return max(0.0, step + row * rows + kv_token * kv_tokens + pair * pairs + self.besides.get(int(rows), 0.0))

    @classmethod
    def of(cls, seen: NDArray[np.float64]) -> StepLaw:
        """The best one for features and seconds [N]: of steps of as many rows `besides` has the mean of what is left, the nearer
        to 0 the fewer they are. Such means need no rounds: they are taken out of both sides first, in part, as random effects.
        """
        sizes, place, counts = np.unique(seen[:, 1], return_inverse=True, return_counts=True)
        weights, means = seen[:, -1:] ** -2, np.zeros((len(sizes), NUM_FEATURES + 1))
        np.add.at(means, place, seen * weights)
        means /= np.bincount(place, weights[:, 0])[:, None]
        apart = (seen - (1 - (counts[place, None] + 1) ** -0.5) * means[place]) / seen[:, -1:]
        factors = non_negative_fit(apart[:, :-1], apart[:, -1])
        besides = (means[:, -1] - means[:, :-1] @ factors) * counts / (counts + 1)
        return cls(tuple(map(float, factors)), dict(zip(map(int, sizes), map(float, besides))))


class StepTimes:
    """What steps take, on the device or of the host's time, learnt from those that were observed, apart for steps with prompts,
    which other things bound. rows: of a step, those that are made up included."""

    def __init__(self, rows: Rows = unpadded) -> None:
        self._rows = rows
        self._seen = np.zeros((2, WINDOW, NUM_FEATURES + 1))  # features and seconds, by whether there are prompts
        self._counts, self._next_fit = [0, 0], REFIT
        self._laws = [StepLaw()] * 2

    def predict(self, work: StepWork) -> float:
        """Seconds; 0 when nothing is known."""
        return self._laws[work.prompts > 0](self._rows(work), work.kv_tokens, work.pairs)

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step took so long. Of clocks that stand still nothing is learnt."""
        if work.tokens:
            self._keep(int(work.prompts > 0), (self._rows(work), work.kv_tokens, work.pairs, seconds))

    def _keep(self, kind: int, row: Sequence[float]) -> None:
        if row[-1] > 0:
            self._seen[kind, self._counts[kind] % WINDOW] = (1.0, *row)
            self._counts[kind] += 1
            if (total := sum(self._counts)) >= self._next_fit:
                self._next_fit = total + max(REFIT, min(total, WINDOW) // 4)
                self.fit()

    def fit(self) -> None:
        """Least squares over all that is known. Called now and then by `observe`. Of a kind of step that never came, the other
        kind's law is the best guess.
        """
        kinds = self.known()
        laws = [StepLaw.of(rows) for rows in kinds]
        self._laws = laws if all(map(len, kinds)) else [laws[len(kinds[1]) > 0]] * 2

    def known(self) -> list[NDArray[np.float64]]:
        """Features and seconds of the last steps that only decode, and of others."""
        return [rows[: min(count, WINDOW)] for rows, count in zip(self._seen, self._counts)]

    def ratios(self) -> list[NDArray[np.float64]]:
        """What steps took, as a part of what is predicted of them, by kind; without the tenth that differs most."""
        found: list[NDArray[np.float64]] = []
        for rows, law in zip(self.known(), self._laws):
            ratio = np.sort([row[-1] / max(1e-9, law(*row[1:-1])) for row in rows])
            found.append(ratio[len(ratio) // 20 : len(ratio) - len(ratio) // 20])
        return found

    def load(self, kinds: list[NDArray[np.float64]]) -> None:
        """[rows, kv_tokens, pairs, seconds] of steps that only decode, and of others."""
        for kind, rows in enumerate(kinds):
            for row in rows.tolist():
                self._keep(kind, row)
        self.fit()


class CostModel:
    """Predicts steps from those that were observed. Without any, it knows nothing: `is_fitted` is False.

    device: what steps take there. host: what scheduling and launching a step and telling its tokens takes, all of a step where
    nothing is done beside it. A step that overlaps with the next one takes the longer of the two.

    path: where what was observed is kept from one server to the next of the same model on the same device; None for nowhere.
    page_copy_seconds: what a copy of a page to the host's memory takes. rows: of a step as it is computed, those that are made up
    included.
    """

    def __init__(self, path: Path | None = None, page_copy_seconds: float = 0.0, rows: Rows = unpadded) -> None:
        self.page_copy_seconds = page_copy_seconds
        self.rows = rows
        self._path = path
        self.forget()

    @property
    def is_fitted(self) -> bool:
        return self.predict(StepWork(1, 1, 1)) > 0

    def predict(self, work: StepWork) -> float:
        """Seconds from the end of the step before to the end of this one; 0 when nothing is known."""
        return max(self.host.predict(work), self.device.predict(work))

    def forget(self) -> None:
        """Go back to what is kept: the first steps compile kernels."""
        self.host, self.device = StepTimes(self.rows), StepTimes(self.rows)
        if self._path is not None:
            self._load(self._path)

    def fit(self) -> None:
        """To all that is known."""
        self.host.fit()
        self.device.fit()

    def save(self) -> None:
        """Keep it, all of it or nothing; where that cannot be written, say so and go on."""
        kept = {name: [rows[:, 1:].tolist() for rows in times.known()] for name, times in self._times().items()}
        if self._path is None or not any(map(any, kept.values())):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, prefix=self._path.name, delete=False) as file:
                json.dump(kept, file)
            Path(file.name).replace(self._path)
        except OSError as error:
            _LOG.warning("cannot keep the times of steps in %s (%s)", self._path, error.strerror)

    def _times(self) -> dict[str, StepTimes]:
        return {"host": self.host, "device": self.device}

    def _load(self, path: Path) -> None:
        """What cannot be read is measured again."""
        try:
            kept = json.loads(path.read_text())
            found = {name: [_rows(rows) for rows in kept[name]] for name in self._times()}
        except (OSError, ValueError, TypeError, KeyError):
            return
        if all(len(kinds) == 2 for kinds in found.values()):
            for name, times in self._times().items():
                times.load(found[name])


def _rows(kept: object) -> NDArray[np.float64]:
    """Raises ValueError or TypeError for anything but rows of numbers that can be."""
    rows = np.array(kept, np.float64)
    if rows.size and (rows.shape[1:] != (NUM_FEATURES,) or not np.isfinite(rows).all() or (rows < 0).any()):
        raise ValueError("no rows of times")
    return rows.reshape(-1, NUM_FEATURES)


def non_negative_fit(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The factors f >= 0, one for each column, that minimise |features @ f - seconds|^2.

    The best ones are the plain least squares over the columns whose factor is not 0: with few columns, all choices are tried. Of
    two that explain as much, as with equal columns, it is the one of fewer columns, the first ones.
    """
    scale = np.abs(features).max(axis=0, initial=1e-300)
    columns = features / scale
    gram, moments = columns.T @ columns, columns.T @ seconds
    chosen = np.array(sorted(itertools.product((1.0, 0.0), repeat=len(scale)), key=sum))
    inverses = np.linalg.pinv(gram * chosen[:, :, None] * chosen[:, None, :], rcond=1e-9, hermitian=True)
    factors = chosen * (inverses @ moments)
    errors = ((factors @ gram - 2 * moments) * factors).sum(axis=1)
    errors[(factors < 0).any(axis=1)] = 0.0  # no better than none
    return factors[np.argmax(errors <= errors.min() + 1e-12 * float(seconds @ seconds))] / scale


class StepWatch:
    """Teaches a cost model what steps take, from when an engine launches them, waits for them and has their tokens."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.rest_ends(0.0)

    def rest_ends(self, now: float) -> None:
        """Work comes where there was none."""
        self._since = now  # the end of the step before
        self._is_first = True
        self._was_queued = False  # whether the device had the next step when that one ended

    def alone(self, work: StepWork, now: float) -> None:
        """A step has ended, beside which nothing was done."""
        self._cost.host.observe(work, now - self._since)
        self._since, self._is_first, self._was_queued = now, False, False

    def overlapped(self, work: StepWork, launched: float, behind: StepWork | None, asked: float, now: float) -> None:
        """A step has ended that was launched at `launched`; then `behind` was, or there was nothing, and it was waited for from
        `asked` to `now`. If there was nothing to wait for, the device has waited for the host, and nobody knows since when.
        """
        waited = now - asked > WAITED * (now - self._since)
        if behind is not None and not self._is_first:
            self._cost.host.observe(behind, asked - self._since)
        if waited and (self._is_first or self._was_queued):
            self._cost.device.observe(work, now - (launched if self._is_first else self._since))
        self._since, self._is_first, self._was_queued = now, False, waited


class StepBudget:
    """What still fits into a step: `max_tokens` tokens, as many rows if they are padded, and no more than the limit in seconds,
    as the cost model says. Rows that are made up are paid for: a step that has some takes as much of a prompt as fills them.

    b* = max{b : t_step(decodes + b tokens of prompts) <= limit}: Dynamic SplitFuse (DeepSpeed-FastGen, arXiv 2401.08671), its
    budget derived from the limit on the time between two tokens as Sarathi-Serve (arXiv 2403.02310) proposes. Where nothing
    decodes there is no such time, and the limit does not count.
    """

    def __init__(self, max_tokens: int, cost: CostModel, limit: float | None, decodes: StepWork) -> None:
        self.work = decodes
        self._max_tokens = max_tokens
        self._cost = cost
        self._limit = (False, limit if limit is not None and decodes.tokens else math.inf)
        self._least = LEAST_CHUNK

    @property
    def is_spent(self) -> bool:
        """Whether no token fits any more."""
        return self.work.tokens >= self._max_tokens or (self._least == 0 and self._price(0, 1) > self._limit)

    def take(self, start: int, pending: int) -> int:
        """How many of a prompt's pending tokens go into the step, behind `start` that are in the cache; they are in it then."""
        most = max(0, min(pending, self._max_tokens - self.work.tokens))
        least = min(most, self._least)
        limit = max(self._limit, self._price(start, least)) if least else self._limit
        count = least + bisect_right(range(least + 1, most + 1), limit, key=lambda count: self._price(start, count))
        self._least -= least
        if count:
            self.work = self.work.with_prompt(start, count)
        return count

    def _price(self, start: int, count: int) -> tuple[bool, float]:
        """Whether the step would have too many rows with so much of a prompt, and its seconds."""
        work = self.work.with_prompt(start, count)
        return self._cost.rows(work) > self._max_tokens, self._cost.predict(work)
