"""paged_decode against attention in float64: batches, heads, pages, numbers of queries, and divisions among blocks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from attention_batches import Batch, exact_attention, exact_lse, limit_of, make_inputs, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus import TilusError
from tilus.kernels import paged_decode
from tilus.kernels.paged_decode import DecodePlan, launch, most_queries, paged_decode_kernel, plans
from tilus.kernels.paged_decode_split import Split
from tilus.ptx.assembler import SpillError
from tilus.runtime.binaries import build
from tilus.target import get_target

TILE = 64
EXECUTIONS = ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
SKEWED = (1, 300, 0, 65, 17, 128)


def decode_batch(kv_lens: tuple[int, ...], q_len: int = 1, **shape: Any) -> Batch:
    return Batch(tuple((q_len, n) for n in kv_lens), **shape)


def without_spills(candidates: Iterable[DecodePlan], launch_by: Callable[[DecodePlan], Any]) -> Any:
    """What the first plan gives whose kernel the assembler of this machine has registers for."""
    for plan in candidates:
        try:
            return launch_by(plan)
        except SpillError as error:
            spilled = error
    raise spilled


def plan_for(q_len: int, batch: Batch, crowded: bool = False) -> DecodePlan:
    return plans(q_len, batch.group, batch.head_dim, batch.page_size, 16, crowded)[0]


def run(
    batch: Batch, device: str, blocks: int, split: Split | None = None, plan: DecodePlan | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [tokens, heads, head_dim] and the logarithms [tokens, heads] by so many blocks.

    More queries than fit into a launch go by the public function, on as many blocks as it likes.
    """
    inputs, q_len = make_inputs(batch, seed), batch.lengths[0][0]
    q = inputs.q.unflatten(0, (len(batch.lengths), q_len))
    tensors = [q, inputs.kv_cache, inputs.block_tables, inputs.kv_lens]
    if device == "cuda":
        tensors = [on_gpu(t) for t in tensors]
    if q_len > most_queries(batch.group, batch.head_dim):
        out, lse = paged_decode(*tensors, inputs.scale, return_lse=True, device=device)
    else:
        candidates = [plan] if plan else plans(q_len, batch.group, batch.head_dim, batch.page_size, 16, crowded=False)
        out, lse = without_spills(candidates, lambda plan: launch(
            *tensors, inputs.scale, plan, split or Split(min(plan.tile, batch.page_size)), blocks, True, device
        ))  # fmt: skip
    assert out.shape == q.shape and out.dtype == batch.dtype and lse.shape == q.shape[:3]
    return out.flatten(0, 1).cpu(), lse.flatten(0, 1).cpu()


def check(
    batch: Batch, device: str, blocks: int = 3, split: Split | None = None, plan: DecodePlan | None = None
) -> None:
    """Results within the bound of `limit_of`, with weights of 11 bits or more; logarithms within f32 arithmetic."""
    inputs = make_inputs(batch, 0)
    out, lse = run(batch, device, blocks, split, plan)
    expected, size = exact_attention(inputs, batch)
    error, limit = np.abs(out.double().numpy() - expected), limit_of(batch, expected, size, 2.0**-11)
    assert (error <= limit).all(), f"{batch}: off by {error.max()}, {(error / (limit + 1e-30)).max()} of the limit"
    expected_lse = exact_lse(inputs, batch)
    found = lse.double().numpy()
    assert np.array_equal(np.isneginf(found), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    assert np.abs(found[finite] - expected_lse[finite]).max(initial=0) < 2.0**-14


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("blocks", [pytest.param(1, marks=pytest.mark.exhaustive), 29])
def test_skewed_batch(blocks: int, device: str) -> None:
    """Sequences without tokens, of a part of a page, of many tiles; more blocks than units."""
    check(decode_batch(SKEWED, head_dim=64), device, blocks)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("kv_len", [1, pytest.param(65, marks=pytest.mark.exhaustive), 129 * 16])
def test_lengths(kv_len: int, device: str) -> None:
    """At the edges of pages and tiles; more pages than the copying warp holds, and more parts than are merged at a time."""
    blocks = 29 if kv_len > 2000 else 2
    check(decode_batch((kv_len,), kv_heads=1, group=8, head_dim=64), device, blocks)


@pytest.mark.parametrize("page_size", [16, 128])
def test_a_part_of_more_pages_than_are_looked_up_at_once(page_size: int) -> None:
    """Twice over, and the last ones fewer."""
    check(decode_batch((1100,), kv_heads=1, group=1, head_dim=64, page_size=page_size), "reference", blocks=1)


@pytest.mark.parametrize("device", ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pages_behind_the_end_are_not_looked_at(device: str) -> None:
    """Entries behind the last one may name pages of others, here of NaN."""
    batch = decode_batch((32, 17), kv_heads=1, group=1, head_dim=64)
    inputs, right = make_inputs(batch, 0), run(batch, "reference", 2)[0]
    unused = set(range(inputs.kv_cache.shape[0])) - set(inputs.block_tables.flatten().tolist())
    tables = torch.where(inputs.block_tables < inputs.kv_cache.shape[0], inputs.block_tables, min(unused))
    tensors = [inputs.q[:, None], inputs.kv_cache, tables.int(), inputs.kv_lens]
    out = paged_decode(*([on_gpu(t) for t in tensors] if device == "cuda" else tensors), inputs.scale, device=device)
    assert (out[:, 0].float().cpu() - right.float()).abs().max() <= 2.0**-8 * right.float().abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("q_len", range(1, 9))
def test_all_columns(q_len: int, group: int, head_dim: int) -> None:
    """Few and many columns: groups of them for different warps, and padding of tokens and of heads."""
    check(decode_batch((70, 2, 150, 0), q_len, kv_heads=2, group=group, head_dim=head_dim), "cuda", blocks=4)


@pytest.mark.parametrize(
    ("q_len", "group", "head_dim"),
    [
        (8, 8, 64),
        (5, 3, 128),
        pytest.param(3, 16, 256, marks=pytest.mark.exhaustive),
        pytest.param(1, 16, 96, marks=pytest.mark.exhaustive),
        pytest.param(3, 4, 256, marks=pytest.mark.exhaustive),
    ],
)
def test_columns(q_len: int, group: int, head_dim: int) -> None:
    check(decode_batch((70, 2), q_len, kv_heads=1, group=group, head_dim=head_dim), "emulator", blocks=2)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("page_size", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (16, 64)), 32, 128])
