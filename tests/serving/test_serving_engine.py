"""Scheduler, pages and engine together, on a fake model whose memory notices every mistake.

The laws: every request finishes with the answer that it would get alone, whatever arrives, leaves or runs out of pages
around it; pages are conserved after each step; the limits of a step hold; the oldest request moves on.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import EOS, VOCABULARY, FakeRunner, FakeVocabulary, ManualClock, next_token, reference_answer

from serving.config import ADMISSION_POLICIES, EngineConfig
from serving.core import Batch, Request, RequestOutput, SamplingParams, StepOutput
from serving.engine import Engine
from serving.errors import RequestError
from tilus.errors import TilusError

LIMIT = ", but this model's context holds 20 tokens"


def make_engine(runner=None, clock=None, **limits) -> Engine:
    config = EngineConfig(**({"num_pages": 16, "max_model_len": 64, "page_size": 4, "max_step_tokens": 64} | limits))
    return Engine(runner or FakeRunner(config.page_size), FakeVocabulary(), config, clock or ManualClock())


def request(name: str, prompt: list[int], **params) -> Request:
    return Request(name, tuple(prompt), SamplingParams(temperature=0, **params))


def run(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token.token_id for output in outputs for token in output.tokens]


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    max_tokens: int
    abort_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 30),
        prompt=st.one_of(
            st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=20),
            st.integers(1, 20).map(lambda size: list(range(1, size + 1))),  # these share their beginnings
        ),
        max_tokens=st.integers(1, 12),
        abort_after=st.one_of(st.none(), st.integers(0, 15)),
    ),
    min_size=1,
    max_size=12,
)


@given(
    arrivals=arrivals,
    page_size=st.integers(1, 5),
    spare_pages=st.integers(0, 6),
    max_batch=st.integers(1, 6),
    spare_tokens=st.integers(0, 20),
    admission=st.sampled_from(ADMISSION_POLICIES),
    num_host_pages=st.integers(0, 12),
    prefill_first=st.booleans(),
    overlap=st.booleans(),
)
def test_every_request_gets_its_own_answer(
    arrivals: list[Arrival],
    page_size: int,
    spare_pages: int,
    max_batch: int,
    spare_tokens: int,
    admission: str,
    num_host_pages: int,
    prefill_first: bool,
    overlap: bool,
) -> None:
    num_pages = -(-32 // page_size) + spare_pages  # the longest request just fits
    runner = FakeRunner(page_size, lazy=overlap)
    engine = make_engine(
        runner, num_pages=num_pages, page_size=page_size, max_batch=max_batch, max_step_tokens=max_batch + spare_tokens,
        admission=admission, num_host_pages=num_host_pages, prefill_first=prefill_first, overlap=overlap,
    )  # fmt: skip
    outputs: dict[str, list[RequestOutput]] = {}
    aborted: set[str] = set()
    for step in range(5_000):
        for index, arrival in enumerate(arrivals):
            name = f"r{index}"
            if arrival.step == step:
                engine.add(request(name, arrival.prompt, max_tokens=arrival.max_tokens))
                outputs[name] = []
            if arrival.abort_after is not None and arrival.step + arrival.abort_after == step:
                aborted.add(name)
                engine.abort(name)
                engine.check()
        waits = any(seq.is_full for seq in engine.scheduler.running)  # for a step, and for pages
        oldest = engine.scheduler.running[0] if engine.scheduler.running and not waits else None
        before = oldest.num_computed if oldest else 0
        for output in engine.step():
            assert output.request_id not in aborted
            outputs[output.request_id].append(output)
        engine.check()
        order = [*engine.scheduler.running, *engine.scheduler.waiting]  # first come, first served
        assert [seq.id for seq in order] == [name for name in outputs if name in {seq.id for seq in order}]
        if oldest and not prefill_first:  # progress: the oldest request is never pushed back
            assert oldest.num_computed > before
        if step > 50 and not engine.has_work:
            break
    assert not engine.has_work
    assert engine.pages.num_free == num_pages and not engine.scheduler.host.owners()
    if admission == "conservative":
        assert engine.scheduler.num_recomputed == engine.scheduler.num_swapped == 0
    for index, arrival in enumerate(arrivals):
        name = f"r{index}"
        expected = reference_answer(arrival.prompt, arrival.max_tokens)
        found = tokens_of(outputs[name])
        if name in aborted:
            assert found == expected[: len(found)]
            continue
        assert found == expected
        assert [o.finish_reason for o in outputs[name][:-1]] == [None] * (len(outputs[name]) - 1)
        assert outputs[name][-1].finish_reason == ("stop" if expected[-1] == EOS else "length")
        assert "".join(o.text for o in outputs[name]) == FakeVocabulary().decode([t for t in expected if t != EOS])
    for batch in runner.batches:
        assert len(batch.items) <= max_batch
        assert 0 < sum(len(item.token_ids) for item in batch.items) <= max_batch + spare_tokens


@given(
    lengths=st.lists(st.tuples(st.integers(4, 8), st.integers(10, 12)), min_size=4, max_size=8),
    aborts=st.lists(st.tuples(st.integers(3, 25), st.integers(0, 7)), max_size=3),
    page_size=st.integers(1, 3),
    num_host_pages=st.integers(20, 40),
)
@settings(max_examples=25)
def test_what_was_on_the_host_comes_back(
    lengths: list[tuple[int, int]], aborts: list[tuple[int, int]], page_size: int, num_host_pages: int
) -> None:
    """Many answers in a cache for one or two: they lose their places time and again, and some leave while they have none."""
    engine = make_engine(
        num_pages=-(-24 // page_size), page_size=page_size, max_model_len=24, num_host_pages=num_host_pages,
        admission="aggressive", max_step_tokens=32,
    )  # fmt: skip
    tokens = {str(index): list[int]() for index in range(len(lengths))}
    for index, (size, answer) in enumerate(lengths):
        engine.add(request(str(index), [index + 1] * size, max_tokens=answer, ignore_eos=True))
    aborted, step = set[str](), 0
    while engine.has_work:
        for when, index in aborts:
            if when == step:
                aborted.add(str(index))
                engine.abort(str(index))
        for output in engine.step():
            tokens[output.request_id] += [token.token_id for token in output.tokens]
        engine.check()
        step += 1
    assert engine.scheduler.num_swapped > 0 or aborted
    assert not engine.scheduler.host.owners() and engine.pages.num_free == engine.pages.num_pages
    for index, (size, answer) in enumerate(lengths):
        expected = reference_answer([index + 1] * size, answer, ignore_eos=True)
        found = tokens[str(index)]
        assert found == expected or (str(index) in aborted and found == expected[: len(found)])


def test_prefill_and_decode_share_a_step() -> None:
    runner = FakeRunner(4)
    engine = make_engine(runner, max_step_tokens=8, max_batch=4)
    engine.add(request("first", [1, 2, 3], max_tokens=9, ignore_eos=True))
    engine.step()
    engine.add(request("second", list(range(1, 21)), max_tokens=2, ignore_eos=True))
    shares = []
    for _ in range(3):
        engine.step()
        shares.append({item.request_id: len(item.token_ids) for item in runner.batches[-1].items})
    assert shares == [{"first": 1, "second": 7}, {"first": 1, "second": 7}, {"first": 1, "second": 6}]


def test_preemption_takes_the_youngest_and_keeps_its_answer_and_its_turn() -> None:
    engine = make_engine(num_pages=4, page_size=4, max_model_len=16, max_batch=2, admission="aggressive")
    prompts = {"old": [1, 2, 3, 4], "young": [5, 6, 7, 8], "later": [9]}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, max_tokens=10, ignore_eos=True))
    young = list(engine.scheduler.waiting)[1]
    outputs: dict[str, list[RequestOutput]] = {name: [] for name in prompts}
    while young.num_preemptions == 0:
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert [seq.id for seq in engine.scheduler.running] == ["old"]
    assert [seq.id for seq in engine.scheduler.waiting] == ["young", "later"]
    for name, found in run(engine).items():
        outputs[name] += found
    for name, prompt in prompts.items():
        assert tokens_of(outputs[name]) == reference_answer(prompt, 10, ignore_eos=True)


def test_admission_waits_for_pages_in_order_of_arrival() -> None:
    engine = make_engine(num_pages=4, page_size=4, max_model_len=16)
    engine.add(request("runs", [1] * 12, max_tokens=2, ignore_eos=True))
    engine.add(request("waits", [2] * 8, max_tokens=1))
    engine.add(request("small", [3], max_tokens=1))
    engine.step()
    assert [seq.id for seq in engine.scheduler.waiting] == ["waits", "small"]  # small would fit, but came later
    assert set(run(engine)) == {"runs", "waits", "small"}


def test_stop_string_across_tokens_ends_the_answer() -> None:
    prompt, free = [9, 9, 1], reference_answer([9, 9, 1], 12, ignore_eos=True)
    text = FakeVocabulary().decode(free)
    stop = text[4:7]
    engine = make_engine()
    engine.add(request("r", prompt, max_tokens=12, ignore_eos=True, stop=(stop,)))
    (outputs,) = run(engine).values()
    assert "".join(o.text for o in outputs) == text[: text.index(stop)]
    assert outputs[-1].finish_reason == "stop"
    assert len(tokens_of(outputs)) == text.index(stop) + len(stop)
    assert engine.pages.num_free == engine.pages.num_pages


def test_text_held_for_a_stop_string_is_shown_at_the_end() -> None:
    prompt, free = [9, 9, 1], reference_answer([9, 9, 1], 5, ignore_eos=True)
    text = FakeVocabulary().decode(free)
    engine = make_engine()
    engine.add(request("r", prompt, max_tokens=5, ignore_eos=True, stop=(text[3:] + "never",)))
    (outputs,) = run(engine).values()
    assert [o.text for o in outputs] == [text[0], text[1], text[2], "", text[3:]]
    assert outputs[-1].finish_reason == "length"


def test_max_tokens_defaults_to_the_context() -> None:
    engine = make_engine(max_model_len=20, num_pages=8)
    engine.add(request("r", [1, 2, 3], ignore_eos=True))
    (outputs,) = run(engine).values()
    assert len(tokens_of(outputs)) == 17


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt has no tokens, but at least 1 is needed"),
        ([1, 64], 1, "the prompt contains token 64, but token ids go from 0 to 63"),
        ([1, -1], 1, "the prompt contains token -1, but token ids go from 0 to 63"),
        ([1, 2**70], 1, f"the prompt contains token {2**70}, but token ids go from 0 to 63"),
        ([1, -(2**31) - 1], 1, f"the prompt contains token {-(2**31) - 1}, but token ids go from 0 to 63"),
        ([1] * 21, 1, "the prompt has 21 tokens and max_tokens is 1, together 22" + LIMIT),
        ([1] * 5, 16, "the prompt has 5 tokens and max_tokens is 16, together 21" + LIMIT),
        (
            [1] * 20,
            None,
            "the prompt has 20 tokens" + LIMIT + "; it must leave room for at least 1 token",
        ),
    ],
)
def test_refuses_what_it_can_never_serve(prompt: list[int], max_tokens: int | None, message: str) -> None:
    engine = make_engine(num_pages=5, page_size=4, max_model_len=64)  # the pool is the tighter limit
    with pytest.raises(RequestError) as caught:
        engine.add(request("r", prompt, max_tokens=max_tokens))
    assert str(caught.value) == message
    assert not engine.has_work


def test_a_request_past_its_deadline_ends_and_others_go_on() -> None:
    clock = ManualClock()
    engine = make_engine(clock=clock, request_timeout=10.0, max_batch=1)
    engine.add(request("late", [1], max_tokens=30, ignore_eos=True))
    engine.step()
    clock.time = 5.0
    engine.add(request("waiting", [2], max_tokens=3, ignore_eos=True))
    clock.time = 11.0
    outputs = engine.step()
    assert outputs[0] == RequestOutput("late", "", (), "timeout")
    assert outputs[1].request_id == "waiting"
    engine.check()


def test_an_item_without_numbers_ends_alone() -> None:
    class Broken(FakeRunner):
        def execute(self, batch: Batch) -> StepOutput:
            output = super().execute(batch)
            broken = [item.request_id == "bad" for item in batch.sampled]
            return StepOutput(tuple(None if bad else tokens for bad, tokens in zip(broken, output.tokens)))

    engine = make_engine(Broken(4))
    engine.add(request("bad", [1], max_tokens=3))
    engine.add(request("good", [2], max_tokens=3, ignore_eos=True))
    outputs = run(engine)
    assert outputs["bad"] == [RequestOutput("bad", "", (), "error")]
    assert tokens_of(outputs["good"]) == reference_answer([2], 3, ignore_eos=True)


def test_random_numbers_follow_the_request_not_the_batch() -> None:
    """Each token's draw index is its index in the answer, also after preemption."""
    draws: dict[str, list[int]] = {}

    class Recording(FakeRunner):
        def execute(self, batch: Batch) -> StepOutput:
            for item in batch.sampled:
                draws.setdefault(item.request_id, []).append(item.draw)
            return super().execute(batch)

    engine = make_engine(Recording(4), num_pages=4, page_size=4, max_model_len=16, max_batch=2, admission="aggressive")
    for name in ("old", "young"):
        engine.add(request(name, [1, 2, 3, 4], max_tokens=10, ignore_eos=True))
    run(engine)
    assert draws == {"old": list(range(10)), "young": list(range(10))}


