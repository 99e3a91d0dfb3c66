"""paged_prefill over quantised caches against attention in float64 of the elements that codes stand for, rounded to f16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attention_batches import Batch, Inputs, exact_attention, exact_lse, limit_of
from test_kv_cache import FORMATS, NAMES, OWN_FORMATS, moved, numbers_of
from test_paged_attention import quantized_inputs, starts

import tilus
from tilus.kernels.attention_variant import GivenVariant, Variant
from tilus.kernels.kv_cache import QuantizedCache, quantized_cache
from tilus.kernels.paged_decode import units_of_codes
from tilus.kernels.paged_prefill import (
    PrefillPlan,
    as_f16,
    launch,
    paged_prefill,
    paged_prefill_kernel,
    partials_of,
    plans_of_codes,
)
from tilus.ptx.assembler import SpillError
from tilus.runtime.binaries import build
from tilus.target import get_target

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EXECUTIONS = [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("reference", "emulator")), CUDA]
PLAN = PrefillPlan(2, registers=224, registers_to_copy=32, code_stages=3)
MIXED = ((0, 20), (18, 18), (5, 2), (9, 150), (1, 0), (40, 129))


def elements_of(cache: QuantizedCache) -> torch.Tensor:
    """f16 [pages, 2, page_size, Hkv, D]: products and sums of f16 numbers are exact in float64, and then rounded once."""
    with np.errstate(invalid="ignore"):
        rounded = numbers_of(cache)[1].astype(np.float16)
    return torch.from_numpy(rounded).permute(0, 2, 3, 1, 4)


def check(
    name: str, batch: Batch, device: str, plan: PrefillPlan | None = None, splits: int = 1
) -> None:  # fmt: skip
    """Results as close as those of a cache of f16, but for one rounding to q's dtype; NaN is in all that nobody sees."""
    q, cache, tables, lens = quantized_inputs(name, batch)
    scale = batch.head_dim**-0.5
    inputs = Inputs(q, elements_of(cache), tables, starts(batch, 0), lens, scale)
    given = [q, tables, inputs.q_start, lens]
    queries, table, q_start, kv_lens = [t.cuda() for t in given] if device == "cuda" else given
    arguments = queries, moved(cache, device), table, q_start, kv_lens, scale
    if plan is None:
        out, lse = paged_prefill(*arguments, return_lse=True, device=device)
    else:
        out, lse = launch(*arguments, True, plan, 2, True, device, splits=splits)
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
    check(name, Batch(MIXED, group=2, dtype=dtype), device, PLAN)


@pytest.mark.parametrize("device", ["reference", *EXECUTIONS[1:]])
def test_a_tile_of_rows_that_two_blocks_share(device: str) -> None:
    """Of nine tiles of the cache, the last one of which ends inside of a page."""
    batch = Batch(((4, 135),), kv_heads=1, group=1, dtype=torch.bfloat16)
    check("int4", batch, device, replace(PLAN, heads=1, kv_tile=16), splits=2)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("group", "head_dim", "page_size", "dtype"),
    [
        (1, 128, 16, torch.bfloat16),
        (3, 96, 32, torch.float16),
        (16, 64, 128, torch.bfloat16),
        (4, 128, 256, torch.float16),
    ],
)
def test_shapes(group: int, head_dim: int, page_size: int, dtype: torch.dtype, name: str, device: str) -> None:
    batch = Batch(
        ((20, 20), (5, 150), (1, 300)), kv_heads=1, group=group, head_dim=head_dim, page_size=page_size, dtype=dtype
    )
    check(name, batch, device)


@pytest.mark.parametrize("device", ["emulator", CUDA])
@pytest.mark.parametrize(
    ("name", "group", "page_size"),
    [
        ("fp8", 2, 16),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [("int4", 4, 16), ("int8", 1, 64)]),
    ],
)
def test_heads_of_256(name: str, group: int, page_size: int, device: str) -> None:
    """Keys and values go through the registers of the same warps."""
    shape: dict[str, Any] = {"group": group, "head_dim": 256, "page_size": page_size, "dtype": torch.bfloat16}
    check(name, Batch(((20, 20), (5, 70)), kv_heads=1, **shape), device)


