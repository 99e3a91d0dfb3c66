"""Every kernel of the library survives its text form, as translated and after all passes, and compiles to the same PTX."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import pytest

import tilus.kernels
from tilus.compiler import compile_function
from tilus.dtypes import f16, f32, float6_e3m2, float8_e4m3, int4, int8, int16, uint4
from tilus.instructions import INSTRUCTIONS
from tilus.ir import parser
from tilus.ir.function import Function
from tilus.ir.printer import print_function
from tilus.kernels.activation import silu
from tilus.kernels.gemm_schedule import Plan
from tilus.kernels.kv_cache import KV_FORMATS
from tilus.kernels.mla_decode import MlaPlan
from tilus.kernels.paged_decode import DecodePlan
from tilus.kernels.paged_decode_split import Split
from tilus.kernels.paged_prefill import PrefillPlan
from tilus.kernels.quantize.tiles import ROWS
from tilus.kernels.sampling_row import Tiling
from tilus.kernels.shared_prefix import shared_plans
from tilus.kernels.shared_prefix_kernel import SharedProblem
from tilus.kernels.warpgroup_linear import WarpgroupPlan
from tilus.lang.kernel import Kernel
from tilus.target import get_target

# Compile-time values for each kernel; a new kernel needs an entry.
SPECIALIZATIONS: dict[str, list[dict[str, Any]]] = {
    "activation.gated_kernel": [{"activation": silu}],
    "activation.soft_cap_kernel": [{}],
    "attention.paged_attention_kernel": [
        {"group": 3, "head_dim": 64, "page_size": 16, "rows": 16, "kv_tile": 64, "stages": 2},
        {"group": 4, "head_dim": 128, "page_size": 16, "rows": 64, "kv_tile": 64, "stages": 2},
    ],
    "embedding.dense_embedding_kernel": [{}],
    "embedding.quantized_embedding_kernel": [{"group": 32}],
    "columns.take_columns_kernel": [{}],
    "gemm_kernel.gemm_kernel": [
        {"plan": Plan(32, 2, 1, 2)},
        {"plan": Plan(256, 2, 1, 3, share_x=2), "constant": True},
        {"plan": Plan(16, 1, 2, 4, blocks=4)},
    ],
    "grouped_linear.grouped_linear_kernel": [
        {"wdtype": uint4, "scale_dtype": f16, "span": 128, "plan": WarpgroupPlan(8, 1, 2, 1, 2, 8)},
        {"wdtype": int4, "scale_dtype": f16, "span": 0, "plan": WarpgroupPlan(64, 2, 1, 1, 1, 4)},
    ],
    "index_checks.first_outside_kernel": [{}],
    "kv_cache.rope_append_quantized_kernel": [
        {"head_dim": 64, "q_heads": 3, "kv_heads": 3, "page_size": 16, "kind": KV_FORMATS["int4"]}
    ],
    "kv_frame.restore_values_kernel": [{"head_dim": 64, "q_heads": 3}],
    "linear.quantized_linear": [
        {
            "wdtype": uint4,
            "scale_dtype": f16,
            "span": 128,
            "tokens": 8,
            "rows": 2,
            "warps": 2,
            "stages": 1,
            "blocks_per_sm": 1,
        },
        {
            "wdtype": int4,
            "scale_dtype": float8_e4m3,
            "span": 16,
            "tokens": 16,
            "rows": 1,
            "warps": 2,
            "stages": 1,
            "blocks_per_sm": 1,
        },
        {
            "wdtype": float6_e3m2,
            "scale_dtype": f32,
            "span": 0,
            "tokens": 8,
            "rows": 1,
            "warps": 4,
            "stages": 2,
            "blocks_per_sm": 2,
        },
        {
            "wdtype": int4,
            "scale_dtype": f16,
            "span": 32,
            "tokens": 8,
            "rows": 1,
            "warps": 1,
            "stages": 0,
            "blocks_per_sm": 1,
            "order": ROWS,
        },
    ],
    "draft_agreement.follow_drafts_kernel": [{"page_size": 16}],
    "merge_states.merge_states_kernel": [{"head_dim": 128, "rows": 4}],
    "mla_attention.mla_attention_kernel": [{"width": 576, "latent": 512, "page_size": 16}],
    "mla_decode.mla_decode_kernel": [
        {
            "width": 576,
            "latent": 512,
            "q_len": 1,
            "heads": 128,
            "groups": 1,
            "eights": 8,
            "page_size": 64,
            "teams": 66,
            "split": Split(256),
            "plan": MlaPlan(cluster=2),
        }
    ],
    "mla_prefill.mla_prefill_kernel": [
        {"width": 576, "latent": 512, "heads": 16, "page_size": 16, "plan": MlaPlan(cluster=2)}
    ],
    "mixture.route_kernel": [{"experts": 60, "top": 4, "normalized": True}],
    "mixture.places_kernel": [{}],
    "mixture.scatter_kernel": [{"top": 2}],
    "mixture.combine_kernel": [{"top": 2}],
    "norm.rms_norm_kernel": [{"hidden": 768}],
    "paged_decode.paged_decode_kernel": [
        {
            "unit": f16,
            "q_len": 1,
            "group": 4,
            "head_dim": 128,
            "page_size": 16,
            "blocks": 132,
            "split": Split(16),
            "plan": DecodePlan(64, 3, 4),
        },
        {
            "unit": int16,
            "q_len": 2,
            "group": 3,
            "head_dim": 64,
            "page_size": 32,
            "blocks": 132,
            "split": Split(128, fixed=True),
            "plan": DecodePlan(128, 4, 8),
            "kind": KV_FORMATS["int4"],
            "early": True,
        },
    ],
    "paged_prefill.paged_prefill_kernel": [
        {"kv_heads": 2, "group": 4, "head_dim": 128, "page_size": 16, "causal": True, "plan": PrefillPlan(4)},
        {"kv_heads": 1, "group": 1, "head_dim": 64, "page_size": 128, "causal": False, "plan": PrefillPlan(1)},
    ],
    "shared_prefix_groups.shared_prefix_groups_kernel": [
        {"q_len": 2, "page_size": 16, "members": 16, "unit": 128, "lanes": 64},
        {"q_len": 1, "page_size": 256, "members": 32, "unit": 256, "lanes": 256, "early": True},
    ],
    "shared_prefix_kernel.shared_prefix_kernel": [
        {
            "q_len": 2,
            "kv_heads": 2,
            "group": 4,
            "head_dim": 64,
            "page_size": 16,
            "blocks": 132,
            "problem": SharedProblem(next(shared_plans(2, 4, 64)), 128, Split(16)),
        }
    ],
    "shared_prefix_merge.shared_prefix_merge_kernel": [
        {"q_len": 2, "kv_heads": 2, "group": 4, "head_dim": 64, "heads": 4, "row_tokens": 32}
    ],
    "quantize.codes.pack_codes_kernel": [
        {"wdtype": uint4, "lookup": False},
        {"wdtype": int4, "lookup": False, "order": ROWS},
    ],
    "quantize.codes.unpack_codes_kernel": [{"wdtype": int8, "lookup": True}],
    "quantize_tokens.quantize_tokens_kernel": [{"columns": 768}, {"columns": 20000, "paired": True}],
    "rope.rope_append_kernel": [{"head_dim": 64, "q_heads": 3, "kv_heads": 3, "page_size": 16}],
    "logit_edits.allow_kernel": [{}],
    "logit_edits.edit_kernel": [{}],
    "logprobs.runs_kernel": [{}],
    "logprobs.best_kernel": [{"padded_runs": 4}],
    "sampling.survey_kernel": [{"tiling": Tiling(4, 2)}],
    "sampling.choose_kernel": [{"tiling": Tiling(4, 1, 2), "most_runs": 4}],
    "warpgroup_linear.warpgroup_linear": [
        {"wdtype": uint4, "scale_dtype": f16, "span": 128, "plan": WarpgroupPlan(16, 1, 2, 1, 2, 4)},
        {"wdtype": int8, "scale_dtype": f32, "span": 0, "plan": WarpgroupPlan(8, 1, 1, 2, 1, 3)},
    ],
}


def parse(text: str, **options: Any) -> Function:
    return parser.parse_function(text, INSTRUCTIONS, **options)


def library() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for info in pkgutil.walk_packages(tilus.kernels.__path__, "tilus.kernels."):
        module = importlib.import_module(info.name)
        found |= {
            f"{info.name.removeprefix('tilus.kernels.')}.{name}": value
            for name, value in vars(module).items()
            if isinstance(value, Kernel) and not name.startswith("_") and value.signature.loc.file == module.__file__
        }
    return found


def without_locations(ptx: str) -> str:
    return re.sub(r"^ *\.(loc|file) .*\n", "", ptx, flags=re.MULTILINE)


TYPES = {
    "act": f16, "weight": f16, "out": f16, "out_dtype": f16, "unit": f16, "dtype": f16, "row_dtype": f16, "code": int8,
    "bias_type": f32,
}  # fmt: skip


def arguments_of(kernel: Kernel, consts: dict[str, Any]) -> dict[str, Any]:
    """The types that it has, and the constants."""
    return {t: dtype for t, dtype in TYPES.items() if any(p.type.dtype == t for p in kernel.signature.tensors)} | consts


def test_every_kernel_is_here_with_all_of_its_constants() -> None:
    kernels = library()
    assert set(kernels) == set(SPECIALIZATIONS)
    for name, cases in SPECIALIZATIONS.items():
        for consts in cases:
            kernels[name].specialize(**arguments_of(kernels[name], consts))


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("name", "consts"), [(name, consts) for name, cases in SPECIALIZATIONS.items() for consts in cases]
)
def test_round_trip(name: str, consts: dict[str, Any]) -> None:
    target, kernel = get_target("sm_90a"), library()[name]
    function = kernel.ir(**arguments_of(kernel, consts))
    compiled = compile_function(function, target)
    for stage in (function, compiled.function):
        text = print_function(stage)
        again = parse(text)
        assert print_function(again) == text
        assert without_locations(compile_function(again, target).ptx) == without_locations(compiled.ptx)
