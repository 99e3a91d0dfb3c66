"""Shared prefixes of quantised caches and with variants of attention, against float64 and beside paged_decode."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attention_batches import Array, Batch, Inputs, exact_attention, exact_lse, limit_of, make_inputs, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_cache import NAMES, OWN_FORMATS, moved, numbers_of
from test_paged_attention import quantized_inputs
from test_shared_prefix import CUDA, KINDS, assert_assembles, decoding, share_pages
from test_tree_attention import SLOPES, VARIANTS, Change, ancestors, exact, sink, soft_cap, trees

from tilus import TilusError
from tilus.kernels import paged_decode
from tilus.kernels.attention_variant import Variant, pack_bits
from tilus.kernels.shared_prefix import find_shared_prefixes, shared_prefix_decode
from tilus.kernels.shared_prefix_groups import TOKENS

SLOW = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("reference", "emulator")]
TINY = decoding((330, 300), kv_heads=1, group=2, dtype=torch.bfloat16)


def limit_of_codes(batch: Batch, inputs: Inputs, expected: Array, size: Array) -> Array:
    """Beside `limit_of` with weights of f16: elements are rounded to f16, of values, and of keys, by which a weight is off twice
    as much as its score; sums of |query * key| are below their norms' product."""
    norms = float(inputs.q.float().norm(dim=-1).max()) * float(inputs.kv_cache[:, 0].nan_to_num().norm(dim=-1).max())
    return limit_of(batch, expected, size, weight_step=2.0**-11 * (2 + 2 * norms * inputs.scale))


def check_codes(name: str, batch: Batch, common: list[int], device: str) -> None:
    """Within the bound; pages that nobody uses are NaN, and so are those that only later sequences of a group have."""
    q, cache, tables, lens = quantized_inputs(name, batch)
    share_pages(batch, tables, common)
    elements = torch.from_numpy(numbers_of(cache)[1]).permute(0, 2, 3, 1, 4)
    inputs = Inputs(q, elements, tables, lens, lens, batch.head_dim**-0.5)
    tensors = [q.unflatten(0, (-1, batch.lengths[0][0])), tables, lens]
    queries, table, kv_lens = [on_gpu(t) for t in tensors] if device == "cuda" else tensors
    given_cache = moved(cache, device)
    out, lse = shared_prefix_decode(queries, given_cache, table, kv_lens, inputs.scale, return_lse=True, device=device)
    (expected, size), wanted = exact_attention(inputs, batch), exact_lse(inputs, batch)
    error = np.abs(out.flatten(0, 1).cpu().double().numpy() - expected)
    limit = limit_of_codes(batch, inputs, expected, size)
    assert (error <= limit).all(), f"off by {error.max()}, {(error / (limit + 1e-30)).max()} of the limit"
    found, finite = lse.flatten(0, 1).cpu().double().numpy(), np.isfinite(wanted)
    assert np.array_equal(np.isneginf(found), ~finite)
    assert np.abs(found[finite] - wanted[finite]).max(initial=0) < 2.0**-7


def test_two_sequences_of_codes() -> None:
    check_codes("int4", TINY, [0, 18], "reference")


@pytest.mark.parametrize("device", [*SLOW, CUDA])
@pytest.mark.parametrize("name", [*NAMES, *OWN_FORMATS])
def test_codes(name: str, device: str) -> None:
    check_codes(name, TINY, [0, 18], device)


@pytest.mark.parametrize("device", [*SLOW, CUDA])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("batch", "common"),
    [
        (decoding((400, 500, 256, 20, 500, 660), kv_heads=2, group=2), [0, 20, 24, 0, 0, 30]),
        (decoding((300,) * 9, 8, kv_heads=1, group=4), [18] * 9),
        (decoding((600, 700), 3, kv_heads=1, group=3, head_dim=96, dtype=torch.bfloat16), [33] * 2),
        (decoding((900, 800, 810), kv_heads=2, group=4, head_dim=128, page_size=256), [3] * 3),
        (decoding((300, 290), 3, kv_heads=1, group=16, dtype=torch.bfloat16), [17] * 2),
        (decoding((0, 300, 3, 300), kv_heads=2, group=1), [0] * 4),
    ],
    ids=str,
)
def test_shapes_of_codes(batch: Batch, common: list[int], name: str, device: str) -> None:
    check_codes(name, batch, common, device)


