"""Drafts change how many steps an answer takes, and nothing else: on exact fakes, by chance, and on a model."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_fakes import FakeRunner, FakeVocabulary, ManualClock, next_token, reference_answer
from test_overlap import PAGE, request, run
from tiny_llama import CPU
from torch_kernels import TorchKernels

from serving import core
from serving.config import EngineConfig
from serving.core import UNKNOWN, Batch, BatchItem, Request, SampledToken, SamplingParams, StepOutput
from serving.engine import Engine
from serving.kv import PageTables
from serving.loader import Checkpoint
from serving.model import load_model
from serving.runner import TorchRunner, _agreeing
from serving.speculation import Drafter, DraftModel, Drafts, PromptLookup

VOCABULARY = FakeVocabulary.vocab_size


class Guesses:
    """Right or wrong as a list says, over and over. Behind what is not known yet they are as if that were right."""

    ahead = True

    def __init__(self, right: Sequence[bool]) -> None:
        self._right = right
        self._count = 0

    def chances(self, seq: core.Sequence) -> tuple[float, float]:
        return 1.0, 1.0

    def propose(self, wanted: Mapping[core.Sequence, int]) -> Drafts:
        return {seq.id: self._of(self._completed(seq.tokens), count) for seq, count in wanted.items()}

    def _completed(self, tokens: Sequence[int]) -> list[int]:
        known: list[int] = []
        for token in tokens:
            known.append(next_token(known) if token == UNKNOWN else token)
        return known

    def _of(self, tokens: list[int], count: int) -> tuple[int, ...]:
        drafts: list[int] = []
        for _ in range(count):
            self._count += 1
            token = next_token(tokens + drafts)
            right = self._right[self._count % len(self._right)]
            drafts.append(token if right else (token + 1) % VOCABULARY)
        return tuple(drafts)

    def forget(self, request_id: str) -> None: ...


class Small(FakeRunner):
    """A model that mostly agrees with the fake model."""

    def __init__(self, page_size: int, wrong: int) -> None:
        super().__init__(page_size)
        self._wrong = wrong

    def execute(self, batch: Batch) -> StepOutput:
        found = super().execute(batch)
        tokens = [None if t is None else t[-1].token_id for t in found.tokens]
        changed = [t if t is None or t % 5 >= self._wrong else (t + 1) % VOCABULARY for t in tokens]
        self._last = {item.request_id: t for item, t in zip(batch.sampled, changed) if t is not None}
        return StepOutput(tuple(None if t is None else (SampledToken(t),) for t in changed))


def make_engine(runner: FakeRunner, drafter: Drafter | None, drafts: int, **limits: Any) -> Engine:
    given_limits = {"num_pages": 24, "max_model_len": 40, "max_batch": 4, "max_step_tokens": 12} | limits
    config = EngineConfig(
        **{"overlap": True, "admission": "aggressive"} | given_limits, page_size=PAGE, num_drafts=drafts
    )
    return Engine(runner, FakeVocabulary(), config, ManualClock(), drafter=drafter)


def draft_model(wrong: int, num_pages: int = 24) -> DraftModel:
    return DraftModel(Small(PAGE, wrong), PageTables(num_pages, PAGE), max_step_tokens=5)


drafters = st.one_of(
    st.lists(st.booleans(), min_size=1, max_size=7).map(Guesses),
    st.builds(PromptLookup, longest=st.integers(1, 3), shortest=st.just(1)),
    st.builds(draft_model, wrong=st.integers(0, 5), num_pages=st.integers(1, 24)),
)  # fmt: skip


@given(
    drafter=drafters,
    prompts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=15), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 14), min_size=6, max_size=6),
    drafts=st.integers(1, 8),
    num_pages=st.integers(14, 24),
    stop=st.sampled_from([(), ("!",), ("5", "A#")]),
    lazy=st.booleans(),
    way=st.sampled_from([{}, {"num_host_pages": 40}, {"schedule": "priority"}, {"overlap": False}]),
)
def test_answers_are_those_without_drafts(
    drafter: Drafter,
    prompts: list[list[int]],
    lengths: list[int],
    drafts: int,
    num_pages: int,
    stop: tuple[str, ...],
    lazy: bool,
    way: dict[str, Any],
) -> None:
    """The runner checks each read of the cache, and steps run as late as they may; sequences lose their pages, are swapped and
    computed again, others come later with a higher priority; the engine's integrity is checked after each step."""
    found: list[dict[str, list[int]]] = []
    for guesses in (None, drafter):
        engine = make_engine(FakeRunner(PAGE, lazy=lazy), guesses, drafts, num_pages=num_pages, **way)
        answers: dict[str, list[int]] = {}
        for index, (prompt, length) in enumerate(zip(prompts, lengths)):
            params = {"ignore_eos": index % 2 == 0, "presence_penalty": float(index == 3), "stop": stop}
            engine.add(dataclasses.replace(request(str(index), prompt, length, **params), priority=-index))
            for output in engine.step() if index % 2 else ():
                answers.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
        for name, tokens in run(engine).items():
            answers.setdefault(name, []).extend(tokens)
        found.append(answers)
        assert engine.pages.num_free == engine.pages.num_pages
    assert found[0] == found[1]
    if isinstance(drafter, DraftModel):
        assert not (drafter._cached or drafter._of or drafter._guessed)
        assert drafter._pages.num_free == drafter._pages.num_pages
    if isinstance(drafter, PromptLookup):
        assert not drafter._known


