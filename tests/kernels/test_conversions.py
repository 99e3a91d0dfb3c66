"""Every layout conversion in the library's kernels and the examples is free of bank conflicts, or says what it costs."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from typing import Any

import pytest
from test_assembles import EXAMPLES, LIBRARY, LINEAR, linear_call

from tilus.compiler import compile_function
from tilus.ir.visit import instructions
from tilus.kernels.linear import quantized_linear
from tilus.lang.kernel import Specialization
from tilus.layout.conversion import ConversionPlan, ScratchWay
from tilus.report import make_report
from tilus.target import get_target

NAMES = [*(f"matmul_v{v}" for v in range(5)), "vector_add", "attention"]


def linear(case: tuple[Any, ...]) -> Specialization:
    args, values = linear_call(*case)
    return quantized_linear.specialize(*args, **values)


def library() -> Iterator[tuple[str, Any]]:
    for kernel, values in LIBRARY:
        yield f"{kernel.__name__} {values}", lambda kernel=kernel, values=values: kernel.specialize(**values)
    for case in LINEAR:
        yield f"linear of {case[0]} with {case[1]} tokens in groups of {case[2]}", lambda case=case: linear(case)
    for name in NAMES:
        module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        kernel = module[name.split("_v")[0]]
        yield name, kernel.specialize


CASES = dict(library())


@pytest.mark.parametrize("name", CASES)
def test_no_bank_conflicts(name: str) -> None:
    compiled = compile_function(CASES[name]().function, get_target("sm_90a"))
    for stmt in instructions(compiled.function.body):
        for plan in stmt.inst.conversions():
            assert no_conflicts(plan), str(plan)


def no_conflicts(plan: ConversionPlan) -> bool:
    return not isinstance(plan.chosen, ScratchWay) or plan.chosen.scratch.extra_wavefronts == 0


@pytest.mark.parametrize("name", CASES)
def test_the_report_shows_every_conversion(name: str) -> None:
    """Those inside of reductions too."""
    compiled = compile_function(CASES[name]().function, get_target("sm_90a"))
    plans = [plan for stmt in instructions(compiled.function.body) for plan in stmt.inst.conversions()]
    lines = make_report(compiled).render().splitlines()
    section = lines[lines.index("conversions") + 1 : lines.index("machine code") - 1]
    assert len(section) == max(1, len(plans))
    shown = map(str, plans) if plans else ["none"]
    assert all(line.endswith(text) for line, text in zip(section, shown, strict=True))


def test_attention_reduces_its_rows_inside_of_warps() -> None:
    """Two by two warps would share the product more evenly, and then exchange maxima and sums through shared memory."""
    compiled = compile_function(CASES["attention"]().function, get_target("sm_90a"))
    assert all(not stmt.inst.conversions() for stmt in instructions(compiled.function.body))