@pytest.mark.exhaustive
@given(
    st.lists(st.tuples(st.integers(0, 700), st.sampled_from([0, 16, 20, 40])), min_size=2, max_size=5),
    st.sampled_from(NAMES),
    st.integers(1, 3),
)
@settings(max_examples=4)
def test_any_batch_of_codes(sequences: list[tuple[int, int]], name: str, q_len: int) -> None:
    batch = decoding(tuple(length for length, _ in sequences), q_len, kv_heads=1, group=2)
    check_codes(name, batch, [common for _, common in sequences], "reference")


def of_window(count: int) -> Change:
    def change(scores: Array, query: Array, key: Array, head: int, nodes: Array) -> Array:
        return np.where(query - key < count, scores, -np.inf)

    return change


COLUMNS = 5  # conditions of a query that keys of a prefix ask for, too


def bit_of_key(at):
    return at.bit(at.key % COLUMNS)


# Two groups, one of more sequences than a warpgroup has of 8 rows each; what of a prefix a window leaves differs among them.
LENGTHS = (340, 310, 420, 300, 301, 400, 40)
COMMON = [0, 18, 18, 0, 18, 18, 0]
CASES = VARIANTS | {
    "wide window": (Variant(window=100), of_window(100)),
    "bits": (
        Variant(mask=bit_of_key),
        lambda s, query, key, head, nodes: np.where(nodes[:, key[0] % COLUMNS], s, -np.inf),
    ),
    "bits and sinks": (
        Variant(mask=bit_of_key, sink=sink, logits=soft_cap),
        lambda s, query, key, head, nodes: np.where(nodes[:, key[0] % COLUMNS], 2 * np.tanh(s / 2), -np.inf),
    ),
}


