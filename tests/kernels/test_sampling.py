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
from tilus import Const, Tensor, TilusError, f32, int32, uint32
from tilus.kernels.philox import philox
from tilus.kernels.sampling import PIVOTS, filtered, launch, plan_of, sample
from tilus.kernels.sampling_row import Row, RowPlan

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


def uniform(seed: int, position: int, count: int) -> npt.NDArray:
    """Philox 4x32-10 by the paper, in Python's integers: v of each token, f64 [count]."""
    found = []
    for quad in range(-(-count // 4)):
        x, key = [quad, position, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [(b >> 32) ^ x[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ key[1], a & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        found += x
    return (np.array(found[:count], np.float64) + 0.5) / 2**32


def check_winner(logits: npt.NDArray, params: Params, token: int) -> None:
    """The winner of the race over exactly the kept set; another one only where two are as close as f32 can tell."""
    values = np.asarray(logits, np.float32)
    kept = probabilities(values, params)
    assert kept[token] > 0
    with np.errstate(divide="ignore"):
        scores = np.log(kept) - np.log(-np.log1p(-uniform(params.seed, params.position, len(values))))
    assert scores[token] >= scores.max() - 2e-5


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


@pytest.mark.parametrize("row", ROWS)
def test_every_filter_keeps_exactly_what_sorting_keeps(row: str, device: str) -> None:
    """Many draws find every kept token that is not rare, and no other; each one is the winner of its race."""
    draws = 12
    logits = ROWS[row].astype(np.float32)
    params = [replace(p, seed=2**40 + 977 * i, position=i % 5) for p in FILTERS for i in range(draws)]
    found = drawn(np.tile(logits, (len(params), 1)), params, device)
    for p, token in zip(params, found):
        if p.temperature == 0:
            assert token == np.argmax(logits)
        else:
            check_winner(logits, p, int(token))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_types(dtype: torch.dtype, device: str) -> None:
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 3, (len(FILTERS), 331)).astype(np.float32)).to(dtype)
    params = [replace(p, seed=5 + i) for i, p in enumerate(FILTERS)]
    found = sample(logits, **{k: torch.from_numpy(v) for k, v in arrays(params).items()}, device=device)
    for row, p, token in zip(logits.float().numpy(), params, found.tolist()):
        if p.temperature == 0:
            assert token == np.argmax(row)
        else:
            check_winner(row, p, token)


@pytest.mark.parametrize("p", [Params(), Params(0.8, 6), Params(1.5, 0, 0.8), Params(1.0, 9, 0.9, 0.05)], ids=str)
def test_frequencies_are_the_distribution(p: Params) -> None:
    """Chi-square with fixed seeds: over 4.5 standard deviations from its mean has chance 1e-5 or so."""
    logits, draws = np.random.default_rng(8).normal(0, 1.2, 24).astype(np.float32), 20000
    params = [replace(p, seed=i // 7, position=i % 7) for i in range(draws)]
    found = drawn(np.tile(logits, (draws, 1)), params, "cpu")
    counts, expected = np.bincount(found, minlength=24), probabilities(logits, p) * draws
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    freedom = kept.sum() - 1
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom) + 4


def test_a_row_is_drawn_alike_alone_and_in_company(device: str) -> None:
    logits = np.random.default_rng(4).normal(0, 1, (len(FILTERS), 200)).astype(np.float32)
    params = [replace(p, seed=7**i, position=3 * i) for i, p in enumerate(FILTERS)]
    together = drawn(logits, params, device)
    assert [drawn(logits[i : i + 1], params[i : i + 1], device)[0] for i in range(len(params))] == together.tolist()
    assert drawn(logits[::-1].copy(), params[::-1], device)[::-1].tolist() == together.tolist()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "plan", [RowPlan(1, 1, 3, 3), RowPlan(2, 2, 2, 1), RowPlan(8, 1, 1, 1), RowPlan(4, 2, 2, 2, False)], ids=str
)
@pytest.mark.parametrize("where", ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_clusters_and_slices(plan: RowPlan, where: str) -> None:
    """However the row is shared out, the same tokens win."""
    logits = np.random.default_rng(6).normal(0, 2, (5, 371)).astype(np.float32)
    params = [
        Params(0),
        Params(1, 30, 0.9, 0.01, 3),
        Params(1.2, 0, 0.7, 0, 2**63, 9),
        Params(1, 17, 1, 0, 1),
        Params(seed=8),
    ]
    tokens, logprobs = np.zeros(5, np.int32), np.zeros(5, np.float32)
    launch(logits, *arrays(params).values(), tokens, logprobs, plan, where)
    assert tokens.tolist() == drawn(logits, params, "reference").tolist()
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    assert np.abs(logprobs - exact[np.arange(5), tokens]).max() < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_numbers_harm_no_other(bad: float, device: str) -> None:
    logits = np.random.default_rng(9).normal(0, 1, (4, 60)).astype(np.float32)
    params = [Params(seed=1), Params(0.9, 5, 0.9, seed=2), Params(0), Params(1.1, 0, 0.5, seed=4)]
    clean = drawn(logits, params, device)
    for row in (1, 2):
        broken = logits.copy()
        broken[row, 33] = bad
        tokens, logprobs = sample(broken, **arrays(params), return_logprobs=True, device=device)
        assert tokens.tolist() == [-1 if i == row else token for i, token in enumerate(clean)]
        assert np.isnan(logprobs).tolist() == [i == row for i in range(4)]
    logits[:] = -np.inf
    assert (drawn(logits, params, device) == -1).all()


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(FILTERS[:-2]),
    st.integers(1, 300),
    st.booleans(),
)
@settings(max_examples=15)
def test_any_row(seed: int, position: int, p: Params, size: int, coarse: bool) -> None:
    values = np.random.default_rng(seed % 1000).normal(0, 2, size)
    logits = (np.round(values * 4) / 4 if coarse else values).astype(np.float32)
    p = replace(p, seed=seed, position=position)
    check_winner(logits, p, int(drawn(logits[None], [p], "cpu")[0]))


@tilus.kernel
def bound_kernel(
    logits: Tensor["dtype", "rows", "vocabulary"],
    parameters: Tensor[f32, "rows", 3],
    top_k: Tensor[int32, "rows"],
    bounds: Tensor[f32, "rows"],
    *,
    plan: Const,
):
    tilus.grid(logits.shape[0] * plan.cluster, warps=plan.warps, cluster=plan.cluster)
    tilus.cluster_sync()
    i = tilus.block_id(0) // plan.cluster
    row = Row(logits, i, plan)
    most, least, finite, _ = row.survey()
    rate = math.log2(math.e) / parameters[i, 0]
    bound = filtered(row, most, least, finite, rate, top_k[i], parameters[i, 1], parameters[i, 2], PIVOTS)
    tilus.store(bounds, [i], tilus.full([1], bound))


def check_kept(logits: npt.NDArray, params: list[Params], plan: RowPlan, device: str) -> None:
    """Row by row the very set that sorting keeps."""
    numbers = np.array([[p.temperature, p.top_p, p.min_p] for p in params], np.float32)
    bounds = np.zeros(len(params), np.float32)
    bound_kernel.on(device)(logits, numbers, arrays(params)["top_k"], bounds, plan=plan)
    for values, p, bound in zip(logits, params, bounds):
        assert (np.isfinite(values) & (values >= bound)).tolist() == kept_set(values, p).tolist(), p


RANDOM = [p for p in FILTERS if p.temperature > 0]


@pytest.mark.parametrize("row", ROWS)
def test_kept_sets(row: str, device: str) -> None:
    check_kept(np.tile(ROWS[row].astype(np.float32), (len(RANDOM), 1)), RANDOM, plan_of(len(ROWS[row]), False), device)


def test_kept_sets_in_a_cluster() -> None:
    logits = np.random.default_rng(12).normal(0, 2, (len(RANDOM), 510)).astype(np.float32)
    check_kept(logits, RANDOM, RowPlan(4, 1, 1, 1), "emulator")


@given(
    st.integers(0, 10**6), st.integers(1, 400), st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([0.0, 0.25, 2.0])
)
@settings(max_examples=25)
def test_kept_sets_of_any_row(seed: int, size: int, spread: float, step: float) -> None:
    """A step makes ties."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, spread, size)
    logits = (np.round(values / step) * step if step else values).astype(np.float32)
    counts, shares = generator.integers(0, size + 2, 3), generator.uniform(0.05, 1, 3)
    params = [Params(t, int(k), p, m) for t, k, p, m in zip([0.3, 1, 2], counts, shares, [0, 0.02, 0.3])]
    check_kept(np.tile(logits, (3, 1)), params, plan_of(size, False), "cpu")


@pytest.mark.parametrize("size", [32000, 151936])
def test_kept_sets_of_large_vocabularies(size: int, device_of_large: str) -> None:
    """Of small differences; borders of top_p that f32 cannot tell from others are not among these."""
    logits = np.random.default_rng(size).normal(0, 2, (4, size)).astype(np.float32)
    params = [Params(1, 50), Params(0.7, 1000, 0.9), Params(0.6, 0, 0.8), Params(1, 0, 1, 0.05)]
    check_kept(logits, params, plan_of(size, device_of_large == "cuda"), device_of_large)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_of_large(request: pytest.FixtureRequest) -> str:
    return request.param


@tilus.kernel
def philox_kernel(words: Tensor[uint32, 3, 6], out: Tensor[uint32, 3, 4]):
    tilus.grid(3, warps=1)
    given = [tilus.load(words, [tilus.block_id(0), i], [1, 1]) for i in range(6)]
    found = philox(tuple(given[:4]), tuple(given[4:]))
    for i in tilus.static_range(4):
        tilus.store(out, [tilus.block_id(0), i], found[i])


def test_known_answers(device: str) -> None:
    """Those that Random123 publishes for philox4x32 with ten rounds (counter, key, result), and the oracle above agrees."""
    known = [
        ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    words, expected = (np.array([[int(w, 16) for w in row[i].split()] for row in known], np.uint32) for i in range(2))
    out = np.zeros((3, 4), np.uint32)
    philox_kernel.on(device)(words, out)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(uniform(0, 0, 4) * 2**32 - 0.5, expected[0])


@pytest.mark.parametrize(
    "p", [Params(1e-45), Params(1e-29), Params(1, 0, 0.0), Params(1, 0, -1.0), Params(1, 0, 1, 7.0)], ids=str
)
def test_extreme_parameters_leave_the_best_token(p: Params) -> None:
    logits = np.random.default_rng(14).normal(0, 1, (1, 80)).astype(np.float32)
    assert drawn(logits, [p], "reference").tolist() == [np.argmax(logits)]


def test_what_does_not_fit_is_refused() -> None:
    logits = np.zeros((2, 8), np.float32)
    with pytest.raises(TilusError, match=r"logits of shape \[8\], expected \[requests, vocabulary\]"):
        drawn(logits[0], [Params()], "reference")
    with pytest.raises(TilusError, match=r"\[1\], \[1\], \[1\], \[1\], \[1\], \[1\], expected \[2\] each"):
        drawn(logits, [Params()], "reference")
    with pytest.raises(TilusError, match="seeds of int32 and positions of uint32, expected int64 and int32"):
        sample(logits, **{**arrays([Params()] * 2), "seeds": np.zeros(2, np.int32)}, device="reference")
