"""Every layout conversion in the library's kernels and the examples is free of bank conflicts, or says what it costs."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_assembles import EXAMPLES, LIBRARY, LINEAR, linear_call
from test_convert import check_counts

import tilus
from tilus.compiler import compile_function
from tilus.ir.layout_rules import tile_conversion
from tilus.ir.visit import instructions
from tilus.kernels.linear import quantized_linear
from tilus.lang.kernel import Specialization
from tilus.layout import RegisterLayout
from tilus.layout.conversion import ConversionPlan, ScratchWay
from tilus.ptx.assembler import assemble
from tilus.report import make_report
from tilus.target import get_target

NAMES = [*(f"matmul_v{v}" for v in range(5)), "vector_add", "attention"]


def linear(case: tuple[Any, ...]) -> Specialization:
    args, values = linear_call(*case)
    return quantized_linear.specialize(*args, **values)


def library() -> Iterator[tuple[str, Any]]:
    for kernel, values in LIBRARY:
        # Names must be those of other processes, too.
        shown = {key: value.__name__ if callable(value) else value for key, value in values.items()}
        yield f"{kernel.__name__} {shown}", lambda kernel=kernel, values=values: kernel.specialize(**values)
    for case in LINEAR:
        yield f"linear of {case[0]} with {case[1]} tokens in groups of {case[2]}", lambda case=case: linear(case)
    for name in NAMES:
        module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        kernel = module[name.split("_v")[0]]
        yield name, kernel.specialize

    yield "softmax", lambda: runpy.run_path(str(EXAMPLES / "softmax.py"))["softmax"].specialize(width=1024)
    for dtype, out in ((np.int8, np.int32), (np.float32, np.float32)):
        yield f"matmul of {dtype.__name__}", lambda dtype=dtype, out=out: matmul_types(dtype, out)


def matmul_types(dtype: type[np.generic], out: type[np.generic]) -> Specialization:
    kernel = runpy.run_path(str(EXAMPLES / "matmul_types.py"))["matmul"]
    a, b, c = np.zeros((100, 160), dtype), np.zeros((72, 160), dtype), np.zeros((100, 72), out)
    return kernel.specialize(a, b, c, operand=tilus.int8 if dtype is np.int8 else tilus.tf32)


CASES = dict(library())


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "target", ["sm_80", *(pytest.param(target, marks=pytest.mark.exhaustive) for target in ("sm_89", "sm_100a"))]
)
@pytest.mark.parametrize("name", CASES)
def test_no_bank_conflicts_and_no_spills(name: str, target: str) -> None:
    """And what the library compiles for every target assembles without spills; for sm_90a, see the next test."""
    compiled = compile_function(CASES[name]().function, get_target(target))
    (usage,) = assemble(compiled.ptx, get_target(target), allow_spills=True).kernels
    assert (usage.spill_store_nbytes, usage.spill_load_nbytes, usage.stack_nbytes) == (0, 0, 0), usage
    for stmt in instructions(compiled.function.body):
        for plan in stmt.inst.conversions():
            assert no_conflicts(plan), str(plan)


def no_conflicts(plan: ConversionPlan) -> bool:
    return not isinstance(plan.chosen, ScratchWay) or plan.chosen.scratch.extra_wavefronts == 0


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", CASES)
def test_the_report_shows_every_conversion(name: str) -> None:
    """Those inside of reductions too; there are no conflicts and no spills."""
    compiled = compile_function(CASES[name]().function, get_target("sm_90a"))
    plans = [plan for stmt in instructions(compiled.function.body) for plan in stmt.inst.conversions()]
    assert all(map(no_conflicts, plans)), plans
    lines = make_report(compiled).render().splitlines()
    assert [line.split() for line in lines if line.startswith(("  spills", "  stack"))] == [
        ["spills", "none"],
        ["stack", "0", "bytes", "a", "thread"],
    ]
    section = lines[lines.index("conversions") + 1 : lines.index("machine code") - 1]
    assert len(section) == max(1, len(plans))
    shown = map(str, plans) if plans else ["none"]
    assert all(line.endswith(text) for line, text in zip(section, shown, strict=True))
    start, end = lines.index("bank conflicts (extra wavefronts of a block)"), lines.index("layouts") - 1
    claimed = [
        f"{repeats * side.extra} in {repeats * side.wavefronts} wavefronts"
        for scratch in (plan.chosen.scratch for plan in plans if isinstance(plan.chosen, ScratchWay))
        for repeats in (compiled.function.num_threads // scratch.num_threads,)
        for side in (scratch.store, scratch.load)
    ]
    conflicts = lines[start + 1 : end]
    assert all(
        line.endswith(text) for line, text in zip(conflicts[len(conflicts) - len(claimed) :], claimed, strict=True)
    )


def test_the_emulator_counts_what_the_plans_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the pairs of layouts that are converted somewhere in a kernel, in a kernel of their own."""
    found: dict[tuple[tilus.DataType, RegisterLayout, RegisterLayout], None] = {}

    def recorded(dtype: tilus.DataType, src: RegisterLayout, dst: RegisterLayout) -> ConversionPlan:
        plan = tile_conversion(dtype, src, dst)
        if plan.slots is None:
            found[dtype, src.reshape((src.size,)), dst.reshape((dst.size,))] = None
        return plan

    monkeypatch.setattr("tilus.codegen.conversion.tile_conversion", recorded)
    for case in CASES.values():
        compile_function(case().function, get_target("sm_90a"))
    monkeypatch.undo()
    assert len(found) >= 5
    for dtype, src, dst in found:
        check_counts(dtype, src, dst, src.num_threads // 32)


def test_attention_reduces_its_rows_inside_of_warps() -> None:
    """Two by two warps would share the product more evenly, and then exchange maxima and sums through shared memory."""
    compiled = compile_function(CASES["attention"]().function, get_target("sm_90a"))
    assert all(not stmt.inst.conversions() for stmt in instructions(compiled.function.body))
