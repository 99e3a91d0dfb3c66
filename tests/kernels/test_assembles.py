"""Every kernel, as it is typically specialised, assembles for every target without spilling registers."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tilus
from tilus.kernels.activation import gated_kernel, gelu_tanh, silu, soft_cap_kernel
from tilus.kernels.attention import paged_attention_kernel
from tilus.kernels.embedding import dense_embedding_kernel, quantized_embedding_kernel
from tilus.kernels.gemm import kernel_call as gemm_call
from tilus.kernels.gemm_kernel import gemm_kernel
from tilus.kernels.gemm_schedule import Plan, stages_of
from tilus.kernels.grouped_linear import grouped_linear_kernel, plans
from tilus.kernels.kv_cache import KV_FORMATS, rope_append_quantized_kernel
from tilus.kernels.kv_frame import restore_values_kernel
from tilus.kernels.linear import kernel_call, quantized_linear
from tilus.kernels.linear_problem import LinearProblem, heuristic
from tilus.kernels.mixture import combine_kernel, places_kernel, route_kernel, scatter_kernel
from tilus.kernels.norm import rms_norm_kernel
from tilus.kernels.quantize import QuantizedWeight, WeightHeader
from tilus.kernels.quantize_tokens import quantize_tokens_kernel
from tilus.kernels.rope import rope_append_kernel
from tilus.kernels.schedule import MOST_FACTOR_WORDS, schedule
from tilus.kernels.tune_linear import compile_plan
from tilus.kernels.w4a8_linear import plans as w4a8_plans
from tilus.kernels.warpgroup_linear import warpgroup_linear
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_schedule import warpgroup_plans
from tilus.lang.kernel import Kernel
from tilus.ptx.assembler import SpillError, assemble
from tilus.target import get_target

pytestmark = pytest.mark.slow

TARGETS = ["sm_80", "sm_89", "sm_90a", "sm_100a"]
# What ptxas makes of them: the oldest and the first target always, those between and beyond in the exhaustive tests.
CHECKED = [pytest.param(t, marks=() if t in ("sm_80", "sm_90a") else pytest.mark.exhaustive) for t in TARGETS]
EXAMPLES = Path(__file__).parents[2] / "examples"


def assert_no_spills(kernel: Kernel, target: str, *args: Any, **values: Any) -> None:
    ptx = kernel.ptx(*args, target=target, **values)
    for usage in assemble(ptx, get_target(target), allow_spills=True).kernels:
        assert (usage.spill_store_nbytes, usage.spill_load_nbytes, usage.stack_nbytes) == (0, 0, 0), usage


# These, those of LINEAR, and the examples are compiled for every target by test_conversions.py.
LIBRARY: list[tuple[Kernel, dict[str, Any]]] = [
    *(
        (rms_norm_kernel, {"dtype": tilus.f16, "out_dtype": tilus.f16, "hidden": hidden})
        for hidden in (100, 576, 4096, 16384)
    ),
    *(
        (quantize_tokens_kernel, {"act": tilus.bf16, "code": code, "columns": columns, "paired": paired})
        for code in (tilus.int8, tilus.float8_e4m3)
        for columns, paired in ((100, False), (16384, False), (16384, True), (28672, True))
    ),
    (gated_kernel, {"dtype": tilus.f16}),
    (gated_kernel, {"dtype": tilus.bf16, "activation": gelu_tanh}),
    (soft_cap_kernel, {}),
    (route_kernel, {"experts": 128, "top": 8, "normalized": True}),
    (places_kernel, {}),
    (scatter_kernel, {"dtype": tilus.f16, "top": 8}),
    (combine_kernel, {"dtype": tilus.f16, "top": 8}),
    (dense_embedding_kernel, {"dtype": tilus.bf16}),
    (quantized_embedding_kernel, {"dtype": tilus.f16, "code": tilus.int8, "group": 32}),
    (
        rope_append_kernel,
        {
            "act": tilus.f16,
            "dtype": tilus.f16,
            "head_dim": 64,
            "heads": 15,
            "q_heads": 9,
            "kv_heads": 3,
            "page_size": 16,
        },
    ),
    (
        rope_append_kernel,
        {
            "act": tilus.bf16,
            "dtype": tilus.bf16,
            "head_dim": 128,
            "heads": 48,
            "q_heads": 32,
            "kv_heads": 8,
            "page_size": 16,
        },
    ),
    *(
        (
            rope_append_quantized_kernel,
            {
                "dtype": dtype,
                "head_dim": head_dim,
                "q_heads": q_heads,
                "kv_heads": kv_heads,
                "page_size": 16,
                "kind": KV_FORMATS[name],
                "constant": True,
            },
        )
        for name, dtype, head_dim, q_heads, kv_heads in (
            ("fp8", tilus.f16, 64, 9, 3),
            ("int4", tilus.bf16, 128, 32, 8),
            ("int8", tilus.f16, 256, 8, 1),
        )
    ),
    (restore_values_kernel, {"dtype": tilus.bf16, "q_heads": 32, "head_dim": 128}),
    *(
        (
            paged_attention_kernel,
            {
                "dtype": dtype,
                "unit": dtype,
                "out_dtype": dtype,
                "group": group,
                "head_dim": head_dim,
                "page_size": 16,
                "rows": rows,
                "kv_tile": kv_tile,
            },
        )
        for dtype, group, head_dim, rows, kv_tile in (
            (tilus.f16, 3, 64, 16, 64),
            (tilus.f16, 3, 64, 64, 64),
            (tilus.bf16, 4, 128, 16, 64),
            (tilus.bf16, 4, 128, 64, 32),
        )
    ),
]


@pytest.mark.parametrize("target", CHECKED)
def test_add_rms_norm(target: str) -> None:
    x, residual, weight = torch.empty(4, 4096).half(), torch.empty(4, 4096), torch.empty(4096)
    assert_no_spills(rms_norm_kernel, target, x, weight, x, 1e-5, residual, weight, hidden=4096)


F16, F32 = tilus.f16, tilus.f32
# Code type, group, type of scales, minimums, zero points, activations, table.
GROUPED = [
    (tilus.int4, 128, F16, False, False, torch.float16, False),
    (tilus.int4, 128, F16, False, False, torch.bfloat16, False),
    (tilus.uint4, 32, F16, True, False, torch.float16, False),
    (tilus.uint6, 16, F32, True, True, torch.bfloat16, False),
    (tilus.uint4, 64, F16, False, False, torch.bfloat16, True),
    (tilus.float4_e2m1, 32, tilus.float8_e8m0, False, False, torch.bfloat16, False),
]
# Code type, tokens, group, type of scales, minimums, zero points, activations, table: those with the most registers among them.
LINEAR = [
    (tilus.uint4, 1, 128, F16, False, False, torch.float16),
    (tilus.uint6, 1, 128, F16, False, False, torch.bfloat16),
    (tilus.uint4, 1, 16, F32, True, False, torch.float16),
    (tilus.uint3, 16, 128, F16, False, False, torch.float16),
    (tilus.uint7, 16, 128, F16, False, False, torch.bfloat16),
    (tilus.uint4, 16, 32, F16, True, False, torch.float16),
    (tilus.uint8, 16, 32, F16, True, False, torch.bfloat16),
    (tilus.float4_e2m1, 16, 16, tilus.float8_e4m3, False, False, torch.bfloat16),
    (tilus.uint4, 16, 64, F16, True, False, torch.bfloat16, True),
    (tilus.uint8, 256, 16, F32, True, False, torch.float16),
]


def linear_call(
    dtype: tilus.DataType,
    m: int,
    group: int,
    scale: tilus.DataType,
    has_mins: bool,
    has_zeros: bool,
    act: torch.dtype,
    has_table: bool = False,
    n: int = 8192,
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a product with a weight of N x 8192 and a bias, with the schedule of an H100; few tokens may split K."""
    header = WeightHeader(dtype, (n, 8192), group, scale.name, scale.name if has_mins else None, has_zeros, has_table)
    plan = schedule(m, n // 64, 128, dtype.nbits, 132, header.factor_words)
    arrays = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in header.arrays.items()}
    x, y = torch.empty(m, 8192, dtype=act), torch.empty(m, n, dtype=act)
    partial, tickets = None, None
    if plan.splits > 1:
        partial, tickets = torch.empty(plan.splits, m, n), torch.empty(4096, dtype=torch.int32)
    optional = (arrays.get(name) for name in ("mins", "zeros", "table"))
    args = [x, arrays["codes"], arrays["scales"], y, 1.0, *optional, torch.empty(n, dtype=act), partial, tickets]
    values = {"wdtype": dtype, "scale_dtype": scale, "mins_dtype": scale, "span": header.span, "tokens": plan.tokens}
    rest = {"rows": plan.rows, "warps": plan.warps, "stages": plan.stages, "blocks_per_sm": plan.blocks_per_sm}
    return args, values | rest


