"""paged_prefill against attention in float64: ragged batches, pages, heads, causal and full; laws of its results."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attention_batches import Batch, Inputs, limit_of, make_inputs, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus import TilusError
from tilus.kernels.kv_cache import quantized_cache
from tilus.kernels.merge_states import merge_states
from tilus.kernels.paged_prefill import PrefillPlan, heads_of, launch, paged_prefill, paged_prefill_kernel, plans_of
from tilus.kernels.paged_prefill_tiles import number
from tilus.runtime.binaries import build
from tilus.target import get_target

Array = npt.NDArray[np.float64]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EXECUTIONS = [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("reference", "emulator")), CUDA]
MIXED = ((0, 20), (1, 40), (18, 18), (70, 300), (5, 2), (1, 0), (9, 80), (1, 129))


def exact(inputs: Inputs, batch: Batch, causal: bool = True) -> tuple[Array, Array, Array]:
    """Attention in float64, the sums of weight * |value|, and logarithms of sums of exp(score), sequence by sequence."""
    q, cache = inputs.q.double().numpy(), inputs.kv_cache.double().numpy()
    out, size, lse, row = np.zeros_like(q), np.zeros_like(q), np.full(q.shape[:2], -np.inf), 0
    for sequence, (queries, length) in enumerate(batch.lengths):
        pages = inputs.block_tables[sequence, : -(-length // batch.page_size)].numpy()
        tokens = cache[pages].swapaxes(0, 1).reshape(2, -1, *cache.shape[3:])[:, :length].repeat(batch.group, axis=2)
        own = slice(row, row + queries)
        row += queries
        if queries == 0 or length == 0:
            continue
        query, key = np.arange(queries)[:, None], np.arange(length)
        seen = (key <= query + length - queries) | (not causal)
        scores = np.where(seen, np.einsum("qhd,khd->hqk", q[own], tokens[0]) * inputs.scale, -np.inf)
        lse[own] = np.logaddexp.reduce(scores, axis=2).T
        weights = np.exp(scores - scores.max(axis=2, keepdims=True, initial=-1e9))
        weights /= np.maximum(weights.sum(axis=2, keepdims=True), 1e-300)
        out[own] = np.einsum("hqk,khd->qhd", weights, tokens[1])
        size[own] = np.einsum("hqk,khd->qhd", weights, np.abs(tokens[1]))
    return out, size, lse


def run(
    inputs: Inputs, device: str, causal: bool = True, plan: PrefillPlan | None = None, blocks: int = 2, splits: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and its logarithms, by the plan, blocks and splits of the library or by those given."""
    tensors = [inputs.q, inputs.kv_cache, inputs.block_tables, inputs.q_start, inputs.kv_lens]
    if device == "cuda":
        tensors = [on_gpu(t) for t in tensors]
    if plan is None:
        out, lse = paged_prefill(*tensors, inputs.scale, causal=causal, return_lse=True, device=device)
    else:
        out, lse = launch(*tensors, inputs.scale, causal, plan, blocks, True, device, splits=splits)
    return out.cpu(), lse.cpu()