def test_mistakes_of_the_program_are_reported() -> None:
    class Short(FakeRunner):
        def execute(self, batch: Batch) -> StepOutput:
            return StepOutput(())

    engine = make_engine(Short(4))
    engine.add(request("r", [1], max_tokens=1))
    with pytest.raises(TilusError, match="request id 'r' is live already"):
        engine.add(request("r", [1], max_tokens=1))
    with pytest.raises(TilusError, match="the runner sampled 0 tokens, expected 1"):
        engine.step()


def test_check_sees_pages_without_a_sequence() -> None:
    engine = make_engine()
    engine.pages.reserve("ghost", 1)
    with pytest.raises(TilusError, match=r"pages belong to \['ghost'\], but \[\] are running"):
        engine.check()


def test_contradicting_limits_are_refused() -> None:
    with pytest.raises(TilusError, match="max_step_tokens is 8, but every one of max_batch = 16 sequences"):
        EngineConfig(num_pages=1, max_model_len=1, max_batch=16, max_step_tokens=8)
    with pytest.raises(TilusError, match="num_pages is 0, but must be positive"):
        EngineConfig(num_pages=0, max_model_len=1)


def test_abort_after_the_end_is_no_mistake() -> None:
    engine = make_engine()
    engine.add(request("r", [1], max_tokens=1))
    run(engine)
    engine.abort("r")
    engine.check()


def test_the_fake_model_ends_some_answers_itself() -> None:
    """Guards the tests above: both kinds of ending occur."""
    ends = {reference_answer([first, 3], 12)[-1] == EOS for first in range(1, VOCABULARY)}
    assert ends == {True, False}
    assert next_token([1]) != next_token([2])