# Group, type of scales, minimums, zero points: for each limit of factor words the scheme that needs the most registers.
SCHEME_AT_LIMIT = {
    13: (128, F16, False, False),
    26: (32, F16, False, False),
    34: (32, F32, False, False),
    50: (32, F16, True, False),
    172: (16, F32, True, True),
}
UNSIGNED = [tilus.uint1, tilus.uint2, tilus.uint3, tilus.uint4, tilus.uint5, tilus.uint6, tilus.uint7, tilus.uint8]


LIMITS = [
    (tokens, stages, dtype, words)
    for (tokens, stages), limits in MOST_FACTOR_WORDS.items()
    for dtype, words in zip(UNSIGNED, limits, strict=True)
    if words
]


@pytest.mark.sampled(9)
@pytest.mark.parametrize(("tokens", "stages", "dtype", "words"), LIMITS, ids=str)
def test_the_most_factors(tokens: int, stages: int, dtype: tilus.DataType, words: int) -> None:
    """At every limit of the schedules, each on one target, with one type of activations."""
    act = (torch.float16, torch.bfloat16)[dtype.nbits // 4 % 2]
    args, values = linear_call(dtype, tokens, *SCHEME_AT_LIMIT[words], act)
    assert values["tokens"] == tokens
    assert_no_spills(quantized_linear, TARGETS[dtype.nbits % 4], *args, **values | {"stages": stages})


@pytest.mark.parametrize("target", CHECKED)
def test_two_blocks_on_a_multiprocessor(target: str) -> None:
    """More rows of tiles than multiprocessors: half as many registers."""
    args, values = linear_call(tilus.uint6, 1, 128, F16, False, False, torch.bfloat16, n=16384)
    assert values["blocks_per_sm"] == 2
    assert_no_spills(quantized_linear, target, *args, **values)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("factors", [False, True], ids=["plain", "factors"])
@pytest.mark.parametrize(
    ("act", "weight", "out", "plan"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, Plan(256, 2, 1, 0, share_x=2)),
        (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, Plan(256, 2, 1, 0)),
        (torch.float16, torch.float16, torch.float32, Plan(16, 1, 3, 0)),
        (torch.float16, torch.float16, torch.float32, Plan(128, 2, 1, 0, share_w=2)),
        (torch.int8, torch.int8, torch.bfloat16, Plan(192, 2, 1, 0)),
        (torch.int8, torch.int8, torch.float16, Plan(96, 2, 1, 0, blocks=2)),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16, Plan(64, 1, 2, 0, blocks=2)),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16, Plan(64, 1, 3, 0, blocks=4)),
    ],
    ids=str,
)
def test_gemm(act: torch.dtype, weight: torch.dtype, out: torch.dtype, plan: Plan, factors: bool) -> None:
    """At the limits of registers, with as many stages as there is room for. No waits between products, too: the assembler would
    say so. With factors: everything that a plain product does without."""
    m, n, k = 512, 1024, 4096
    x, w, y = torch.empty(m, k, dtype=act), torch.empty(n, k, dtype=weight), torch.empty(m, n, dtype=out)
    vectors = (torch.empty(m), torch.empty(n), torch.empty(n)) if factors else (None, None, None)
    filled = replace(plan, stages=stages_of(plan, out.itemsize))
    arguments, values = gemm_call(x, w, y, (1.0, *vectors), filled, constant=True)
    assert_no_spills(gemm_kernel, "sm_90a", *arguments, **values)
    ptx = gemm_kernel.ptx(*arguments, target="sm_90a", **values)
    assert ("stmatrix.sync.aligned.m8n8.x4.trans" in ptx) == (out.itemsize == 2)  # y^T in rows of y


