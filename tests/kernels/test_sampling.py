"""Sampling against a definition by sorting in float64: the kept set, the distribution, and independence of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilus
from tilus import Tensor, TilusError, uint32
from tilus.kernels.philox import philox
from tilus.kernels.sampling import sample

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Params:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def arrays(params: list[Params]) -> dict[str, npt.NDArray]:
    return {
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([p.top_k for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "min_p": np.array([p.min_p for p in params], np.float32),
        "seeds": np.array([p.seed for p in params], np.uint64),
        "positions": np.array([p.position for p in params], np.uint32),
    }


def drawn(logits: npt.NDArray, params: list[Params], device: str) -> npt.NDArray:
    return sample(logits, **arrays(params), device=device)


def kept_set(logits: Logits, params: Params) -> npt.NDArray:
    """By sorting: what the filters keep one after the other, ties together. bool [V]."""
    scaled = logits.astype(np.float64) / params.temperature
    order = np.sort(scaled)[::-1]
    kept = scaled > -np.inf
    if 0 < params.top_k < len(scaled):
        kept &= scaled >= order[params.top_k - 1]
    if params.top_p < 1:
        values = np.sort(scaled[kept])[::-1]
        weights = np.exp(values - values[0])
        gathered = np.r_[0.0, np.cumsum(weights)] / weights.sum()
        above = gathered[np.searchsorted(-values, -scaled)]  # those before the first one that is equal
        kept &= above < np.float32(params.top_p)
    if params.min_p > 0:  # the same as a comparison of probabilities, which would round differences below 1e-16 away
        kept &= scaled >= scaled.max() + math.log(np.float32(params.min_p))
    return kept


def probabilities(logits: Logits, params: Params) -> npt.NDArray:
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max()) * kept_set(logits, params)
    return weights / weights.sum()


def uniforms(seeds: npt.NDArray[np.uint64], position: int, tokens: npt.NDArray) -> npt.NDArray:
    """Philox 4x32-10 by the paper, in integers of 64 bits: v of each seed and token, f64 [seeds, tokens]."""
    low = np.uint64(0xFFFFFFFF)
    key = [(seeds & low)[:, None], (seeds >> np.uint64(32))[:, None]]
    quads, places = np.unique(tokens // 4, return_inverse=True)
    x = [quads.astype(np.uint64)[None], np.full((1, 1), position, np.uint64), *np.zeros((2, 1, 1), np.uint64)]
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(b >> np.uint64(32)) ^ x[1] ^ key[0], b & low, (a >> np.uint64(32)) ^ x[3] ^ key[1], a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    words = np.stack(np.broadcast_arrays(*x), axis=-1)
    return (words[:, places, tokens % 4].astype(np.float64) + 0.5) / 2**32


def scores_of(logits: npt.NDArray, p: Params, seeds: npt.NDArray[np.uint64], tokens: npt.NDArray) -> npt.NDArray:
    """What decides the race, f64 [seeds, tokens]."""
    return logits[tokens].astype(np.float64) / p.temperature - np.log(-np.log1p(-uniforms(seeds, p.position, tokens)))


def check_winner(logits: npt.NDArray, p: Params, token: int) -> None:
    """The winner of the race over exactly the kept set; another one only where two are as close as f32 can tell."""
    kept = np.flatnonzero(kept_set(logits, p))
    assert token in kept
    scores = scores_of(logits, p, np.array([p.seed], np.uint64), kept)[0]
    assert scores[kept == token] >= scores.max() - 2e-5


SEEDS = np.random.default_rng(20).integers(0, 2**64, 600, np.uint64)


def telling(logits: npt.NDArray, p: Params) -> list[Params]:
    """The same filters with seeds that tell a set from its neighbours: the least token that is kept wins the race over the kept
    ones, or the best one that is dropped would win if it were kept."""
    if p.temperature == 0:
        return []
    kept = kept_set(logits, p)
    least = np.flatnonzero(kept & (logits == logits[kept].min()))
    dropped = logits[~kept & np.isfinite(logits)]
    best = np.flatnonzero(~kept & (logits == dropped.max())) if len(dropped) else np.zeros(0, np.int64)
    of_kept = scores_of(logits, p, SEEDS, np.flatnonzero(kept)).max(1)
    seeds = [*SEEDS[scores_of(logits, p, SEEDS, least).max(1) >= of_kept][:2]]
    if len(best):
        seeds += [*SEEDS[scores_of(logits, p, SEEDS, best).max(1) > of_kept][:2]]
    return [replace(p, seed=int(seed)) for seed in seeds]


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("reference", marks=pytest.mark.exhaustive),
        pytest.param("emulator", marks=pytest.mark.exhaustive),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def where(request: pytest.FixtureRequest) -> str:
    """`test_all_executions_agree` is about the others, in the time that there is."""
    return request.param


ROWS = {
    "spread": np.random.default_rng(0).normal(0, 2, 103),
    "peaked": np.r_[np.zeros(39), 50.0],
    "equal": np.full(77, -3.25),
    "ties": np.random.default_rng(1).integers(-2, 3, 90) * 0.5,
    "masked": np.where(np.arange(64) % 3 == 0, np.random.default_rng(2).normal(0, 1, 64), -np.inf),
    "one left": np.where(np.arange(50) == 17, -80.0, -np.inf),
    "tiny": np.array([1e-30, -1e-30, 0.0, -0.0, 2e-30]),
    "geometric": -np.arange(48) * math.log(2),
    "huge": np.array([3e38, -3e38, 1.0, 2.9e38]),
}
FILTERS = [
    Params(), Params(0.5), Params(top_k=1), Params(top_k=3), Params(top_k=40), Params(top_k=10**6), Params(top_p=0.9),
    Params(top_p=0.3), Params(top_p=1e-6), Params(top_p=0.999), Params(min_p=0.1), Params(min_p=1.0), Params(2.0, 20, 0.83, 0.07),
    Params(0.7, 7, 0.61), Params(1.3, 30, 1.0, 0.2), Params(temperature=0.0), Params(temperature=0.0, top_k=5, top_p=0.4),
]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("row", ROWS)
def test_every_filter_keeps_exactly_what_sorting_keeps(row: str, where: str) -> None:
    """Each token wins the race over the kept set, also where the least kept one wins or the best dropped one would."""
    logits = ROWS[row].astype(np.float32)
    params = [replace(p, seed=2**40 + 977 * i, position=i % 5) for p in FILTERS for i in range(3)]
    params += [telling_p for p in FILTERS for telling_p in telling(logits, p)]
    found = drawn(np.tile(logits, (len(params), 1)), params, where)
    for p, token in zip(params, found):
        if p.temperature == 0:
            assert token == np.argmax(logits)
        else:
            check_winner(logits, p, int(token))


def test_seeds_tell_kept_sets_apart() -> None:
    """Most filters of a row of many different logits have seeds for both sides of their borders."""
    logits = ROWS["spread"].astype(np.float32)
    assert sum(len(telling(logits, p)) == 4 for p in FILTERS) >= 9


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_types(dtype: torch.dtype, where: str) -> None:
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 3, (len(FILTERS), 331)).astype(np.float32)).to(dtype)
    params = [replace(p, seed=5 + i) for i, p in enumerate(FILTERS)]
    found = sample(logits, **{k: torch.from_numpy(v) for k, v in arrays(params).items()}, device=where)
    for row, p, token in zip(logits.float().numpy(), params, found.tolist()):
        if p.temperature == 0:
            assert token == np.argmax(row)
        else:
            check_winner(row, p, token)


@pytest.mark.parametrize("p", [Params(), Params(0.8, 6), Params(1.5, 0, 0.8), Params(1.0, 9, 0.9, 0.05)], ids=str)
def test_frequencies_are_the_distribution(p: Params) -> None:
    """Chi-square with fixed seeds: over 4.5 standard deviations from its mean has chance 1e-5 or so."""
    logits, draws = np.random.default_rng(8).normal(0, 1.2, 24).astype(np.float32), 4000
    params = [replace(p, seed=i // 7, position=i % 7) for i in range(draws)]
    found = drawn(np.tile(logits, (draws, 1)), params, "cpu")
    counts, expected = np.bincount(found, minlength=24), probabilities(logits, p) * draws
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    freedom = kept.sum() - 1
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom) + 4


def test_a_row_is_drawn_alike_alone_and_in_company(where: str) -> None:
    logits = np.random.default_rng(4).normal(0, 1, (len(FILTERS), 200)).astype(np.float32)
    params = [replace(p, seed=7**i, position=3 * i) for i, p in enumerate(FILTERS)]
    together = drawn(logits, params, where)
    assert [drawn(logits[i : i + 1], params[i : i + 1], where)[0] for i in range(len(params))] == together.tolist()
    assert drawn(logits[::-1].copy(), params[::-1], where)[::-1].tolist() == together.tolist()


@pytest.mark.parametrize("size", [4096, 4097, 9000])
def test_rows_of_several_runs(size: int, where: str) -> None:
    """Whatever runs the best tokens are in; the lowest of equal ones is the greedy choice."""
    logits = np.round(np.random.default_rng(size).normal(0, 2, (10, size)), 2).astype(np.float32)
    logits[0, [size - 1, 4000]] = 11.0
    logits[1, size - 1] = 12.0
    filters = [
        Params(0),
        Params(0),
        Params(0.7, 20, 0.9),
        Params(1, 200),
        Params(1, 0, 0.6),
        Params(1, 0, 1, 0.2),
        Params(),
    ]
    params = [
        replace(p, seed=71 * i)
        for i, p in enumerate([*filters, Params(1.4, 3000, 0.99), Params(0.3, 0, 0.2), Params(1, 5)])
    ]
    found = drawn(logits, params, where)
    assert found[:2].tolist() == [4000, size - 1]
    for values, p, token in zip(logits[2:], params[2:], found[2:]):
        check_winner(values, p, int(token))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_numbers_harm_no_other(bad: float, where: str) -> None:
    logits = np.random.default_rng(9).normal(0, 1, (4, 60)).astype(np.float32)
    params = [Params(seed=1), Params(0.9, 5, 0.9, seed=2), Params(0), Params(1.1, 0, 0.5, seed=4)]
    clean = drawn(logits, params, where)
    for row in (1, 2):
        broken = logits.copy()
        broken[row, 33] = bad
        assert drawn(broken, params, where).tolist() == [-1 if i == row else token for i, token in enumerate(clean)]
    logits[:] = -np.inf
    assert (drawn(logits, params, where) == -1).all()


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(FILTERS[:-2]),
    st.integers(2, 300),
    st.booleans(),
)
@settings(max_examples=15)
def test_any_row(seed: int, position: int, p: Params, size: int, coarse: bool) -> None:
    values = np.random.default_rng(seed % 1000).normal(0, 2, size)
    logits = (np.round(values * 4) / 4 if coarse else values).astype(np.float32)
    p = replace(p, seed=seed, position=position)
    token, again = drawn(np.stack([logits, logits]), [p, p], "cpu").tolist()
    check_winner(logits, p, token)
    assert again == token


@given(
    st.integers(0, 10**6), st.integers(2, 400), st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([0.0, 0.25, 2.0])
)
@settings(max_examples=20)
def test_kept_sets_of_any_row(seed: int, size: int, spread: float, step: float) -> None:
    """A step makes ties."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, spread, size)
    logits = (np.round(values / step) * step if step else values).astype(np.float32)
    counts, shares = generator.integers(0, size + 2, 3), generator.uniform(0.05, 1, 3)
    filters = [Params(t, int(k), p, m) for t, k, p, m in zip([0.3, 1, 2], counts, shares, [0, 0.02, 0.3])]
    params = [it for p in filters for it in [replace(p, seed=seed), *telling(logits, p)]]
    for p, token in zip(params, drawn(np.tile(logits, (len(params), 1)), params, "cpu")):
        check_winner(logits, p, int(token))