def test_page_sizes(page_size: int, device: str) -> None:
    check(decode_batch((70, 200), kv_heads=1, group=2, page_size=page_size), device, blocks=3)


@pytest.mark.parametrize("device", EXECUTIONS)
def test_bfloat16(device: str) -> None:
    check(decode_batch((70, 33), q_len=2, kv_heads=1, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize(
    "plan",
    [DecodePlan(64, 1, 2), pytest.param(DecodePlan(128, 2, 8), marks=pytest.mark.exhaustive), DecodePlan(128, 3, 4, 2)],
    ids=str,
)
def test_plans(plan: DecodePlan, device: str) -> None:
    """A single stage, tiles of two units' tokens, more tokens for a warp, warps that share tokens."""
    check(decode_batch((200, 40), q_len=4, kv_heads=1, group=4), device, 3, Split(plan.tile), plan)


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([0, 64, 128]),
)
@settings(max_examples=6)
def test_any_batch(kv_lens: list[int], group: int, blocks: int, fixed: int) -> None:
    split = Split(fixed, fixed=True) if fixed else None
    check(decode_batch(tuple(kv_lens), kv_heads=2, group=group, head_dim=64), "reference", blocks, split)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("limits", [(34, 10), (34, 34), (33, 33)])
def test_fewer_blocks_share_few_tokens(limits: tuple[int, int], device: str) -> None:
    """12, 6 and all of 24 blocks for 33 units of three sequences, whose parts are not as many."""
    split = Split(16, fewer=((limits[0], 12), (limits[1], 6)))
    check(decode_batch((400, 100, 3), kv_heads=1, group=4, head_dim=64), device, 24, split)


@pytest.mark.parametrize("device", EXECUTIONS)
def test_one_head_of_one_sequence(device: str) -> None:
    """The public function leaves blocks idle that would only be merged."""
    batch = decode_batch((500,), kv_heads=1, group=16, head_dim=64)
    inputs = make_inputs(batch, 0)
    tensors = [inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens]
    out = paged_decode(*([on_gpu(t) for t in tensors] if device == "cuda" else tensors), inputs.scale, device=device)
    expected, size = exact_attention(inputs, batch)
    assert (np.abs(out[:, 0].cpu().double().numpy() - expected) <= limit_of(batch, expected, size)).all()


@pytest.mark.parametrize("device", EXECUTIONS)
def test_fixed_split_gives_the_same_bits_alone_and_in_any_batch(device: str) -> None:
    """The same sequence with other neighbours, in other pages, on other numbers of blocks, by the plan of a crowded batch."""
    batch = decode_batch((200, 40, 130), kv_heads=1, head_dim=64)
    together, _ = run(batch, device, 5, Split(TILE, fixed=True))
    again, _ = run(batch, device, 2, Split(TILE, fixed=True))
    assert torch.equal(together, again)
    inputs = make_inputs(batch, 0)
    tensors = [
        inputs.q[2:, None],
        inputs.kv_cache,
        inputs.block_tables[2:].contiguous(),
        inputs.kv_lens[2:].contiguous(),
    ]
    if device == "cuda":
        tensors = [on_gpu(t) for t in tensors]
    alone, _ = launch(
        *tensors, inputs.scale, plan_for(1, batch, crowded=True), Split(TILE, fixed=True), 1, False, device
    )
    assert torch.equal(alone[0].cpu(), together[2:])


@pytest.mark.parametrize("device", ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_bits_every_time(device: str) -> None:
    """Whichever block comes last: partial results are added up in their order. The emulator's seed is that of the run."""
    batch = decode_batch((300,), kv_heads=1, head_dim=64)
    first, _ = run(batch, device, 7)
    for _ in range(3 if device == "cuda" else 1):
        assert torch.equal(run(batch, device, 7)[0], first)


def test_tickets_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next launch finds them as this one did."""
    module = sys.modules[paged_decode_kernel.python.__module__]
    tickets = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(module, "counters", lambda like, count: tickets)
    for _ in range(2):
        check(decode_batch((300, 17), head_dim=64), "emulator", 5)
        assert not tickets.any()


@pytest.mark.gpu
def test_a_captured_launch_follows_the_lengths() -> None:
    """A CUDA graph reads lengths and block tables when it is replayed: no host plan, nothing frozen but the shapes."""
    batch = decode_batch((700, 333, 64, 5), kv_heads=4, group=4, head_dim=128)
    inputs = make_inputs(batch, 0)
    q, cache, tables, lens = (
        on_gpu(t) for t in (inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens)
    )
    paged_decode(q, cache, tables, lens, inputs.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode(q, cache, tables, lens, inputs.scale)
    for kv_lens in [(700, 333, 64, 5), (1, 2, 3, 4), (500, 333, 0, 5)]:
        lens.copy_(torch.tensor(kv_lens, dtype=torch.int32))
        graph.replay()
        inputs.kv_lens[:] = torch.tensor(kv_lens, dtype=torch.int32)
        now = decode_batch(kv_lens, kv_heads=4, group=4, head_dim=128)
        expected, size = exact_attention(inputs, now)
        error = np.abs(out[:, 0].cpu().double().numpy() - expected)
        assert (error <= limit_of(now, expected, size)).all()


def test_the_public_function() -> None:
    """With and without logarithms, fixed and even, tables constant or not: within the bound, on the blocks that it chooses."""
    batch = decode_batch((40, 20), kv_heads=1, head_dim=64)
    inputs = make_inputs(batch, 0)
    expected, size = exact_attention(inputs, batch)
    q = inputs.q[:, None]
    args = (q, inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale)
    for fixed in (None, 128):
        out, lse = paged_decode(*args, return_lse=True, fixed_split=fixed, device="emulator")
        assert (np.abs(out[:, 0].double().numpy() - expected) <= limit_of(batch, expected, size)).all()
        assert np.allclose(lse[:, 0].double().numpy(), exact_lse(inputs, batch), rtol=0, atol=2.0**-14)
    assert torch.equal(
        paged_decode(*args, fixed_split=128, constant_tables=True, constant_past=True, device="emulator"), out
    )


SHAPES = [
    (128, 1, 4, 16),
    *(pytest.param(*shape, marks=pytest.mark.exhaustive) for shape in [
        (64, 1, 1, 16), (64, 1, 16, 32), (64, 8, 4, 64), (64, 7, 8, 16), (96, 1, 8, 16), (96, 7, 4, 64), (96, 7, 8, 16),
        (128, 1, 16, 32), (128, 2, 8, 16), (128, 7, 4, 16), (128, 8, 8, 64), (128, 3, 3, 128), (256, 1, 8, 16), (256, 1, 16, 64),
        (256, 7, 4, 32), (256, 3, 8, 16),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("head_dim", "q_len", "group", "page_size"), SHAPES)
@pytest.mark.parametrize("crowded", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_assembles_without_spills(head_dim: int, q_len: int, group: int, page_size: int, crowded: bool) -> None:
    """`build` raises for spills: of a layer of a pool, with logarithms. Tiles come by tensor copies, fragments by ldmatrix."""
    batch = decode_batch((5, 33), q_len, group=group, head_dim=head_dim, page_size=page_size)
    inputs, plan = make_inputs(batch, 0), plan_for(q_len, batch, crowded)
    q = inputs.q.unflatten(0, (2, q_len)).unflatten(2, (2, group))
    partial, tickets = torch.zeros(9, q_len, group, head_dim), torch.zeros(8, dtype=torch.int32)
    special = paged_decode_kernel.specialize(
        q, inputs.kv_cache, inputs.block_tables, inputs.kv_lens, q, partial, partial[..., 0].contiguous(), tickets, 1.0,
        torch.zeros(2, q_len, 2, group), None, q_len=q_len, group=group, head_dim=head_dim, page_size=page_size, blocks=132,
        split=Split(min(plan.tile, page_size)), plan=plan,
    )  # fmt: skip
    compiled, cubin = build(special.function, get_target("sm_90a"))
    assert cubin and "cp.async.bulk.tensor.5d" in compiled.ptx and "ldmatrix.sync.aligned.m8n8.x4.trans" in compiled.ptx


def test_a_plan_that_spills_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is tried, and remembered."""
    module = sys.modules[paged_decode_kernel.python.__module__]
    tried, real = list[DecodePlan](), launch

    def spilling(*args: Any) -> Any:
        tried.append(args[5])
        if len(tried) == 1:
            raise SpillError("spills")
        return real(*args)

    monkeypatch.setattr(module, "launch", spilling)
    monkeypatch.setattr(module, "_found", {})
    batch = decode_batch((70,), kv_heads=1, head_dim=64)
    inputs = make_inputs(batch, 0)
    args = (inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale)
    first = paged_decode(*args, device="reference")
    assert torch.equal(paged_decode(*args, device="reference"), first)
    assert tried == [*plans(1, 3, 64, 16, 16, True)][:2] + tried[1:2]


class Unlaunched:
    """A kernel that does nothing."""

    def on(self, device: str | None) -> Callable[..., None]:
        return lambda *args, **values: None


def test_what_follows_from_shapes_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later call makes no layouts: a few dozen functions run in front of its launch, and most of these are of two lines."""
    module = sys.modules[paged_decode_kernel.python.__module__]
    monkeypatch.setattr(module, "paged_decode_kernel", Unlaunched())
    inputs, calls = make_inputs(decode_batch((70, 33)), 0), list[str]()

    def call() -> None:
        args = inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale
        paged_decode(*args, device="emulator")

    call()
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_qualname) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert "paged_decode" in calls and len(calls) < 100, calls


def wrong(**change: Any) -> str:
    batch = decode_batch((5, 33))
    inputs = make_inputs(batch, 0)
    given = {
        "q": inputs.q[:, None], "kv_cache": inputs.kv_cache, "block_tables": inputs.block_tables,
        "kv_lens": inputs.kv_lens, "scale": 1.0, "device": "reference", **change,
    }  # fmt: skip
    with pytest.raises(TilusError) as caught:
        paged_decode(**given)
    return str(caught.value)


def test_arguments_that_do_not_fit_are_refused_with_both_values() -> None:
    def expect(text: str, *parts: str) -> None:
        assert all(part in text for part in parts), text

    half = torch.float16
    expect(wrong(q=torch.zeros(2, 1, 7, 64, dtype=half)), "7 query heads for 2 kv heads")
    expect(wrong(q=torch.zeros(2, 1, 34, 64, dtype=half)), "34 query heads", "1 to 16")
    expect(
        wrong(q=torch.zeros(2, 6, 64, dtype=half)), "[2, 6, 64]", "[sequences, q_len, q_heads, head_dim]", "unsqueeze"
    )
    expect(wrong(q=torch.zeros(2, 9, 6, 64, dtype=half)), "9 queries", "1 to 8", "paged_attention")
    expect(wrong(q=torch.zeros(2, 1, 6, 64)), "float32", "float16", "QuantizedCache")
    expect(wrong(q=torch.zeros(2, 1, 6, 128, dtype=half)), "head_dim", "128", "64")
    eighty = {"q": torch.zeros(2, 1, 6, 80, dtype=half), "kv_cache": torch.zeros(9, 2, 16, 2, 80, dtype=half)}
    expect(wrong(**eighty), "head_dim 80", "64, 96, 128, 256")
    expect(wrong(kv_cache=torch.zeros(9, 2, 24, 2, 64, dtype=half)), "page_size 24", "16, 32, 64 or a multiple of 128")
    expect(wrong(kv_lens=torch.zeros(3, dtype=torch.int32)), "sequences", "3", "2")
    expect(wrong(kv_lens=torch.zeros(2, dtype=torch.int64)), "int64", "int32")
    expect(wrong(fixed_split=96), "fixed_split=96", "multiple of 128")


def test_large_scores_do_not_overflow() -> None:
    """Scores of up to 2000, where exp alone overflows: the largest one takes all of the weight."""
    batch = decode_batch((70,), q_len=2, kv_heads=1, group=1)
    inputs = make_inputs(batch, 0)
    found = paged_decode(inputs.q[None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, 50.0, device="reference")
    expected, _ = exact_attention(type(inputs)(**{**vars(inputs), "scale": 50.0}), batch)
    assert np.allclose(found[0].double().numpy(), expected, rtol=0, atol=2.0**-8)
    assert math.isfinite(float(found.abs().max()))
