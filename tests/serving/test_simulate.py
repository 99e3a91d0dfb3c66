"""The simulator: time passes as steps say, the limit between tokens is kept, and the policies are worth what they promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.__main__ import main
from serving.bench.simulate import (
    COLUMNS,
    Pace,
    PlainVocabulary,
    PlannedEnds,
    SimRunner,
    VirtualClock,
    numbers,
    replay,
    roofline,
    simulate,
)
from serving.bench.workload import PlannedRequest, arrival_times
from serving.config import EngineConfig
from serving.core import Batch, StepOutput
from serving.cost_model import LEAST_CHUNK, CostModel, StepWork
from serving.engine import Engine

LIMITS = EngineConfig(4000, 8192, max_batch=64, max_step_tokens=512, request_timeout=1e9, prefix_cache=False)


def seconds(work: StepWork) -> float:
    return 1e-3 + 2e-5 * work.tokens + 3e-8 * work.kv_tokens + 1e-9 * work.pairs


@given(st.integers(1, 40), st.integers(1, 20), st.integers(4, 64), st.floats(0, 5))
@settings(max_examples=25)
def test_a_request_alone_takes_what_its_steps_take(prompt: int, answer: int, chunk: int, arrival: float) -> None:
    expected, context = list[float](), prompt
    time = sum(
        seconds(StepWork(count, start + count, sum(range(start + 1, start + count + 1)), count > 1))
        for start in range(0, prompt, chunk)
        if (count := min(chunk, prompt - start))
    )
    for _ in range(answer):
        expected.append(time)
        context += 1
        time += seconds(StepWork(1, context, context))
    clock = VirtualClock()
    runner = PlannedEnds(SimRunner(clock, Pace(seconds)), {"0": answer})
    engine = Engine(runner, PlainVocabulary(), replace(LIMITS, max_step_tokens=chunk, max_batch=4), clock)
    (record,) = replay(engine, [PlannedRequest(arrival, prompt, answer)], clock, max_tokens=100).records
    assert record.outcome == "finished" and record.output_tokens == answer
    assert [time - arrival for time in record.token_times] == pytest.approx(expected)


class Watching:
    """Remembers what each step did, and took."""

    def __init__(self, clock: VirtualClock, lengths: dict[str, int]) -> None:
        self._clock = clock
        self._runner = PlannedEnds(SimRunner(clock, Pace(seconds)), lengths)
        self.steps: list[tuple[list[int], float]] = []

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        start, wait = self._clock(), self._runner.launch(batch)

        def watched() -> StepOutput:
            output = wait()
            self.steps.append(([len(item.token_ids) for item in batch.items], self._clock() - start))
            return output

        return watched


def conversation(count: int, rate: float) -> list[PlannedRequest]:
    rng = np.random.default_rng(0)
    arrivals = arrival_times("gamma", rate, count, rng, cv=1.1)
    inputs, outputs = rng.lognormal(6.5, 0.9, count), rng.lognormal(4.3, 0.8, count)
    return [
        PlannedRequest(float(a), min(4000, int(i) + 1), min(300, int(o) + 1))
        for a, i, o in zip(arrivals, inputs, outputs)
    ]


@pytest.mark.parametrize("slo", [0.004, 0.008])
def test_the_limit_between_tokens_is_kept_once_steps_are_known(slo: float) -> None:
    plan, clock = conversation(40, 8.0), VirtualClock()
    watching = Watching(clock, {str(index): planned.output_tokens for index, planned in enumerate(plan)})
    engine = Engine(watching, PlainVocabulary(), replace(LIMITS, itl_slo=slo), clock)
    replay(engine, plan, clock)
    mixed = [(counts, took) for counts, took in watching.steps[200:] if 1 in counts and max(counts) > 1]
    assert len(mixed) > 50
    for counts, took in mixed:
        assert took <= slo * 1.01 or sum(count for count in counts if count > 1) <= LEAST_CHUNK
    assert max(took for _, took in mixed) > 0.9 * slo  # and used


def test_chunks_keep_gaps_short_at_the_same_throughput() -> None:
    """Against prompts first, at about 80 % of what can be served: 0.4 of the gap, 0.97 of the throughput."""
    plan = conversation(120, 16.0)
    limits = replace(LIMITS, num_pages=30000, max_batch=128)
    chunks = simulate(plan, replace(limits, itl_slo=0.03)).summary
    first = simulate(plan, replace(limits, prefill_first=True, max_step_tokens=8192)).summary
    assert chunks.itl.p99 <= 0.4 * first.itl.p99
    assert chunks.output_tokens_per_second >= 0.97 * first.output_tokens_per_second


def test_past_future_admission_rarely_evicts_and_fills_the_cache() -> None:
    """Long answers, all at once: a quarter of the evictions of aggressive admission, 1.8 times the throughput of reservations."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(38), 1.0, 250).astype(int) + 1, 512)
    plan = [PlannedRequest(0.0, int(size), int(length)) for size, length in zip(rng.integers(4, 64, 250), lengths)]
    found = {
        name: simulate(plan, replace(LIMITS, num_pages=500, max_batch=128, admission=name), max_tokens=512)
        for name in ("past-future", "aggressive", "conservative")
    }
    evicted = {name: outcome.recomputed for name, outcome in found.items()}
    rates = {name: outcome.summary.output_tokens_per_second for name, outcome in found.items()}
    assert evicted["aggressive"] > 20 and evicted["past-future"] <= 0.25 * evicted["aggressive"]
    assert rates["past-future"] >= 1.8 * rates["conservative"]


def host_seconds(work: StepWork) -> float:
    return 5e-4 + 1e-5 * work.tokens


