"""What of the benchmarks needs no GPU: that they measure the right thing, and their schema. No times are judged."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilus
from tilus.kernels import linear
from tilus.kernels.quantize import PRESETS, RECIPE_NAMES, SCHEMES, pack

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gemm() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "gemm.py"))


def case(gemm: dict[str, Any], dtype: str, scheme: str, group: int) -> Any:
    return gemm["Case"]((128, 256), (1, 16), dtype, scheme, group)


def test_the_kernel_that_is_timed_is_checked(gemm: dict[str, Any]) -> None:
    """Every scheme and some types; a weight whose rows are displaced by one is refused."""
    cases = [(c.dtype, c.scheme, min(c.group, 256)) for c in gemm["SCHEMES"]]
    for dtype, scheme, group in [*cases, ("uint1", "symmetric", 128), ("float6_e3m2", "symmetric", 128)]:
        matrix = gemm["random_matrix"](case(gemm, dtype, scheme, group))
        exact = gemm["Exact"](matrix, "cpu")
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).half()
        y = linear(x, pack(matrix, "cpu"), device="reference")
        assert 0 <= gemm["checked"](exact.error(x, y), scheme) <= 1
        with pytest.raises(SystemExit, match="an element is off by"):
            gemm["checked"](exact.error(x, y.roll(1, 1)), scheme)


def test_a_sweep_has_schedules_of_both_batches(gemm: dict[str, Any]) -> None:
    plans = gemm["sweep_plans"]()
    assert len(set(plans)) == len(plans) == 45
    assert {plan.tokens for plan in plans} == {8, 16}


def test_the_read_kernel_reads_every_byte(gemm: dict[str, Any]) -> None:
    x = np.random.default_rng(0).integers(-100, 100, 20_000).astype(np.int32)
    sums = np.zeros(3, np.int32)
    gemm["read"].on("emulator")(x, sums)
    assert sums.tolist() == [int(x[i : i + 8192].sum()) for i in (0, 8192, 16384)]


def test_weight_bytes_and_copies(gemm: dict[str, Any]) -> None:
    weight = pack(gemm["random_matrix"](case(gemm, "int4", "symmetric", 128)), "cpu")
    assert weight.nbytes == 128 * 256 // 2 + 128 * 2 * 2  # codes, and two f16 scales a row
    again = gemm["clone"](weight)
    assert again.header == weight.header
    assert all(torch.equal(a, again.arrays[n]) and a is not again.arrays[n] for n, a in weight.arrays.items())
    for nbytes in (1_000, 8 << 20, 200 << 20):
        assert gemm["copies"](nbytes, 50 << 20) * nbytes > 150 << 20


def test_compile_time_schema() -> None:
    compile_time = runpy.run_path(str(BENCHMARKS / "compile_time.py"))
    sample = compile_time["in_new_process"]("uint4", "sm_90a")
    assert list(sample) == ["import_s", "library_s", "frontend_s", "passes_s", "codegen_s", "ptxas_s"]
    assert all(seconds > 0 for seconds in sample.values())


def test_layout_benchmark_covers_the_library() -> None:
    layout = runpy.run_path(str(BENCHMARKS / "layout.py"))
    measured = layout["measure"](repeats=1)
    assert measured["register_layouts"] > 50 and measured["memory_layouts"] > 20
    operations = {(case["kind"], case["operation"]) for case in measured["cases"]}
    assert operations == {
        (kind, name)
        for kind in ("register", "memory")
        for name in ("construct", "product", "divide", "left_divide", "equal", "hash", "reshape")
    }
    assert all(case["median_us"] > 0 and case["samples"] > 0 for case in measured["cases"])


def test_inference_schema() -> None:
    measured = runpy.run_path(str(BENCHMARKS / "inference.py"))["measure"]((100,), samples=1)
    (case,) = measured["cases"]
    assert list(case) == ["instructions", "inference_s", "evaluations", "pipeline_s"]
    assert all(value > 0 for value in case.values()) and abs(case["instructions"] - 100) < 10


@pytest.fixture(scope="module")
def casts() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "casts.py"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((BENCHMARKS / "results" / "cpu" / "casts.json").read_text())


def test_the_recorded_costs_of_casts_are_those_of_today(casts: dict[str, Any], recorded: dict[str, Any]) -> None:
    found = casts["measure"]([tilus.dtype(name) for name in ("int3", "uint8", "float6_e3m2", "float8_e4m3")], False)
    rows = {(row["target"], row["src"], row["dst"]): row for row in recorded["casts"]}
    for row in found["casts"]:
        before = rows[row["target"], row["src"], row["dst"]]
        assert row == before | {"machine": None}
    assert all(row in recorded["original"] for row in found["original"])


def test_the_table_of_casts_is_the_recorded_one(casts: dict[str, Any], recorded: dict[str, Any]) -> None:
    page = (BENCHMARKS.parent / "docs" / "casts.md").read_text()
    assert casts["table"](recorded) in page, "paste the table of `python benchmarks/casts.py --table`"


def test_the_machine_code_of_a_cast_takes_little_more_than_its_plan(
    casts: dict[str, Any], recorded: dict[str, Any]
) -> None:
    """In every row, and measured again for one: what ptxas adds are constants that it makes again in the loop."""
    for row in recorded["casts"]:
        if row["machine"] is not None:
            assert row["scaled"] <= row["machine"] + 1 / 32 <= row["scaled"] + 0.25
    again = casts["machine_cost"](tilus.float4_e2m1, tilus.f16, casts["TARGETS"]["sm_90a"])
    assert 1.125 <= again <= 1.125 + 0.25


@pytest.fixture(scope="module")
def accuracy() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "accuracy.py"))


def test_accuracy_rows_have_every_type_and_scheme_once(accuracy: dict[str, Any]) -> None:
    rows = accuracy["all_rows"]()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.recipe.dtype for row in rows} == {tilus.dtype(name) for name in RECIPE_NAMES if name not in PRESETS}
    assert {row.recipe.scheme for row in rows} == set(SCHEMES)


def test_the_accuracy_table_is_what_was_measured(accuracy: dict[str, Any]) -> None:
    """And 4 bits with a scale and a minimum for 32 weights lose no more than 1 % of perplexity against the model as shipped."""
    result = json.loads((BENCHMARKS / "results" / "h100" / "quantization.json").read_text())
    assert [row["row"] for row in result["rows"]] == [row.name for row in accuracy["all_rows"]()]
    assert accuracy["table"](result) in (BENCHMARKS.parent / "docs" / "quantization.md").read_text()
    ratios = {row["row"]: row["ratio"] for row in result["rows"]}
    assert ratios["uint4-g32"] <= 1.01


def test_launches_on_the_cpu_are_measured() -> None:
    measure = runpy.run_path(str(BENCHMARKS / "cpu_launch.py"), {"__name__": "benchmark"})["measure"]
    measure.__globals__["LAUNCHES"] = 5
    result = measure(2, 64, 1)
    recorded = json.loads((BENCHMARKS / "results" / "cpu" / "cpu_launch.json").read_text())
    assert all(case.keys() == result.keys() for case in recorded["cases"])
    assert 0 < result["min_us"] <= result["median_us"]


@pytest.fixture(scope="module")
def cpu_linear() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "cpu_linear.py"))


def test_what_is_timed_on_a_cpu_is_checked(cpu_linear: dict[str, Any]) -> None:
    """A result whose columns are displaced by one is refused; copies are more than the caches hold, each its own memory."""
    matrix = cpu_linear["random_matrix"]("uint4", 128, 256, 32, True)
    weight = pack(matrix, torch.device("cpu"))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).half()
    y = linear(x, weight, device="reference")
    cpu_linear["check"](matrix, x, y)
    with pytest.raises(SystemExit, match="the result is off by"):
        cpu_linear["check"](matrix, x, y.roll(1, 1))


def test_the_read_kernel_of_a_cpu_reads_every_byte(cpu_linear: dict[str, Any]) -> None:
    x = torch.randint(-100, 100, (150_000,), dtype=torch.int32)
    sums = torch.zeros(3, dtype=torch.int32)
    cpu_linear["read"].on("cpu")(x, sums)
    assert sums.tolist() == [int(x[i : i + 65536].sum()) for i in (0, 65536, 131072)]


def test_the_servers_rates_are_medians_beside_the_peers() -> None:
    row = runpy.run_path(str(BENCHMARKS / "cpu_serving.py"))["row"]
    assert row("decode", [3.0, 9.0, 6.0], [2.0, 4.0, 3.0]) == {
        "case": "decode", "unit": "tokens/s", "ours": 6.0, "peer": 3.0, "ratio": 2.0,
    }  # fmt: skip
    assert row("decode", [3.0, 9.0, 6.0], []) | {"ours": None} == {
        "case": "decode", "unit": "tokens/s", "ours": None, "peer": None, "ratio": None,
    }  # fmt: skip
