"""The entry to attention: quantised caches on every device, batches that decode in part, results of another type.

Expected values are attention in float64 over the elements that codes stand for.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from attention_batches import Batch, exact_attention, limit_of, make_inputs, on_gpu
from test_attention_variant import exact
from test_kv_cache import FORMATS, NAMES, NO_PAGE, NOT_NUMBERS, Array, moved, numbers_of, random_cache

from tilus import TilusError
from tilus.kernels import paged_attention, quantized_cache
from tilus.kernels.attention import paged_attention_kernel, rows_of_codes
from tilus.kernels.kv_cache import QuantizedCache
from tilus.runtime.binaries import build
from tilus.target import get_target

EXECUTIONS = ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
MIXED = ((1, 40), (1, 70), (18, 18), (9, 80))


def quantized_inputs(
    name: str, batch: Batch, seed: int = 0
) -> tuple[torch.Tensor, QuantizedCache, torch.Tensor, torch.Tensor]:
    """(q, cache, block tables, lengths); pages that nobody uses, and tokens behind an end, have NaN for factors."""
    size, counts = batch.page_size, [-(-kv // batch.page_size) for _, kv in batch.lengths]
    cache = random_cache(name, sum(counts) + 2, size, batch.kv_heads, batch.head_dim, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    tables = torch.full((len(counts), max(counts) + 1), NO_PAGE, dtype=torch.int32)
    unused = torch.ones(len(order), size, dtype=torch.bool)
    for row, ((_, kv), count) in enumerate(zip(batch.lengths, counts, strict=True)):
        mine, order = order[:count], order[count:]
        tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
        for token in range(kv):
            unused[mine[token // size], token % size] = False
    where = unused[:, None, None, :].expand(cache.codes.shape[:4])
    cache.codes[where] = NOT_NUMBERS.get(name, 0)
    cache.factors.masked_fill_(where[:, :, :, None].expand(cache.factors.shape), math.nan)
    total = sum(queries for queries, _ in batch.lengths)
    q = torch.randn(total, batch.kv_heads * batch.group, batch.head_dim, generator=generator).to(batch.dtype)
    return q, cache, tables, torch.tensor([kv for _, kv in batch.lengths], dtype=torch.int32)


def expected_and_limit(
    batch: Batch, q: torch.Tensor, cache: QuantizedCache, tables: torch.Tensor
) -> tuple[Array, Array]:
    """And how far a result may be off: by the rounding of weights times scales to f16 (absolutely below its normal numbers), of
    queries to f16 where they are bf16 (none: their exponents are near 0), of the result, and f32 arithmetic."""
    numbers, values = numbers_of(cache)
    half_step = 2.0**-11 if batch.dtype == torch.float16 else 2.0**-8
    expected, limit, row = np.zeros(q.shape), np.zeros(q.shape), 0
    for (queries, kv), table in zip(batch.lengths, tables.tolist(), strict=True):
        pages = table[: -(-kv // batch.page_size)]
        for query in range(queries):
            seen = max(0, kv - queries + query + 1)
            for head in range(q.shape[1] if seen else 0):
                own = head // batch.group
                keys, elements = np.concatenate([values[page, own] for page in pages], axis=1)[:, :seen]
                codes = np.concatenate([numbers[page, own, 1] for page in pages], axis=0)[:seen]
                scores = keys @ q[row, head].double().numpy() * batch.head_dim**-0.5
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                expected[row, head], size = weights @ elements, weights @ (np.abs(elements) + 2)
                rounding = (2.0**-11 + 2.0**-14) * size + 2.0**-25 * np.abs(codes).sum(0)
                limit[row, head] = half_step * np.abs(expected[row, head]) + rounding
            row += 1
    return expected, limit


def starts(batch: Batch, decodes: int) -> torch.Tensor:
    lengths = [queries for queries, _ in batch.lengths[decodes:]]
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def check(name: str, batch: Batch, device: str, decodes: int = 0, invariant: bool = False) -> None:
    q, cache, tables, lens = quantized_inputs(name, batch)
    tensors = [q, tables, starts(batch, decodes), lens]
    if device == "cuda":
        tensors = [t.cuda() for t in tensors]
    found = paged_attention(
        tensors[0], moved(cache, device), *tensors[1:], batch.head_dim**-0.5, decodes=decodes, invariant=invariant,
        device=device,
    )  # fmt: skip
    assert found.shape == q.shape and found.dtype == batch.dtype
    expected, limit = expected_and_limit(batch, q, cache, tables)
    error = np.abs(found.cpu().double().numpy() - expected)
    assert (error <= limit).all(), f"{(error / (limit + 1e-30)).max()} of the limit"


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_mixed_batches(name: str, device: str) -> None:
    check(name, Batch(MIXED), device, decodes=2)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("group", "head_dim", "page_size", "dtype"),
    [(1, 16, 32, torch.float16), (4, 128, 16, torch.bfloat16), (16, 80, 128, torch.float16)],
)
def test_quantised_shapes(
    name: str, group: int, head_dim: int, page_size: int, dtype: torch.dtype, device: str
) -> None:
    shape: dict[str, Any] = {"group": group, "head_dim": head_dim, "page_size": page_size, "dtype": dtype}
    check(name, Batch(((1, 150), (1, 5), (5, 2), (0, 3), (19, 70)), kv_heads=1, **shape), device, decodes=2)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("sm", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
@pytest.mark.parametrize(("name", "head_dim", "rows"), [("int8", 64, 16), ("fp8", 128, 64), ("int4", 128, 16)])
def test_quantised_kernels_assemble_without_spills(name: str, head_dim: int, rows: int, sm: str) -> None:
    """`build` raises for spills."""
    cache, q = quantized_cache(name, 4, 16, 2, head_dim), torch.zeros(6, 2, 4, head_dim, dtype=torch.bfloat16)
    numbers = torch.zeros(3, 2, dtype=torch.int32)
    special = paged_attention_kernel.specialize(
        q, rows_of_codes(cache), numbers, numbers[:, 0].contiguous(), q, 1.0, None if rows == 16 else numbers[:, 0].contiguous(),
        cache.factors, group=4, head_dim=head_dim, page_size=16, rows=rows, kv_tile=64 if rows == 16 else 32,
        kind=cache.format,
    )  # fmt: skip
    compiled, cubin = build(special.function, get_target(sm))
    assert cubin and "mma.sync.aligned.m16n8k16" in compiled.ptx and "ldmatrix" in compiled.ptx


def run(batch: Batch, device: str, seed: int = 0, **options: Any) -> torch.Tensor:
    """Of a cache of 16 bits."""
    inputs, decodes = make_inputs(batch, seed), options.get("decodes", 0)
    tensors = [inputs.q, inputs.kv_cache, inputs.block_tables, starts(batch, decodes), inputs.kv_lens]
    if device == "cuda":
        tensors = [on_gpu(t) for t in tensors]
    return paged_attention(*tensors, inputs.scale, device=device, **options).cpu()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("decodes", range(3))
def test_batches_that_decode_in_part(decodes: int, device: str) -> None:
    batch = Batch(MIXED, head_dim=64)
    expected, size = exact_attention(make_inputs(batch, 0), batch)
    error = np.abs(run(batch, device, decodes=decodes).double().numpy() - expected)
    assert (error <= limit_of(batch, expected, size)).all()


@pytest.mark.parametrize("device", EXECUTIONS)
def test_results_of_another_type(device: str) -> None:
    """A bf16 cache for f16 activations: half a step of bf16 in the weights, of f16 in the result."""
    batch = Batch(MIXED, dtype=torch.bfloat16)
    expected, size = exact_attention(make_inputs(batch, 0), batch)
    found = run(batch, device, decodes=2, out_dtype=torch.float16)
    assert found.dtype == torch.float16
    limit = 2.0**-11 * np.abs(expected) + (2.0**-8 + 2.0**-15) * size + 2.0**-25
    assert (np.abs(found.double().numpy() - expected) <= limit).all()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", [None, "fp8", "int4"])
def test_invariant_bits(name: str | None, device: str) -> None:
    """A row that decodes, the same in a chunk with others before it, and alone: the same bits."""
    batch, chunked = Batch(((1, 40), (1, 90), (18, 30))), Batch(((6, 40), (1, 90), (2, 14)))

    def of(lengths: Batch, decodes: int) -> torch.Tensor:
        if name is None:
            whole = make_inputs(Batch(((40, 40), (90, 90), (30, 30))), 0)
            q, cache, tables = whole.q, whole.kv_cache, whole.block_tables
        else:
            q, cache, tables, _ = quantized_inputs(name, Batch(((40, 40), (90, 90), (30, 30))))
        ends = [(0, 40), (40, 90), (130, 30)]
        rows = torch.cat([q[start + kv - n : start + kv] for (start, _), (n, kv) in zip(ends, lengths.lengths)])
        lens = torch.tensor([kv for _, kv in lengths.lengths], dtype=torch.int32)
        tensors = [rows, tables, starts(lengths, decodes), lens]
        if device == "cuda":
            tensors = [t.cuda() for t in tensors]
            cache = on_gpu(cache) if isinstance(cache, torch.Tensor) else moved(cache, device)
        return paged_attention(
            tensors[0], cache, *tensors[1:], 0.125, decodes=decodes, invariant=True, device=device
        ).cpu()  # fmt: skip

    decoded, prefilled = of(batch, 2), of(chunked, 0)
    assert torch.equal(decoded, of(batch, 0)) and torch.equal(decoded[:1], prefilled[5:6])
    assert torch.equal(decoded[1:2], prefilled[6:7]) and torch.equal(decoded[2:4], prefilled[7:9])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [None, "fp8"])
def test_on_hopper_each_part_goes_to_its_kernel(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the emulator, which stands for an H100: those that decode to paged_decode, others to paged_prefill, of codes, too;
    and what comes out is attention."""
    module, called = sys.modules[paged_attention.__module__], list[str]()
    monkeypatch.setattr(module, "_is_hopper", lambda q, where: True)

    def watched(function: str) -> Any:
        real = getattr(module, function)

        def call(*args: Any, **options: Any) -> Any:
            called.append(function)
            return real(*args, **options)

        return call

    for function in ("paged_decode", "paged_prefill", "portable_attention"):
        monkeypatch.setattr(module, function, watched(function))
    batch = Batch(((1, 40), (1, 70), (9, 30)), kv_heads=1)
    if name is None:
        expected, size, _ = exact(
            make_inputs(batch, 0), batch, lambda s, query, key, head: np.where(query - key < 25, s, -np.inf), None
        )
        out = run(batch, "emulator", decodes=2, constant_tables=True, constant_past=True, window=25)
        error = np.abs(out.double().numpy() - expected)
        assert (error <= limit_of(batch, expected, size)).all()
    else:
        check(name, batch, "emulator", decodes=2)
    assert called == ["paged_decode", "paged_prefill"]


def test_arguments_that_do_not_fit_are_refused_with_both_values() -> None:
    inputs = make_inputs(Batch(((1, 5), (2, 33))), 0)

    def wrong(**change: Any) -> str:
        with pytest.raises(TilusError) as caught:
            paged_attention(**(vars(inputs) | {"device": "reference"} | change))
        return str(caught.value)

    assert "decodes = 3 with 3 queries of 2 sequences" in wrong(decodes=3)
    assert "no q_start for 1 sequences" in wrong(decodes=1, q_start=None)
    assert "q_start of shape [3] for 1 sequences, expected [2]" in wrong(decodes=1)
    assert "3 queries of 2 sequences that decode" in wrong(decodes=2, q_start=torch.zeros(1, dtype=torch.int32))
    assert "q of torch.float16 and kv_cache of torch.bfloat16" in wrong(kv_cache=inputs.kv_cache.bfloat16())
    assert "head_dim 64 of q and 32 of kv_cache" in wrong(kv_cache=quantized_cache("int4", 4, 16, 2, 32))
