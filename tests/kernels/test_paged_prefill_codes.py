"""paged_prefill over quantised caches against attention in float64 of the elements that codes stand for, rounded to f16."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from attention_batches import Batch, Inputs, exact_attention, exact_lse, limit_of
from test_kv_cache import NAMES, moved, numbers_of
from test_paged_attention import quantized_inputs, starts

from tilus.kernels.kv_cache import KV_FORMATS, QuantizedCache, quantized_cache
from tilus.kernels.paged_decode import units_of_codes
from tilus.kernels.paged_prefill import (
    PrefillPlan,
    as_f16,
    launch,
    paged_prefill,
    paged_prefill_kernel,
    plans_of_codes,
)
from tilus.runtime.execute import build
from tilus.target import get_target

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EXECUTIONS = [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("reference", "emulator")), CUDA]
MIXED = ((0, 20), (18, 18), (5, 2), (9, 150), (1, 0), (40, 129))


def elements_of(cache: QuantizedCache) -> torch.Tensor:
    """f16 [pages, 2, page_size, Hkv, D]: products and sums of f16 numbers are exact in float64, and then rounded once."""
    with np.errstate(invalid="ignore"):
        rounded = numbers_of(cache)[1].astype(np.float16)
    return torch.from_numpy(rounded).permute(0, 2, 3, 1, 4)


def check(name: str, batch: Batch, device: str, plan: PrefillPlan | None = None, blocks: int = 2) -> None:
    """Results as close as those of a cache of f16, but for one rounding to q's dtype; NaN is in all that nobody sees."""
    q, cache, tables, lens = quantized_inputs(name, batch)
    scale = batch.head_dim**-0.5
    inputs = Inputs(q, elements_of(cache), tables, starts(batch, 0), lens, scale)
    tensors = [q, tables, inputs.q_start, lens]
    if device == "cuda":
        tensors = [t.cuda() for t in tensors]
    arguments = tensors[0], moved(cache, device), *tensors[1:]
    if plan is None:
        out, lse = paged_prefill(*arguments, scale, return_lse=True, device=device)
    else:
        out, lse = launch(*arguments, scale, True, plan, blocks, True, device)
    (expected, size), wanted = exact_attention(inputs, batch), exact_lse(inputs, batch)
    error = np.abs(out.cpu().double().numpy() - expected)
    limit = limit_of(batch, expected, size, weight_step=2.0**-11)
    assert out.dtype == batch.dtype
    assert (error <= limit).all(), f"off by {error.max()}, {(error / (limit + 1e-30)).max()} of the limit"
    found, finite = lse.cpu().double().numpy(), np.isfinite(wanted)
    assert np.array_equal(np.isneginf(found), ~finite)
    assert np.abs(found[finite] - wanted[finite]).max(initial=0) < 2.0**-14


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_batches(dtype: torch.dtype, name: str, device: str) -> None:
    """Prompts, chunks, decoding, sequences without queries, queries without keys; more tiles than blocks."""
    check(name, Batch(MIXED, group=2, dtype=dtype), device, PrefillPlan(2, registers=216, code_stages=3))


@pytest.mark.parametrize("name", NAMES)
def test_chunk(name: str) -> None:
    check(name, Batch(((7, 39),), kv_heads=1, group=2, dtype=torch.bfloat16), "emulator", PrefillPlan(2, 64, registers=216, code_stages=3))
