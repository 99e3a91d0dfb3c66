"""Every kernel, as it is typically specialised, assembles for every target without spilling registers."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import tilus
from tilus.kernels.activation import silu_mul_kernel
from tilus.kernels.attention import paged_attention_kernel
from tilus.kernels.embedding import dense_embedding_kernel, quantized_embedding_kernel
from tilus.kernels.linear import quantized_linear
from tilus.kernels.norm import rms_norm_kernel
from tilus.kernels.rope import rope_append_kernel
from tilus.kernels.schedule import schedule
from tilus.lang.kernel import Kernel
from tilus.ptx.assembler import assemble
from tilus.target import get_target

pytestmark = pytest.mark.slow

TARGETS = ["sm_80", "sm_89", "sm_90a", "sm_100a"]
EXAMPLES = Path(__file__).parents[2] / "examples"


def assert_no_spills(kernel: Kernel, target: str, *args: Any, **values: Any) -> None:
    ptx = kernel.ptx(*args, target=target, **values)
    for usage in assemble(ptx, get_target(target), allow_spills=True).kernels:
        assert (usage.spill_store_nbytes, usage.spill_load_nbytes, usage.stack_nbytes) == (0, 0, 0), usage


LIBRARY: list[tuple[Kernel, dict[str, Any]]] = [
    *((rms_norm_kernel, {"dtype": tilus.f16, "hidden": hidden}) for hidden in (100, 576, 4096, 16384)),
    (silu_mul_kernel, {"dtype": tilus.f16}),
    (dense_embedding_kernel, {"dtype": tilus.bf16}),
    (quantized_embedding_kernel, {"dtype": tilus.f16, "code": tilus.int8, "group": 32}),
    (
        rope_append_kernel,
        {"dtype": tilus.f16, "head_dim": 64, "heads": 15, "q_heads": 9, "kv_heads": 3, "page_size": 16},
    ),
    (
        rope_append_kernel,
        {"dtype": tilus.bf16, "head_dim": 128, "heads": 48, "q_heads": 32, "kv_heads": 8, "page_size": 16},
    ),
    *(
        (
            paged_attention_kernel,
            {"dtype": dtype, "group": group, "head_dim": head_dim, "page_size": 16, "rows": rows, "kv_tile": kv_tile},
        )
        for dtype, group, head_dim, rows, kv_tile in (
            (tilus.f16, 3, 64, 16, 64),
            (tilus.f16, 3, 64, 64, 64),
            (tilus.bf16, 4, 128, 16, 64),
            (tilus.bf16, 4, 128, 64, 32),
        )
    ),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kernel", "values"), LIBRARY, ids=lambda part: getattr(part, "__name__", None))
def test_library(kernel: Kernel, values: dict[str, Any], target: str) -> None:
    assert_no_spills(kernel, target, **values)


@pytest.mark.parametrize("target", TARGETS)
def test_add_rms_norm(target: str) -> None:
    x, residual, weight = torch.empty(4, 4096).half(), torch.empty(4, 4096), torch.empty(4096)
    assert_no_spills(rms_norm_kernel, target, x, weight, x, 1e-5, residual, hidden=4096)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [tilus.uint4, tilus.int3, tilus.float6_e3m2, tilus.int8], ids=str)
@pytest.mark.parametrize(("m", "group"), [(1, 128), (1, 32), (16, 32), (16, 128), (256, 128), (256, 16)])
def test_linear(dtype: tilus.DataType, m: int, group: int, target: str) -> None:
    """Of 4096 x 4096, with the schedule of an H100; unsigned codes have minimums, few tokens split K."""
    plan = schedule(m, 64, 64, dtype.nbits, 132)
    x, codes = torch.empty(m, 4096).half(), torch.empty(64, 64, 512 * dtype.nbits, dtype=torch.uint8)
    scales = torch.empty(64, 4096 // group, 8, 16, dtype=torch.uint8)
    partial, tickets = None, None
    if plan.splits > 1:
        partial, tickets = torch.empty(plan.splits, m, 4096), torch.empty(64, dtype=torch.int32)
    mins = None if dtype.is_signed else scales
    assert_no_spills(
        quantized_linear, target, x, codes, scales, x, 1.0, mins, None, None, None, partial, tickets,
        wdtype=dtype, scale_dtype=tilus.f16, mins_dtype=tilus.f16, span=group, tokens=plan.tokens, rows=plan.rows,
        warps=plan.warps, stages=plan.stages, blocks_per_sm=plan.blocks_per_sm,
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [f"matmul_v{v}" for v in range(5)] + ["vector_add", "attention"])
def test_examples(name: str, target: str) -> None:
    module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert_no_spills(module[name.split("_v")[0]] if "matmul" in name else module[name], target)
