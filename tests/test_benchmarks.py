"""What of the benchmarks needs no GPU: that they measure the right thing, and their schema. No times are judged."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilus

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gemm() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "gemm.py"))


@pytest.mark.parametrize("name", ["int4", "int3", "float6_e3m2"])
@pytest.mark.parametrize("m", [1, 16])
def test_the_kernel_that_is_timed_is_checked(gemm: dict[str, Any], name: str, m: int) -> None:
    weight, decoded = gemm["random_weight"](128, 256, tilus.dtype(name), 128, "cpu")
    gemm["check"](weight, decoded, m)
    with pytest.raises(SystemExit, match="relative error"):
        gemm["check"](weight, decoded.roll(1, 0), m)


def test_the_read_kernel_reads_every_byte(gemm: dict[str, Any]) -> None:
    x = np.random.default_rng(0).integers(-100, 100, 20_000).astype(np.int32)
    sums = np.zeros(3, np.int32)
    gemm["read"].on("emulator")(x, sums)
    assert sums.tolist() == [int(x[i : i + 8192].sum()) for i in (0, 8192, 16384)]


def test_weight_bytes_and_copies(gemm: dict[str, Any]) -> None:
    weight, _ = gemm["random_weight"](128, 256, tilus.int4, 128, "cpu")
    assert gemm["weight_nbytes"](weight) == 128 * 256 // 2 + weight.scales.numel() * 2
    assert isinstance(weight.codes, torch.Tensor)
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
