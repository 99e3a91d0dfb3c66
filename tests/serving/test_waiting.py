"""Whose turn it is: first come, first served; by priority; in fair shares. Nobody starves but by priority, which asks for it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import FakeRunner, FakeVocabulary, ManualClock, reference_answer

from serving import waiting
from serving.config import EngineConfig
from serving.core import Request, SamplingParams, Sequence
from serving.engine import Engine
from serving.waiting import INPUT_WEIGHT, OUTPUT_WEIGHT

PAGE = 2


def make_engine(schedule: str, num_pages: int = 32, **limits) -> Engine:
    config = EngineConfig(num_pages, 40, page_size=PAGE, schedule=schedule, prefix_cache=False, **limits)
    return Engine(FakeRunner(PAGE, lazy=config.overlap), FakeVocabulary(), config, ManualClock())


def request(name: str, prompt: list[int], length: int, priority: int = 0, user: str = "") -> Request:
    return Request(
        name, tuple(prompt), SamplingParams(temperature=0, max_tokens=length, ignore_eos=True), priority, user
    )


def finish(engine: Engine) -> tuple[list[str], dict[str, list[int]]]:
    """In which order requests end, and their tokens."""
    order, tokens = list[str](), dict[str, list[int]]()
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
            if output.finish_reason is not None:
                order.append(output.request_id)
        engine.check()
    return order, tokens


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 5)), min_size=1, max_size=12))
def test_one_at_a_time_goes_by_priority_and_then_by_arrival(wanted: list[tuple[int, int]]) -> None:
    engine = make_engine("priority", max_batch=1)
    for index, (priority, length) in enumerate(wanted):
        engine.add(request(str(index), [1, 2, index + 1], length, priority))
    order, _ = finish(engine)
    assert order == [str(index) for index in sorted(range(len(wanted)), key=lambda index: (wanted[index][0], index))]


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), st.integers(1, 16)), min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(0, 16),
    st.sampled_from([20, 400]),
    st.booleans(),
)
@settings(max_examples=40)
def test_none_runs_in_place_of_one_with_a_better_priority(
    arrivals: list[tuple[int, int, int]], max_batch: int, num_host_pages: int, num_pages: int, overlap: bool
) -> None:
    """Where there are pages for all, the first of those that wait takes the place of a worse one in a step. And all get their own
    answers, whoever took their place."""
    engine = make_engine(
        "priority",
        num_pages,
        max_batch=max_batch,
        num_host_pages=num_host_pages,
        admission="aggressive",
        overlap=overlap,
    )
    tokens: dict[str, list[int]] = {}
    for step in range(2000):
        for index, (when, priority, length) in enumerate(arrivals):
            if when == step:
                engine.add(request(str(index), [3, index + 1], length, priority))
        queued, running = list(engine.scheduler.waiting), engine.scheduler.running
        urgent = queued and running and queued[0].request.priority < running[-1].request.priority
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
        engine.check()
        if urgent and num_pages == 400:
            assert queued[0] not in engine.scheduler.waiting
        if step > 12 and not engine.has_work:
            break
    assert tokens == {
        str(index): reference_answer([3, index + 1], length, ignore_eos=True)
        for index, (_, _, length) in enumerate(arrivals)
    }


users = st.lists(
    st.lists(st.tuples(st.integers(1, 10), st.integers(1, 12)), min_size=12, max_size=20), min_size=2, max_size=4
)


@given(users, st.integers(1, 6), st.integers(20, 40))
@settings(max_examples=20)
def test_users_who_always_wait_get_equal_shares(
    plans: list[list[tuple[int, int]]], max_batch: int, num_pages: int
) -> None:
    """The bound of the paper, with service counted from what runs and comes out, until the first user has nothing waiting."""
    engine = make_engine("fair", num_pages, max_batch=max_batch)
    for user, plan in enumerate(plans):
        for index, (prompt, length) in enumerate(plan):
            engine.add(request(f"{user}-{index}", [1 + user] * prompt, length, user=str(user)))
    service, started = [0] * len(plans), set[str]()
    bound = 2 * max(INPUT_WEIGHT * 10, OUTPUT_WEIGHT * num_pages * PAGE)
    while len({seq.request.user for seq in engine.scheduler.waiting}) == len(plans):
        assert max(service) - min(service) <= bound
        for output in engine.step():
            service[int(output.request_id.partition("-")[0])] += OUTPUT_WEIGHT * len(output.tokens)
        for seq in engine.scheduler.running:
            if seq.id not in started:
                started.add(seq.id)
                service[int(seq.request.user)] += INPUT_WEIGHT * len(seq.request.prompt)
    order, _ = finish(engine)
    assert set(order) <= {f"{user}-{index}" for user, plan in enumerate(plans) for index in range(len(plan))}
    assert not engine.has_work


def shares(schedule: str) -> list[str]:
    """Users of the answers as they end: one sends forty requests, then another one four."""
    engine = make_engine(schedule, max_batch=2)
    for user, count in (("greedy", 40), ("modest", 4)):
        for index in range(count):
            engine.add(request(f"{user}-{index}", [1, 2], 4, user=user))
    return [name.partition("-")[0] for name in finish(engine)[0]]


def test_many_requests_of_one_user_do_not_delay_another() -> None:
    assert "modest" not in shares("fcfs")[:40]
    assert shares("fair")[:12].count("modest") == 4


def test_answers_count_twice_as_much_as_prompts() -> None:
    """A prompt of two tokens with an answer of eleven costs 24, with one of one token 4: six of these for each of the others."""
    engine = make_engine("fair", max_batch=1)
    for index in range(60):
        engine.add(request(f"long-{index}", [1, 2], 11, user="long"))
        engine.add(request(f"short-{index}", [1, 2], 1, user="short"))
    order, _ = finish(engine)
    assert 35 <= sum(name.startswith("short") for name in order[:42]) <= 37


def test_idle_time_earns_nothing() -> None:
    """A user who comes late shares from then on, and does not make up for what was not asked for."""
    engine = make_engine("fair", max_batch=1)
    for index in range(20):
        engine.add(request(f"early-{index}", [1, 2], 4, user="early"))
    for _ in range(40):
        engine.step()
    for index in range(20):
        engine.add(request(f"late-{index}", [1, 2], 4, user="late"))
    order, _ = finish(engine)
    assert 3 <= sum(name.startswith("early") for name in order[:8]) <= 5


def test_users_are_forgotten_when_that_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_USERS", 50)
    queue = waiting.Waiting("fair")
    for index in range(150):
        seq = Sequence(request(str(index), [1], 1, user=str(index)), max_tokens=1, deadline=0)
        queue.push(seq)
        queue.charge(seq, 1)
        queue.remove(seq)
    assert len(queue._served) <= 51
