"""Kernels of the library whose shared memory is written by copies or by other blocks, as they are typically specialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import tilus
from tilus import bf16, f16, int8, uint4
from tilus.kernels.gemm_kernel import gemm_kernel
from tilus.kernels.gemm_schedule import Plan
from tilus.kernels.grouped_linear import grouped_linear_kernel
from tilus.kernels.kv_cache import quantized_cache
from tilus.kernels.linear import kernel_call
from tilus.kernels.mla_decode import MlaPlan, mla_decode_kernel
from tilus.kernels.mla_prefill import PLAN, mla_prefill_kernel
from tilus.kernels.paged_decode import paged_decode_kernel, plans, units_of_codes
from tilus.kernels.paged_decode_split import Split
from tilus.kernels.paged_prefill import as_f16, paged_prefill_kernel, plans_of, plans_of_codes
from tilus.kernels.quantize import QuantizedWeight, WeightHeader
from tilus.kernels.shared_prefix import shared_plans
from tilus.kernels.shared_prefix_kernel import SharedProblem, shared_prefix_kernel
from tilus.kernels.trial_arrays import placeholder
from tilus.kernels.warpgroup_linear import warpgroup_linear
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_schedule import warpgroup_plans
from tilus.lang.kernel import Specialization

INTEGERS, FLOATS = torch.zeros(8, 8, dtype=torch.int32), torch.zeros(8, 8)


def linear(
    m: int, plan: WarpgroupPlan | None = None, dtype: str = "int4", group: int = 128, **kinds: Any
) -> Specialization:
    """Of 4096 x 4096; by default with the plan that the library takes."""
    given: dict[str, Any] = {"scale_dtype": "f16", "mins_dtype": None, **kinds}
    header = WeightHeader(getattr(tilus, dtype), (4096, 4096), group, **given)
    arrays: dict[str, Any] = {name: np.empty(*kind) for name, kind in header.arrays.items()}
    weight = QuantizedWeight(header, **arrays)
    operands = placeholder((m, 4096), f16), weight, placeholder((m, 4096), f16)
    kernel, arguments, values = kernel_call(*operands, None, plan or warpgroup_plans(header, m, 132)[0])
    return kernel.specialize(*arguments, **values)


def cached(name: str | None) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """(Eight pages of 16 tokens and two heads, factors, format) of bfloat16, or quantised."""
    if name is None:
        return torch.zeros(8, 2, 16, 2, 128).bfloat16(), None, None
    cache = quantized_cache(name, 8, 16, 2, 128)
    return units_of_codes(cache), cache.factors, cache.format


def decode(name: str | None) -> Specialization:
    cache, factors, kind = cached(name)
    q, partial = torch.zeros(8, 1, 2, 4, 128).bfloat16(), torch.zeros(9, 1, 4, 128)
    nbits = 16 if kind is None else kind.code.nbits
    plan = plans(1, 4, 128, 16, nbits, crowded=False)[0]
    return paged_decode_kernel.specialize(
        q, cache, INTEGERS, INTEGERS[0], q, partial, partial[..., 0].contiguous(), INTEGERS[0], 1.0, None, factors, q_len=1,
        group=4, head_dim=128, page_size=16, blocks=132, split=Split(16), plan=plan, kind=kind,
    )  # fmt: skip


def prefill(name: str | None) -> Specialization:
    cache, factors, kind = cached(name)
    q = torch.zeros(8, 2, 4, 128).bfloat16()
    bits, q_type = (q, None) if kind is None else as_f16(q)
    plan = plans_of(4, 128)[0] if kind is None else plans_of_codes(4, 128, kind.code.nbits)[0]
    return paged_prefill_kernel.specialize(
        bits, cache, INTEGERS, INTEGERS[0], INTEGERS[0], q, 1.0, 132, None, None, None, None, factors, head_dim=128,
        page_size=16, kv_heads=2, group=4, causal=True, plan=plan, kind=kind, q_type=q_type,
    )  # fmt: skip


def prefixes(name: str | None) -> Specialization:
    cache, factors, kind = cached(name)
    q, notes, found = torch.zeros(8, 1, 2, 4, 128).bfloat16(), INTEGERS[:4], INTEGERS[:7]
    rows, q_type = (q.flatten(0, 1), None) if kind is None else as_f16(q.flatten(0, 1))
    prefix, own = torch.zeros(4, 128, 128), torch.zeros(9, 1, 4, 128)
    plan = next(shared_plans(1, 4, 128, 16 if kind is None else kind.code.nbits))
    return shared_prefix_kernel.specialize(
        q, rows, cache, INTEGERS, found, notes, prefix, prefix[..., 0].contiguous(), own, own[..., 0].contiguous(), 1.0,
        factors, q_len=1, kv_heads=2, group=4, head_dim=128, page_size=16, blocks=128,
        problem=SharedProblem(plan, 128, Split(16), kind, q_type),
    )  # fmt: skip


def dense(plan: Plan) -> Specialization:
    return gemm_kernel.specialize(act=f16, weight=f16, out=f16, bias_type=f16, plan=plan)


def latents() -> Specialization:
    return mla_decode_kernel.specialize(
        dtype=bf16, width=576, latent=512, q_len=1, heads=128, groups=1, eights=8, page_size=64, teams=66, split=Split(256),
        plan=MlaPlan(cluster=2),
    )  # fmt: skip


COPYING: dict[str, Callable[[], Specialization]] = {
    "linear, 1 token": lambda: linear(1),
    "linear, 16 tokens": lambda: linear(16),
    "linear, 64 tokens": lambda: linear(64),
    "linear, 512 tokens": lambda: linear(512),
    "linear, others meanwhile": lambda: linear(64, WarpgroupPlan(64, 1, 2, 1, 2, 4, blocks_per_sm=2, overlap="others")),
    "linear, shared activations": lambda: linear(16, WarpgroupPlan(16, 1, 2, 2, 2, 4, sharing=2)),
    "linear, scaled": lambda: linear(32, WarpgroupPlan(32, 2, 1, 1, 2, 3, scaled=True, launched=2)),
    "linear, streamed": lambda: linear(
        16, WarpgroupPlan(16, 1, 3, 1, 1, 6, launched=5, streamed=True, overlap="steps")
    ),
    "minimums, 1 token": lambda: linear(1, dtype="uint4", group=32, mins_dtype="f16"),
    "minimums, 16 tokens": lambda: linear(16, dtype="uint4", group=32, mins_dtype="f16"),
    "zero points": lambda: linear(16, dtype="uint4", has_zeros=True),
    "table": lambda: linear(16, dtype="uint4", group=64, has_table=True),
    "grouped": lambda: grouped_linear_kernel.specialize(
        act=f16, out=f16, bias_type=f16, wdtype=uint4, scale_dtype=f16, span=128, plan=WarpgroupPlan(8, 1, 2, 1, 2, 8)
    ),
    "8-bit activations": lambda: warpgroup_linear.specialize(
        act=int8,
        out=bf16,
        bias_type=f16,
        wdtype=uint4,
        scale_dtype=f16,
        span=128,
        plan=WarpgroupPlan(16, 1, 2, 1, 2, 4),
    ),
    "dense": lambda: dense(Plan(256, 2, 1, 3, share_x=2)),
    "dense, sums of a cluster": lambda: dense(Plan(16, 1, 2, 4, blocks=4)),
    "decode": lambda: decode(None),
    "decode, fp8": lambda: decode("fp8"),
    "decode, int8": lambda: decode("int8"),
    "decode, int4": lambda: decode("int4"),
    "prefill": lambda: prefill(None),
    "prefill, fp8": lambda: prefill("fp8"),
    "prefill, int4": lambda: prefill("int4"),
    "shared prefixes": lambda: prefixes(None),
    "shared prefixes, int8": lambda: prefixes("int8"),
    "latents, decode": latents,
    "latents, prefill": lambda: mla_prefill_kernel.specialize(
        dtype=bf16, width=576, latent=512, heads=16, page_size=16, plan=PLAN
    ),
}