@pytest.mark.parametrize("drafter", [Guesses([True]), draft_model(0)], ids=["guesses", "model"])
def test_right_drafts_save_steps(drafter: Drafter) -> None:
    """A step for the prompt, then each has four tokens: three drafts and one more. None is guessed that could not be used."""
    runner = FakeRunner(PAGE)
    engine = make_engine(runner, drafter, 3)
    engine.add(request("r", [1, 2], 10, ignore_eos=True))
    assert run(engine) == {"r": reference_answer([1, 2], 10, ignore_eos=True)}
    assert [item.num_drafts for batch in runner.batches for item in batch.items] == [0, 3, 3, 0]


def test_drafts_are_within_the_limits_of_a_step() -> None:
    runner = FakeRunner(PAGE)
    engine = make_engine(runner, Guesses([True]), 8, max_step_tokens=12)
    for name in "abcd":
        engine.add(request(name, [1, ord(name) % 64], 20, ignore_eos=True))
    run(engine)
    assert max(sum(len(item.token_ids) for item in batch.items) for batch in runner.batches) == 12


def test_what_follows_the_same_tokens_is_proposed() -> None:
    def sequence(*tokens: int) -> core.Sequence:
        return core.Sequence(Request("r", tokens, SamplingParams()), 10, math.inf)

    lookup, seq = PromptLookup(3, 2), sequence(1, 2, 3, 9, 8, 7, 2, 3)
    assert lookup.propose({seq: 4}) == {"r": (9, 8, 7, 2)}
    seq.tokens += [9]
    assert lookup.propose({seq: 2}) == {"r": (8, 7)}
    seq.tokens += [5]
    assert lookup.propose({seq: 2}) == {}
    seq.tokens += [9, 8, 1, 3, 9]  # of equal runs the last one
    assert lookup.propose({seq: 1}) == {"r": (5,)}
    seq.tokens += [8, 7, 0, 9, 8, 1, 2, 3, 9]  # and a longer one before it, which has been followed since
    assert lookup.propose({seq: 3}) == {"r": (8, 7, 2)}
    assert PromptLookup(3, 2).propose({sequence(4, 4): 3}) == {}


@pytest.mark.parametrize(
    ("on_the_device", "expected", "certain"),
    [((), (3, 4, 5), 0), ((UNKNOWN,), (4, 5, 6), 1), ((3, 4, UNKNOWN), (6, 7, 1), 3), ((3, 9, UNKNOWN), (5, 6, 7), 2),
     ((9, 4, UNKNOWN), (4, 5, 6), 1)],
)  # fmt: skip
def test_proposals_are_behind_what_the_device_is_expected_to_give(
    on_the_device: tuple[int, ...], expected: tuple[int, ...], certain: int
) -> None:
    """Drafts there that differ from what is followed now end it, with one token more; else guesses would miss for ever."""
    seq = core.Sequence(Request("r", (1, 2, 3, 4, 5, 6, 7, 1, 2), SamplingParams()), 20, math.inf)
    seq.tokens += on_the_device
    seq.num_unknown = len(on_the_device)
    lookup = PromptLookup()
    assert lookup.propose({seq: 3}) == {"r": expected}
    first, each = lookup.chances(seq)
    assert first == pytest.approx(each ** (1 + certain)) and 0 < each < 1


class ByChance(FakeRunner):
    """Draws from a chain's probabilities by the request's seed and the number of the draw, as samplers do."""

    def __init__(self, chain: np.ndarray) -> None:
        super().__init__(PAGE)
        self._chain = np.cumsum(chain, axis=-1)

    def _run(self, item: BatchItem) -> tuple[SampledToken, ...] | None:
        if super()._run(item) is None or item.params is None:
            return None
        known = list(item.token_ids)
        drafts = known[len(known) - item.num_drafts :]
        tokens: list[int] = []
        for count in range(item.num_drafts + 1):
            uniform = np.random.Generator(np.random.Philox(key=item.params.seed, counter=item.draw + count)).random()
            tokens.append(int(np.searchsorted(self._chain[known[len(known) - item.num_drafts - 1 + count]], uniform)))
            if count < len(drafts) and drafts[count] != tokens[-1]:
                break
        return tuple(SampledToken(token) for token in tokens)