def check(
    batch: Batch, device: str, causal: bool = True, plan: PrefillPlan | None = None, seed: int = 0, splits: int = 1
) -> None:  # fmt: skip
    """Results within the bound of `limit_of`, logarithms within f32 arithmetic on scores below 16."""
    inputs = make_inputs(batch, seed)
    out, lse = run(inputs, device, causal, plan, splits=splits)
    expected, size, expected_lse = exact(inputs, batch, causal)
    error, limit = np.abs(out.double().numpy() - expected), limit_of(batch, expected, size)
    assert out.dtype == batch.dtype
    assert (error <= limit).all(), f"{batch}: off by {error.max()}, {(error / (limit + 1e-30)).max()} of the limit"
    found = lse.double().numpy()
    assert np.array_equal(np.isneginf(found), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    assert np.abs(found[finite] - expected_lse[finite]).max(initial=0) < 2.0**-14


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", ["emulator", CUDA])
@pytest.mark.parametrize(
    ("batch", "causal", "heads"),
    [
        (Batch(MIXED, kv_heads=2, group=2), True, 2),
        (Batch(((150, 170), (1, 40)), kv_heads=1, group=3, head_dim=128, page_size=128, dtype=torch.bfloat16), True, 1),
        (Batch(((20, 150), (3, 129)), kv_heads=2, group=16, head_dim=96, page_size=32), False, 16),
    ],
    ids=["mixed", "wide heads", "all heads, not causal"],
)
def test_batches(batch: Batch, causal: bool, heads: int, device: str) -> None:
    """Prefill, chunks, decoding, sequences without queries, queries without keys; more tiles than blocks."""
    check(batch, device, causal, plans_of(heads, batch.head_dim)[0])


@pytest.mark.parametrize("device", EXECUTIONS)
def test_full(device: str) -> None:
    check(Batch(MIXED, kv_heads=2, group=2), device, False, PrefillPlan(2))


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 256, 257])
def test_lengths(length: int, device: str) -> None:
    """At the borders of pieces, pages and tiles: of a whole prompt, of its last query, and of two."""
    check(Batch(((length, length), (1, length), (2, length)), kv_heads=1, group=1), device)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_page_sizes(page_size: int, device: str) -> None:
    check(Batch(((18, 150), (3, 3), (150, 280)), kv_heads=1, group=1, page_size=page_size), device)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_groups(group: int, heads: int, device: str) -> None:
    """Heads of a tile that are some of the group, all of it, and more."""
    check(Batch(((40, 70), (1, 20)), kv_heads=2, group=group), device, plan=PrefillPlan(heads))


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype, device: str) -> None:
    check(Batch(((40, 170), (1, 20)), kv_heads=1, group=2, head_dim=head_dim, dtype=dtype), device)


LENGTHS = st.lists(st.tuples(st.integers(0, 140), st.integers(0, 140)), min_size=1, max_size=3)


def check_any(lengths: list[tuple[int, int]], causal: bool, seed: int) -> None:
    batch = Batch(tuple((queries, queries + past) for queries, past in lengths), kv_heads=1, group=2)
    check(batch, "emulator", causal, PrefillPlan(2), seed)


@given(LENGTHS, st.just(True), st.integers(0, 99))
@settings(max_examples=2)
def test_any_batch(lengths: list[tuple[int, int]], causal: bool, seed: int) -> None:
    check_any(lengths, causal, seed)


@pytest.mark.exhaustive
@given(LENGTHS, st.booleans(), st.integers(0, 99))
@settings(max_examples=30)
def test_many_batches(lengths: list[tuple[int, int]], causal: bool, seed: int) -> None:
    check_any(lengths, causal, seed)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_share_tiles_of_rows(causal: bool, splits: int, device: str) -> None:
    """By tiles of the cache of 16 tokens, so that tiles of rows have one to five parts; some have no keys at all."""
    batch = Batch(((40, 340), (1, 130), (3, 3), (0, 9), (5, 2), (70, 70)), kv_heads=2, group=2)
    check(batch, device, causal, PrefillPlan(2, 16), splits=splits)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("stages", [(1, 1), (3, 2), (2, 3), (5, 4)])
def test_stages(stages: tuple[int, int], device: str) -> None:
    """Of keys and of values: any numbers will do."""
    check(Batch(((70, 300), (3, 200)), kv_heads=1, group=2), device, True, PrefillPlan(2, 48, *stages, 224, 56))


@pytest.mark.parametrize("device", EXECUTIONS[1:])
def test_chunks_have_the_bits_of_the_whole(device: str) -> None:
    """What a query sees is visited in the same tiles, whichever queries are beside it. (Products of the reference are numpy's,
    whose order of sums depends on the number of rows.)"""
    batch = Batch(((200, 200),), kv_heads=1, group=2)
    inputs = make_inputs(batch, 0)
    whole = run(inputs, device, plan=PrefillPlan(2))[0]
    for begin, end in ((0, 70), (70, 71), (71, 200)):
        part = dataclasses.replace(
            inputs, q=inputs.q[begin:end].contiguous(), q_start=torch.tensor([0, end - begin], dtype=torch.int32),
            kv_lens=torch.tensor([end], dtype=torch.int32),
        )  # fmt: skip
        assert torch.equal(run(part, device, plan=PrefillPlan(2))[0], whole[begin:end])


