"""Sampling in the server: what requests ask for reaches the kernels, and a result depends on nothing but its request."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

import tilus
from serving.core import BatchItem, SampledToken, SamplingParams
from serving.errors import RequestError
from serving.sampling import Sampler

VOCABULARY, MAX_ROWS = 20, 4000
CPU = torch.device("cpu")
SAMPLER = Sampler(VOCABULARY, MAX_ROWS, CPU)


def item(draw: int = 0, history: tuple[int, ...] = (), allowed: bytes | None = None, **params) -> BatchItem:
    return BatchItem("r", (1,), 0, (0,), SamplingParams(**params), draw, history, allowed)


def sampled(
    logits: torch.Tensor, items: list[BatchItem], sampler: Sampler = SAMPLER
) -> tuple[SampledToken | None, ...]:
    sampler.write(items)
    sampler.run(logits, len(items))
    return sampler.collect(items)()


def chosen(logits: torch.Tensor, items: list[BatchItem]) -> list[int]:
    return [-1 if token is None else token.token_id for token in sampled(logits, items)]


def random_logits(rows: int, key: int = 0) -> torch.Tensor:
    """Odd keys: with ties."""
    logits = np.random.default_rng(key).normal(0, 1.5, (rows, VOCABULARY))
    return torch.from_numpy((np.round(2 * logits) / 2 if key % 2 else logits).astype(np.float32))


def distribution(logits: list[float], params: SamplingParams) -> npt.NDArray[np.float64]:
    """By the definition, one token at a time."""
    weights = [math.exp(x / params.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    allowed = order[: params.top_k or None]
    mass = sum(weights[i] for i in allowed)
    kept, gathered = [], 0.0
    for i in allowed:
        if gathered >= params.top_p:
            break
        kept.append(i)
        gathered += weights[i] / mass
    kept = [i for i in kept if weights[i] >= params.min_p * max(weights)]
    total = sum(weights[i] for i in kept)
    return np.array([weights[i] / total if i in kept else 0.0 for i in range(len(logits))])


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.6, "top_k": 4},
        {"top_k": 5, "top_p": 0.6},
        {"min_p": 0.2},
    ],
    ids=str,
)
def test_frequencies_are_the_distribution(params: dict[str, float]) -> None:
    logits = random_logits(1)
    found = chosen(logits.expand(MAX_ROWS, -1).contiguous(), [item(draw, seed=5, **params) for draw in range(MAX_ROWS)])
    counts = np.bincount(found, minlength=VOCABULARY)
    expected = distribution(logits[0].tolist(), SamplingParams(**params))
    assert np.all(counts[expected == 0] == 0)
    # Four standard deviations of a binomial, with fixed seeds: no luck involved.
    assert np.all(np.abs(counts - MAX_ROWS * expected) <= 4 * np.sqrt(MAX_ROWS * expected * (1 - expected)) + 1e-9)


def edited(logits: list[float], it: BatchItem) -> list[float]:
    """What the documentation of the parameters says, one token at a time."""
    params, counts = it.params or SamplingParams(), Counter(it.history[len(it.history) - it.draw :])
    result = list(logits)
    for token in range(len(result)):
        if token in it.history:
            penalty = params.repetition_penalty
            result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
        result[token] -= counts[token] * params.frequency_penalty + (counts[token] > 0) * params.presence_penalty
        result[token] += sum(bias for other, bias in params.logit_bias if other == token)
        if it.allowed is not None and not it.allowed[token // 8] >> token % 8 & 1:
            result[token] = -math.inf
    return result


tokens = st.integers(0, VOCABULARY - 1)


@st.composite
def wishes(draw) -> BatchItem:
    history = tuple(draw(st.lists(tokens, max_size=12)))
    return item(
        draw(st.integers(0, len(history))), history, draw(st.none() | st.binary(min_size=3, max_size=3)),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.8])), seed=draw(st.integers(0, 2**64 - 1)),
        top_k=draw(st.integers(0, VOCABULARY + 3)), top_p=draw(st.just(1.0) | st.floats(0.01, 1.0)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])), presence_penalty=draw(st.sampled_from([0.0, 1.5, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])), logprobs=draw(st.sampled_from([None, None, 0, 3])),
        logit_bias=tuple(draw(st.lists(st.tuples(tokens, st.sampled_from([-100.0, 2.5])), max_size=3))),
    )  # fmt: skip


@given(st.lists(wishes(), min_size=1, max_size=5), st.integers(0, 100))
@settings(max_examples=40)
def test_what_requests_ask_for(items: list[BatchItem], key: int) -> None:
    """Greedy rows take the best of the edited logits, random ones a token of the kept set of these; None where nothing is
    allowed. Logarithms are those of the model. And company does not matter."""
    logits = random_logits(len(items), key)
    together = sampled(logits, items)
    assert torch.equal(logits, random_logits(len(items), key))
    log_softmax = torch.log_softmax(logits.double(), -1)
    for row, (it, token) in enumerate(zip(items, together)):
        wanted = edited(logits[row].tolist(), it)
        best = max(wanted)
        if token is None:
            assert best == -math.inf
            continue
        if it.params.temperature == 0:
            assert wanted[token.token_id] >= best - 1e-4
        else:
            assert wanted[token.token_id] > -math.inf
            assert sum(x > wanted[token.token_id] + 1e-4 for x in wanted) < (it.params.top_k or VOCABULARY)
        assert (token.logprobs is None) == (it.params.logprobs is None)
        if token.logprobs is not None:
            order = sorted(range(VOCABULARY), key=lambda i: -logits[row, i])[: it.params.logprobs]
            assert [token_id for token_id, _ in token.logprobs.top] == order
            found = [token.logprobs.logprob, *(value for _, value in token.logprobs.top)]
            expected = [log_softmax[row, i].item() for i in (token.token_id, *order)]
            assert found == pytest.approx(expected, abs=1e-5)
    assert [sampled(logits[row : row + 1], [it])[0] for row, it in enumerate(items)] == list(together)


def ranking(logits: torch.Tensor, history: tuple[int, ...], draw: int, **params) -> list[int]:
    """The tokens in the order of their logits as a request wants them, found by forbidding the best one again and again."""
    banned: list[int] = []
    for _ in range(VOCABULARY):
        bias = tuple((token, -100.0) for token in banned)
        banned += chosen(logits, [item(draw, history, temperature=0, logit_bias=bias, **params)])
    return banned


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits, history = random_logits(1), (3, 3, 0, 7, 19)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), logits.clone())[0]
    assert ranking(logits, history, 2, repetition_penalty=1.7) == expected.argsort(descending=True).tolist()


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 1.9}, {"frequency_penalty": 0.7}, {"presence_penalty": -1.2, "repetition_penalty": 0.6}],
    ids=str,
)
def test_tokens_of_the_answer_are_penalised(params: dict[str, float]) -> None:
    """The prompt's are not, except by repetition_penalty. Every token of the history changes its place by its penalty."""
    logits = torch.linspace(-2, 2, VOCABULARY)[None].contiguous()
    history = (18, 17, 18, 3, 14, 14, 14, 9, 18, 5)
    wanted = edited(logits[0].tolist(), item(6, history, **params))
    assert ranking(logits, history, 6, **params) == sorted(range(VOCABULARY), key=lambda i: -wanted[i])