@pytest.mark.parametrize("size", [32000, 151936, 2**18])
def test_large_vocabularies(size: int, where: str) -> None:
    """Of small differences; borders of top_p that f32 cannot tell from others are not among these."""
    logits = np.random.default_rng(size).normal(0, 2, size).astype(np.float32)
    filters = [Params(1, 50), Params(0.7, 1000, 0.9), Params(0.6, 0, 0.3), Params(1, 0, 1, 0.05), Params(0.9)]
    params = [it for p in filters for it in [replace(p, seed=size), *(telling(logits, p) if p.top_k == 50 else [])]]
    params.append(Params(0))
    *found, greedy = drawn(np.tile(logits, (len(params), 1)), params, where).tolist()
    assert greedy == np.argmax(logits)
    for p, token in zip(params, found):
        check_winner(logits, p, token)


@pytest.mark.parametrize("execution", ["reference", "emulator"])
def test_all_executions_agree(execution: str) -> None:
    logits = np.random.default_rng(5).normal(0, 2, (6, 60)).astype(np.float32)
    logits[5, 7] = np.nan
    filters = [Params(0), Params(), Params(1, 9), Params(0.8, 0, 0.5), Params(1.2, 20, 0.7, 0.05), Params(1)]
    params = [replace(p, seed=2**63 + i) for i, p in enumerate(filters)]
    assert drawn(logits, params, execution).tolist() == drawn(logits, params, "cpu").tolist()