@pytest.mark.sampled(12)
@pytest.mark.parametrize("m", [32, 512, 1024, 4096])
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_grouped_linear(case: tuple[Any, ...], m: int) -> None:
    """64 experts. Some plan does not spill; with one scale a group of 128 it is one that keeps the tiles of the best."""
    dtype, group, scale, has_mins, has_zeros, act, has_table = case
    header = WeightHeader(
        dtype, (64 * 1024, 4096), group, scale.name, scale.name if has_mins else None, has_zeros, has_table
    )
    arrays = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in header.arrays.items()}
    codes, scales, mins, zeros = (
        arrays[name].flatten(1) if name in arrays else None for name in ("codes", "scales", "mins", "zeros")
    )
    x, y, bias = torch.empty(m, 4096, dtype=act), torch.empty(m, 1024, dtype=act), torch.empty(64, 1024, dtype=act)
    args = [x, codes, scales, y, torch.empty(65, dtype=torch.int32), 1.0, 132]
    args += [mins, zeros, arrays.get("table"), bias]
    values = {"wdtype": dtype, "scale_dtype": scale, "mins_dtype": scale if has_mins else None, "span": header.span}
    found = list(plans(m, 64, header, 132))
    for plan in found:
        ptx = grouped_linear_kernel.ptx(*args, target="sm_90a", plan=plan.item, **values)
        try:
            assemble(ptx, get_target("sm_90a"))
        except SpillError:
            continue
        assert group < 128 or (plan.item.tokens, plan.item.rows) == (found[0].item.tokens, found[0].item.rows)
        return
    raise AssertionError("every plan spills")


