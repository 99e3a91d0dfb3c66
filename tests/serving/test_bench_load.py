"""The load generator against a server of known delays, in virtual time: what it reports is what happened, exactly."""

from __future__ import annotations

import asyncio
import email.utils
import socket
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import BREAK, STREAM, Answer, ScriptedServer, constant_plan, observe, token, used
from virtual_time import VirtualLoop, run_virtually

from serving.bench.events import EventReader
from serving.bench.prompts import PromptWriter, TokenCost
from serving.bench.record import Failure, Record
from serving.bench.summary import summarise
from serving.bench.target import Target
from serving.bench.workload import PlannedRequest


def one(answer: Answer, **options: Any) -> Record:
    """The record of one request with this answer."""
    seen = run_virtually(observe(ScriptedServer(lambda index, body: answer), constant_plan(1), **options))
    (record,) = seen.records
    return record


def test_times_of_tokens_are_those_of_the_server() -> None:
    record = one(Answer.stream([0.7, 0.1, 0.2, 0.05]))
    assert record.outcome == "finished" and record.failure is None
    assert record.ttft == pytest.approx(0.7)
    assert record.gaps == pytest.approx((0.1, 0.2, 0.05))
    assert record.tpot == pytest.approx(0.35 / 3)
    assert record.e2e == pytest.approx(1.05)
    assert (record.input_tokens, record.output_tokens, record.late) == (7, 4, 0.0)


def test_tokens_are_counted_by_usage_not_by_chunks() -> None:
    record = one(Answer.stream([0.5, 0.3, 0.3], outputs=7))
    assert record.num_output == 7
    assert record.tpot == pytest.approx(0.6 / 6)
    assert len(record.gaps) == 2


def test_without_usage_chunks_are_counted() -> None:
    record = one(Answer(((0.5, token()), (0.5, token()), (0.0, "[DONE]"))))
    assert (record.output_tokens, record.num_output, record.input_tokens) == (None, 2, None)


