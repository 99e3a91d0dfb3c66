"""Sampling: the distribution that was asked for, and a result that depends on nothing but the request."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.core import BatchItem, SamplingParams
from serving.errors import RequestError
from serving.sampling import sample

VOCABULARY = 12


def item(draw: int = 0, **params) -> BatchItem:
    return BatchItem("r", (1,), 0, (0,), SamplingParams(**params), draw)


def chosen(logits: torch.Tensor, items: list[BatchItem]) -> list[int]:
    return [token.token_id for token in sample(logits, items) if token is not None]


def random_logits(rows: int, key: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(key).normal(0, 1.5, (rows, VOCABULARY)).astype(np.float32))


def distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """By the definition, one token at a time."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    allowed = order[: top_k or None]
    mass = sum(weights[i] for i in allowed)
    kept, gathered = [], 0.0
    for i in allowed:
        if gathered >= top_p:
            break
        kept.append(i)
        gathered += weights[i] / mass
    total = sum(weights[i] for i in kept)
    return np.array([weights[i] / total if i in kept else 0.0 for i in range(len(logits))])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.7, 0, 0.8), (1.6, 4, 1), (1.0, 5, 0.6), (2.0, 1, 1)]
)
def test_frequencies_are_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits, draws = random_logits(1), 4000
    items = [item(draw, temperature=temperature, top_k=top_k, top_p=top_p, seed=5) for draw in range(draws)]
    counts = np.bincount(chosen(logits.expand(draws, -1), items), minlength=VOCABULARY)
    expected = distribution(logits[0].tolist(), temperature, top_k, top_p)
    assert np.all(counts[expected == 0] == 0)
    # Four standard deviations of a binomial, with fixed seeds: no luck involved.
    assert np.all(np.abs(counts - draws * expected) <= 4 * np.sqrt(draws * expected * (1 - expected)) + 1e-9)


rows = st.lists(
    st.builds(
        item,
        draw=st.integers(0, 1000),
        temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        top_k=st.integers(0, VOCABULARY + 3),
        top_p=st.just(1.0) | st.floats(0.01, 1.0),
        seed=st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=6,
)


@given(rows, st.integers(0, 100))
def test_company_does_not_matter(items: list[BatchItem], key: int) -> None:
    logits = random_logits(len(items), key)
    together = chosen(logits, items)
    alone = [chosen(logits[row : row + 1], [items[row]])[0] for row in range(len(items))]
    assert together == alone


def test_greedy_breaks_ties_the_same_way_alone_and_in_company() -> None:
    tied = torch.zeros(1, VOCABULARY)
    assert chosen(tied, [item(temperature=0)]) == chosen(tied.expand(3, -1), [item(temperature=0)] * 3)[:1]


def test_a_row_of_nan_harms_no_other() -> None:
    logits = random_logits(3)
    clean = sample(logits, [item(seed=1), item(seed=2), item(seed=3)])
    for temperature, bad in itertools.product((0.0, 1.0), (math.nan, math.inf)):
        logits[1, 4] = bad
        tokens = sample(logits, [item(seed=1), item(seed=2, temperature=temperature), item(seed=3)])
        assert tokens == (clean[0], None, clean[2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_models_own(temperature: float) -> None:
    logits = random_logits(3)
    expected = torch.log_softmax(logits.double(), -1)
    tokens = sample(
        logits, [item(temperature=temperature), item(logprobs=0), item(logprobs=3, temperature=temperature)]
    )
    assert [token is not None and token.logprobs is None for token in tokens] == [True, False, False]
    for row, count in ((1, 0), (2, 3)):
        token = tokens[row]
        assert token.logprobs.logprob == pytest.approx(expected[row, token.token_id].item(), abs=1e-6)
        best = sorted(range(VOCABULARY), key=lambda i: -expected[row, i])[:count]
        assert [token_id for token_id, _ in token.logprobs.top] == best
        assert [value for _, value in token.logprobs.top] == pytest.approx(expected[row, best].tolist(), abs=1e-6)


def test_tokens_that_are_ruled_out_are_never_chosen() -> None:
    logits = torch.full((64, VOCABULARY), -math.inf)
    logits[:, 3::4] = 0.0
    assert set(chosen(logits, [item(draw) for draw in range(64)])) == {3, 7, 11}
    logits[5] = -math.inf
    assert sample(logits, [item(draw) for draw in range(64)])[5] is None


def test_min_p() -> None:
    logits = torch.linspace(0, 2.2, VOCABULARY).expand(200, -1)
    kept = {i for i in range(VOCABULARY) if math.exp(logits[0, i] - logits[0, -1]) >= 0.5}
    assert set(chosen(logits, [item(draw, min_p=0.5) for draw in range(200)])) == kept


def test_every_seed_and_draw_is_its_own() -> None:
    logits = torch.zeros(1, 4096)
    items = [item(draw, seed=seed) for draw in range(8) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    found = chosen(logits.expand(len(items), -1), items)
    assert len(set(found)) >= len(items) - 3
    assert found == chosen(logits.expand(len(items), -1), items)


def test_no_rows_are_no_tokens() -> None:
    assert sample(torch.empty(0, VOCABULARY), []) == ()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1, but must be between 0 and 2"),
        ({"temperature": math.nan}, "temperature is nan, but must be between 0 and 2"),
        ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1, but must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p is 1.5, but must be between 0 and 1"),
        ({"top_k": -1}, "top_k is -1, but must be at least 1, or 0 for no limit"),
        ({"seed": 2**64}, "seed is 18446744073709551616, but must be between 0 and 2^64 - 1"),
        ({"stop": ("a", "")}, "stop is ['a', ''], but must be at most 16 strings of 1 to 256 characters"),
        ({"stop": ("a" * 257,)}, f"stop is ['{'a' * 257}'], but must be at most 16 strings of 1 to 256 characters"),
        ({"stop": ("a",) * 17}, f"stop is {['a'] * 17}, but must be at most 16 strings of 1 to 256 characters"),
        ({"logprobs": 21}, "logprobs is 21, but must be between 0 and 20"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert str(caught.value) == message
    assert caught.value.param == next(iter(params))
