"""Variants of paged_prefill, each a few lines in the language, against the same formula in float64; and wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attention_batches import Batch, Inputs, limit_of, make_inputs, on_gpu

import tilus
from tilus import TilusError
from tilus.kernels import paged_prefill
from tilus.kernels.attention_variant import Variant
from tilus.kernels.paged_prefill import PrefillPlan, paged_prefill_kernel, plans_of
from tilus.kernels.plan_choice import by_fitting_plan
from tilus.runtime.binaries import build
from tilus.target import get_target

Array = npt.NDArray[np.float64]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
BATCH = Batch(((40, 200), (1, 40), (3, 2)), kv_heads=2, group=2)
PARAMETERS = torch.tensor(
    [0.5, 0.25, 0.125, 0.0625, -1.0, 2.0, 0.0, 3.0]
)  # slopes of four heads, then logits of their sinks


def soft_cap(score, at):
    return tilus.tanh(score * (1 / 2.0)) * 2.0


def alibi(score, at):
    return score + (at.key - at.query).to(tilus.f32) * at.of_heads()


def window(at):
    return at.key > at.query - 32


def every_second_head_skips(at):
    return (at.key % 2 == 0) | (at.head % 2 == 0)


def sink(at):
    return at.of_heads(4)


Scores = Callable[[Array, Array, Array, int], Array]
VARIANTS: dict[str, tuple[Variant, Scores, list[float] | None]] = {
    "soft cap": (Variant(logits=soft_cap), lambda s, query, key, head: 2 * np.tanh(s / 2), None),
    "ALiBi": (Variant(logits=alibi), lambda s, query, key, head: s + (key - query) * 0.5 ** (head + 1), None),
    "sliding window": (Variant(mask=window), lambda s, query, key, head: np.where(query - key < 32, s, -np.inf), None),
    "heads": (
        Variant(mask=every_second_head_skips),
        lambda s, query, key, head: s if head % 2 == 0 else np.where(key % 2 == 0, s, -np.inf),
        None,
    ),
    "window that skips": (Variant(window=32), lambda s, query, key, head: np.where(query - key < 32, s, -np.inf), None),
    "sinks": (Variant(sink=sink), lambda s, query, key, head: s, [-1.0, 2.0, 0.0, 3.0]),
    "all": (
        Variant(soft_cap, window, sink),
        lambda s, query, key, head: np.where(query - key < 32, 2 * np.tanh(s / 2), -np.inf),
        [-1.0, 2.0, 0.0, 3.0],
    ),
}


def exact(inputs: Inputs, batch: Batch, change: Scores, sinks: list[float] | None) -> tuple[Array, Array, Array]:
    """(result, sums of weight * |value|, logarithms), head by head."""
    q, cache = inputs.q.double().numpy(), inputs.kv_cache.double().numpy()
    out, size, lse = np.zeros_like(q), np.zeros_like(q), np.full(q.shape[:2], -np.inf)
    row = 0
    for sequence, (queries, length) in enumerate(batch.lengths):
        pages = inputs.block_tables[sequence, : -(-length // batch.page_size)].numpy()
        keys, values = cache[pages].swapaxes(0, 1).reshape(2, -1, *cache.shape[3:])[:, :length]
        query, key = np.arange(queries)[:, None] + length - queries, np.arange(length)
        for head in range(q.shape[1]):
            k, v = (x[:, head // batch.group] for x in (keys, values))
            scores = change(q[row : row + queries, head] @ k.T * inputs.scale, query, key, head)
            scores = np.where(key <= query, scores, -np.inf)
            extra = np.full((queries, 1), -np.inf if sinks is None else sinks[head])
            logs = np.logaddexp.reduce(np.hstack([scores, extra]), axis=1)
            weights = np.exp(scores - np.where(np.isneginf(logs), 0, logs)[:, None])
            out[row : row + queries, head], size[row : row + queries, head] = weights @ v, weights @ np.abs(v)
            lse[row : row + queries, head] = logs
        row += queries
    return out, size, lse


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", [pytest.param("reference", marks=pytest.mark.exhaustive), "emulator", CUDA])
@pytest.mark.parametrize(
    "name", [n if n in ("ALiBi", "all") else pytest.param(n, marks=pytest.mark.exhaustive) for n in VARIANTS]
)
def test_variants(name: str, device: str) -> None:
    """Scores are within 2^-9 of themselves (tanh of a GPU); so are weights, whose rounding to f16 comes on top."""
    variant, change, sinks = VARIANTS[name]
    inputs = make_inputs(BATCH, 0)
    tensors = [inputs.q, inputs.kv_cache, inputs.block_tables, inputs.q_start, inputs.kv_lens]
    parameters = PARAMETERS
    if device == "cuda":
        tensors, parameters = [on_gpu(t) for t in tensors], PARAMETERS.cuda()
    out, lse = paged_prefill(
        *tensors, inputs.scale, return_lse=True, variant=variant, parameters=parameters, device=device
    )
    expected, size, expected_lse = exact(inputs, BATCH, change, sinks)
    inexact = 2.0**-9 * size if variant.logits is soft_cap else 0.0
    assert (np.abs(out.cpu().double().numpy() - expected) <= limit_of(BATCH, expected, size) + inexact).all()
    found = lse.cpu().double().numpy()
    assert np.array_equal(np.isneginf(found), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    assert np.abs(found[finite] - expected_lse[finite]).max() <= (2.0**-9 if variant.logits is soft_cap else 2.0**-14)


@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_assemble_with_some_plan(name: str, head_dim: int) -> None:
    """Without spills, and without waits between products."""
    q, cache = torch.zeros(2, 2, 4, head_dim).half(), torch.zeros(4, 2, 16, 2, head_dim).half()
    table, starts = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)

    def assemble(plan: PrefillPlan) -> int:
        special = paged_prefill_kernel.specialize(
            q, cache, table, starts, table[0], q, 1.0, 132, torch.zeros(2, 2, 4), PARAMETERS, kv_heads=2, group=4,
            head_dim=head_dim, page_size=16, causal=True, plan=plan, variant=VARIANTS[name][0],
        )  # fmt: skip
        return len(build(special.function, get_target("sm_90a"))[1])

    assert by_fitting_plan({}, name, plans_of(4, head_dim), assemble)


def wrong(**functions: Callable[..., object]) -> str:
    inputs = make_inputs(Batch(((2, 5),), kv_heads=1, group=1), 0)
    with pytest.raises(TilusError) as caught:
        paged_prefill(**vars(inputs), variant=Variant(**functions), device="reference")
    return str(caught.value)


def integers(score, at):
    return at.key - at.query


def a_row_too_many(score, at):
    return tilus.zeros([65, 1])


def no_condition(at):
    return at.key - at.query


def a_number(at):
    return 1


def no_name(score, at):
    return score * slope


def one_argument(score):
    return score


def temperature(score, at):
    return score * at.of_heads()


def first_parameter(at):
    return at.parameters[0]


def test_wrong_variants_are_shown_where_they_are_defined() -> None:
    """With what they give and what was expected; other mistakes at the line in them."""
    here = "test_attention_variant.py"
    cases: list[tuple[dict[str, Callable[..., object]], list[str]]] = [
        ({"logits": integers}, ["integers, gives int32[64, 128]", "f32", "[64, 128]", "def integers(score, at):"]),
        ({"logits": a_row_too_many}, ["f32[65, 1]", "[64, 128]", "def a_row_too_many(score, at):"]),
        ({"mask": no_condition}, ["int32[64, 128]", "boolean", "compare", "def no_condition(at):"]),
        ({"mask": a_number}, ["no tile", "boolean", "def a_number(at):"]),
        ({"logits": no_name}, ["slope", "return score * slope"]),
        ({"logits": one_argument}, ["one_argument(score)", "logits(score, at)", "def one_argument(score):"]),
        ({"logits": temperature}, ["at.of_heads", "no parameters", "pass parameters=", "def temperature(score, at):"]),
        ({"mask": soft_cap}, ["soft_cap(score, at)", "mask(at)", "def soft_cap(score, at):"]),
    ]
    for functions, parts in cases:
        text = wrong(**functions)
        assert all(part in text for part in [here, *parts]), text


def test_what_is_no_variant_is_refused_at_once() -> None:
    with pytest.raises(TilusError, match=r"the mask of an attention variant is 3, expected a function mask\(at\)"):
        Variant(mask=3)
    with pytest.raises(TilusError, match=r"the window of an attention variant is 2.5, expected an integer from 1 on"):
        Variant(window=2.5)


def test_a_scalar_is_no_mask() -> None:
    inputs, variant = make_inputs(Batch(((2, 5),), kv_heads=1, group=1), 0), Variant(mask=first_parameter)
    with pytest.raises(TilusError, match=r"first_parameter, gives a scalar of f32, expected boolean that broadcasts"):
        paged_prefill(**vars(inputs), variant=variant, parameters=torch.ones(1), device="reference")
