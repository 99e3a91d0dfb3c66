"""Guessed tokens change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_fakes import VOCABULARY, FakeRunner, FakeVocabulary, ManualClock, reference_answer
from tiny_llama import CPU

from serving.config import EngineConfig
from serving.core import Batch, BatchItem, Request, SampledToken, SamplingParams
from serving.engine import Engine
from serving.kernels import default_kernels
from serving.loader import Checkpoint
from serving.model import load_model
from serving.runner import TorchRunner

PAGE = 16


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(temperature=1.5, seed=3, logprobs=2)])
def test_what_agrees_is_kept_and_one_token_more(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    """Wherever the guesses begin to be wrong, with another sequence in front and one behind."""
    monkeypatch.delenv("TILUS_DEVICE", raising=False)
    model = load_model(tiny_checkpoint, default_kernels(invariant=True), CPU)
    runner, prompt = TorchRunner(model, 6, PAGE, CPU), tuple(np.random.default_rng(0).integers(0, 256, 9).tolist())

    def step(*items: BatchItem) -> list[tuple[SampledToken, ...] | None]:
        return list(runner.launch(Batch(items))().tokens)

    def item(tokens: Sequence[int], start: int, draw: int, num_drafts: int = 0) -> BatchItem:
        return BatchItem("r", tuple(tokens), start, (4, 1), params, draw, num_drafts=num_drafts)

    plain: list[SampledToken] = []
    tokens, start = list(prompt), 0
    for draw in range(5):
        (found,) = step(item(tokens[start:], start, draw))
        assert found is not None and len(found) == 1
        plain.append(found[0])
        start = len(tokens)
        tokens.append(found[0].token_id)
    other = BatchItem("other", (7, 8, 9), 0, (0,), params, 0)
    (alone,) = step(other)
    answer = [token.token_id for token in plain]
    for right in range(4):
        guesses = answer[1:4] if right == 3 else [*answer[1 : right + 1], (answer[right + 1] + 1) % 256, 5][:3]
        drafted = item([answer[0], *guesses], len(prompt), 1, len(guesses))
        assert step(other, drafted, other._replace(request_id="third", pages=(3,))) == [
            alone,
            tuple(plain[1 : right + 2]),
            alone,
        ]


@given(
    prompts=st.lists(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=8), min_size=1, max_size=4),
    max_tokens=st.integers(1, 12),
    key=st.integers(0, 1000),
    overlap=st.booleans(),
)
def test_answers_are_those_without_guesses(prompts: list[list[int]], max_tokens: int, key: int, overlap: bool) -> None:
    """Guesses of any number and quality, for some sequences in some steps; also where an answer ends among them."""
    runner, luck = FakeRunner(3, lazy=True), random.Random(key)
    config = EngineConfig(64, 40, page_size=3, max_batch=4, max_step_tokens=30, overlap=overlap)
    engine = Engine(runner, FakeVocabulary(), config, ManualClock())
    schedule = engine.scheduler.schedule

    def guessing() -> Batch:
        return Batch(tuple(guessed(item) for item in schedule().items))

    def guessed(item: BatchItem) -> BatchItem:
        if item.params is None or item.token_ids[-1] < 0 or luck.random() < 0.3:
            return item
        seq = next(seq for seq in engine.scheduler.running if seq.id == item.request_id)
        truth = reference_answer(seq.tokens, 4, ignore_eos=True)
        guesses = tuple(token if luck.random() < 0.7 else 63 for token in truth[: luck.randint(0, 4)])
        assert engine.pages.reserve(item.request_id, item.kv_len + len(guesses))
        pages = engine.pages.table(item.request_id)
        return item._replace(token_ids=item.token_ids + guesses, pages=pages, num_drafts=len(guesses))

    engine.scheduler.schedule = guessing
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0)))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
        engine.check()
    for index, prompt in enumerate(prompts):
        assert found[str(index)] == reference_answer(prompt, max_tokens)
    assert engine.pages.num_free == 64