def test_the_distribution_is_the_models() -> None:
    """Of pairs of tokens behind the first; drafts are the most probable tokens, which would show. chi-square with 15 degrees of
    freedom exceeds 37.7 once in a thousand times; the seeds are fixed."""
    chain = np.random.default_rng(0).dirichlet(np.full(4, 0.7), 4)

    class Likeliest(Guesses):
        def _completed(self, tokens: Sequence[int]) -> list[int]:
            return [*tokens[:-1], *self._of(list(tokens[:-1]), 1)] if tokens[-1] == UNKNOWN else list(tokens)

        def _of(self, tokens: list[int], count: int) -> tuple[int, ...]:
            for _ in range(count):
                tokens.append(int(chain[tokens[-1]].argmax()))
            return tuple(tokens[-count:])

    runner = ByChance(chain)
    engine = make_engine(runner, Likeliest([True]), 2, num_pages=64)
    total = 1500
    for seed in range(total):
        engine.add(Request(str(seed), (0,), SamplingParams(max_tokens=4, seed=seed, ignore_eos=True)))
    answers = run_unchecked(engine)
    agreed = sum(item.num_drafts for batch in runner.batches for item in batch.items)
    assert agreed > total  # drafts were made
    pairs = Counter((tokens[1], tokens[2]) for tokens in answers.values())
    second = (chain[0] @ chain)[:, None] * chain
    statistic = sum(
        (pairs[i, j] - total * second[i, j]) ** 2 / (total * second[i, j]) for i in range(4) for j in range(4)
    )
    assert statistic < 37.7


def run_unchecked(engine: Engine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
    return found


@pytest.mark.exhaustive
def test_a_model_drafts_for_itself(tiny_checkpoint: Checkpoint) -> None:
    """All guesses of the same model are right, at any temperature: they are drawn with the random numbers that check them."""
    model = load_model(tiny_checkpoint, TorchKernels(), CPU)
    found: list[dict[str, list[SampledToken]]] = []
    counts: list[int] = []
    for drafts in (0, 3):
        runner = Counted(model, 40, 4, CPU, max_rows=16)
        drafter = DraftModel(TorchRunner(model, 40, 4, CPU), PageTables(40, 4), 32) if drafts else None
        config = EngineConfig(40, 64, page_size=4, max_batch=4, max_step_tokens=32, num_drafts=drafts)
        engine = Engine(runner, tiny_checkpoint.tokenizer, config, ManualClock(), drafter=drafter)
        run_of: dict[str, list[SampledToken]] = {}
        for index in range(3):
            params = SamplingParams(max_tokens=13, temperature=index / 2, seed=index, logprobs=2, ignore_eos=True)
            engine.add(Request(str(index), tuple(range(1 + 9 * index, 19 * index + 4)), params))
        while engine.has_work:
            for output in engine.step():
                run_of.setdefault(output.request_id, []).extend(output.tokens)
            engine.check()
        found.append(run_of)
        counts.append(runner.steps)
    for name, tokens in found[0].items():
        assert [t.token_id for t in tokens] == [t.token_id for t in found[1][name]]
        assert [t.logprobs.logprob for t in tokens if t.logprobs] == pytest.approx(
            [t.logprobs.logprob for t in found[1][name] if t.logprobs], abs=1e-3
        )
    assert 2 * counts[1] <= counts[0]


class Counted(TorchRunner):
    steps = 0

    def launch(self, batch: Batch):
        self.steps += 1
        return super().launch(batch)


@given(
    drafts=st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=5),
    seed=st.integers(0, 2**32 - 1),
    broken=st.floats(0, 0.3),
)
def test_the_runner_keeps_drafts_up_to_the_first_that_differs(
    drafts: list[list[int]], seed: int, broken: float
) -> None:
    """And what was sampled there, of rows that are in the order of the items; a row without numbers in front of that ends it."""
    rng = np.random.default_rng(seed)
    items = tuple(
        BatchItem(str(index), (7, *guesses), 0, (0,), SamplingParams(), 0, num_drafts=len(guesses))
        for index, guesses in enumerate(drafts)
    )
    rows = [[None if rng.random() < broken else int(rng.integers(3)) for _ in (0, *guesses)] for guesses in drafts]
    found = tuple(None if token is None else SampledToken(token) for mine in rows for token in mine)
    expected: list[list[int] | None] = []
    for guesses, mine in zip(drafts, rows):
        kept: list[int] | None = []
        for guess, token in zip([*guesses, None], mine):
            kept = None if token is None else [*kept, token]
            if kept is None or token != guess:
                break
        expected.append(kept)
    assert [t and [token.token_id for token in t] for t in _agreeing(items, found)] == expected
