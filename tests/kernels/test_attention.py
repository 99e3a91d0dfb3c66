"""paged_attention against attention in float64, over ragged batches, page tables, group sizes and head sizes.

Pages that no sequence uses, and what lies behind a sequence's last token, are NaN; unused entries of block tables are no
pages at all. So a result without NaN also shows that nothing else was looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus import TilusError
from tilus.kernels import paged_attention
from tilus.kernels.attention import paged_attention_kernel
from tilus.runtime.execute import build
from tilus.target import get_target

Array = npt.NDArray[np.float64]
NO_PAGE = 2**20
EXECUTIONS = ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Batch:
    """(queries, cached tokens) of each sequence, and the shape of heads and pages."""

    lengths: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float16


@dataclass(frozen=True, eq=False)
class Inputs:
    q: torch.Tensor
    kv_cache: torch.Tensor
    block_tables: torch.Tensor
    q_start: torch.Tensor
    kv_lens: torch.Tensor
    scale: float


def make_inputs(batch: Batch, seed: int) -> Inputs:
    """Random tensors; pages of a sequence are anywhere in a pool of which the cache is one layer."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-kv // batch.page_size) for _, kv in batch.lengths]
    pages = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    shape = (len(pages), 3, 2, batch.page_size, batch.kv_heads, batch.head_dim)
    cache = torch.full(shape, math.nan, dtype=batch.dtype)[:, 1]
    tables = torch.full((len(counts), max(counts, default=0) + 2), NO_PAGE, dtype=torch.int32)
    for row, ((_, kv), count) in enumerate(zip(batch.lengths, counts, strict=True)):
        mine, pages = pages[:count], pages[count:]
        tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
        for index in range(kv):
            content = torch.randn(2, batch.kv_heads, batch.head_dim, generator=generator)
            cache[mine[index // batch.page_size], :, index % batch.page_size] = content.to(batch.dtype)
    total = sum(queries for queries, _ in batch.lengths)
    q = torch.randn(total, batch.kv_heads * batch.group, batch.head_dim, generator=generator).to(batch.dtype)
    q_start = torch.tensor([0, *itertools.accumulate(queries for queries, _ in batch.lengths)], dtype=torch.int32)
    kv_lens = torch.tensor([kv for _, kv in batch.lengths], dtype=torch.int32)
    return Inputs(q, cache, tables, q_start, kv_lens, batch.head_dim**-0.5)


def exact_attention(inputs: Inputs, batch: Batch) -> tuple[Array, Array]:
    """Softmax attention one query and head at a time; also the sums of weight * |value|, which scale rounding errors."""
    q, cache = inputs.q.double().numpy(), inputs.kv_cache.double().numpy()
    out, size = np.zeros_like(q), np.zeros_like(q)
    row = 0
    for sequence, (queries, kv) in enumerate(batch.lengths):
        table = inputs.block_tables[sequence].tolist()
        tokens = [cache[table[i // batch.page_size], :, i % batch.page_size] for i in range(kv)]
        for query in range(queries):
            seen = max(0, kv - queries + query + 1)
            for head in range(q.shape[1] if seen else 0):
                keys, values = np.stack([token[:, head // batch.group] for token in tokens[:seen]], axis=1)
                scores = keys @ q[row, head] * inputs.scale
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[row, head], size[row, head] = weights @ values, weights @ np.abs(values)
            row += 1
    return out, size


def check(batch: Batch, device: str, seed: int = 0) -> None:
    """The result is off by the rounding of the weights and of the result, plus f32 arithmetic: less than 2^-15 more.

    Weights below the normal numbers of f16 are rounded absolutely, by up to 2^-25 of the largest weight.
    """
    inputs = make_inputs(batch, seed)
    expected, size = exact_attention(inputs, batch)
    tensors = [inputs.q, inputs.kv_cache, inputs.block_tables, inputs.q_start, inputs.kv_lens]
    if device == "cuda":
        tensors = [_on_gpu(t) for t in tensors]
    found = paged_attention(*tensors, inputs.scale, device=device)
    assert found.shape == inputs.q.shape and found.dtype == batch.dtype
    half_step = 2.0**-11 if batch.dtype == torch.float16 else 2.0**-8
    longest = max((kv for _, kv in batch.lengths), default=0)
    limit = half_step * np.abs(expected) + (half_step + 2.0**-15) * size + longest * 2.0**-25 * 5
    error = np.abs(found.cpu().double().numpy() - expected)
    assert (error <= limit).all(), (
        f"{batch}: off by {error.max()}, at most {(error / (limit + 1e-30)).max()} of the limit"
    )


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides: the cache stays a view of a pool."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return copy.copy_(tensor)


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


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("name", SHAPES_OF_BATCHES)
def test_ragged_batches(name: str, device: str) -> None:
    check(Batch(SHAPES_OF_BATCHES[name]), device)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("lengths", [((1, 70), (1, 20)), ((18, 70), (3, 3))], ids=["decode", "prefill"])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_group_sizes(group: int, lengths: tuple[tuple[int, int], ...], device: str) -> None:
    check(Batch(lengths, group=group), device)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("lengths", [((1, 70), (1, 20)), ((18, 70), (3, 3))], ids=["decode", "prefill"])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_head_sizes(head_dim: int, lengths: tuple[tuple[int, int], ...], device: str) -> None:
    check(Batch(lengths, kv_heads=1, head_dim=head_dim), device)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("lengths", [((1, 150), (1, 20)), ((18, 150), (3, 3))], ids=["decode", "prefill"])
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_page_sizes(page_size: int, lengths: tuple[tuple[int, int], ...], device: str) -> None:
    check(Batch(lengths, kv_heads=1, page_size=page_size), device)


@pytest.mark.parametrize("device", EXECUTIONS)
def test_bfloat16(device: str) -> None:
    check(Batch(((1, 70), (18, 30)), dtype=torch.bfloat16), device)


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


@pytest.mark.parametrize("sm", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_assembles_without_spills(sm: str, head_dim: int) -> None:
    """`build` raises for spills."""
    for group, page_size, rows in [(1, 16, 16), (3, 128, 16), (8, 16, 64), (3, 128, 64)]:
        kv_tile = 64 if rows == 16 or head_dim == 64 else 32
        batch = Batch(((1, 5), (2, 33)), group=group, head_dim=head_dim, page_size=page_size)
        inputs, heads = make_inputs(batch, 0), (2, group)
        q = inputs.q.unflatten(1, heads)
        tensors = (q, inputs.kv_cache, inputs.block_tables, inputs.q_start, inputs.kv_lens, torch.empty_like(q))
        special = paged_attention_kernel.specialize(
            *tensors, 1.0, group=group, head_dim=head_dim, page_size=page_size, rows=rows, kv_tile=kv_tile
        )
        compiled, cubin = build(special.function, get_target(sm))
        assert cubin and "mma.sync.aligned.m16n8k16" in compiled.ptx and "ldmatrix" in compiled.ptx


def wrong(change: dict[str, Any], batch: Batch = Batch(((1, 5), (2, 33)))) -> str:
    inputs = {**vars(make_inputs(batch, 0)), **change}
    with pytest.raises(TilusError) as caught:
        paged_attention(**inputs, device="reference")
    return str(caught.value)


def test_arguments_that_do_not_fit_are_refused_with_both_values() -> None:
    def expect(text: str, *parts: str) -> None:
        assert all(part in text for part in parts), text

    expect(wrong({"q": torch.zeros(3, 7, 64).half()}), "7 query heads for 2 kv heads")
    expect(wrong({"q": torch.zeros(3, 34, 64).half()}), "34 query heads", "1 to 16")
    expect(wrong({"q": torch.zeros(3, 6 * 64).half()}), "[3, 384]", "[tokens, q_heads, head_dim]")
    expect(wrong({"q": torch.zeros(3, 6, 32).half()}), "head_dim", "32", "64")
    expect(wrong({"q": torch.zeros(3, 6, 64)}), "f32", "f16")
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