def test_the_role_of_a_chat_is_no_token_but_its_reasoning_is() -> None:
    def delta(**fields: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}

    steps = (
        (0.1, delta(role="assistant", content="")),
        (0.1, delta(reasoning_content="hm")),
        (0.1, delta(content="")),  # half a character
        (0.1, delta(content="a")),
        (0.1, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
        (0.1, used(1, 3)),
        (0.1, "[DONE]"),
    )
    record = one(Answer(steps), target=Target("m", "chat"))
    assert record.token_times == pytest.approx((0.2, 0.3, 0.4))
    assert record.end == pytest.approx(0.7)


def test_an_answer_that_shows_nothing_came_with_its_end() -> None:
    silent = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
    assert one(Answer(((0.4, silent), (0.1, used(1, 1)), (0.0, "[DONE]")))).ttft == pytest.approx(0.4)


def test_open_loop_sends_in_time_however_slow_the_server_is() -> None:
    """One answer at a time, a second each, ten times as many requests: all are sent in time and wait their turn."""
    free_at = 0.0

    def answer(index: int, body: dict[str, Any]) -> Answer:
        nonlocal free_at
        now = asyncio.get_running_loop().time()
        free_at = max(free_at, now) + 1.0
        return Answer.stream([free_at - now])

    seen = run_virtually(observe(ScriptedServer(answer), constant_plan(20, 0.1)))
    assert [record.sent for record in seen.records] == pytest.approx([0.1 * i for i in range(20)])
    assert [record.ttft for record in seen.records] == pytest.approx([i + 1 - 0.1 * i for i in range(20)])


def lose(seconds: float) -> None:
    """Hold the whole client up for so long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.now += seconds


def test_a_late_client_skips_nothing_and_latencies_count_from_the_arrival() -> None:
    async def held_up():
        asyncio.get_running_loop().call_later(0.25, lose, 0.5)
        return await observe(ScriptedServer(lambda index, body: Answer.stream([1.0])), constant_plan(9, 0.1))

    seen = run_virtually(held_up())
    late = [0, 0, 0, 0.45, 0.35, 0.25, 0.15, 0.05, 0]
    assert [record.late for record in seen.records] == pytest.approx(late)
    assert [record.ttft for record in seen.records] == pytest.approx([1 + seconds for seconds in late])
    assert max(seen.lags) == pytest.approx(0.5, abs=0.02)
    warnings = summarise(seen).warnings
    assert any("sent requests late by 442 ms" in warning for warning in warnings), warnings
    assert any("woke up late by" in warning for warning in warnings), warnings


class SlowWriter(PromptWriter):
    def text(self, index: int, planned: PlannedRequest) -> str:
        lose(0.5 if index == 3 else 0.0)
        return super().text(index, planned)


def test_a_prompt_that_takes_long_to_write_holds_up_none_before_it() -> None:
    server = ScriptedServer(lambda index, body: Answer.stream([1.0]))
    seen = run_virtually(observe(server, constant_plan(8, 0.1), writer=SlowWriter(0, TokenCost(0.0, 1.0))))
    assert [record.late for record in seen.records] == pytest.approx([0, 0, 0, 0.4, 0.3, 0.2, 0.1, 0])


def test_a_punctual_client_is_not_warned_about() -> None:
    seen = run_virtually(observe(ScriptedServer(lambda i, b: Answer.stream([0.1] * 3, inputs=5)), constant_plan(9)))
    assert len(seen.lags) > 100 and max(seen.lags) < 1e-9
    assert summarise(seen).warnings == ()


@pytest.mark.parametrize("users", [1, 3, 50])
def test_closed_loop_has_so_many_requests_on_their_way(users: int) -> None:
    server = ScriptedServer(lambda index, body: Answer.stream([0.5, 0.25]))
    shown: list[tuple[int, int]] = []
    seen = run_virtually(observe(server, constant_plan(12, 100.0), users=users, shown=shown))
    assert server.most == min(users, 12)
    assert [record.index for record in seen.records] == list(range(12))
    assert max(record.end for record in seen.records) == pytest.approx(0.75 * -(-12 // users))
    assert {round(record.ttft or 0, 9) for record in seen.records} == {0.5}
    assert shown == [(done, 12) for done in range(13)]


def test_429_is_retried_as_the_server_says_and_counted() -> None:
    busy = [Answer.error(429, "busy", **{"retry-after": "2"}), Answer.error(429, "busy")]
    answers = [*busy, Answer.stream([0.5])]
    seen = run_virtually(observe(ScriptedServer(lambda index, body: answers[index]), constant_plan(1)))
    (record,) = seen.records
    assert (record.outcome, record.retries) == ("finished", 2)
    assert record.ttft == pytest.approx(2 + 1 + 0.5)  # without the header: a second
    assert record.late == 0.0


def test_retry_after_may_be_a_date() -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    answers = [Answer.error(429, "busy", **{"retry-after": date}), Answer.stream([0.0])]
    seen = run_virtually(observe(ScriptedServer(lambda index, body: answers[index]), constant_plan(1)))
    assert 25 < seen.records[0].e2e <= 30


def test_endless_429_fails_after_the_retries() -> None:
    record = one(Answer.error(429, "busy"), target=Target("m", "completions", retries=3))
    assert (record.outcome, record.retries, record.failure) == ("failed", 3, Failure("http 429", "busy"))


FAILURES = {
    "status": (Answer.error(500, "out of pages"), Failure("http 500", "out of pages")),
    "text": (Answer(((0.0, b"<html>bad gateway"),), 502, {}), Failure("http 502", "<html>bad gateway")),
    "cut": (
        Answer(((0.5, token()), (0.5, token()))),
        Failure("cut off", "the stream ended after 2 chunks without [DONE]"),
    ),
    "lost": (
        Answer(((0.5, token()), (0.5, BREAK))),
        Failure("cut off", "the server closed the connection before the end of its answer"),
    ),
    "early": (
        Answer(((0.5, BREAK),)),
        Failure("connection", "the server closed the connection before the end of its answer"),
    ),
    "error": (
        Answer(((0.5, token()), (0.5, {"error": {"message": "too slow"}}))),
        Failure("error in the stream", "too slow"),
    ),
    "malformed": (
        Answer(((0.5, "{"),)),
        Failure("malformed event", "found '{', but expected a JSON object with choices, usage or error"),
    ),
    "list": (
        Answer(((0.5, "[1]"),)),
        Failure("malformed event", "found '[1]', but expected a JSON object with choices, usage or error"),
    ),
    "whole": (
        Answer(((0.0, b"{}"),), 200, {"content-type": "application/json"}),
        Failure("no stream", "the answer's content-type is 'application/json', but must be text/event-stream"),
    ),
    "silent": (Answer(delay=100.0), Failure("timeout", "not finished after 10 s")),
    "stalled": (Answer(((0.5, token()), (100.0, token()))), Failure("timeout", "not finished after 10 s")),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_told_apart_and_keep_what_came_before(case: str) -> None:
    answer, failure = FAILURES[case]
    record = one(answer, target=Target("m", "completions", timeout=10.0))
    assert (record.outcome, record.failure) == ("failed", failure)
    before = [step for _, step in answer.steps if step == token()]
    assert len(record.token_times) == (1 if case == "stalled" else len(before))
    assert record.end == pytest.approx(10.0 if failure.kind == "timeout" else sum(p for p, _ in answer.steps))


def test_a_connection_that_breaks_after_the_answer_is_no_failure() -> None:
    steps = ((0.5, token()), (0.0, used(1, 1)), (0.0, "[DONE]"), (0.3, BREAK))
    record = one(Answer(steps))
    assert (record.outcome, record.end) == ("finished", pytest.approx(0.5))


def test_a_server_that_is_gone_fails_each_request() -> None:
    class Gone(ScriptedServer):
        async def listen(self, path: str) -> None:
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(path)

    seen = run_virtually(observe(Gone(lambda index, body: Answer()), constant_plan(3)))
    assert [record.failure for record in seen.records] == [Failure("connection", "Connection refused")] * 3
    assert summarise(seen).errors[0].count == 3


def test_the_body_of_a_request() -> None:
    server = ScriptedServer(lambda index, body: Answer.stream([0.1]))
    run_virtually(observe(server, constant_plan(1), target=Target("name", "chat", {"temperature": 0, "top_k": 5})))
    (body,) = server.bodies
    ((message,),) = (body.pop("messages"),)
    assert message["role"] == "user" and len(message["content"].split()) == 5
    assert body == {
        "model": "name",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "top_k": 5,
    }


ANSWERS = (
    Answer.stream([0.3, 0.2, 0.2]),
    Answer.stream([2.0]),
    Answer.error(500, "no"),
    Answer.error(429, "busy", **{"retry-after": "1"}),
    Answer(((0.5, token()),), headers=STREAM),
    Answer(delay=50.0),
)


@given(
    kinds=st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=12),
    gaps=st.lists(st.floats(0, 2), min_size=12, max_size=12),
    users=st.none() | st.integers(1, 4),
    stop_at=st.none() | st.floats(0, 15),
)
def test_nothing_is_lost(kinds: list[Answer], gaps: list[float], users: int | None, stop_at: float | None) -> None:
    """planned = sent + not sent, sent = finished + failed + cancelled, and every record is in order."""
    plan = [PlannedRequest(sum(gaps[:i]), 1 + i, 2) for i in range(len(kinds))]
    server = ScriptedServer(lambda index, body: kinds[len(body["prompt"].split()) - 1])
    target = Target("m", "completions", timeout=10.0, retries=2)
    seen = run_virtually(observe(server, plan, users=users, stop_at=stop_at, target=target))
    summary = summarise(seen)
    assert summary.planned == len(kinds) == summary.sent + summary.unsent
    assert summary.sent == summary.finished + summary.failed + summary.cancelled == len(seen.records)
    assert seen.interrupted or summary.unsent == summary.cancelled == 0
    assert len(Counter(record.index for record in seen.records)) == len(seen.records)
    for record in seen.records:
        assert abs(record.late) < 1e-8  # asyncio's timers are exact to a nanosecond
        order = (record.sent, *record.token_times, record.end)
        assert list(order) == sorted(order)
        assert users is not None or record.arrival == plan[record.index].arrival
        assert (record.failure is not None) == (record.outcome == "failed")
        finishes = kinds[record.index] in ANSWERS[:2]
        assert record.outcome in ({"finished", "cancelled"} if finishes else {"failed", "cancelled"})


@given(
    events=st.lists(
        st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), min_size=1, max_size=3),
        max_size=5,
    ),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(1, 12), min_size=1),
    noise=st.sampled_from(["", ": a comment", "event: message", "id"]),
)
def test_events_however_they_are_cut(events: list[list[str]], newline: str, cuts: list[int], noise: str) -> None:
    """Whatever the ends of lines and the sizes of chunks, the data of the events comes out."""
    blocks = [[*([noise] if noise else []), *(f"data: {line}" for line in event), ""] for event in events]
    stream = "".join(line + newline for block in blocks for line in block).encode()
    reader = EventReader()
    found: list[str] = []
    turn = 0
    while stream:
        size = cuts[turn % len(cuts)]
        found += reader.feed(stream[:size])
        stream, turn = stream[size:], turn + 1
    assert found == ["\n".join(event) for event in events]
