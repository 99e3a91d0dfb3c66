"""The overlapped loop gives what the plain one gives, token for token, on a runner that runs every step as late as it may.

That runner checks each read of the cache, so it also proves that pages may change hands while launched steps still write to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving_fakes import EOS, FakeRunner, FakeVocabulary, ManualClock, next_token, reference_answer
from tiny_llama import CPU

from serving.config import EngineConfig
from serving.core import UNKNOWN, Batch, FinishReason, Grammar, Request, SampledToken, SamplingParams, StepOutput
from serving.engine import Engine
from serving.errors import RequestError
from serving.kernels import default_kernels
from serving.loader import Checkpoint
from serving.model import load_model
from serving.runner import TorchRunner
from serving.step_shapes import GraphLimits
from tilus.errors import TilusError

PAGE = 3
TIMEOUT = 40.0


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool
    has_penalty: bool
    abort_after: int | None


Answer = tuple[list[int], str, FinishReason | None]


class EvenTokens:
    """A grammar that admits even tokens only."""

    def is_error(self) -> bool:
        return False

    def compute_bitmask(self) -> bytes:
        return bytes([0b01010101] * 8)

    def consume_token(self, token_id: int) -> bool:
        assert token_id % 2 == 0
        return True


def make_engine(runner: FakeRunner, *, overlap: bool, clock: ManualClock | None = None, **limits: int) -> Engine:
    given = {"num_pages": 16, "max_model_len": 30, "max_batch": 4, "max_step_tokens": 12} | limits
    config = EngineConfig(**given, page_size=PAGE, request_timeout=TIMEOUT, overlap=overlap, admission="aggressive")
    return Engine(runner, FakeVocabulary(), config, clock or ManualClock())


def answers(engine: Engine, arrivals: Sequence[Arrival], clock: ManualClock) -> dict[str, Answer]:
    """What each request got, with the integrity check after each step."""
    found: dict[str, Answer] = {}
    for step in range(2_000):
        for index, arrival in enumerate(arrivals):
            name = f"r{index}"
            if arrival.step == step:
                found[name] = [], "", None
                penalty = 0.5 if arrival.has_penalty else 0.0
                params = SamplingParams(
                    max_tokens=arrival.max_tokens, temperature=0, stop=arrival.stop, ignore_eos=arrival.ignore_eos,
                    presence_penalty=penalty,
                )  # fmt: skip
                engine.add(Request(name, arrival.prompt, params))
            if arrival.abort_after is not None and arrival.step + arrival.abort_after == step:
                engine.abort(name)
                engine.check()
        for output in engine.step():
            tokens, text, reason = found[output.request_id]
            assert reason is None, "nothing comes behind the end"
            found[output.request_id] = (
                tokens + [token.token_id for token in output.tokens], text + output.text, output.finish_reason
            )  # fmt: skip
        engine.check()
        clock.time += 0.5
        if step > 30 and not engine.has_work:
            assert engine.pages.num_free == engine.pages.num_pages
            return found
    raise AssertionError("the engine does not come to an end")


letters = st.integers(1, 3)  # few, so that prompts begin alike and share pages
stops = st.text(st.sampled_from([chr(32 + token) for token in range(0, 64, 5)]), min_size=1, max_size=2)
arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 25),
        prompt=st.lists(letters, min_size=1, max_size=14).map(tuple),
        max_tokens=st.integers(1, 12),
        stop=st.lists(stops, max_size=2).map(tuple),
        ignore_eos=st.booleans(),
        has_penalty=st.booleans(),
        abort_after=st.one_of(st.none(), st.integers(0, 15)),
    ),
    min_size=1,
    max_size=10,
)  # fmt: skip


@given(arrivals=arrivals, num_pages=st.integers(10, 16), max_batch=st.integers(1, 5), lazy=st.booleans())
def test_overlapped_is_plain(arrivals: list[Arrival], num_pages: int, max_batch: int, lazy: bool) -> None:
    """Also what ended by a timeout or an abort is a beginning of the plain answer."""
    limits, found = {"num_pages": num_pages, "max_batch": max_batch}, []
    for overlap in (False, True):
        clock = ManualClock()
        engine = make_engine(FakeRunner(PAGE, lazy=lazy and overlap), overlap=overlap, clock=clock, **limits)
        found.append(answers(engine, arrivals, clock))
    for index, arrival in enumerate(arrivals):
        (plain_tokens, plain_text, plain_reason), (tokens, text, reason) = (run[f"r{index}"] for run in found)
        if {plain_reason, reason} & {None, "timeout"}:
            expected = reference_answer(arrival.prompt, arrival.max_tokens, ignore_eos=arrival.ignore_eos)
            assert tokens == expected[: len(tokens)] and plain_tokens == expected[: len(plain_tokens)]
            assert arrival.abort_after is not None or "timeout" in (plain_reason, reason)
        else:
            assert (tokens, text, reason) == (plain_tokens, plain_text, plain_reason)


def request(name: str, prompt: Sequence[int], max_tokens: int, **params) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0, **params))


def run(engine: Engine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for _ in range(1_000):
        if not engine.has_work:
            return found
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
        engine.check()
    raise AssertionError("the engine does not come to an end")


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_waited_for() -> None:
    events: list[str] = []

    class Watched(FakeRunner):
        def launch(self, batch: Batch):
            number = len(self.batches)
            events.append(f"launch {number}")
            wait = super().launch(batch)

            def waits() -> StepOutput:
                events.append(f"wait {number}")
                return wait()

            return waits

    for overlap in (True, False):
        events.clear()
        engine = make_engine(Watched(PAGE, lazy=True), overlap=overlap)
        engine.add(request("r", [1], 3, ignore_eos=True))
        run(engine)
        late = ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "wait 2"]
        assert events == (late if overlap else sorted(late, key=lambda event: (event[-1], event)))


def test_ends_that_are_known_ahead_waste_no_row() -> None:
    runner = FakeRunner(PAGE, lazy=True)
    engine = make_engine(runner, overlap=True)
    lengths = {"a": 1, "b": 4, "c": 7}
    for name, length in lengths.items():
        engine.add(request(name, [1, 2], length, ignore_eos=True))
    run(engine)
    sampled = [item.request_id for batch in runner.batches for item in batch.sampled]
    assert {name: sampled.count(name) for name in lengths} == lengths


def test_the_place_of_one_that_ends_is_taken_at_once() -> None:
    runner = FakeRunner(PAGE, lazy=True)
    engine = make_engine(runner, overlap=True, max_batch=1)
    for name in ("a", "b"):
        engine.add(request(name, [1, 2], 2, ignore_eos=True))
    for _ in range(4):
        engine.step()
        engine.check()
    assert [[item.request_id for item in batch.items] for batch in runner.batches] == [["a"], ["a"], ["b"], ["b"]]


def test_pages_of_one_that_ends_are_waited_for() -> None:
    """Nobody loses pages for want of some that are free a step later."""
    engine = make_engine(FakeRunner(PAGE, lazy=True), overlap=True, num_pages=4)
    for name, length in (("ends", 2), ("goes on", 5)):
        engine.add(request(name, [1, 2, 3, 4, 5], length, ignore_eos=True))
    goes_on = next(seq for seq in engine.scheduler.waiting if seq.id == "goes on")
    expected = reference_answer([1, 2, 3, 4, 5], 5, ignore_eos=True)
    assert run(engine) == {"ends": expected[:2], "goes on": expected}
    assert goes_on.num_preemptions == 0


def test_an_end_that_is_not_known_costs_one_row() -> None:
    prompt = next((p, 3) for p in range(1, 64) if EOS in reference_answer([p, 3], 8)[1:7])
    expected = reference_answer(prompt, 8)
    runner = FakeRunner(PAGE, lazy=True)
    engine = make_engine(runner, overlap=True)
    engine.add(request("r", prompt, 8))
    assert run(engine) == {"r": expected}
    assert len(runner.batches) == len(expected) + 1
    assert runner.batches[-1].items[0].token_ids == (UNKNOWN,)


@pytest.mark.parametrize("params", [{"presence_penalty": 1.0}, {"grammar": Grammar("regex", "x")}])
def test_what_depends_on_the_tokens_before_waits_for_them(params: dict[str, object]) -> None:
    """And finds them in its history; the others beside it go on as they are."""
    config = EngineConfig(num_pages=16, max_model_len=30, page_size=PAGE, overlap=True)

    class Even(FakeRunner):
        def execute(self, batch: Batch) -> StepOutput:
            even = [None if t is None else (SampledToken(t[-1].token_id & ~1),) for t in super().execute(batch).tokens]
            self._last = {item.request_id: t[-1].token_id for item, t in zip(batch.sampled, even) if t is not None}
            return StepOutput(tuple(even))

    runner = Even(PAGE, lazy=True)
    engine = Engine(runner, FakeVocabulary(), config, ManualClock(), lambda grammar: EvenTokens())
    engine.add(request("careful", [1, 2], 6, ignore_eos="grammar" not in params, **params))
    engine.add(request("other", [5], 9, ignore_eos=True))
    found = run(engine)
    for batch in runner.batches:
        item = next((item for item in batch.items if item.request_id == "careful"), None)
        if item is not None:
            assert item.history == (1, 2, *found["careful"][: item.draw]) and UNKNOWN not in item.token_ids
            assert item.allowed == (EvenTokens().compute_bitmask() if "grammar" in params else None)
    assert len(found["careful"]) == 6 and len(found["other"]) == 9
    assert any(item.token_ids == (UNKNOWN,) for batch in runner.batches for item in batch.items), "later it runs ahead"


def test_a_grammar_without_a_matcher_is_refused() -> None:
    engine = make_engine(FakeRunner(PAGE), overlap=True)
    with pytest.raises(RequestError, match="this server has no grammars, but the answer must match one"):
        engine.add(request("r", [1], 1, grammar=Grammar("regex", "a")))


def test_a_name_that_is_used_again_gets_nothing_of_the_step_that_runs() -> None:
    engine = make_engine(FakeRunner(PAGE, lazy=True), overlap=True)
    engine.add(request("r", [1, 2], 5, ignore_eos=True))
    engine.step()
    engine.abort("r")
    engine.add(request("r", [9], 3, ignore_eos=True))
    engine.check()
    assert run(engine) == {"r": reference_answer([9], 3, ignore_eos=True)}


def test_a_sequence_without_numbers_ends_though_it_has_a_row_in_the_next_step() -> None:
    class Broken(FakeRunner):
        def execute(self, batch: Batch) -> StepOutput:
            found = zip(batch.sampled, super().execute(batch).tokens)
            return StepOutput(tuple(None if item.request_id == "bad" else tokens for item, tokens in found))

    engine = make_engine(Broken(PAGE, lazy=True), overlap=True)
    engine.add(request("bad", [1], 5))
    engine.add(request("good", [2], 5, ignore_eos=True))
    assert run(engine) == {"bad": [], "good": reference_answer([2], 5, ignore_eos=True)}


def test_check_sees_unknown_tokens_that_nothing_will_tell() -> None:
    engine = make_engine(FakeRunner(PAGE), overlap=True)
    engine.add(request("r", [1], 5, ignore_eos=True))
    engine.step()
    engine._launched = None
    with pytest.raises(TilusError, match="request 'r' has 1 unknown tokens, 1 by its own count"):
        engine.check()


def answers_of(checkpoint: Checkpoint, device: torch.device, *, overlap: bool) -> dict[str, list[SampledToken]]:
    """Greedy and random requests, some with logarithms of probabilities; prompts beside answers, and captured steps."""
    model = load_model(checkpoint, default_kernels(invariant=True), device)
    config = EngineConfig(20, 96, page_size=16, max_batch=3, max_step_tokens=24, overlap=overlap)
    runner = TorchRunner(model, 20, 16, device, max_rows=3, graphs=GraphLimits(3, 6, 24))
    engine, rng = Engine(runner, checkpoint.tokenizer, config, ManualClock()), np.random.default_rng(1)
    for index in range(6):
        prompt = tuple(rng.integers(0, 256, rng.integers(1, 40)).tolist())
        length, logprobs = int(rng.integers(1, 25)), 2 if index % 2 else None
        params = SamplingParams(length, temperature=index % 3 / 2, seed=index, logprobs=logprobs, ignore_eos=index > 3)
        engine.add(Request(str(index), prompt, params))
    found: dict[str, list[SampledToken]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.tokens)
        engine.check()
    return found


def test_the_model_gives_the_same_tokens(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILUS_DEVICE", raising=False)
    plain, overlapped = (answers_of(tiny_checkpoint, CPU, overlap=overlap) for overlap in (False, True))
    assert len(plain) == 6 and overlapped == plain


@pytest.mark.gpu
def test_the_model_gives_the_same_tokens_on_a_gpu(tiny_checkpoint: Checkpoint) -> None:
    plain, overlapped = (answers_of(tiny_checkpoint, torch.device("cuda"), overlap=way) for way in (False, True))
    assert len(plain) == 6 and overlapped == plain


def test_the_fake_model_is_a_function_of_all_tokens() -> None:
    """Guards the tests above."""
    assert len({next_token([first, 1]) for first in range(20)}) > 10