@pytest.mark.parametrize("device", ["emulator", CUDA])
@pytest.mark.parametrize(
    "name", ["int2", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in OWN_FORMATS if n != "int2")]
)
def test_formats_of_ones_own(name: str, device: str) -> None:
    check(name, Batch(((20, 20), (5, 150), (1, 90)), kv_heads=1, group=2, dtype=torch.bfloat16), device, PLAN)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("stages", [(1, 1, 6), (1, 2, 2), (2, 1, 3), (2, 2, 1)])
def test_stages(stages: tuple[int, int, int], device: str) -> None:
    """Of keys, of values and of codes: any numbers will do, whatever their turns."""
    keys, values, codes = stages
    plan = replace(PLAN, kv_tile=64, key_stages=keys, value_stages=values, code_stages=codes)
    check("fp8", Batch(((70, 300), (3, 200)), kv_heads=1, group=2), device, plan)


def soft_cap(score: Any, at: Any) -> Any:
    return tilus.tanh(score * 0.5) * 2.0


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_codes_have_the_bits_of_their_elements(name: str, device: str) -> None:
    """As a cache of f16 holds them: what computes does not know of codes. So variants, splits and all else hold for both."""
    batch = Batch(((40, 150), (3, 300)), group=2)
    q, cache, tables, lens = quantized_inputs(name, batch)
    table, q_start, kv_lens, own = [t.cuda() if device == "cuda" else t for t in (tables, starts(batch, 0), lens, q)]
    given = GivenVariant(Variant(soft_cap, window=100), None, None)

    def attend(kv_cache: Any, plan: PrefillPlan) -> torch.Tensor:
        out, _ = launch(own, kv_cache, table, q_start, kv_lens, 0.125, True, plan, 2, True, device, given, splits=2)
        return out.cpu()

    elements = elements_of(cache).contiguous()
    plain = replace(PLAN, kv_tile=16, registers=232, registers_to_copy=40)
    found = attend(moved(cache, device), replace(PLAN, kv_tile=16))
    assert (
        torch.equal(found, attend(elements.cuda() if device == "cuda" else elements, plain)) and found.isfinite().all()
    )


SHAPES = [
    (128, 4, 16, torch.bfloat16, True), (64, 2, 128, torch.float16, False), (96, 16, 32, torch.bfloat16, True),
    (256, 4, 16, torch.bfloat16, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(
            name, shape, marks=() if shape == SHAPES[0] and name in ("fp8", "int2") else pytest.mark.exhaustive
        )
        for name in FORMATS
        for shape in SHAPES
        if shape[0] * FORMATS[name].code.nbits % 128 == 0
    ],
)
def test_assembles_without_spills(name: str, shape: tuple[int, int, int, torch.dtype, bool]) -> None:
    assert_assembles(name, shape, splits=1)


@pytest.mark.parametrize("name", ["fp8", pytest.param("int8", marks=pytest.mark.exhaustive)])
def test_partial_results_have_room_beside_codes(name: str) -> None:
    assert_assembles(name, SHAPES[0], splits=2)


def assert_assembles(name: str, shape: tuple[int, int, int, torch.dtype, bool], splits: int) -> None:
    """The best plan; with heads of 256 one of them."""
    head_dim, heads, page_size, dtype, causal = shape
    cache = quantized_cache(FORMATS[name], 4, page_size, 2, head_dim)
    q, table, starts_ = (
        torch.zeros(2, 2, heads, head_dim, dtype=dtype),
        torch.zeros(2, 2, dtype=torch.int32),
        torch.zeros(3).int(),
    )
    bits, q_type = as_f16(q)
    plans = plans_of_codes(heads, head_dim, cache.format.code.nbits)
    for plan in plans if head_dim == 256 else plans[:1]:
        special = paged_prefill_kernel.specialize(
            bits, units_of_codes(cache), table, starts_, table[0], q, 1.0, 132, torch.zeros(2, 2, heads), None, None, None,
            cache.factors, *partials_of(q[0], 4, splits),
            head_dim=head_dim, page_size=page_size, kv_heads=2, group=heads, causal=causal, kind=cache.format, plan=plan,
            q_type=q_type,
        )  # fmt: skip
        try:
            compiled, cubin = build(special.function, get_target("sm_90a"))
        except SpillError:
            continue
        assert cubin and "wgmma.mma_async" in compiled.ptx and ".f32.f16.f16" in compiled.ptx
        return
    raise AssertionError(f"all of {plans} spill registers")