@pytest.mark.sampled(12)
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096)])
@pytest.mark.parametrize("m", [8, 16, 32, 256])
@pytest.mark.parametrize("act", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_w4a8_linear(act: torch.dtype, m: int, shape: tuple[int, int]) -> None:
    """Some plan with the tokens and rows of the best does not spill."""
    (n, k), header = shape, WeightHeader(tilus.int4, shape, 128, "f16")
    arrays = {name: torch.empty(full, dtype=getattr(torch, kind)) for name, (full, kind) in header.arrays.items()}
    x, y, bias = torch.empty(m, k, dtype=act), torch.empty(m, n, dtype=torch.bfloat16), torch.empty(n)
    args = [x, arrays["codes"].flatten(1), arrays["scales"].flatten(1), y, 1.0, n // 64, 0.0, 1.0]
    args += [None, None, None, bias, None, None, torch.empty(m)]
    found = list(w4a8_plans(m, tilus.int8 if act == torch.int8 else tilus.float8_e4m3, header, 132))
    same = [plan for plan in found if (plan.tokens, plan.rows) == (found[0].tokens, found[0].rows)]
    spilled: list[int] = []
    for plan in same:
        ptx = warpgroup_linear.ptx(*args, target="sm_90a", plan=plan, wdtype=tilus.int4, scale_dtype=F16, span=128)
        (usage,) = assemble(ptx, get_target("sm_90a"), allow_spills=True).kernels
        spilled.append(usage.spill_store_nbytes)
    assert 0 in spilled, dict(zip(same, spilled, strict=True))


@pytest.mark.parametrize("activation", [silu, pytest.param(gelu_tanh, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "m", [64, 4096, *(pytest.param(m, marks=pytest.mark.exhaustive) for m in (1, 16, 32, 128, 512))]
)
def test_gates_need_no_registers_that_sums_do_not(m: int, activation: Any) -> None:
    """The best plan of a feed-forward layer does not spill with an activation either."""
    header = WeightHeader(tilus.int4, (28672, 4096), 128, "f16", is_gated=True)
    arrays = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in header.arrays.items()}
    x, y = torch.empty(m, 4096).half(), torch.empty(m, 14336).half()
    (plan, *_) = warpgroup_plans(header, m, 132)
    kernel, args, values = kernel_call(x, QuantizedWeight(header, **arrays), y, None, plan, activation)
    assert_no_spills(kernel, "sm_90a", *args, **values)


# Of plans of each kind; the rest of what was timed (benchmarks/results/h100/gemm_plans_any_tokens.json) in the exhaustive tests.
OTHER_SHAPES = [(18944, 3584), (3584, 18944), (10240, 8192), (4608, 3584), (11008, 2560), (14336, 4096), (4096, 4096)]
KINDS = [(18944, 3584, 100), (18944, 3584, 333), (14336, 4096, 150), (4096, 4096, 200), (4096, 4096, 700)]


@pytest.mark.parametrize(
    ("n", "k", "m"),
    [
        *KINDS,
        *(
            pytest.param(n, k, m, marks=pytest.mark.exhaustive)
            for n, k in OTHER_SHAPES
            for m in (100, 150, 200, 333, 700)
            if (n, k, m) not in KINDS
        ),
    ],
)
def test_the_best_plan_of_other_shapes(n: int, k: int, m: int) -> None:
    """It does not spill for int4 in groups of 128, nor does the assembler add waits, which it would say."""
    header = WeightHeader(tilus.int4, (n, k), 128, "f16")
    arrays = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in header.arrays.items()}
    x, y, (plan, *_) = torch.empty(m, k).half(), torch.empty(m, n).half(), warpgroup_plans(header, m, 132)
    kernel, args, values = kernel_call(x, QuantizedWeight(header, **arrays), y, None, plan)
    assert_no_spills(kernel, "sm_90a", *args, **values)


@pytest.mark.parametrize("name", ["matmul_v5"])
def test_examples_for_hopper(name: str) -> None:
    module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert_no_spills(module[name.split("_v")[0]], "sm_90a")


@pytest.mark.parametrize(
    ("dtype", "shape", "m"),
    [
        (tilus.int8, (128256, 4096), 256),
        (tilus.int3, (4096, 4096), 1024),
        pytest.param(tilus.uint4, (6144, 4096), 4096, marks=pytest.mark.exhaustive),
        pytest.param(tilus.int8, (4096, 14336), 128, marks=pytest.mark.exhaustive),
    ],
)
def test_short_groups_find_a_plan_for_many_tokens(dtype: Any, shape: tuple[int, int], m: int) -> None:
    """The rule's: weights are multiplied by scales, those of a whole tile before its products."""
    header = WeightHeader(dtype, shape, 32, "f16", None, False, False)
    problem = LinearProblem.of(header, m, tilus.f16, tilus.f16)
    best = heuristic(problem, 132, hopper=True)
    assert isinstance(best, WarpgroupPlan) and best.tokens > 64 and best.scaled
    assert compile_plan(problem, best, get_target("sm_90a")) == best
