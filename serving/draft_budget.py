"""How many of the next tokens of each sequence a step guesses: as many as bring the most tokens in its time, none included."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as List
from typing import NamedTuple

from serving.core import Sequence
from serving.cost_model import Rows, StepTimes, StepWork

_GAIN = 1.03  # in tokens a second that guesses must promise
_PROBE = 128  # steps without guesses, after which one sequence is guessed for to learn what that takes and brings
_FEW = 8  # steps without guesses that tell what they take
_LIKELY = 0.5


class Hope(NamedTuple):
    """What guesses of a sequence are worth. first: the chance that the first one is right. each: that one is, if those in front
    are. room: how many there may be, at least 1."""

    seq: Sequence
    first: float
    each: float
    room: int


class DraftBudget:
    """Chooses by chances and by what a step with more rows takes, from the end of the step before it to its own.

    A step gives each sequence one token, and another one for each of its guesses that is right together with all in front of it.
    Guesses are taken in the order of their chances as long as they raise tokens a second. Where nothing is known yet of what
    steps take, those are taken that are more likely right than not. rows: of a step as it is computed, so that guesses in place
    of rows that are made up cost nothing.
    """

    def __init__(self, rows: Rows) -> None:
        self._times = StepTimes(rows)
        self._since = 0.0
        self._idle = _PROBE - _FEW  # steps since the last one with guesses

    def rest_ends(self, now: float) -> None:
        """Work comes where there was none."""
        self._since = now

    def observe(self, work: StepWork, now: float) -> None:
        """A step has ended."""
        self._times.observe(work, now - self._since)
        self._since = now
        if not work.prompts and len(self._times.known()[0]) == _FEW:
            self._times.fit()

    def counts(self, hopes: List[Hope], decodes: StepWork) -> dict[Sequence, int]:
        """decodes: the step without guesses. How many for each sequence that has some."""
        if not hopes:
            return {}
        counts = self._best(hopes, decodes)
        self._idle = 0 if counts else self._idle + 1
        if self._idle > _PROBE:
            self._idle = 0
            best = max(hopes, key=lambda hope: hope.first)
            counts = {best.seq: best.room}
        return counts

    def _best(self, hopes: List[Hope], decodes: StepWork) -> dict[Sequence, int]:
        predict, counts = self._times.predict, dict[Sequence, int]()
        work, tokens = dataclasses.replace(decodes, prompts=1, prompt_tokens=1), float(decodes.tokens)
        without, seconds = predict(decodes), predict(work)
        if seconds > 0 and len(self._times.known()[0]) < _FEW:
            return {}  # what a step without guesses takes is the first thing to know
        # One more row takes this at least, so that less likely guesses need no look.
        row = predict(dataclasses.replace(work, tokens=work.tokens + 1, prompt_tokens=2)) - seconds
        least = tokens * row / seconds if seconds > 0 else _LIKELY
        guesses = [
            (chance, hope.seq)
            for hope in hopes
            for number in range(hope.room)
            if (chance := hope.first * hope.each**number) > least
        ]
        for chance, seq in sorted(guesses, key=lambda guess: guess[0], reverse=True):
            number = counts.get(seq, 0) + 1
            guessed = len(counts) + (number == 1)  # sequences that then do not just decode
            work = StepWork(
                work.tokens + 1, work.kv_tokens + 1, work.pairs + len(seq.tokens) + number, guessed,
                guessed + sum(counts.values()) + 1,
            )  # fmt: skip
            longer = predict(work)
            if chance * seconds < tokens * (longer - seconds):
                break
            counts[seq], tokens, seconds = number, tokens + chance, longer
        pays = tokens * without >= _GAIN * decodes.tokens * seconds
        return counts if pays else {}
