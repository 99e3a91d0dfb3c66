"""Where copies or other blocks write to shared memory again, no load from it is on its way: a law of the library's machine code
(`scoreboards`), and many launches in a row, which show what breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import scoreboards
import torch
from copying_kernels import COPYING
from latent_batches import SCALE, LatentBatch, make_inputs, on_gpu
from weights import matrix_of

import tilus
from tilus.compiler import compile_function
from tilus.kernels import mla_decode
from tilus.kernels.linear import launch
from tilus.kernels.mla_stages import Exchange
from tilus.kernels.quantize import pack
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_sums import Sums
from tilus.ptx.assembler import assemble
from tilus.target import get_target

HOPPER = get_target("sm_90a")
FENCE = "fence.acquire.cta;"
# Those whose loads would be on their way without the fence; then one of every other family.
RED = ("linear, 1 token", "minimums, 1 token", "minimums, 16 tokens", "dense, sums of a cluster")
ALWAYS = (*RED, "linear, 16 tokens", "8-bit activations", "grouped", "decode, fp8")


def lines_of(function: Callable[..., object], code: str) -> set[str]:
    lines, first = inspect.getsourcelines(function)
    return {f"{inspect.getfile(function)}:{first + index}" for index, line in enumerate(lines) if line.strip() == code}


# Arrivals behind which nobody writes but threads of the block, by ordinary stores: these come behind the loads in any case.
AMONG_THREADS = lines_of(Exchange.take, "tilus.arrive(self.taken[self.slot])")
AMONG_THREADS |= lines_of(Sums.added_to, "tilus.arrive(self.taken)")


def loads_under_way(ptx: str) -> list[scoreboards.UnderWay]:
    cubin = assemble(ptx, HOPPER, options=("-lineinfo",), allow_spills=True).cubin
    assert scoreboards.arrivals(cubin)
    return [found for found in scoreboards.loads_under_way(cubin) if found.source not in AMONG_THREADS]


@pytest.mark.sampled(9)
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.exhaustive) for name in COPYING]
)
def test_no_load_is_on_its_way_where_memory_is_handed_on(name: str) -> None:
    """Where nothing else in the kernel waits, it is the fence that does."""
    ptx = compile_function(COPYING[name]().function, HOPPER).ptx
    assert loads_under_way(ptx) == []
    if name in RED:
        assert loads_under_way(ptx.replace(FENCE, ""))


def agree(run: Callable[[], torch.Tensor], replays: int) -> None:
    """The results of launches without a pause between them have the same bits."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated for a stream exists from here on
        first = run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        results = [run() for _ in range(20)]
    for _ in range(replays):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(result, first) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["symmetric", "minimums"])
@pytest.mark.parametrize("plan", [
    WarpgroupPlan(8, 1, 1, 1, 1, 2, blocks_per_sm=3, unit="mma"),
    WarpgroupPlan(16, 1, 2, 1, 1, 4, blocks_per_sm=2, unit="mma"),
    WarpgroupPlan(16, 1, 1, 1, 2, 2, blocks_per_sm=2),
], ids=str)  # fmt: skip
def test_launches_of_a_linear_layer_agree(plan: WarpgroupPlan, scheme: str) -> None:
    """As few stages as there can be."""
    weight = pack(
        matrix_of(scheme, tilus.uint4 if scheme == "minimums" else tilus.int4, 14336, 2048, 64, seed=1), "cuda"
    )
    x = torch.randn(plan.tokens, 2048, generator=torch.Generator().manual_seed(2)).half().cuda()

    def run() -> torch.Tensor:
        y = torch.empty(plan.tokens, 14336, dtype=torch.float16, device="cuda")
        launch(x, weight, y, None, plan, "cuda")
        return y

    agree(run, replays=40)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_launches_of_latent_attention_agree(heads: int) -> None:
    batch = LatentBatch(((1, 2048),) * 16, heads=heads, page_size=64)
    inputs = make_inputs(batch)
    q, *rest = (on_gpu(t) for t in (inputs.q.unflatten(0, (16, 1)), inputs.cache, inputs.block_tables, inputs.kv_lens))
    agree(lambda: mla_decode(q, *rest, scale=SCALE), replays=40)
