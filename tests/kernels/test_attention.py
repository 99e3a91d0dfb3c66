"""paged_attention against attention in float64, over ragged batches, page tables, group sizes and head sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from attention_batches import Batch, Inputs, exact_attention, limit_of, make_inputs, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_variant import exact

from tilus import TilusError
from tilus.kernels import paged_attention
from tilus.kernels.attention import paged_attention_kernel
from tilus.runtime.binaries import build
from tilus.target import get_target

EXECUTIONS = ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


def check(batch: Batch, device: str, seed: int = 0) -> None:
    inputs = make_inputs(batch, seed)
    expected, size = exact_attention(inputs, batch)
    tensors = [inputs.q, inputs.kv_cache, inputs.block_tables, inputs.q_start, inputs.kv_lens]
    if device == "cuda":
        tensors = [on_gpu(t) for t in tensors]
    found = paged_attention(*tensors, inputs.scale, device=device)
    assert found.shape == inputs.q.shape and found.dtype == batch.dtype
    limit = limit_of(batch, expected, size)
    error = np.abs(found.cpu().double().numpy() - expected)
    assert (error <= limit).all(), (
        f"{batch}: off by {error.max()}, at most {(error / (limit + 1e-30)).max()} of the limit"
    )


SHAPES_OF_BATCHES = {
    "one token": ((1, 1),),
    "a page": ((1, 16),),
    "a page and one": ((1, 17),),
    "a kv tile": ((1, 64),),
    "a kv tile and one": ((1, 65),),
    "decode": ((1, 3), (1, 70), (1, 1), (1, 33), (1, 128)),
    "speculative decode": ((3, 40), (2, 2), (4, 70)),
    "prefill": ((21, 21), (5, 5)),
    "long prefill": ((70, 70),),
    "chunked prefill": ((7, 50), (20, 90)),
    "mixed": ((1, 40), (18, 18), (1, 7), (9, 80), (1, 1)),
    "a sequence without queries": ((0, 20), (2, 9), (0, 0), (1, 5), (0, 3)),
    "queries without keys": ((5, 2), (1, 0), (20, 1)),
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("name", SHAPES_OF_BATCHES)
def test_ragged_batches(name: str, device: str) -> None:
    check(Batch(SHAPES_OF_BATCHES[name]), device)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("lengths", [((1, 70), (1, 20)), ((18, 70), (3, 3))], ids=["decode", "prefill"])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_group_sizes(group: int, lengths: tuple[tuple[int, int], ...], device: str) -> None:
    check(Batch(lengths, group=group), device)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("lengths", [((1, 70), (1, 20)), ((18, 70), (3, 3))], ids=["decode", "prefill"])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_head_sizes(head_dim: int, lengths: tuple[tuple[int, int], ...], device: str) -> None:
    check(Batch(lengths, kv_heads=1, head_dim=head_dim), device)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("lengths", [((1, 150), (1, 20)), ((18, 150), (3, 3))], ids=["decode", "prefill"])
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_page_sizes(page_size: int, lengths: tuple[tuple[int, int], ...], device: str) -> None:
    check(Batch(lengths, kv_heads=1, page_size=page_size), device)


@pytest.mark.parametrize("device", EXECUTIONS)
def test_bfloat16(device: str) -> None:
    check(Batch(((1, 70), (18, 30)), dtype=torch.bfloat16), device)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize(("window", "soft_cap"), [(20, None), (1, 2.0), (64, 0.5)])
@pytest.mark.parametrize(
    "lengths", [((1, 140), (1, 64), (1, 3)), ((18, 150), (70, 70), (3, 2))], ids=["decode", "prefill"]
)
def test_windows_and_soft_caps(
    lengths: tuple[tuple[int, int], ...], window: int, soft_cap: float | None, device: str
) -> None:
    """Windows within a tile, of one key, and of a whole tile; scores within 2^-9 of themselves (tanh of a GPU)."""
    if device == "emulator" and window == 64:
        lengths = lengths[:1]
    batch = Batch(lengths, kv_heads=1, group=2)
    inputs = make_inputs(batch, 0)
    cap = 1e30 if soft_cap is None else soft_cap
    expected, size, _ = exact(
        inputs, batch, lambda s, query, key, head: np.where(query - key < window, cap * np.tanh(s / cap), -np.inf), None
    )
    tensors = [inputs.q, inputs.kv_cache, inputs.block_tables, inputs.q_start, inputs.kv_lens]
    if device == "cuda":
        tensors = [on_gpu(t) for t in tensors]
    found = paged_attention(*tensors, inputs.scale, window=window, soft_cap=soft_cap, device=device)
    limit = limit_of(batch, expected, size) + (0.0 if soft_cap is None else 2.0**-9 * size)
    assert (np.abs(found.cpu().double().numpy() - expected) <= limit).all()


def test_what_a_window_hides_is_not_read() -> None:
    """Pages in front of the tile that the first query's window begins in are no pages at all."""
    batch = Batch(((2, 300),), kv_heads=1, group=1)
    inputs = make_inputs(batch, 0)
    expected = paged_attention(*vars(inputs).values(), window=40, device="reference")
    inputs.block_tables[0, : 256 // 16] = 2**20
    assert torch.equal(paged_attention(*vars(inputs).values(), window=40, device="reference"), expected)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_heads_of_256_on_a_cpu(device: str) -> None:
    check(Batch(((1, 70), (18, 40)), kv_heads=1, group=2, head_dim=256), device)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(max_examples=25)
def test_any_batch(lengths: list[tuple[int, int]], group: int, seed: int) -> None:
    check(Batch(tuple((q, q + past) for q, past in lengths), kv_heads=1, group=group, head_dim=16), "reference", seed)


def test_large_scores_do_not_overflow() -> None:
    """Scores of up to 2000, where exp alone overflows: the largest one takes all of the weight."""
    batch = Batch(((2, 70),), kv_heads=1, group=1)
    inputs = make_inputs(batch, 0)
    found = paged_attention(
        inputs.q, inputs.kv_cache, inputs.block_tables, inputs.q_start, inputs.kv_lens, 50.0, device="reference"
    )
    expected, _ = exact_attention(Inputs(**{**vars(inputs), "scale": 50.0}), batch)
    assert np.allclose(found.double().numpy(), expected, rtol=0, atol=2.0**-8)


def test_nothing_to_do() -> None:
    empty = Batch(((0, 5), (0, 0)))
    assert paged_attention(*vars(make_inputs(empty, 0)).values(), device="reference").shape == (0, 6, 64)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("sm", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_assembles_without_spills(sm: str, head_dim: int) -> None:
    """`build` raises for spills."""
    for group, page_size, rows in [(1, 16, 16), (3, 128, 16), (8, 16, 64), (3, 128, 64)]:
        kv_tile = 64 if rows == 16 or head_dim == 64 else 32
        batch = Batch(((1, 5), (2, 33)), group=group, head_dim=head_dim, page_size=page_size)
        inputs, heads = make_inputs(batch, 0), (2, group)
        q = inputs.q.unflatten(1, heads)
        tensors = (q, inputs.kv_cache, inputs.block_tables, inputs.kv_lens, torch.empty_like(q))
        special = paged_attention_kernel.specialize(
            *tensors,
            1.0,
            inputs.q_start,
            group=group,
            head_dim=head_dim,
            page_size=page_size,
            rows=rows,
            kv_tile=kv_tile,
            window=None if group == 1 else 100,
            soft_cap=30.0 if group == 8 else None,
        )
        compiled, cubin = build(special.function, get_target(sm))
        assert cubin and "mma.sync.aligned.m16n8k16" in compiled.ptx and "ldmatrix" in compiled.ptx


def wrong(change: dict[str, Any]) -> str:
    inputs = {**vars(make_inputs(Batch(((1, 5), (2, 33))), 0)), "device": "reference", **change}
    with pytest.raises(TilusError) as caught:
        paged_attention(**inputs)
    return str(caught.value)


def test_arguments_that_do_not_fit_are_refused_with_both_values() -> None:
    def expect(text: str, *parts: str) -> None:
        assert all(part in text for part in parts), text

    expect(wrong({"q": torch.zeros(3, 7, 64).half()}), "7 query heads for 2 kv heads")
    expect(wrong({"q": torch.zeros(3, 34, 64).half()}), "34 query heads", "1 to 16")
    expect(wrong({"q": torch.zeros(3, 6 * 64).half()}), "[3, 384]", "[tokens, q_heads, head_dim]")
    expect(wrong({"q": torch.zeros(3, 6, 32).half()}), "head_dim", "32", "64")
    expect(wrong({"window": 0}), "window of an attention variant is 0, expected an integer from 1 on")
    expect(wrong({"soft_cap": -1.0}), "soft_cap is -1.0, expected a positive number")
    large = {"q": torch.zeros(3, 6, 256).half(), "kv_cache": torch.zeros(9, 2, 16, 2, 256).half(), "device": "emulator"}
    expect(wrong(large), "head_dim 256 for the kernel of all GPUs, expected at most 128")
    expect(wrong({"q": torch.zeros(3, 6, 64)}), "q of torch.float32", "kv_cache of torch.float16", "quantized_cache")
    expect(wrong({"kv_cache": torch.zeros(9, 2, 24, 2, 64).half()}), "page_size 24", "16, 32 or a multiple of 64")
    expect(wrong({"q_start": torch.zeros(2, dtype=torch.int32)}), "[2]", "[3]")
    expect(wrong({"kv_lens": torch.zeros(2, dtype=torch.int64)}), "int64", "int32")
    expect(wrong({"block_tables": torch.zeros(3, 4, dtype=torch.int32)}), "sequences", "3", "2")


def test_work_grows_with_what_the_mask_shows() -> None:
    """Query tiles only visit kv tiles that some query of theirs sees: cached tokens behind it are never read."""
    batch = Batch(((64, 64), (64, 64)), kv_heads=1, group=1)
    inputs = make_inputs(batch, 0)
    lengths: Sequence[int] = (64, 4)
    inputs.kv_lens[:] = torch.tensor(lengths, dtype=torch.int32)
    found = paged_attention(*vars(inputs).values(), device="reference")
    assert found[:64].isfinite().all()
    assert (found[64 : 64 + 60] == 0).all() and (found[64 + 60 :] != 0).any()
