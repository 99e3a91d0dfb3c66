"""What requests ask of the logits: each rule against its definition, one token at a time, and rows apart from each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving_fakes import FakeRunner, FakeVocabulary, ManualClock, reference_answer

from serving.config import EngineConfig
from serving.core import BatchItem, Request, SamplingParams
from serving.engine import Engine
from serving.logits import adjusted
from serving.sampling import sample

SIZE = 12
TOKENS = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20)
PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "presence_penalty": st.sampled_from([0.0, -1.5, 0.75]),
        "frequency_penalty": st.sampled_from([0.0, -0.5, 1.25]),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.5]),
        "logit_bias": st.dictionaries(st.integers(0, SIZE - 1), st.sampled_from([-100.0, -1.0, 2.5])).map(
            lambda biases: tuple(biases.items())
        ),
    }
)


def item(params: SamplingParams, prompt: list[int], answer: list[int], allowed: frozenset[int] | None) -> BatchItem:
    bits = None if allowed is None else sum(1 << token for token in allowed).to_bytes(-(-SIZE // 8), "little")
    return BatchItem("r", (1,), 0, (0,), params, len(answer), (*prompt, *answer), bits)


def by_definition(
    logits: list[float], params: SamplingParams, prompt: list[int], answer: list[int], allowed: frozenset[int] | None
) -> list[float]:
    scores = list(logits)
    for token in range(SIZE):
        if token in prompt or token in answer:
            positive = scores[token] > 0
            scores[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
        scores[token] -= params.frequency_penalty * answer.count(token)
        scores[token] -= params.presence_penalty if token in answer else 0.0
        scores[token] += dict(params.logit_bias).get(token, 0.0)
        if allowed is not None and token not in allowed:
            scores[token] = -math.inf
    weights = [math.exp((score - max(scores)) / params.temperature) for score in scores]
    return [score if weight >= params.min_p - 1e-6 else -math.inf for score, weight in zip(scores, weights)]


@given(
    params=PARAMS,
    prompt=TOKENS,
    answer=TOKENS | st.just([]),
    allowed=st.none() | st.frozensets(st.integers(0, SIZE - 1), min_size=1),
    key=st.integers(0, 99),
)
def test_the_rules_are_their_definitions_and_rows_are_apart(params, prompt, answer, allowed, key: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(key).normal(0, 2, (3, SIZE)).astype(np.float32))
    before = logits.clone()
    asked, plain = SamplingParams(**params), SamplingParams()
    found = adjusted(
        logits, [item(plain, [0], [], None), item(asked, prompt, answer, allowed), item(plain, [0], [1], None)]
    )
    expected = by_definition(before[1].tolist(), asked, prompt, answer, allowed)
    assert np.allclose(found[1].numpy(), expected, rtol=1e-5, atol=1e-5)  # both round float32 sums of a few terms
    assert torch.equal(found[0], before[0]) and torch.equal(found[2], before[2])
    assert torch.equal(logits, before)


def test_who_asks_for_nothing_pays_nothing() -> None:
    logits = torch.zeros(2, SIZE)
    assert adjusted(logits, [item(SamplingParams(), [1], [2], None)] * 2) is logits


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("top_k", [0, 5])
def test_what_is_not_allowed_is_never_drawn(temperature: float, top_k: int) -> None:
    """Bits behind the mask's end count as not allowed, as where the model's rows are wider than the vocabulary."""
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (1, 20)).astype(np.float32)).expand(300, -1)
    items = [
        BatchItem(
            "r", (1,), 0, (0,), SamplingParams(temperature=temperature, top_k=top_k, seed=3), i, (1,), b"\x81\x08"
        )
        for i in range(300)
    ]
    drawn = {token.token_id for token in sample(logits, items)}
    assert drawn <= {0, 7, 11} and (temperature < 2 or drawn == {0, 7, 11})


def test_the_engine_tells_the_history_where_it_is_needed() -> None:
    """Also in chunks: a history is that of the whole sequence. Without penalties nobody copies it."""
    runner, config = (
        FakeRunner(page_size=4),
        EngineConfig(num_pages=64, max_model_len=100, page_size=4, max_step_tokens=40),
    )
    engine = Engine(runner, FakeVocabulary(), config, ManualClock())
    prompt = tuple(range(1, 60))
    engine.add(Request("penalised", prompt, SamplingParams(max_tokens=9, ignore_eos=True, presence_penalty=1.0)))
    engine.add(Request("plain", prompt, SamplingParams(max_tokens=9, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    answer = reference_answer(prompt, 9, ignore_eos=True)
    found = {
        name: [i for b in runner.batches for i in b.sampled if i.request_id == name] for name in ("penalised", "plain")
    }
    assert [i.history for i in found["penalised"]] == [(*prompt, *answer[:draw]) for draw in range(9)]
    assert [i.history for i in found["plain"]] == [()] * 9
