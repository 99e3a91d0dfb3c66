"""What of benchmarks/serving_schedule.py needs no GPU: its rows, and how far predictions are said to be off."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import serving_schedule
from serving_schedule import Remembered

from serving.cost_model import CostModel, StepTimes, StepWork

DECODE, PROMPT = StepWork(2, 20, 20), StepWork(50, 50, 1275, prompts=True)


def taking(decode: float, prompt: float) -> StepTimes:
    times = StepTimes()
    for _ in range(40):
        times.observe(DECODE, decode)
        times.observe(PROMPT, prompt)
    times.fit()
    return times


def test_residuals_are_of_what_was_predicted_before() -> None:
    """Steps that only decode take half of what is known, prompts four times as much."""
    watched = Remembered(taking(4e-3, 10e-3))
    for _ in range(10):
        watched.observe(DECODE, 2e-3)
        watched.observe(PROMPT, 40e-3)
    decode, prompt = watched.residuals(case="a", resource="device")
    assert decode == {
        "case": "a", "resource": "device", "prompts": False, "steps": 10, "measured_ms": 2.0, "predicted_ms": 4.0,
        "ratio": [2.0, 2.0, 2.0],
    }  # fmt: skip
    assert (prompt["prompts"], prompt["measured_ms"], prompt["predicted_ms"]) == (True, 40.0, 10.0)
    assert watched.alone().predict(DECODE) == pytest.approx(2e-3)


def test_each_replay_is_simulated_with_steps_of_its_own(tmp_path: Path) -> None:
    options = argparse.Namespace(
        trace=None, requests=20, longest=256, few_pages=60, num_pages=2000, max_batch=8, max_step_tokens=128, context=4096,
        itl_slo=[30.0], prefill_tokens=512, steps=None, runner="sim", out=tmp_path / "out.json",
    )  # fmt: skip
    known, models = CostModel(), [CostModel(), CostModel(), CostModel()]
    known.device = taking(4e-3, 10e-3)
    for model, seconds in zip(models, (1e-3, 2e-3, 4e-3)):
        model.device = taking(seconds, 10e-3)
    _, outcomes = serving_schedule.compare_admission(options, serving_schedule.simulator(known, models))
    a_token = [outcome.summary.itl.p50 for outcome in outcomes]
    assert a_token == pytest.approx([1e-3, 2e-3, 4e-3], rel=0.01)
    report = {"rows": []}
    serving_schedule.measure(options, report)
    assert json.loads(options.out.read_text()) == report and report["steps"] == "estimated"
    assert {tuple(row) for row in report["rows"]} == {("case", "metric", "value", "unit", "baseline", "limit")}