def test_a_mask_forbids_whatever_the_bias() -> None:
    """Bits beyond the vocabulary mean nothing; a mask that is too short forbids the rest."""
    logits = random_logits(3)
    only_five = bytes([1 << 5, 0, 0xF0])
    items = [item(allowed=only_five, logit_bias=((6, 100.0),)), item(allowed=bytes(3)), item(allowed=b"\x80", seed=9)]
    assert chosen(logits, items) == [5, -1, 7]


def test_a_row_of_nan_harms_no_other() -> None:
    clean = sampled(random_logits(3), [item(seed=1), item(seed=2), item(seed=3)])
    for temperature, bad in itertools.product((0.0, 1.0), (math.nan, math.inf)):
        logits = random_logits(3)
        logits[1, 4] = bad
        assert sampled(logits, [item(seed=1), item(seed=2, temperature=temperature), item(seed=3)]) == (
            clean[0],
            None,
            clean[2],
        )


def test_draws_have_numbers_of_their_own() -> None:
    """Of equal logits: every draw and seed chooses anew, and the same ones the same."""
    items = [item(draw, seed=seed) for seed in range(20) for draw in range(40)]
    found = chosen(torch.zeros(800, VOCABULARY), items)
    assert found == chosen(torch.zeros(800, VOCABULARY), items)
    counts = np.bincount(found, minlength=VOCABULARY)
    assert np.all(np.abs(counts - 40) < 4 * math.sqrt(40))
    assert len({tuple(found[40 * seed : 40 * seed + 40]) for seed in range(20)}) == 20


