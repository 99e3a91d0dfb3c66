"""Ragged batches over paged caches of latents, and multi-head latent attention in float64: what its tests share.

Pages that no sequence uses, and what lies behind a sequence's last token, are NaN; unused entries of block tables are no
pages at all. So a result without NaN also shows that nothing else was looked at.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
NO_PAGE = 2**20
LATENT, WIDTH = 512, 576  # DeepSeek-V2, arXiv 2405.04434: the value is the first 512 of the key's 576 elements
SCALE = 192**-0.5  # heads of 128 + 64 elements before absorption


@dataclass(frozen=True)
class LatentBatch:
    """(queries, cached tokens) of each sequence, and the shape of heads and pages."""

    lengths: tuple[tuple[int, int], ...]
    heads: int = 16
    page_size: int = 16
    dtype: torch.dtype = torch.float16


@dataclass(frozen=True, eq=False)
class LatentInputs:
    """q: [tokens, heads, 576]."""

    q: torch.Tensor
    cache: torch.Tensor
    block_tables: torch.Tensor
    q_start: torch.Tensor
    kv_lens: torch.Tensor


def make_inputs(batch: LatentBatch, seed: int = 0) -> LatentInputs:
    """Random tensors; pages of a sequence are anywhere in a pool of which the cache is one layer."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-kv // batch.page_size) for _, kv in batch.lengths]
    pages = torch.randperm(sum(counts) + 3, generator=generator)
    cache = torch.full((len(pages), 2, batch.page_size, WIDTH), math.nan, dtype=batch.dtype)[:, 1]
    tables = torch.full((len(counts), max(counts, default=0) + 2), NO_PAGE, dtype=torch.int32)
    for row, ((_, kv), count) in enumerate(zip(batch.lengths, counts, strict=True)):
        mine, pages = pages[:count], pages[count:]
        tables[row, :count] = mine
        content = torch.full((count * batch.page_size, WIDTH), math.nan, dtype=batch.dtype)
        content[:kv] = torch.randn(kv, WIDTH, generator=generator)
        cache[mine] = content.view(count, batch.page_size, WIDTH)
    total = sum(queries for queries, _ in batch.lengths)
    q = torch.randn(total, batch.heads, WIDTH, generator=generator).to(batch.dtype)
    q_start = torch.tensor([0, *itertools.accumulate(queries for queries, _ in batch.lengths)], dtype=torch.int32)
    return LatentInputs(q, cache, tables, q_start, torch.tensor([kv for _, kv in batch.lengths], dtype=torch.int32))


@dataclass(frozen=True, eq=False)
class Exact:
    """out [tokens, heads, 512]; size: the sums of weight * |value|, which scale rounding errors; lse [tokens, heads]."""

    out: Array
    size: Array
    lse: Array


def exact_attention(inputs: LatentInputs, batch: LatentBatch) -> Exact:
    """One query token at a time, in float64."""
    q, cache = inputs.q.double().numpy(), inputs.cache.double().numpy()
    out, lse = np.zeros((*q.shape[:2], LATENT)), np.full(q.shape[:2], -np.inf)
    size, row = np.zeros_like(out), 0
    for sequence, (queries, kv) in enumerate(batch.lengths):
        table = inputs.block_tables[sequence].tolist()
        tokens = [cache[table[i // batch.page_size], i % batch.page_size] for i in range(kv)]
        for query in range(queries):
            seen = max(0, kv - queries + query + 1)
            if seen:
                keys = np.stack(tokens[:seen])
                scores = q[row] @ keys.T * SCALE
                lse[row] = np.logaddexp.reduce(scores, axis=1)
                weights = np.exp(scores - lse[row][:, None])
                out[row], size[row] = weights @ keys[:, :LATENT], weights @ np.abs(keys[:, :LATENT])
            row += 1
    return Exact(out, size, lse)


def assert_close(out: torch.Tensor, lse: torch.Tensor, inputs: LatentInputs, batch: LatentBatch) -> None:
    """Off by no more than the rounding of weights and of the result, half a step each, plus f32 arithmetic, less than 2^-15 of
    the weights. Weights below the normal numbers of f16 are rounded absolutely, by up to 2^-25 of the largest one."""
    exact = exact_attention(inputs, batch)
    assert out.dtype == batch.dtype and lse.dtype == torch.float32
    half_step = 2.0**-11 if batch.dtype == torch.float16 else 2.0**-8
    longest = max((kv for _, kv in batch.lengths), default=0)
    limit = half_step * np.abs(exact.out) + (half_step + 2.0**-15) * exact.size + longest * 2.0**-25 * 5
    error = np.abs(out.double().cpu().numpy().reshape(exact.out.shape) - exact.out)
    assert (error <= limit).all(), f"{batch}: off by {error.max()}, {(error / (limit + 1e-30)).max()} of the limit"
    found = lse.double().cpu().numpy().reshape(exact.lse.shape)
    finite = np.isfinite(exact.lse)
    assert np.array_equal(np.isneginf(found), ~finite)
    assert np.abs(found[finite] - exact.lse[finite]).max(initial=0) < 2.0**-14


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides: the cache stays a view of a pool."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return copy.copy_(tensor)