@tilus.kernel
def philox_kernel(words: Tensor[uint32, 3, 6], out: Tensor[uint32, 3, 4]):
    tilus.grid(3, warps=1)
    given = [tilus.load(words, [tilus.block_id(0), i], [1, 1]) for i in range(6)]
    found = philox(tuple(given[:4]), tuple(given[4:]))
    for i in tilus.static_range(4):
        tilus.store(out, [tilus.block_id(0), i], found[i])


def test_known_answers(where: str) -> None:
    """Those that Random123 publishes for philox4x32 with ten rounds (counter, key, result), and the oracle above agrees."""
    known = [
        ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    words, expected = (np.array([[int(w, 16) for w in row[i].split()] for row in known], np.uint32) for i in range(2))
    out = np.zeros((3, 4), np.uint32)
    philox_kernel.on(where)(words, out)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(uniforms(np.zeros(1, np.uint64), 0, np.arange(4))[0] * 2**32 - 0.5, expected[0])


def test_extreme_parameters_leave_the_best_token() -> None:
    params = [Params(1e-45), Params(1e-29), Params(1, 0, 0.0), Params(1, 0, -1.0), Params(1, 0, 1, 7.0)]
    logits = np.random.default_rng(14).normal(0, 1, (5, 80)).astype(np.float32)
    assert drawn(logits, params, "cpu").tolist() == logits.argmax(1).tolist()


def test_what_does_not_fit_is_refused() -> None:
    logits = np.zeros((2, 8), np.float32)
    with pytest.raises(TilusError, match=r"logits of shape \[8\], expected \[requests, vocabulary\]"):
        drawn(logits[0], [Params()], "reference")
    with pytest.raises(TilusError, match=r"\[1\], \[1\], \[1\], \[1\], \[1\], \[1\], expected \[2\] each"):
        drawn(logits, [Params()], "reference")
    with pytest.raises(TilusError, match="seeds of int32 and positions of uint32, expected int64 and int32"):
        sample(logits, **{**arrays([Params()] * 2), "seeds": np.zeros(2, np.int32)}, device="reference")