@pytest.mark.parametrize("device", EXECUTIONS)
def test_parts_of_the_keys_merge_to_the_whole(device: str) -> None:
    """All of the first 96 tokens, and the rest of them causally."""
    batch = Batch(((60, 190),), kv_heads=1, group=2)
    inputs = make_inputs(batch, 0)
    out, lse = run(inputs, device)
    first = dataclasses.replace(inputs, kv_lens=torch.tensor([96], dtype=torch.int32))
    rest = dataclasses.replace(
        inputs, block_tables=inputs.block_tables[:, 6:].contiguous(), kv_lens=torch.tensor([94], dtype=torch.int32)
    )
    merged, merged_lse = merge_states(*run(first, device, causal=False), *run(rest, device), device="reference")
    assert (merged.double() - out.double()).abs().max() <= 2.0**-9 * out.abs().max()
    assert (merged_lse - lse).abs().max() <= 2.0**-16


@pytest.mark.parametrize("device", EXECUTIONS)
def test_pages_may_be_anywhere(device: str) -> None:
    batch = Batch(((40, 200), (17, 17)), kv_heads=1, group=2)
    inputs = make_inputs(batch, 0)
    order = torch.randperm(inputs.kv_cache.shape[0], generator=torch.Generator().manual_seed(1))
    moved = inputs.block_tables.clone()
    for old, new in enumerate(torch.argsort(order).tolist()):
        moved[inputs.block_tables == old] = new
    elsewhere = dataclasses.replace(inputs, kv_cache=inputs.kv_cache[order], block_tables=moved)
    assert all(map(torch.equal, run(elsewhere, device, plan=PrefillPlan(2)), run(inputs, device, plan=PrefillPlan(2))))


def test_large_scores_do_not_overflow() -> None:
    """Scores of up to 2000, where exp alone overflows: the largest one takes all of the weight."""
    batch = Batch(((2, 70),), kv_heads=1, group=2)
    inputs = dataclasses.replace(make_inputs(batch, 0), scale=50.0)
    (found, _), (expected, _, _) = run(inputs, "reference", plan=PrefillPlan(2)), exact(inputs, batch)
    assert np.allclose(found.double().numpy(), expected, rtol=0, atol=2.0**-8)


def test_nothing_to_do() -> None:
    assert run(make_inputs(Batch(((0, 5), (0, 0))), 0), "reference")[0].shape == (0, 6, 64)


def test_heads_of_a_tile_waste_no_rows() -> None:
    """Long prompts take heads that divide the group; single queries take the whole group."""
    assert [heads_of(4096, 1, group) for group in (1, 2, 3, 4, 6, 7, 8, 12, 16)] == [1, 2, 1, 4, 2, 1, 8, 4, 16]
    assert [heads_of(8, 8, group) for group in (1, 2, 3, 4, 6, 7, 8, 12, 16)] == [1, 2, 4, 4, 8, 8, 8, 16, 16]


KINDS = [
    (head_dim, heads, page_size, dtype, causal)
    for head_dim in (64, 96, 128, 256)
    for heads, page_size, dtype, causal in [
        (4, 16, torch.bfloat16, True), (1, 16, torch.float16, False), (2, 32, torch.bfloat16, False),
        (8, 64, torch.float16, True), (16, 128, torch.bfloat16, True), (1, 256, torch.bfloat16, True),
    ]
]  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "heads", "page_size", "dtype", "causal"),
    [pytest.param(*kind, marks=() if kind == KINDS[12] else pytest.mark.exhaustive) for kind in KINDS],
)
def test_assembles_without_spills(head_dim: int, heads: int, page_size: int, dtype: torch.dtype, causal: bool) -> None:
    """`build` raises for spills and for waits that the assembler puts between products."""
    q, cache = torch.zeros(2, 2, heads, head_dim, dtype=dtype), torch.zeros(4, 2, page_size, 2, head_dim, dtype=dtype)
    table, starts = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    special = paged_prefill_kernel.specialize(
        q, cache, table, starts, table[0], q, 1.0, 132, torch.zeros(2, 2, heads), head_dim=head_dim, page_size=page_size,
        kv_heads=2, group=heads, causal=causal, plan=plans_of(heads, head_dim)[0],
    )  # fmt: skip
    compiled, cubin = build(special.function, get_target("sm_90a"))
    assert cubin and "cp.async.bulk.tensor.5d" in compiled.ptx and "wgmma.mma_async" in compiled.ptx