def check_variant(name: str, batch: Batch, common: list[int], device: str) -> None:
    """Scores are within 2^-9 of themselves where there is a tanh (of a GPU), and so are weights."""
    variant, change = CASES[name]
    inputs, nodes, q_len = make_inputs(batch, 0), trees(batch, 0), batch.lengths[0][0]
    if variant.mask is bit_of_key:
        nodes = np.random.default_rng(0).random((len(inputs.q), COLUMNS)) < 0.6
    share_pages(batch, inputs.block_tables, common)
    bits, slopes = pack_bits(torch.from_numpy(nodes)) if variant.mask in (ancestors, bit_of_key) else None, SLOPES
    tensors = [inputs.q.unflatten(0, (-1, q_len)), inputs.kv_cache, inputs.block_tables, inputs.kv_lens]
    if device == "cuda":
        tensors, slopes, bits = [on_gpu(t) for t in tensors], slopes.cuda(), None if bits is None else bits.cuda()
    out, lse = shared_prefix_decode(
        *tensors, inputs.scale, return_lse=True, variant=variant, parameters=slopes, bits=bits, device=device
    )
    expected, size, expected_lse = exact(inputs, batch, change, nodes, variant.sink is not None)
    inexact = 2.0**-9 if variant.logits is soft_cap else 0.0
    found = lse.flatten(0, 1).cpu().double().numpy()
    error = np.abs(out.flatten(0, 1).cpu().double().numpy() - expected)
    assert (error <= limit_of(batch, expected, size) + inexact * size).all()
    assert np.array_equal(np.isneginf(found), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    assert np.abs(found[finite] - expected_lse[finite]).max() <= max(2.0**-14, inexact)


@pytest.mark.parametrize("name", ["bits and sinks", "wide window"])
def test_variants_of_two_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On several blocks, so that there are several parts of a sequence's own tokens."""
    monkeypatch.setattr(sys.modules["tilus.kernels.shared_prefix"], "num_sms_of", lambda *_: 3)
    check_variant(name, replace(TINY, lengths=((2, 330), (2, 300)), dtype=torch.float16), [0, 18], "reference")


@pytest.mark.parametrize("device", [*SLOW, CUDA])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_variants(q_len: int, name: str, device: str) -> None:
    check_variant(name, decoding(LENGTHS, q_len, kv_heads=2, group=3), COMMON, device)


def test_what_a_window_hides_from_all_is_not_read() -> None:
    """Its pages may hold no numbers; those that one sequence still sees are read for it."""
    batch = decoding((340, 300), kv_heads=1, group=2)
    inputs = make_inputs(batch, 0)
    share_pages(batch, inputs.block_tables, [0, 18])
    shared = find_shared_prefixes(inputs.block_tables, inputs.kv_lens, 1, 2, 16, device="reference")
    assert shared[TOKENS].tolist() == [256, 256]
    # Those of keys in front of 192, where the tile is in which the window of the shorter sequence begins, at 220.
    tables = inputs.block_tables.clone()
    tables[:, :12] = next(i for i, page in enumerate(inputs.kv_cache) if page.isnan().all())
    arguments = inputs.q[:, None], inputs.kv_cache, tables, inputs.kv_lens, inputs.scale
    out = shared_prefix_decode(*arguments, variant=Variant(window=80), shared=shared, device="reference")
    expected, size, _ = exact(inputs, batch, of_window(80), trees(batch, 0))
    assert (np.abs(out[:, 0].double().numpy() - expected) <= limit_of(batch, expected, size)).all()


def test_what_is_left_to_paged_decode() -> None:
    """Heads of 256 elements, one sequence, bits for more columns than a launch has: the same result, in the caller's tensor."""
    for batch, mask in [
        (decoding((4, 5), kv_heads=1, group=1, head_dim=256), None),
        (decoding((4,), kv_heads=1, group=2), None),
        (decoding((4, 5), 3, kv_heads=1, group=16), ancestors),
    ]:
        inputs, q_len = make_inputs(batch, 0), batch.lengths[0][0]
        arguments = (
            inputs.q.unflatten(0, (-1, q_len)),
            inputs.kv_cache,
            inputs.block_tables,
            inputs.kv_lens,
            inputs.scale,
        )
        bits = None if mask is None else pack_bits(torch.from_numpy(trees(batch, 0)))
        options: dict[str, Any] = {"variant": Variant(mask=mask), "bits": bits, "device": "reference"}
        into = torch.empty_like(arguments[0])
        assert shared_prefix_decode(*arguments, **options, out=into) is into
        assert torch.equal(into, paged_decode(*arguments, **options))


def test_bits_of_another_batch_are_refused() -> None:
    inputs = make_inputs(TINY, 0)
    arguments = (inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale)
    with pytest.raises(TilusError, match=r"shared_prefix_decode: bits of shape \[3, 1\], expected \[2, 1 to 8 words\]"):
        shared_prefix_decode(
            *arguments, variant=Variant(mask=ancestors), bits=torch.zeros(3, 1).int(), device="reference"
        )


def test_where_no_plan_fits_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["tilus.kernels.shared_prefix"]
    monkeypatch.setattr(module, "shared_plans", lambda *_: iter(()))
    monkeypatch.setattr(module, "_fitting", {})
    inputs = make_inputs(decoding((4, 5), kv_heads=1, group=2), 0)
    arguments = (inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale)
    for _ in range(2):
        assert torch.equal(
            shared_prefix_decode(*arguments, device="reference"), paged_decode(*arguments, device="reference")
        )
    assert list(module._fitting.values()) == [None]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("variant", ["window", "soft cap", "ALiBi", "sinks"])
def test_variants_assemble_by_some_plan(variant: str, name: str | None) -> None:
    assert_assembles(*KINDS[0], name, CASES[variant][0])