@pytest.mark.parametrize("slower", ["device", "host"])
@pytest.mark.parametrize("overlap", [True, False])
def test_an_engine_learns_what_host_and_device_take(slower: str, overlap: bool) -> None:
    """Each of its own where they overlap; of a device that always waits for the host nothing is known, and nothing needed.
    Without overlap the host has no time of its own."""
    pace, cost = Pace(seconds, lambda work: host_seconds(work) * (20 if slower == "host" else 1)), CostModel()
    simulate(conversation(60, 12.0), replace(LIMITS, overlap=overlap), pace, max_tokens=400, cost=cost)
    cost.fit()
    works = StepWork(8, 9000, 9000), StepWork(40, 30000, 30000), StepWork(500, 9000, 1_500_000, True)
    for work in works:
        device, host = pace.device(work), pace.host(work)
        assert cost.predict(work) == pytest.approx(max(device, host), rel=0.02)
        if overlap:
            assert cost.host.predict(work) == pytest.approx(host, rel=0.02)
            assert cost.device.predict(work) == pytest.approx(device, rel=0.02) or slower == "host"


def test_time_of_the_host_is_hidden_by_the_device_or_the_other_way_round() -> None:
    """Steps follow each other as fast as the slower one goes, and without overlap as both together."""
    plan = [PlannedRequest(0.0, 10, 200)]

    def gap(host: float, device: float, overlap: bool) -> float:
        pace = Pace(lambda work: device, lambda work: host)
        return simulate(plan, replace(LIMITS, overlap=overlap), pace, max_tokens=400).summary.itl.p50

    assert gap(1e-3, 4e-3, True) == pytest.approx(4e-3) and gap(5e-3, 4e-3, True) == pytest.approx(5e-3)


def test_swapping_costs_copies_instead_of_tokens() -> None:
    plan = [PlannedRequest(0.0, 60, 120) for _ in range(24)]
    limits = replace(LIMITS, num_pages=120, admission="aggressive")
    again = simulate(plan, limits)
    swapped = simulate(plan, replace(limits, num_host_pages=1000), pace=Pace(roofline, page_copy=1e-6))
    slow = simulate(plan, replace(limits, num_host_pages=1000), pace=Pace(roofline, page_copy=1.0))
    assert again.recomputed > 0 and again.swapped == 0
    assert swapped.swapped > 0 and swapped.recomputed == 0
    assert swapped.summary.duration < again.summary.duration
    assert slow.swapped < swapped.swapped  # once the cost model knows better


def test_the_command_compares_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    arguments = [
        "simulate",
        "--rate",
        "4",
        "--limit",
        "6",
        "--output-tokens",
        "5:9",
        "--itl-slo",
        "30",
        "--json",
        str(path),
    ]
    assert main(arguments) == 0
    report = json.loads(path.read_text())
    assert list(report["policies"]) == ["past-future", "aggressive", "conservative", "prefill first"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == " ".join(COLUMNS).split() and len(table) == 5
    for line, values in zip(table[1:], report["policies"].values()):
        assert line[14:].split() == [f"{value:.2f}" for value in values.values()]
        assert values["requests/s"] > 0 and values["evicted"] == 0


def test_the_command_takes_times_that_a_server_has_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests of one token each after a prompt of one token take a step of 4 ms, for which the host needs 7 ms."""
    cost = CostModel(tmp_path / "steps.json")
    for tokens in range(1, 65):
        cost.device.observe(StepWork(tokens, tokens, tokens), 4e-3)
        cost.host.observe(StepWork(tokens, tokens, tokens), 7e-3)
    cost.save()
    workload = ["--rate", "1", "--limit", "3", "--input-tokens", "1", "--output-tokens", "9"]
    assert main(["simulate", "--steps", str(tmp_path / "steps.json"), *workload, "--json", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out").read_text())["policies"]["past-future"]
    assert report["itl p50"] == pytest.approx(7.0) and report["ttft p50"] == pytest.approx(14.0)


def test_steps_scatter_as_those_did_that_were_measured() -> None:
    """Equal steps took 3 or 5 ms, and once a second: so do simulated ones, but for the second, and in the mean as long."""
    cost = CostModel()
    for index in range(200):
        cost.device.observe(StepWork(1, 100, 100), 1.0 if index == 50 else 3e-3 + 2e-3 * (index % 2))
    cost.fit()
    plan = [PlannedRequest(0.0, 99, 2000)]
    found = simulate(plan, LIMITS, Pace(Pace.of(cost).device), max_tokens=3000).summary.itl
    assert found.p50 in (pytest.approx(3e-3, rel=0.05), pytest.approx(5e-3, rel=0.05)) and found.max < 6e-3
    assert found.mean == pytest.approx(4e-3, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "/nowhere.json"], "error: /nowhere.json holds no times of steps"),
        (["--max-batch", "0"], "error: max_batch is 0, but must be positive"),
        (["--trace", "/nowhere.csv"], "error: cannot read the trace /nowhere.csv"),
    ],
)
def test_what_cannot_be_simulated_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--limit", "2", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_estimate_of_an_h100() -> None:
    """4.7 GB at 2.6 TB/s and 0.9 ms bound a step of one token; 1000 tokens of a prompt are bound by what they compute."""
    assert roofline(StepWork(1, 1, 1)) == pytest.approx(2.71e-3, rel=0.01)
    assert roofline(StepWork(1000, 1000, 500_500, True)) == pytest.approx(1e-3 * (35.14 + 0.15 * 1.86 + 0.9), rel=0.01)
    assert numbers(simulate([PlannedRequest(0.0, 1, 1)], LIMITS))[3] == pytest.approx(2.71, rel=0.01)
