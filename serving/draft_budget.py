"""How many of the next tokens of each sequence a step guesses: as many as bring the most tokens in its time, none included."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence as List
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

from serving.core import Sequence
from serving.cost_model import Rows, StepWork

_GAIN = 1.03  # in tokens a second that guesses must promise
_PROBE, _LONGEST_PROBE = 128, 4096  # steps without guesses, after which it is looked again whether they pay
_KNOWN = 2  # steps of a kind that tell what they take
_MEMORY = 16  # values that a mean is of
_LIKELY = 0.5
_UNUSUAL = 3.0  # so many times the median is a disturbance


class Hope(NamedTuple):
    """What guesses of a sequence are worth. first: the chance that the first one is right. each: that one is, if those in front
    are. room: how many there may be, at least 1."""

    seq: Sequence
    first: float
    each: float
    room: int


class StepKind(NamedTuple):
    """Of a step: sequences that get a token, and its rows. Both as computed, those that are made up included; equal where nothing
    is guessed."""

    sequences: int
    rows: int

    @property
    def is_plain(self) -> bool:
        return self.rows == self.sequences


class Mean:
    """Of the last values, but for those that are far above most of them: what comes first is often compiled first. value: None
    until there are enough."""

    def __init__(self) -> None:
        self._values = deque[float](maxlen=_MEMORY)
        self.value: float | None = None

    def learn(self, value: float) -> None:
        self._values.append(value)
        if len(self._values) >= _KNOWN:
            most = _UNUSUAL * sorted(self._values)[(len(self._values) - 1) // 2]
            self.value = fmean(value for value in self._values if value <= most)


class DraftBudget:
    """Chooses by chances and by how many times as long a step takes that has guesses: of its kind, as those before it took.

    A step gives each sequence one token, and another one for each of its guesses that is right together with all in front of it.
    Guesses are taken in the order of their chances, as many as bring the most tokens a second. Of rows that no step had yet it is
    hoped that they take no longer than the next fewer, and of those of the first step with guesses, that it takes no longer at
    all; but then guesses must be more likely right than not. rows: of a step as it is computed, so that guesses in place of rows
    that are made up cost nothing.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._plain: dict[int, Mean] = {}  # seconds, by sequences
        # By sequences and rows: how many times as long as without guesses.
        self._longer: dict[int, dict[int, Mean]] = {}
        self._since = 0.0
        self._idle, self._patience = 0, _PROBE  # steps since the last one with guesses, and how many there may be

    def rest_ends(self, now: float) -> None:
        """Work comes where there was none."""
        self._since = now

    def kind(self, sequences: int, guessed: int, drafts: int) -> StepKind:
        """Of a step with so many drafts, for so many of its sequences."""
        plain = self._rows(StepWork(sequences))
        rows = self._rows(StepWork(sequences + drafts, 0, 0, guessed, guessed + drafts)) if drafts else 0
        return StepKind(plain, max(rows, plain + (drafts > 0)))

    def observe(self, ended: StepKind | None, prepared: StepKind | None, now: float) -> None:
        """A step has ended. Since the one before it did, another one has been prepared: itself where nothing overlaps. None for
        those with prompts.

        The time is half of either: where one of the two has no guesses, half of what a plain step takes is its, and the rest the
        other's.
        """
        seconds, self._since = now - self._since, now
        if ended is None or prepared is None or ended.sequences != prepared.sequences or seconds <= 0:
            return
        plain = self._plain.setdefault(ended.sequences, Mean())
        guessing = [kind for kind in (ended, prepared) if not kind.is_plain]
        if not guessing:
            plain.learn(seconds)
        elif plain.value is not None:
            longer = seconds / plain.value if len(guessing) == 2 else 2 * seconds / plain.value - 1
            for kind in guessing:
                self._longer.setdefault(kind.sequences, {}).setdefault(kind.rows, Mean()).learn(max(1.0, longer))

    def counts(self, hopes: List[Hope], sequences: int) -> dict[Sequence, int]:
        """How many guesses for each of the sequences that have some, of so many that decode."""
        if not hopes:
            return {}
        counts = self._best(hopes, sequences)
        self._idle = 0 if counts else self._idle + 1
        if counts:
            self._patience = _PROBE
        elif self._idle > self._patience:
            self._idle, self._patience = 0, min(2 * self._patience, _LONGEST_PROBE)
            best = max(hopes, key=lambda hope: hope.first)
            counts = {best.seq: best.room}
        return counts

    def _best(self, hopes: List[Hope], sequences: int) -> dict[Sequence, int]:
        plain = self.kind(sequences, 0, 0).rows
        if self._plain and (plain not in self._plain or self._plain[plain].value is None):
            return {}  # what a step without guesses takes is the first thing to know
        known = {rows: mean.value for rows, mean in self._longer.get(plain, {}).items() if mean.value is not None}
        least = 0.0 if known else _LIKELY
        guesses = [
            (chance, number, hope.seq)
            for hope in hopes
            for number in range(hope.room)
            if (chance := hope.first * hope.each**number) > least
        ]
        guesses.sort(key=lambda guess: guess[0], reverse=True)
        tokens = list(accumulate((chance for chance, _, _ in guesses), initial=float(sequences)))
        guessed = list(accumulate((number == 0 for _, number, _ in guesses), initial=0))

        def rows_of(count: int) -> int:
            return self.kind(sequences, guessed[count], count).rows

        best, rate = 0, _GAIN * sequences
        for count in _some_of(len(guesses)):
            rows = rows_of(count)
            full = min(len(guesses), max(count, rows - sequences))
            count = full if rows_of(full) == rows else count
            if tokens[count] > rate * (longer := _between(known, plain, rows)):
                best, rate = count, tokens[count] / longer
        counts = dict[Sequence, int]()
        for _, _, seq in guesses[:best]:
            counts[seq] = counts.get(seq, 0) + 1
        return counts


def _some_of(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), *([most] if most else [])]


def _between(known: dict[int, float], plain: int, rows: int) -> float:
    """How many times as long steps of so many rows take: between those of the next fewer and the next more that are known."""
    sizes = sorted(known)
    index = bisect_left(sizes, rows)
    fewer, less = (sizes[index - 1], known[sizes[index - 1]]) if index else (plain, 1.0)
    if index == len(sizes):
        return less
    more, longer = sizes[index], known[sizes[index]]
    return less + (longer - less) * (rows - fewer) / (more - fewer)