def wrong(**change: Any) -> str:
    given_ = {**vars(make_inputs(Batch(((1, 5), (2, 33))), 0)), "device": "reference", **change}
    with pytest.raises(TilusError) as caught:
        paged_prefill(**given_)
    return str(caught.value)


def test_arguments_that_do_not_fit_are_refused_with_both_values() -> None:
    def expect(text: str, *parts: str) -> None:
        assert all(part in text for part in parts), text

    half = torch.float16
    expect(wrong(q=torch.zeros(3, 7, 64, dtype=half)), "7 query heads for 2 kv heads")
    expect(wrong(q=torch.zeros(3, 34, 64, dtype=half)), "34 query heads", "1 to 16")
    expect(wrong(q=torch.zeros(3, 384, dtype=half)), "[3, 384]", "[tokens, q_heads, head_dim]")
    expect(wrong(q=torch.zeros(3, 6, 32, dtype=half)), "head_dim", "32", "64")
    expect(wrong(q=torch.zeros(3, 6, 64)), "float32", "float16", "QuantizedCache")
    expect(wrong(q=torch.zeros(3, 6, 96, dtype=half)), "head_dim 96 of q and 64 of kv_cache")
    expect(
        wrong(kv_cache=quantized_cache("fp8", 9, 16, 2, 80), q=torch.zeros(3, 6, 80, dtype=half)),
        "head_dim 80",
        "64, 96, 128, 256",
    )
    eighty = {"q": torch.zeros(3, 6, 80, dtype=half), "kv_cache": torch.zeros(9, 2, 16, 2, 80, dtype=half)}
    expect(wrong(**eighty), "head_dim 80", "64, 96, 128, 256")
    expect(wrong(kv_cache=torch.zeros(9, 2, 24, 2, 64, dtype=half)), "page_size 24", "16, 32, 64 or a multiple of 128")
    expect(wrong(q_start=torch.zeros(2, dtype=torch.int32)), "[2]", "[3]")
    expect(wrong(kv_lens=torch.zeros(2, dtype=torch.int64)), "int64", "int32")
    expect(wrong(block_tables=torch.zeros(3, 4, dtype=torch.int32)), "sequences", "3", "2")
    expect(wrong(scale=-1.0), "-1.0", "more than 0")


@given(blocks=st.integers(1, 300), turns=st.integers(1, 40))
def test_each_number_is_taken_once(blocks: int, turns: int) -> None:
    taken = [number(turn, block, blocks) for turn in range(turns) for block in range(blocks)]
    assert sorted(taken) == list(range(turns * blocks))


@pytest.mark.parametrize(
    ("batch", "queries", "most"), [(16, 1024, 1.06), (4, 4096, 1.06), (1, 16384, 1.02), (16, 512, 1.12)]
)
def test_blocks_have_about_the_same_to_do(batch: int, queries: int, most: float) -> None:
    """Causal prompts of 8 kv heads on 132 blocks, in tiles of 32 queries and 128 keys, and the ends of each."""
    lengths = [(tile * 32 + 31) // 128 + 2.5 for _ in range(batch) for tile in range(queries // 32)]
    costs = [length for length in reversed(lengths) for _ in range(8)]
    turns = -(-len(costs) // 132)
    found = [
        sum(costs[at] for turn in range(turns) if (at := number(turn, block, 132)) < len(costs)) for block in range(132)
    ]
    assert max(found) <= most * sum(found) / 132
