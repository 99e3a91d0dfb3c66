"""Ragged batches over paged caches, and attention in float64: what the tests of attention kernels share.

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


def exact_lse(inputs: Inputs, batch: Batch) -> Array:
    """Logarithms of the sums of exp(scaled score), [tokens, heads]; minus infinity where there is no key."""
    q, cache = inputs.q.double().numpy(), inputs.kv_cache[:, 0].double().numpy()
    result = np.full(q.shape[:2], -np.inf)
    row = 0
    for sequence, (queries, kv) in enumerate(batch.lengths):
        table = inputs.block_tables[sequence].tolist()
        keys = [cache[table[i // batch.page_size], i % batch.page_size] for i in range(kv)]
        for query in range(queries):
            for head in range(q.shape[1]):
                scores = [key[head // batch.group] @ q[row, head] for key in keys[: max(0, kv - queries + query + 1)]]
                result[row, head] = np.logaddexp.reduce(np.array(scores) * inputs.scale) if scores else -np.inf
            row += 1
    return result


def limit_of(batch: Batch, expected: Array, size: Array) -> Array:
    """How far a result may be off: by the rounding of the weights and of the result, plus f32 arithmetic, less than 2^-15 more.

    Weights below the normal numbers of f16 are rounded absolutely, by up to 2^-25 of the largest weight.
    """
    half_step = 2.0**-11 if batch.dtype == torch.float16 else 2.0**-8
    longest = max((kv for _, kv in batch.lengths), default=0)
    return half_step * np.abs(expected) + (half_step + 2.0**-15) * size + longest * 2.0**-25 * 5


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides: the cache stays a view of a pool."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return copy.copy_(tensor)
