"""Random paged batches on the GPU, in copies that exceed the L2 cache, and f32 attention to check results with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from paged.cases import Case
from tilus.kernels.kv_cache import QuantizedCache, quantized_cache

L2_MULTIPLE = 3  # what the copies of a cache add up to at least, in sizes of the L2 cache
MOST_CHECKED = 3  # sequences
MOST_QUERIES = 96  # of each, at random
BOUND = 4.5e-3  # of the relative L2 error: the rounding of weights and results to bf16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """caches: [pages, 2, page, kv_heads, head_dim] or quantised, the same numbers in all; pages are in random order. errors: the
    largest of what was checked, by name."""

    case: Case
    q: torch.Tensor
    caches: list[Any]
    block_tables: torch.Tensor
    kv_lens: torch.Tensor
    scale: float
    errors: dict[str, float] = field(default_factory=dict[str, float])

    def contiguous(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [batch, kv_heads, context, head_dim] of a batch of equal lengths."""
        both = self.caches[0][self.block_tables.long()]  # [batch, pages, 2, page, kv_heads, head_dim]
        keys, values = (both[:, :, kind].flatten(1, 2)[:, : self.case.context] for kind in range(2))
        return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()


def random_batch(case: Case, l2_nbytes: int, device: str = "cuda") -> PagedBatch:
    counts = [-(-length // case.page) for length in case.lengths]
    generator = torch.Generator().manual_seed(sum(counts))
    order = torch.randperm(sum(counts), generator=generator).int()
    tables = torch.zeros(case.batch, max(counts), dtype=torch.int32)
    for row, (count, start) in enumerate(zip(counts, torch.tensor([0, *counts]).cumsum(0).tolist())):
        tables[row, :count] = order[start : start + count]
    cache, clone, nbytes = random_cache(case, sum(counts), device)
    copies = max(1, -(-L2_MULTIPLE * l2_nbytes // nbytes))
    dtype = DTYPES.get(case.kv_dtype, torch.bfloat16)
    q = torch.randn(case.batch, case.q_len, case.heads, case.head_dim, device=device).to(dtype)
    lens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    caches = [cache, *(clone() for _ in range(copies - 1))]
    return PagedBatch(case, q, caches, tables.to(device), lens, case.head_dim**-0.5)


def random_cache(case: Case, pages: int, device: str) -> tuple[Any, Callable[[], Any], int]:
    """A cache, what makes a copy of it, and its size in bytes. Elements are of the order of one."""
    if case.kv_dtype in DTYPES:
        shape = (pages, 2, case.page, case.kv_heads, case.head_dim)
        dense = torch.empty(shape, dtype=DTYPES[case.kv_dtype], device=device).normal_()
        return dense, dense.clone, dense.nbytes
    cache = quantized_cache(case.kv_dtype, pages, case.page, case.kv_heads, case.head_dim, device)
    largest = cache.format.largest
    cache.codes.random_(0, 256)
    if case.kv_dtype == "fp8":
        cache.codes[cache.codes.bitwise_and(127) == 127] = 0  # NaN
    cache.factors[:, :, :, 0].uniform_(1.5 / largest, 2.5 / largest)
    if cache.format.has_centre:
        cache.factors[:, :, :, 1] = cache.factors[:, :, :, 0] / 2  # codes from -8 to 7

    def clone() -> QuantizedCache:
        return QuantizedCache(cache.format, cache.codes.clone(), cache.factors.clone())

    return cache, clone, cache.codes.nbytes + cache.factors.nbytes


def elements_of(cache: Any, pages: torch.Tensor) -> torch.Tensor:
    """f32 [pages, 2, page, kv_heads, head_dim]"""
    if not isinstance(cache, QuantizedCache):
        return cache[pages].float()
    raw = cache.codes[pages]
    if cache.format.code.nbits == 4:
        numbers = torch.stack([(raw & 15 ^ 8).char() - 8, (raw >> 4 ^ 8).char() - 8], dim=-1).flatten(-2).float()
    else:
        numbers = raw.view(torch.int8 if cache.format.code.is_integer else torch.float8_e4m3fn).float()
    factors = cache.factors[pages].float()[..., None]
    values = numbers * factors[:, :, :, 0]
    if cache.format.has_centre:
        values += factors[:, :, :, 1]
    return values.permute(0, 2, 3, 1, 4)


def error_of(batch: PagedBatch, out: torch.Tensor) -> float:
    """The largest relative L2 error of the first, a middle and the last sequence against f32. out: like q."""
    case, worst = batch.case, 0.0
    for row in sorted({0, case.batch // 2, case.batch - 1})[:MOST_CHECKED]:
        length = case.lengths[row]
        pages = batch.block_tables[row, : -(-length // case.page)].long()
        # [2, length, kv_heads, head_dim]
        both = elements_of(batch.caches[0], pages).transpose(0, 1).flatten(1, 2)[:, :length]
        keys, values = both.repeat_interleave(case.heads // case.kv_heads, dim=2)
        chosen = torch.randperm(case.q_len, generator=torch.Generator().manual_seed(row))[:MOST_QUERIES].to(out.device)
        scores = torch.einsum("qhd,khd->hqk", batch.q[row, chosen].float(), keys) * batch.scale
        last = length - case.q_len + chosen
        hidden = torch.arange(length, device=scores.device) > last[:, None]
        wanted = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)
        worst = max(worst, float((out[row, chosen].float() - wanted).norm() / wanted.norm()))
    return worst


def check(batch: PagedBatch, out: torch.Tensor, what: str) -> float:
    """The error. Raises: SystemExit where it is too large."""
    error = error_of(batch, out)
    if not error <= BOUND:
        raise SystemExit(f"{what}, {batch.case}: the relative error is {error:.2e}, expected at most {BOUND}")
    batch.errors[what] = max(round(error, 6), batch.errors.get(what, 0.0))
    return error