def test_which_rows_are_plain() -> None:
    def is_plain(items: list[BatchItem]) -> bool:
        sampler = Sampler(VOCABULARY, 4, CPU)
        sampler.write(items)
        return sampler.is_plain

    assert is_plain([item(top_k=3, top_p=0.5, min_p=0.1), item(temperature=0), item()._replace(params=None)])
    for it in (
        item(logprobs=0), item(logit_bias=((1, 1.0),)), item(presence_penalty=1.0), item(frequency_penalty=1.0),
        item(repetition_penalty=1.1), item(allowed=b"\xff"),
    ):  # fmt: skip
        assert not is_plain([item(), it])


def test_a_captured_run_follows_what_is_written() -> None:
    """Rows without an item are greedy."""
    sampler, logits = Sampler(VOCABULARY, 4, CPU), torch.zeros(4, VOCABULARY)
    sampler.write([item()])
    with tilus.capture() as launches:
        where = sampler.run(logits, 4)
    for key in range(3):
        items = [item(key, seed=7), item(temperature=0.5, top_k=3, seed=key)]
        logits.copy_(random_logits(4, key))
        expected = chosen(logits[:2], items)
        sampler.write(items)
        launches.replay()
        assert [token.token_id for token in sampler.collect(items)()] == expected
        assert where[2:].tolist() == logits[2:].argmax(-1).tolist()
        sampler.write([])
        launches.replay()
        assert where.tolist() == logits.argmax(-1).tolist()


def test_no_rows_are_no_tokens() -> None:
    assert sampled(torch.empty(0, VOCABULARY), []) == ()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1, but must be between 0 and 2"),
        ({"temperature": math.nan}, "temperature is nan, but must be between 0 and 2"),
        ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1, but must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1, but must be at least 1, or 0 for no limit"),
        ({"min_p": 1.5}, "min_p is 1.5, but must be between 0 and 1"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5, but must be between -2 and 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty is -3.0, but must be between -2 and 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, but must be above 0 and at most 2"),
        (
            {"logit_bias": ((4, 101.0),)},
            "logit_bias is {4: 101.0}, but must be at most 1024 tokens with numbers between -100 and 100",
        ),
        ({"seed": 2**64}, "seed is 18446744073709551616, but must be between 0 and 2^64 - 1"),
        ({"stop": ("a", "")}, "stop is ['a', ''], but must be at most 16 strings of 1 to 256 characters"),
        ({"stop": ("a" * 257,)}, f"stop is ['{'a' * 198}, but must be at most 16 strings of 1 to 256 characters"),
        ({"stop": ("a",) * 17}, f"stop is {['a'] * 17}, but must be at most 16 strings of 1 to 256 characters"),
        ({"logprobs": 21}, "logprobs is 21, but must be between 0 and 20"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert str(caught.value) == message
    assert caught.value.param == next(iter(params))
