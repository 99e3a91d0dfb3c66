"""Masks of bits, windows and other variants where both kernels take them: a few queries a sequence, decoded and prefilled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attention_batches import Batch, Inputs, limit_of, make_inputs, on_gpu
from hypothesis import given
from hypothesis import strategies as st

import tilus
from tilus import TilusError
from tilus.kernels import paged_decode, paged_prefill
from tilus.kernels.attention_variant import Variant, pack_bits

Array = npt.NDArray[Any]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = [pytest.param("reference", marks=pytest.mark.exhaustive), "emulator", CUDA]


def ancestors(at):
    return (at.key < at.past) | at.bit(at.key - at.past)


def sink(at):
    return 0.5 - at.head.to(tilus.f32)


def soft_cap(score, at):
    return tilus.tanh(score * (1 / 2.0)) * 2.0


def alibi(score, at):
    return score + (at.key - at.query).to(tilus.f32) * at.of_heads()


def even_heads(at):
    return (at.key % 2 == 0) | (at.head % 2 == 0)


def trees(batch: Batch, seed: int) -> Array:
    """Of random trees, a parent in front of each node but the root: whether a query sees node n, [queries, nodes at most]."""
    rng = np.random.default_rng(seed)
    rows = list[Array]()
    most = max(queries for queries, _ in batch.lengths)
    for queries, _ in batch.lengths:
        sees = np.eye(queries, most, dtype=bool)
        for node in range(1, queries):
            sees[node] |= sees[rng.integers(node)]
        rows.append(sees)
    return np.concatenate(rows)


Change = Callable[[Array, Array, Array, int, Array], Array]
SINKS = {"sinks", "all"}


def exact(
    inputs: Inputs, batch: Batch, change: Change, nodes: Array, sinks: bool = False
) -> tuple[Array, Array, Array]:
    """(result, sums of weight * |value|, logarithms) of scores as `change` makes them, causal. nodes: see `trees`."""
    q, cache = inputs.q.double().numpy(), inputs.kv_cache.double().numpy()
    out, size, lse, row = np.zeros_like(q), np.zeros_like(q), np.full(q.shape[:2], -np.inf), 0
    for sequence, (queries, length) in enumerate(batch.lengths):
        own = slice(row, row + queries)
        row += queries
        pages = inputs.block_tables[sequence, : -(-length // batch.page_size)].numpy()
        keys, values = np.nan_to_num(cache[pages].swapaxes(0, 1).reshape(2, -1, *cache.shape[3:])[:, :length])
        query, key = np.arange(queries)[:, None] + length - queries, np.arange(length)[None]
        for head in range(q.shape[1]):
            k, v = (x[:, head // batch.group] for x in (keys, values))
            scores = change(q[own, head] @ k.T * inputs.scale, query, key, head, nodes[own])
            scores = np.where(key <= query, scores, -np.inf)
            logs = np.logaddexp.reduce(scores, axis=1, initial=0.5 - head if sinks else -np.inf)
            weights = np.exp(scores - np.where(np.isneginf(logs), 0, logs)[:, None])
            out[own, head], size[own, head], lse[own, head] = weights @ v, weights @ np.abs(v), logs
    return out, size, lse


def of_tree(scores: Array, query: Array, key: Array, head: int, nodes: Array) -> Array:
    node = key[0] - query[0, 0]
    return np.where((node < 0) | nodes[:, np.maximum(node, 0)], scores, -np.inf)


def recent(scores: Array, query: Array, key: Array, head: int, nodes: Array) -> Array:
    return np.where(query - key < 40, scores, -np.inf)


VARIANTS: dict[str, tuple[Variant, Change]] = {
    "tree": (Variant(mask=ancestors), of_tree),
    "window": (Variant(window=40), recent),
    "soft cap": (Variant(logits=soft_cap), lambda s, query, key, head, nodes: 2 * np.tanh(s / 2)),
    "ALiBi": (Variant(logits=alibi), lambda s, query, key, head, nodes: s + (key - query) * 0.5 ** (head + 1)),
    "heads": (
        Variant(mask=even_heads),
        lambda s, query, key, head, nodes: np.where((key % 2 == 0) | (head % 2 == 0), s, -np.inf),
    ),
    "sinks": (Variant(sink=sink), lambda s, query, key, head, nodes: s),
    "all": (
        Variant(logits=soft_cap, mask=ancestors, window=40, sink=sink),
        lambda s, query, key, head, nodes: of_tree(
            recent(2 * np.tanh(s / 2), query, key, head, nodes), query, key, head, nodes
        ),
    ),
}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625])


def run(name: str, function: Any, inputs: Inputs, q_len: int, bits: torch.Tensor, device: str) -> tuple[Array, Array]:
    """Results and logarithms, query by query."""
    variant, _ = VARIANTS[name]
    tensors = [inputs.q, inputs.kv_cache, inputs.block_tables, inputs.q_start, inputs.kv_lens]
    slopes = SLOPES
    if device == "cuda":
        tensors, bits, slopes = [on_gpu(t) for t in tensors], bits.cuda(), slopes.cuda()
    if function is paged_decode:
        tensors = [tensors[0].unflatten(0, (-1, q_len)), *tensors[1:3], tensors[4]]
    needs_bits = variant.mask is ancestors
    out, lse = function(
        *tensors, inputs.scale, return_lse=True, variant=variant, parameters=slopes, bits=bits if needs_bits else None,
        device=device,
    )  # fmt: skip
    return out.cpu().double().numpy().reshape(inputs.q.shape), lse.cpu().double().numpy().reshape(inputs.q.shape[:2])


def check(name: str, function: Any, batch: Batch, device: str) -> None:
    """Scores are within 2^-9 of themselves where there is a tanh (of a GPU), and so are weights."""
    inputs, nodes = make_inputs(batch, 0), trees(batch, 0)
    out, lse = run(name, function, inputs, batch.lengths[0][0], pack_bits(torch.from_numpy(nodes)), device)
    expected, size, expected_lse = exact(inputs, batch, VARIANTS[name][1], nodes, name in SINKS)
    inexact = 2.0**-9 if VARIANTS[name][0].logits is soft_cap else 0.0
    assert (np.abs(out - expected) <= limit_of(batch, expected, size) + inexact * size).all()
    assert np.array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    assert np.abs(lse[finite] - expected_lse[finite]).max() <= max(2.0**-14, inexact)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "function"),
    [
        pytest.param(name, function, marks=() if (name, function) in (("all", paged_decode), ("tree", paged_prefill)) else
        pytest.mark.exhaustive)
        for name in VARIANTS for function in (paged_decode, paged_prefill)
    ],
)  # fmt: skip
def test_a_few_queries_a_sequence(name: str, function: Any, device: str) -> None:
    """Sequences of nothing but queries, of one tile and of several; columns and rows of padding."""
    lengths = ((5, 70), (5, 5), (5, 0), (5, 3), (5, 200))
    check(name, function, Batch(lengths, kv_heads=2, group=3), device)


@pytest.mark.parametrize("device", [pytest.param("emulator", marks=pytest.mark.exhaustive), CUDA])
def test_a_tree_of_many_words(device: str) -> None:
    """More nodes than a word has bits, in ragged batches."""
    check("tree", paged_prefill, Batch(((70, 100), (3, 9), (40, 40)), kv_heads=1, group=2), device)


@pytest.mark.parametrize("device", ["reference", CUDA])
@pytest.mark.parametrize("function", [paged_decode, paged_prefill])
def test_what_lies_in_front_of_a_window_is_not_read(function: Any, device: str) -> None:
    """There all elements are NaN, which no weight of zero would undo: whole pages, and in prefill whole tiles of 128 tokens."""
    batch = Batch(((2, 700), (2, 300), (2, 90)), kv_heads=1, group=2)
    inputs = make_inputs(batch, 0)
    whole = 16 if function is paged_decode else 128
    for sequence, (queries, length) in enumerate(batch.lengths):
        unseen = max(0, length - queries + 1 - 40) // whole * whole
        inputs.kv_cache[inputs.block_tables[sequence, : unseen // 16].long()] = torch.nan
    nodes = trees(batch, 0)
    out, _ = run("window", function, inputs, 2, pack_bits(torch.from_numpy(nodes)), device)
    expected, size, _ = exact(inputs, batch, recent, nodes)
    assert (np.abs(out - expected) <= limit_of(batch, expected, size)).all()


@given(st.integers(0, 5), st.integers(1, 256), st.integers(0, 99))
def test_bits_of_conditions(queries: int, count: int, seed: int) -> None:
    """Bit i of word w is condition 32 w + i; those behind the last one are zero."""
    conditions = np.random.default_rng(seed).integers(0, 2, (queries, count)).astype(bool)
    packed = pack_bits(torch.from_numpy(conditions))
    assert packed.dtype == torch.int32 and packed.shape == (queries, -(-count // 32))
    unpacked = np.unpackbits(packed.numpy().view(np.uint8), axis=1, bitorder="little").astype(bool)
    assert np.array_equal(unpacked[:, :count], conditions) and not unpacked[:, count:].any()


def wrong(function: Any, **options: Any) -> str:
    inputs = make_inputs(Batch(((2, 20), (2, 5)), kv_heads=1, group=1), 0)
    many = (inputs.q_start,) if function is paged_prefill else ()
    q = inputs.q if many else inputs.q.unflatten(0, (2, 2))
    with pytest.raises(TilusError) as caught:
        function(
            q, inputs.kv_cache, inputs.block_tables, *many, inputs.kv_lens, inputs.scale, **options, device="reference"
        )
    return str(caught.value)


def no_condition(at):
    return at.key - at.query


def no_tile(score, at):
    return 1.0


def one_argument(score):
    return score


@pytest.mark.parametrize("function", [paged_decode, paged_prefill])
def test_wrong_variants_and_tensors(function: Any) -> None:
    """Functions are shown where they are defined; tensors with both shapes."""
    zeros = torch.zeros(4, 1, dtype=torch.int32)
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"variant": Variant(mask=no_condition)}, ["no_condition, gives int32", "boolean", "def no_condition(at):"]),
        ({"variant": Variant(logits=no_tile)}, ["no_tile, gives no tile", "f32", "def no_tile(score, at):"]),
        (
            {"variant": Variant(sink=no_condition)},
            ["sink", "no_condition, gives int32", "f32", "def no_condition(at):"],
        ),
        ({"variant": Variant(mask=ancestors)}, ["no bits", "pack_bits", "def ancestors(at):"]),
        ({"variant": Variant(mask=ancestors), "bits": zeros[1:]}, ["[3, 1]", "[4, 1 to 8 words]"]),
        ({"variant": Variant(mask=ancestors), "bits": zeros.expand(4, 9)}, ["[4, 9]", "[4, 1 to 8 words]"]),
    ]
    for options, parts in cases:
        text = wrong(function, **options)
        assert all(part in text for part in parts), text
    with pytest.raises(TilusError, match=r"def one_argument"):
        Variant(logits=one_argument)
    with pytest.raises(TilusError, match="window of an attention variant is 0"):
        Variant(window=0)


def test_what_does_not_go_together() -> None:
    assert "window=4 and causal=False" in wrong(paged_prefill, variant=Variant(window=4), causal=False)
    inputs = make_inputs(Batch(((8, 20),), kv_heads=1, group=16), 0)
    args = (inputs.q[None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale)
    with pytest.raises(TilusError, match="bits with 8 queries a sequence, expected at most 4"):
        paged_decode(
            *args, variant=Variant(mask=ancestors), bits=torch.zeros(8, 1, dtype=torch.int32), device="reference"
        )
