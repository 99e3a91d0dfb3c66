"""mla_decode against attention in float64: batches, heads, pages, numbers of queries, and divisions among blocks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_batches import SCALE, LatentBatch, LatentInputs, assert_close, make_inputs, on_gpu

from tilus import TilusError
from tilus.kernels import merge_states, mla_decode
from tilus.kernels.mla_decode import MlaPlan, launch, mla_decode_kernel, parts_of_sequence, plan_of
from tilus.kernels.paged_decode_split import Split
from tilus.runtime.binaries import build
from tilus.target import get_target

EXECUTIONS = [
    pytest.param("reference", marks=pytest.mark.exhaustive),
    "emulator",
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SKEWED = (1, 150, 0, 65)


def decode_batch(kv_lens: tuple[int, ...], q_len: int = 1, **shape: Any) -> LatentBatch:
    return LatentBatch(tuple((q_len, n) for n in kv_lens), **shape)


def arguments(inputs: LatentInputs, batch: LatentBatch, device: str) -> tuple[torch.Tensor, ...]:
    q = inputs.q.unflatten(0, (len(batch.lengths), batch.lengths[0][0]))
    tensors = (q, inputs.cache, inputs.block_tables, inputs.kv_lens)
    return tuple(on_gpu(t) for t in tensors) if device == "cuda" else tensors


def run(
    batch: LatentBatch, device: str, teams: int, split: Split | None = None, plan: MlaPlan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """By so many clusters."""
    plan = plan or plan_of(batch.lengths[0][0], batch.heads)
    tensors = arguments(make_inputs(batch), batch, device)
    return launch(*tensors, SCALE, plan, split or Split(64), teams, True, device)


def check(
    batch: LatentBatch, device: str, teams: int = 3, split: Split | None = None, plan: MlaPlan | None = None
) -> None:
    out, lse = run(batch, device, teams, split, plan)
    assert_close(out, lse, make_inputs(batch), batch)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("teams", [pytest.param(1, marks=pytest.mark.exhaustive), 7])
def test_skewed_batch(teams: int, device: str) -> None:
    """Sequences without tokens, of a part of a page, of many tiles; more blocks than units."""
    check(decode_batch(SKEWED), device, teams)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize(
    ("q_len", "heads"),
    [
        (1, 128), (3, 16), (4, 64), *(pytest.param(*shape, marks=pytest.mark.exhaustive) for shape in [
            (4, 16), (1, 32), (3, 32), (1, 64), (2, 64), (3, 64), (2, 128), (3, 128), (4, 128),
        ]),
    ],
)  # fmt: skip
def test_rows(q_len: int, heads: int, device: str) -> None:
    """One block for the rows of a sequence, some of which may be nobody's; pairs of blocks; several pairs."""
    check(decode_batch((70, 2), q_len, heads=heads), device, teams=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize(
    ("page_size", "heads"),
    [(64, 128), *(pytest.param(n, h, marks=pytest.mark.exhaustive) for n in (16, 32, 64, 128) for h in (16, 128))],
)
def test_page_sizes(page_size: int, heads: int, device: str) -> None:
    """Pages longer than what a block of a pair brings, with an end in it."""
    check(decode_batch((70, 130), heads=heads, page_size=page_size), device)


@pytest.mark.parametrize("device", EXECUTIONS)
def test_bfloat16(device: str) -> None:
    check(decode_batch((70, 33), q_len=2, dtype=torch.bfloat16), device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize(
    "plan",
    [MlaPlan(tile=32, stages=4), pytest.param(MlaPlan(cluster=1, stages=1), marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_plans(plan: MlaPlan, device: str) -> None:
    """Two slots for weights; a single stage, and blocks that bring for themselves."""
    check(decode_batch((100,), heads=128), device, 3, plan=plan)


@pytest.mark.exhaustive
@given(
    st.lists(st.integers(0, 130), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([0, 64, 128]),
)
@settings(max_examples=3)
def test_any_batch(kv_lens: list[int], q_len: int, teams: int, fixed: int) -> None:
    split = Split(fixed, fixed=True) if fixed else None
    check(decode_batch(tuple(kv_lens), q_len, heads=32), "reference", teams, split)


@pytest.mark.parametrize("device", EXECUTIONS)
def test_fixed_split_gives_the_same_bits_alone_and_in_any_batch(device: str) -> None:
    """The same sequence with other neighbours, on other numbers of blocks."""
    batch, split = decode_batch((70, 10, 80)), Split(64, fixed=True)
    together, _ = run(batch, device, 5, split)
    assert torch.equal(run(batch, device, 2, split)[0], together)
    q, cache, tables, lens = arguments(make_inputs(batch), batch, device)
    alone, _ = launch(
        q[2:], cache, tables[2:].contiguous(), lens[2:].contiguous(), SCALE, MlaPlan(), split, 1, False, device
    )
    assert torch.equal(alone[0], together[2])


@given(st.integers(0, 2**20), st.integers(1, 64))
def test_parts_are_whole_units_and_about_as_many_as_is_best(tokens: int, rows: int) -> None:
    """Of what reading and merging takes, in tokens, no more than half above the least of all numbers of parts."""
    units, parts = max(1, -(-tokens // 256)), parts_of_sequence(tokens, rows)
    assert 1 <= parts <= units

    def cost(number: int) -> float:
        return 256 * -(-units // number) + (8 + 3 * rows / 4) * number

    assert cost(parts) <= 1.5 * min(cost(number) for number in range(1, min(units, 2000) + 1))


@pytest.mark.exhaustive
def test_tickets_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next launch finds them as this one did, and its partial results meet in the same order."""
    module = sys.modules[mla_decode_kernel.python.__module__]
    tickets = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(module, "counters", lambda like, count: tickets)
    first = run(decode_batch((150, 17)), "emulator", 5)[0]
    assert not tickets.any()
    assert torch.equal(run(decode_batch((150, 17)), "emulator", 5)[0], first)


@pytest.mark.parametrize("device", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_public_function(device: str) -> None:
    """On every device; fixed and even, with and without logarithms."""
    batch = decode_batch((70, 0, 300), q_len=2, page_size=32)
    inputs = make_inputs(batch)
    args = arguments(inputs, batch, device)
    for fixed in (None, 128):
        out, lse = mla_decode(*args, scale=SCALE, return_lse=True, fixed_split=fixed, device=device)
        assert_close(out, lse, inputs, batch)
        assert torch.equal(mla_decode(*args, scale=SCALE, fixed_split=fixed, device=device), out)


def test_attention_over_two_parts_of_the_tokens_merges_to_the_whole() -> None:
    """The first 64 tokens and the others, by tables that begin behind them; in f32 steps of the dtype of the parts."""
    batch = decode_batch((200,))
    inputs = make_inputs(batch)
    q, cache, tables, lens = arguments(inputs, batch, "reference")
    first = mla_decode(q, cache, tables, torch.full_like(lens, 64), scale=SCALE, return_lse=True, device="reference")
    second = mla_decode(
        q, cache, tables[:, 4:].contiguous(), lens - 64, scale=SCALE, return_lse=True, device="reference"
    )
    merged, lse = merge_states(*first, *second, device="reference")
    whole, whole_lse = mla_decode(q, cache, tables, lens, scale=SCALE, return_lse=True, device="reference")
    assert torch.allclose(lse, whole_lse, rtol=0, atol=2.0**-14)
    largest = max(float(part.abs().max()) for part in (whole, first[0], second[0]))
    assert float((merged.float() - whole.float()).abs().max()) <= 4 * 2.0**-11 * largest


@pytest.mark.gpu
def test_a_captured_launch_follows_the_lengths() -> None:
    batch = decode_batch((700, 333, 64, 5), heads=128, page_size=64)
    inputs = make_inputs(batch)
    q, cache, tables, lens = arguments(inputs, batch, "cuda")
    mla_decode(q, cache, tables, lens, scale=SCALE, return_lse=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = mla_decode(q, cache, tables, lens, scale=SCALE, return_lse=True)
    for kv_lens in [(700, 333, 64, 5), (1, 2, 3, 4), (500, 333, 0, 5)]:
        lens.copy_(torch.tensor(kv_lens, dtype=torch.int32))
        graph.replay()
        assert_close(out, lse, inputs, decode_batch(kv_lens, heads=128, page_size=64))


SHAPES = [
    (1, 16, 16), (1, 128, 64),
    *(pytest.param(*shape, marks=pytest.mark.exhaustive) for shape in [
        (q_len, heads, page) for q_len in (1, 2, 3, 4) for heads in (16, 32, 64, 128) for page in (16, 32, 64, 128)
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("q_len", "heads", "page_size"), SHAPES)
@pytest.mark.parametrize(
    ("fixed", "with_lse"), [(False, True), pytest.param(True, False, marks=pytest.mark.exhaustive)]
)
def test_assembles_without_spills(q_len: int, heads: int, page_size: int, fixed: bool, with_lse: bool) -> None:
    """`build` raises for spills, and for waits that the assembler puts between products."""
    plan = plan_of(q_len, heads)
    rows = q_len * heads
    blocks = -(-rows // 64)
    eights = rows // blocks // 8
    half, integers = torch.bfloat16, torch.zeros(8, 8, dtype=torch.int32)
    partial = torch.zeros(6, eights, 8, 512)
    special = mla_decode_kernel.specialize(
        torch.zeros(8 * rows, 576, dtype=half), torch.zeros(5, 2, page_size, 576, dtype=half)[:, 1], integers, integers[0],
        torch.zeros(8 * blocks, eights, 1, 8, 512, dtype=half), partial, partial[..., 0].contiguous(), integers[1], 1.0,
        torch.zeros(8 * blocks, eights, 1, 8) if with_lse else None, width=576, latent=512, q_len=q_len, heads=heads,
        groups=blocks // plan.cluster, eights=eights, page_size=page_size, teams=132 // plan.cluster,
        split=Split(256, fixed), plan=plan,
    )  # fmt: skip
    compiled, cubin = build(special.function, get_target("sm_90a"))
    assert cubin and ("multicast" in compiled.ptx) == (blocks % 2 == 0)


def wrong(**change: Any) -> str:
    batch = decode_batch((5, 33))
    inputs = make_inputs(batch)
    given = {
        "q": inputs.q[:, None], "cache": inputs.cache, "block_tables": inputs.block_tables, "kv_lens": inputs.kv_lens,
        "scale": 1.0, "device": "reference", **change,
    }  # fmt: skip
    with pytest.raises(TilusError) as caught:
        mla_decode(**given)
    return str(caught.value)


def test_arguments_that_do_not_fit_are_refused_with_both_values() -> None:
    def expect(text: str, *parts: str) -> None:
        assert all(part in text for part in parts), text

    half = torch.float16
    expect(wrong(q=torch.zeros(2, 1, 24, 576, dtype=half)), "24 heads", "16, 32, 64, 128", "zeros")
    expect(wrong(q=torch.zeros(2, 16, 576, dtype=half)), "[2, 16, 576]", "[sequences, q_len, heads, 576]", "unsqueeze")
    expect(wrong(q=torch.zeros(2, 5, 16, 576, dtype=half)), "5 queries", "1 to 4", "mla_prefill")
    expect(wrong(q=torch.zeros(2, 1, 16, 576)), "float32", "float16", "same dtype")
    expect(wrong(q=torch.zeros(2, 1, 16, 512, dtype=half)), "[2, 1, 16, 512]", "576", "latent")
    expect(wrong(cache=torch.zeros(9, 24, 576, dtype=half)), "page_size 24", "16, 32, or a multiple of 64")
    expect(wrong(kv_lens=torch.zeros(3, dtype=torch.int32)), "sequences", "3", "2")
    expect(wrong(kv_lens=torch.zeros(2, dtype=torch.int64)), "int64", "int32")
    expect(wrong(fixed_split=96), "fixed_split=96", "multiple of 64")
    expect(wrong(scale=-1.0), "scale -1.0", "more than 0", "negate")
