"""Admission: predictions are those of the past, the peak is that of the future, and what is promised is kept."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import FakeRunner, FakeVocabulary, ManualClock

from serving.admission import WINDOW, PastFuture, future_peak, predict_lengths
from serving.config import EngineConfig
from serving.core import Request, SamplingParams, Sequence
from serving.engine import Engine
from serving.kv import PageTables

sequences = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=8)


@given(sequences)
def test_the_peak_is_that_of_the_future_token_by_token(running: list[tuple[int, int]]) -> None:
    most, step = 0, 0
    while any(remaining > step for _, remaining in running):
        step += 1
        most = max(most, sum(held + step for held, remaining in running if remaining >= step))
    held, remaining = np.array(running).T
    assert future_peak(held, remaining) == most


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(0, 30), st.integers(31, 50))
def test_lengths_are_drawn_from_longer_ones_of_the_past(past: list[int], output: int, limit: int) -> None:
    """Chances that are spread evenly draw each of them once, and the limit."""
    longer = [length for length in sorted(past) if length > output]
    chances = ((np.arange(len(longer) + 1) + 0.5) / (len(longer) + 1))[:, None]
    drawn = predict_lengths(np.sort(np.array(past, np.int64)), np.array([output]), np.array([limit]), chances)
    assert drawn[:, 0].tolist() == [*longer, limit]


def test_the_past_is_the_last_answers() -> None:
    policy, rng = PastFuture(), np.random.default_rng(0)
    lengths = rng.integers(1, 500, WINDOW + 300).tolist()
    for length in lengths:
        policy.learn(length)
    assert policy._sorted == sorted(lengths[-WINDOW:])


def admitted(policy: PastFuture, num_pages: int, prompt: int, limit: int) -> int:
    """How many equal requests may start together."""
    pages, running = PageTables(num_pages, 16), list[Sequence]()
    while True:
        seq = Sequence(Request(str(len(running)), (1,) * prompt, SamplingParams()), max_tokens=limit, deadline=0)
        if not policy.admits(running, seq, pages) or not pages.reserve(seq.id, prompt):
            return len(running)
        running.append(seq)


def test_more_start_the_shorter_answers_were() -> None:
    """Of 1600 tokens, prompts of 31 with answers of up to 400: 31 tokens and half a page are held, and what comes."""
    policy = PastFuture()
    assert admitted(policy, 100, 31, 400) == int(0.95 * 1600) // (39 + 400)  # nothing is known
    for _ in range(WINDOW):
        policy.learn(50)
    all_short, one_long = int(0.95 * 1600) // (39 + 50), int(0.95 * 1600 - 350) // (39 + 50)
    assert one_long <= admitted(policy, 100, 31, 400) <= all_short


def run(lengths: list[int], admission: str, num_pages: int) -> tuple[int, int]:
    """Requests with answers of these lengths, all at once, over short pages: steps, and how often one lost its pages."""
    config = EngineConfig(num_pages, 64, page_size=2, max_batch=16, admission=admission, prefix_cache=False)
    engine = Engine(FakeRunner(2), FakeVocabulary(), config, ManualClock())
    for index, length in enumerate(lengths):
        engine.add(Request(str(index), (1, 2, 3), SamplingParams(max_tokens=length, ignore_eos=True)))
    steps = 0
    while engine.has_work:
        engine.step()
        engine.check()
        steps += 1
    return steps, engine.scheduler.num_recomputed


@given(st.lists(st.integers(20, 60), min_size=8, max_size=16), st.integers(40, 80))
@settings(max_examples=15)
def test_answers_as_long_as_they_may_be_never_lose_pages(lengths: list[int], num_pages: int) -> None:
    """The limit bounds every prediction, so that each is right here: no more evictions than with full reservation, none."""
    assert run(lengths, "conservative", num_pages)[1] == 0
    assert run([30] * len(lengths), "past-future", num_pages)[1] == 0


def test_the_aggressive_policy_evicts_here() -> None:
    """Guards the test above."""
    assert run([30] * 20, "aggressive", 40)[1] > 5
