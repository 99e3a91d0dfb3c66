"""`tilus tune`: with times that are made up, and compiling for real; users' mistakes with their whole text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_programs import output_of, refusal_of, tilus_

from tilus.errors import TilusError
from tilus.kernels import tune_gemm, tune_linear
from tilus.kernels.gemm_schedule import Plan
from tilus.kernels.schedule import Schedule
from tilus.runtime import cuda, tuned_plans
from tilus.runtime.tuned_plans import Measurement, Tuned

GPU = cuda.Device(0, "a GPU that is not there", (9, 0), 132, 232448, 1)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 1000,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "cache"))
    yield
    tuned_plans.forget()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The problems that a made-up GPU measures."""
    problems: list[Any] = []

    def linear(problem: Any, device: cuda.Device, timer: Any) -> Tuned:
        problems.append(problem)
        plans = (Schedule(8, 1, 2, 1), Schedule(8, 1, 4, 2), Schedule(32, 1, 8, 3))
        return Tuned(tuple(map(Measurement, plans, (12.5, 10.0, None), (None, None, "kernel spills"))), 1)

    def gemm(problem: Any, device: cuda.Device, timer: Any) -> Tuned:
        problems.append(problem)
        return Tuned((Measurement(Plan(16, 1, 1, 8), None, "wrong"), Measurement(Plan(16, 1, 1, 7), 3.0)), 1)

    monkeypatch.setattr(tune_linear, "measure", linear)
    monkeypatch.setattr(tune_gemm, "measure", gemm)
    monkeypatch.setattr(cuda, "device", lambda index: {0: GPU}[index])
    return problems


def test_table(model: Path, asked: list[Any]) -> None:
    lines = output_of("tune", model, "--tokens", "1,16").splitlines()
    assert lines[0].split() == ["layer", "N", "x", "K", "M", "rule", "us", "tuned", "us", "ratio", "plan"]
    assert len(lines) == 11  # five layers at two numbers of tokens
    plan = "Schedule(tokens=8, rows=1, warps=4, stages=2, splits=1, blocks_per_sm=1)"
    assert lines[1].split(maxsplit=8) == ["qkv", "512", "x", "256", "1", "12.50", "10.00", "1.25", plan]
    assert [problem.m for problem in asked] == [1, 16] * 5


def test_known_plans_are_not_measured_again_unless_asked(model: Path, asked: list[Any]) -> None:
    first = output_of("tune", model / "config.json", "--tokens", "2,3,4")
    assert len(asked) == 5 and {problem.m for problem in asked} == {4}  # one bucket
    tuned_plans.forget()
    assert output_of("tune", model, "--tokens", "2,3,4") == first and len(asked) == 5
    output_of("tune", model, "--tokens", "4", "--again")
    assert len(asked) == 10


def test_json(model: Path, asked: list[Any]) -> None:
    lines = json.loads(output_of("tune", model, "--tokens", "5", "--act", "bf16", "--json"))
    assert len(lines) == 5
    plans = [
        {"kind": "Schedule", "tokens": 8, "rows": 1, "warps": 2, "stages": 1, "splits": 1, "blocks_per_sm": 1},
        {"kind": "Schedule", "tokens": 8, "rows": 1, "warps": 4, "stages": 2, "splits": 1, "blocks_per_sm": 1},
        {"kind": "Schedule", "tokens": 32, "rows": 1, "warps": 8, "stages": 3, "splits": 1, "blocks_per_sm": 1},
    ]
    assert lines[0] == {
        "layer": "qkv", "N": 512, "K": 256, "M": 5, "dtype": "int4", "scheme": "symmetric", "group": 128, "act": "bf16",
        "out": "bf16", "heuristic_us": 12.5, "us": 10.0, "ratio": 1.25, "plan": plans[1],
        "candidates": [
            {"plan": plans[0], "us": 12.5, "note": None}, {"plan": plans[1], "us": 10.0, "note": None},
            {"plan": plans[2], "us": None, "note": "kernel spills"},
        ],
    }  # fmt: skip
    head = lines[-1]
    assert [head[key] for key in ("layer", "N", "dtype", "group", "out")] == ["lm_head", 1000, "int8", 32, "f32"]


def test_weights_that_are_not_quantised(model: Path, asked: list[Any]) -> None:
    lines = output_of("tune", model, "--tokens", "1", "--act", "bf16", "--weight-dtype", "bf16", "--head-dtype", "nf4")
    assert lines.splitlines()[1].split(maxsplit=8)[4:8] == ["1", "-", "3.00", "-"]
    (line, *_) = json.loads(
        output_of("tune", model, "--tokens", "1", "--act", "bf16", "--weight-dtype", "bf16", "--json")
    )
    assert (line["dtype"], line["heuristic_us"], line["ratio"], "scheme" in line) == ("bf16", None, None, False)
    dense = asked[0]
    assert (dense.n, dense.k, dense.act.name, dense.weight.name) == (512, 256, "bf16", "bf16")
    assert asked[4].header.has_table and asked[4].header.group == 64


def test_compiling_fills_the_cache_without_a_gpu(model: Path, tmp_path: Path) -> None:
    command = ("tune", model, "--tokens", "1", "--compile-only", "--target", "sm_80", "--head-dtype", "int4")
    first = output_of(*command)
    entries = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cubin").iterdir()}
    count, rest = first.split(maxsplit=1)
    assert rest.startswith("kernels for 5 products, ") and 1 <= len(entries) <= int(count) <= 5
    assert output_of(*command).startswith(f"{count} kernels")
    assert entries == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cubin").iterdir()}


def test_mistakes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(index: int) -> cuda.Device:
        raise TilusError("no CUDA driver found (libcuda.so.1)", hint=cuda.NO_DRIVER_HINT)

    monkeypatch.setattr(cuda, "device", no_gpu)
    for arguments in ((), ("--compile-only",)):
        assert refusal_of("tune", model, *arguments) == (
            "error: tuning needs a GPU: no CUDA driver found (libcuda.so.1)\n"
            "  hint: --compile-only --target NAME needs none; `tilus doctor` says what is missing\n"
        )
    assert "--target goes with --compile-only" in refusal_of("tune", model, "--target", "sm_80", exit_code=2)
    assert "--again and --json go with" in refusal_of("tune", model, "--json", "--compile-only", exit_code=2)
    refusal = refusal_of("tune", model, "--tokens", "1,x", exit_code=2)
    assert "--tokens 1,x: 'x' is no number of tokens, expected M,M,... such as 1,16,64" in refusal
    assert "'0' is no number of tokens" in refusal_of("tune", model, "--tokens", "0", exit_code=2)
    assert refusal_of("tune", model, "--weight-dtype", "int9").startswith("error: unknown weight type 'int9'\n")
    refusal = refusal_of("tune", tmp_path / "nowhere")
    assert refusal.startswith(f"error: there is no file {tmp_path / 'nowhere'}\n  hint: expected a config.json, ")


def test_help_explains() -> None:
    text = " ".join(tilus_("tune", "--help").output.split())
    for words in ("ahead of time", "TILUS_CACHE_DIR", "TILUS_AUTOTUNE=1", "--compile-only", "129-256"):
        assert words in text
