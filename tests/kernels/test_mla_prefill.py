"""mla_prefill against attention in float64: ragged queries, chunks on top of cached tokens, heads and pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_batches import SCALE, LatentBatch, assert_close, make_inputs, on_gpu

from tilus import TilusError
from tilus.kernels import mla_prefill
from tilus.kernels.mla_attention import mla_attention_kernel
from tilus.kernels.mla_prefill import PLAN, mla_prefill_kernel
from tilus.ptx.assembler import assemble
from tilus.runtime.binaries import build
from tilus.target import get_target

DEVICES = ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


def check(batch: LatentBatch, device: str) -> None:
    inputs = make_inputs(batch)
    tensors = inputs.q, inputs.cache, inputs.block_tables, inputs.q_start, inputs.kv_lens
    if device == "cuda":
        tensors = tuple(on_gpu(t) for t in tensors)
    out, lse = mla_prefill(*tensors, scale=SCALE, return_lse=True, device=device)
    assert_close(out, lse, inputs, batch)
    if device != "emulator":
        assert torch.equal(mla_prefill(*tensors, scale=SCALE, device=device), out)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", DEVICES)
def test_ragged_batch(device: str) -> None:
    """No queries; more queries than tokens; a chunk on top of a cache; the last of the rows in the middle of a tile."""
    check(LatentBatch(((3, 3), (0, 9), (2, 1), (9, 70))), device)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "page_size"),
    [(128, 64), *(pytest.param(h, p, marks=pytest.mark.exhaustive) for h in (16, 32, 64, 128) for p in (16, 32, 128))],
)
def test_heads_and_pages(heads: int, page_size: int, device: str) -> None:
    check(LatentBatch(((2, 66), (1, 20)), heads, page_size, torch.bfloat16), device)


@pytest.mark.exhaustive
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 100)), min_size=1, max_size=3), st.sampled_from([16, 64]))
@settings(max_examples=2)
def test_any_batch(lengths: list[tuple[int, int]], heads: int) -> None:
    check(LatentBatch(tuple(lengths), heads), "reference")


@pytest.mark.parametrize("heads", [16, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (32, 64, 128))])
@pytest.mark.parametrize("page_size", [64, pytest.param(16, marks=pytest.mark.exhaustive)])
def test_assembles_without_spills(heads: int, page_size: int) -> None:
    half, integers = torch.bfloat16, torch.zeros(8, 8, dtype=torch.int32)
    special = mla_prefill_kernel.specialize(
        torch.zeros(8 * heads, 576, dtype=half), torch.zeros(5, page_size, 576, dtype=half), integers, integers[0], integers[1],
        torch.zeros(8 * heads, 512, dtype=half), 1.0, 66, torch.zeros(8 * heads), width=576, latent=512, heads=heads,
        page_size=page_size, plan=PLAN,
    )  # fmt: skip
    compiled, cubin = build(special.function, get_target("sm_90a"))
    assert cubin and "multicast" in compiled.ptx


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_100a", marks=pytest.mark.exhaustive)])
def test_the_plain_kernel_assembles_without_spills(target: str) -> None:
    half, integers = torch.float16, torch.zeros(8, 8, dtype=torch.int32)
    ptx = mla_attention_kernel.ptx(
        torch.zeros(8, 16, 576, dtype=half), torch.zeros(5, 16, 576, dtype=half), integers, integers[0], integers[1],
        torch.zeros(8, 16, 512, dtype=half), 1.0, torch.zeros(8, 16), width=576, latent=512, page_size=16, target=target,
    )  # fmt: skip
    assert assemble(ptx, get_target(target)).cubin


def test_starts_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(LatentBatch(((3, 3), (1, 9))))
    with pytest.raises(TilusError, match=r"q_start \[2\] and kv_lens \[2\], expected .*\[sequences \+ 1\]"):
        mla_prefill(inputs.q, inputs.cache, inputs.block_tables, inputs.q_start[1:], inputs.kv_lens, scale=1.0)
