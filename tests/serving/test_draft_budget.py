"""Guesses never cost: steps take what a pace says, in time that is only counted, and answers are texts that are known."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import serving
from serving.bench.simulate import Pace, PlainVocabulary, SimRunner, VirtualClock
from serving.config import EngineConfig
from serving.core import UNKNOWN, Batch, Request, SampledToken, SamplingParams, Sequence, StepOutput
from serving.cost_model import StepWork
from serving.draft_budget import DraftBudget, Hope
from serving.engine import Engine
from serving.kv import PageTables
from serving.speculation import Drafter, DraftModel, PromptLookup

SIZE = 220  # tokens of a prompt, and of its answer
Texts = Mapping[str, list[int]]
Paces = Callable[[int], float]  # milliseconds of a step, by its drafts


class Told:
    """Answers with given texts, and checks drafts against them."""

    def __init__(self, runner: SimRunner, texts: Texts) -> None:
        self._runner, self._texts = runner, texts
        self._wrong: dict[str, int] = {}

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        wait = self._runner.launch(batch)
        found: list[tuple[SampledToken, ...]] = []
        for item in batch.sampled:
            wrong = self._wrong.get(item.request_id, 0) if UNKNOWN in item.token_ids else 0
            first = item.kv_len - item.num_drafts - wrong
            drafts, text = item.token_ids[len(item.token_ids) - item.num_drafts :], self._texts[item.request_id][first:]
            right = next((n for n, (draft, token) in enumerate(zip(drafts, text)) if draft != token), len(drafts))
            self._wrong[item.request_id] = len(drafts) - right
            found.append(tuple(map(SampledToken, text[: right + 1])))

        def told() -> StepOutput:
            wait()
            return StepOutput(tuple(found))

        return told


@cache
def words() -> list[int]:
    text = Path(serving.__file__).with_name("calibration.txt").read_text()
    return [zlib.crc32(word.encode()) % 2**16 + 1 for word in re.findall(r"\w+|[^\w\s]", text)]


def prose(number: int) -> list[int]:
    """Goes on as texts do."""
    return (words()[37 * number :] + words())[: 2 * SIZE + 20]


def dice(number: int) -> list[int]:
    """Everything has been there before, and tells nothing."""
    return np.random.default_rng(number).integers(1, 5, 2 * SIZE + 20).tolist()


def quotation(number: int) -> list[int]:
    return prose(number)[:SIZE] + prose(number)[: SIZE + 20]


def seconds(texts: Texts, pace: Pace, drafts: int, overlap: bool, guessed: Texts | None = None) -> float:
    """guessed: by a draft model, whose steps take a fifth; None for drafts from the prompt."""
    clock = VirtualClock()
    config = EngineConfig(
        2000, 512, max_batch=32, max_step_tokens=256, num_drafts=drafts, overlap=overlap, prefix_cache=False,
        request_timeout=1e9,
    )  # fmt: skip
    drafter: Drafter | None = PromptLookup() if drafts else None
    if guessed is not None:
        small = Pace(lambda work: pace.device(work) / 5, lambda work: pace.host(work) / 5)
        drafter = DraftModel(Told(SimRunner(clock, small), guessed), PageTables(2000, 16), 256)
    engine = Engine(Told(SimRunner(clock, pace), texts), PlainVocabulary(), config, clock, drafter=drafter)
    found: dict[str, list[int]] = {}
    for name, text in texts.items():
        engine.add(Request(name, tuple(text[:SIZE]), SamplingParams(max_tokens=SIZE, temperature=0, ignore_eos=True)))
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
    assert found == {name: text[SIZE : 2 * SIZE] for name, text in texts.items()}
    return clock.time


def paced(step: float, more: float, row: float, host: float) -> Pace:
    """Milliseconds: of a step, what it takes more where not all of it decodes, of a row; of the host."""
    return Pace(lambda work: (step + more * (work.prompts > 0) + row * work.tokens) / 1e3, lambda work: host / 1e3)


PACES = {
    "the device waits": (paced(0.5, 0.3, 0.01, 0.6), True),
    "the host waits": (paced(2.0, 0.1, 0.005, 0.4), True),
    "rows are dear": (paced(1.1, 0.65, 0.06, 0.4), True),
    "in turn": (paced(5.0, 1.0, 2.0, 0.2), False),
}


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.exhaustive)])
def test_what_cannot_be_guessed_costs_three_percent_at_most(pace: str, count: int) -> None:
    for kind in (prose, dice):
        texts = {str(number): kind(number) for number in range(count)}
        without, with_drafts = (seconds(texts, PACES[pace][0], drafts, PACES[pace][1]) for drafts in (0, 4))
        assert with_drafts <= 1.03 * without, kind


@pytest.mark.parametrize(("pace", "count", "gain"), [
    ("the device waits", 1, 2.0), ("the device waits", 6, 1.5), ("the host waits", 1, 2.5), ("the host waits", 6, 2.2),
    ("rows are dear", 1, 1.8), ("rows are dear", 6, 1.2), ("in turn", 1, 1.3), ("in turn", 6, 1.0),
])  # fmt: skip
def test_quotations_gain(pace: str, count: int, gain: float) -> None:
    texts = {str(number): quotation(number) for number in range(count)}
    without, with_drafts = (seconds(texts, PACES[pace][0], drafts, PACES[pace][1]) for drafts in (0, 4))
    assert without >= gain * with_drafts


def test_a_draft_model_is_asked_as_long_as_it_is_right() -> None:
    """Its steps take time of their own, and the model waits for them; where it is wrong it is asked now and then."""
    texts = {str(number): prose(number) for number in range(2)}
    wrong = {name: [token + 1 for token in text] for name, text in texts.items()}
    pace = paced(2.0, 0.1, 0.005, 0.4)
    without, right, in_vain = (
        seconds(texts, pace, drafts, True, guessed) for drafts, guessed in ((0, None), (4, texts), (4, wrong))
    )
    assert 2 * right <= without and in_vain <= 1.03 * without


def test_steps_are_those_of_the_text() -> None:
    """Guards the tests above: a pace of nothing but rows takes a millisecond for each token that goes through the model."""
    texts = {"a": quotation(0)}
    assert seconds(texts, Pace(lambda work: work.tokens / 1e3), 0, True) == pytest.approx((2 * SIZE - 1) / 1e3)


def padded(work: StepWork) -> int:
    return -(-work.tokens // 64) * 64 if work.prompts else work.tokens


SEQUENCES = [Sequence(Request(str(n), (1,) * 50, SamplingParams()), 10, 1e9) for n in range(8)]


def taught(rows: Callable[[StepWork], int], steps: Iterable[int], device: Paces, host: Paces) -> DraftBudget:
    """By steps of 8 sequences with so many drafts each, one of which is prepared while the one before it runs."""
    budget, now = DraftBudget(rows), 0.0
    kinds = [(budget.kind(8, 4 * (drafts > 0), drafts), drafts) for drafts in steps]
    for (kind, drafts), (prepared, next_drafts) in itertools.pairwise(kinds):
        now += max(device(drafts), host(next_drafts))
        budget.observe(kind, prepared, now)
    return budget


def test_guesses_in_place_of_rows_that_are_made_up_cost_nothing() -> None:
    """Steps with guesses have 64 rows, all of which take their time: up to 64 even unlikely guesses are made, which would not pay
    if each had its part of it."""

    def guesses(rows: Callable[[StepWork], int], device: Paces) -> int:
        budget = taught(rows, [0] * 6 + [4] * 6 + [24] * 6, device, lambda drafts: 0.0)
        return sum(budget.counts([Hope(seq, 0.3, 0.3, 4) for seq in SEQUENCES], 8).values())

    dear = guesses(lambda work: work.tokens, lambda drafts: 0.9 + 0.03 * drafts)
    assert dear < guesses(padded, lambda drafts: 1.0 if drafts else 0.9) == 4 * len(SEQUENCES)


@pytest.mark.parametrize("pattern", [[4], [0, 4], [0, 0, 4], [0, 4, 4], [4, 0, 4, 4, 0]])
@pytest.mark.parametrize(("device", "host"), [((1.0, 1.6), (0.2, 0.3)), ((0.2, 0.3), (1.0, 1.6)), ((0.9, 1.2), (1.0, 1.9)),
                                              ((1.0, 2.0), (0.8, 2.5))])  # fmt: skip
def test_what_guesses_cost_is_what_they_make_the_whole_longer(
    pattern: list[int], device: tuple[float, float], host: tuple[float, float]
) -> None:
    """Whoever of host and device waits for the other, and whichever of two steps the time between them belongs to."""
    steps = pattern * (120 // len(pattern))
    total = sum(max(device[a > 0], host[b > 0]) for a, b in itertools.pairwise([*steps, steps[0]]))
    plain = max(device[0], host[0])
    longer = (total - steps.count(0) * plain) / steps.count(4) / plain
    budget = taught(padded, [0] * 6 + steps, lambda drafts: device[drafts > 0], lambda drafts: host[drafts > 0])
    for gain, pays in ((1.03 * longer - 0.1, False), (1.03 * longer + 0.1, True)):
        hopes = [Hope(seq, gain - 1, 0.0, 1) for seq in SEQUENCES]
        assert bool(budget.counts(hopes, 8)) == pays


def test_looks_for_whether_it_pays_become_rarer() -> None:
    budget = taught(padded, [0] * 6 + [4] * 6 + [0] * 6, lambda drafts: 2.0 if drafts else 1.0, lambda drafts: 0.0)
    hopes = [Hope(seq, 0.5, 0.5, 4) for seq in SEQUENCES]
    tries = [number for number in range(4000) if budget.counts(hopes, 8)]
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert len(tries) >= 3 and all(
        after == pytest.approx(2 * before, rel=0.05) for before, after in itertools.pairwise(gaps)
    )
