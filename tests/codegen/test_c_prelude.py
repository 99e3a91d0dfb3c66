"""Which kernels read the headers of the machine's intrinsics, which take a compiler longer than a small kernel."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

import tilus
from tilus import Tensor
from tilus.codegen.c.lower import INTRINSIC
from tilus.compiler import compile_for_cpu
from tilus.runtime.cpu.features import host_target

PRELUDE = files("tilus.codegen.c").joinpath("prelude.h").read_text()


def test_all_that_is_written_with_intrinsics_is_known() -> None:
    functions = re.findall(
        r"^TL_INLINE [^\n]*?(tl_\w+)\([^\n]*\{((?:[^\n]*\}$|.*?^\}))", PRELUDE, re.MULTILINE | re.DOTALL
    )
    assert len(functions) > 20
    intrinsic = {name for name, body in functions if re.search(r"\b(_mm\d*_|v\w+q_)", body)}
    assert "tl_load_f16" in intrinsic and all(INTRINSIC.fullmatch(name) for name in intrinsic)


@tilus.kernel
def copied(x: Tensor["t", 64], y: Tensor["t", 64]):
    tilus.grid(1, warps=1)
    tilus.store(y, [0], tilus.load(x, [0], [64]) * 2)


@pytest.mark.parametrize(("dtype", "reads"), [("f32", False), ("int32", False), ("f16", True)])
def test_only_kernels_that_use_them_read_the_headers(dtype: str, reads: bool) -> None:
    text = compile_for_cpu(copied.specialize(t=tilus.dtypes.dtype(dtype)).function, host_target())
    assert text.startswith("#define TL_NO_INTRINSICS\n") != reads
