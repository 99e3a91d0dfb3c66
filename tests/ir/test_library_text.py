"""Every kernel of the library survives its text form, as translated and after all passes, and compiles to the same PTX."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import pytest

import tilus.kernels
from tilus.compiler import compile_function
from tilus.dtypes import f16, float6_e3m2, int4, int8, uint4
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.lang.kernel import Kernel
from tilus.target import get_target

# Compile-time values for each kernel; a new kernel needs an entry.
SPECIALIZATIONS: dict[str, list[dict[str, Any]]] = {
    "activation.silu_mul_kernel": [{}],
    "attention.paged_attention_kernel": [
        {"group": 3, "head_dim": 64, "page_size": 16, "rows": 16, "kv_tile": 64, "stages": 2},
        {"group": 4, "head_dim": 128, "page_size": 16, "rows": 64, "kv_tile": 64, "stages": 2},
    ],
    "embedding.dense_embedding_kernel": [{}],
    "embedding.quantized_embedding_kernel": [{"group": 32}],
    "linear.quantized_linear": [
        {"wdtype": uint4, "groups": 1, "tokens": 8, "warps": 4, "splits": 1},
        {"wdtype": int4, "groups": 2, "tokens": 16, "warps": 2, "splits": 1},
        {"wdtype": float6_e3m2, "groups": 1, "tokens": 8, "warps": 4, "splits": 1},
    ],
    "norm.rms_norm_kernel": [{"hidden": 768}],
    "rope.rope_append_kernel": [{"head_dim": 64, "heads": 9, "q_heads": 3, "kv_heads": 3, "page_size": 16}],
}


def library() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for info in pkgutil.iter_modules(tilus.kernels.__path__):
        module = importlib.import_module(f"tilus.kernels.{info.name}")
        found |= {
            f"{info.name}.{name}": value
            for name, value in vars(module).items()
            if isinstance(value, Kernel) and not name.startswith("_") and info.name in value.signature.loc.file
        }
    return found


def without_locations(ptx: str) -> str:
    return re.sub(r"^ *\.(loc|file) .*\n", "", ptx, flags=re.MULTILINE)


def test_every_kernel_is_here() -> None:
    assert set(library()) == set(SPECIALIZATIONS)


@pytest.mark.parametrize(
    ("name", "consts"), [(name, consts) for name, cases in SPECIALIZATIONS.items() for consts in cases]
)
def test_round_trip(name: str, consts: dict[str, Any]) -> None:
    target = get_target("sm_90a")
    types = {"act": f16, "out": f16, "dtype": f16, "code": int8}
    kernel = library()[name]
    wanted = {t: dtype for t, dtype in types.items() if any(p.type.dtype == t for p in kernel.signature.tensors)}
    function = kernel.ir(**consts, **wanted)
    compiled = compile_function(function, target)
    for stage in (function, compiled.function):
        text = print_function(stage)
        again = parse_function(text)
        assert print_function(again) == text
        assert without_locations(compile_function(again, target).ptx) == without_locations(compiled.ptx)
