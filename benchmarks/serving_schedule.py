"""Scheduling policies of the server, compared: `python benchmarks/serving_schedule.py [--runner sim|cuda] [--out FILE]`.

The server's own engine answers planned requests, on a clock that is only counted (sim: a step takes what --steps says, which a
run on a GPU has left, or else an estimate) or on a GPU (cuda: random weights in the shape of Llama-3-8B, 4 bits in groups of 128,
times of steps first measured for the cost model). Answers end where the plan says, in neither case known to the scheduler.

    conversation  arrivals and lengths of --trace, or of BurstGPT's statistics, at 80 % of what can be served: prompts in chunks
                  that --itl-slo decides, against prompts first
    long answers  log-normal lengths with sigma 1 of up to --longest tokens, all at once, in a small cache: past-future admission
                  against aggressive and conservative

Output, as JSON: runner, device, options, and rows, a list of {case, metric, value, unit, baseline, limit}: baseline is the value
of what is compared with, limit what the value may be at most (evictions, times) or must be at least (rates), null where none was
set. With --runner cuda also rows of case "agreement ...": the GPU's value, with the simulator's for the same plan as baseline,
whose steps take what was measured before, or ("own steps") in this replay; limit is the part by which they may differ. They are
numbered as they ran: of conversations, those of --itl-slo and then prompts first. And
residuals: a list of {case, resource: device or host, prompts: whether these steps have some, steps, measured_ms: the mean,
predicted_ms: by the model before the replay, ratio: of predicted to measured times, 5th, 50th and 95th percentile}.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tilus
from serving.bench import burstgpt
from serving.bench.simulate import (
    ESTIMATE,
    Outcome,
    Pace,
    PlainVocabulary,
    PlannedEnds,
    replay,
    rows_on_gpu,
    simulate,
)
from serving.bench.summary import summarise
from serving.bench.traces import read_trace
from serving.bench.workload import PlannedRequest, at_rate, scaled
from serving.config import EngineConfig
from serving.core import Runner
from serving.cost_model import CostModel, Rows, StepTimes, StepWork, unpadded
from serving.engine import Engine
from serving.warm_up import measure_steps, warm_up

PAGE = 16
LOAD = 0.8  # of what can be served
AGREEMENT = 0.15
START = time.perf_counter()
Replay = Callable[[list[PlannedRequest], EngineConfig, int], Outcome]


class RealClock:
    def __call__(self) -> float:
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self()))


def conversation(options: argparse.Namespace) -> list[PlannedRequest]:
    if options.trace is not None:
        return read_trace(options.trace, options.requests)
    return burstgpt.generate(options.requests, np.random.default_rng(0))


def long_answers(options: argparse.Namespace) -> list[PlannedRequest]:
    rng, count = np.random.default_rng(0), options.requests
    answers = np.clip(np.rint(rng.lognormal(np.log(options.longest / 13.65), 1.0, count)), 1, options.longest)
    prompts = rng.integers(options.longest // 128, options.longest // 8, count)
    return [PlannedRequest(0.0, int(size), int(answer)) for size, answer in zip(prompts, answers)]


def limits(options: argparse.Namespace, **policy: Any) -> EngineConfig:
    given = {"num_pages": options.num_pages, "max_step_tokens": options.max_step_tokens, "overlap": True} | policy
    return EngineConfig(
        max_model_len=options.context, max_batch=options.max_batch, request_timeout=1e9, prefix_cache=False, **given
    )


def say(text: str) -> None:
    print(f"{time.perf_counter() - START:6.1f} s  {text}", file=sys.stderr, flush=True)


def p99(outcome: Outcome) -> float:
    return outcome.summary.itl.p99 * 1e3 if outcome.summary.itl else 0.0


def rate(outcome: Outcome) -> float:
    return outcome.summary.output_tokens_per_second


def first_token(outcome: Outcome) -> float:
    return outcome.summary.ttft.mean * 1e3 if outcome.summary.ttft else 0.0


def time_a_token(outcome: Outcome) -> float:
    return outcome.summary.tpot.mean * 1e3 if outcome.summary.tpot else 0.0


def evictions(outcome: Outcome) -> float:
    return float(outcome.recomputed + outcome.swapped)


def row(case: str, metric: str, value: float, unit: str, baseline: float, limit: float | None) -> dict[str, Any]:
    found = {"case": case, "metric": metric, "value": value, "unit": unit, "baseline": baseline, "limit": limit}
    return {name: round(item, 4) if isinstance(item, float) else item for name, item in found.items()}


def compare_chunks(
    options: argparse.Namespace, run: Replay, served: float
) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """served: requests a second that can be."""
    plan = at_rate(conversation(options), LOAD * served)
    longest = max(planned.output_tokens for planned in plan)
    chunks = [run(plan, limits(options, itl_slo=slo / 1e3), longest) for slo in options.itl_slo]
    first = run(plan, limits(options, prefill_first=True, max_step_tokens=options.prefill_tokens), longest)
    rows: list[dict[str, Any]] = []
    for slo, found in zip(options.itl_slo, chunks):
        case = f"conversation at {LOAD * served:.2f} requests a second, {slo:g} ms"
        rows += [
            row(case, "inter-token latency, p99", p99(found), "ms", p99(first), 0.4 * p99(first)),
            row(case, "throughput", rate(found), "tokens/s", rate(first), 0.97 * rate(first)),
            row(case, "time to first token, mean", first_token(found), "ms", first_token(first), None),
        ]
    return rows, [*chunks, first]


def compare_admission(options: argparse.Namespace, run: Replay) -> tuple[list[dict[str, Any]], list[Outcome]]:
    plan = long_answers(options)
    found = {
        name: run(plan, limits(options, admission=name, num_pages=options.few_pages), options.longest)
        for name in (("past-future", "aggressive", "conservative"))
    }
    ours, aggressive, conservative = found.values()
    case = f"long answers in {options.few_pages} pages"
    return [
        row(case, "evictions", evictions(ours), "", evictions(aggressive), 0.25 * evictions(aggressive)),
        row(case, "throughput", rate(ours), "tokens/s", rate(conservative), 1.8 * rate(conservative)),
        row(case, "throughput against aggressive", rate(ours), "tokens/s", rate(aggressive), None),
    ], list(found.values())


def simulator(known: CostModel, models: list[CostModel] | None = None) -> Replay:
    """The engine knows `known`; steps take what that says, or in one replay after the other what `models` say."""
    truths = itertools.repeat(known) if models is None else iter(models)

    def run(plan: list[PlannedRequest], config: EngineConfig, max_tokens: int) -> Outcome:
        truth = next(truths)
        pace = Pace.of(truth) if truth.is_fitted else ESTIMATE
        return simulate(plan, config, pace, max_tokens, copy.deepcopy(known))

    return run


class Remembered(StepTimes):
    """Keeps what was predicted of each step, and measured."""

    def __init__(self, known: StepTimes, rows: Rows = unpadded) -> None:
        self.found: list[tuple[StepWork, float, float]] = []
        self._before = known
        super().__init__(rows)
        self.load([rows[:, 1:] for rows in known.known()])
        self.found.clear()

    def observe(self, work: StepWork, seconds: float) -> None:
        self.found.append((work, self._before.predict(work), seconds))
        super().observe(work, seconds)

    def alone(self) -> StepTimes:
        """What is learnt from these steps only."""
        times = StepTimes(self._rows)
        for work, _, seconds in self.found:
            times.observe(work, seconds)
        times.fit()
        return times

    def residuals(self, **row: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for prompts in (False, True):
            times = np.array([(p, m) for work, p, m in self.found if work.prompts == prompts]).reshape(-1, 2)
            if len(times):
                predicted, measured = (round(float(mean) * 1e3, 3) for mean in times.mean(axis=0))
                ratio = np.percentile(times[:, 0] / times[:, 1], (5, 50, 95)).round(3).tolist()
                found = {"steps": len(times), "measured_ms": measured, "predicted_ms": predicted, "ratio": ratio}
                rows.append(row | {"prompts": prompts} | found)
        return rows


class Gpu:
    """Replays on the GPU, on one model and runner."""

    def __init__(self, options: argparse.Namespace) -> None:
        from serving_decode import open_model  # beside this file

        from serving.runner import TorchRunner
        from serving.step_shapes import GraphLimits

        model, _ = open_model(options, options.runner)
        pages = -(-options.context // PAGE)
        largest = limits(options, max_step_tokens=max(options.max_step_tokens, options.prefill_tokens))
        self._runner = TorchRunner(
            model,
            options.num_pages,
            PAGE,
            model.norm.device,
            max_rows=options.max_batch,
            graphs=GraphLimits(options.max_batch, pages, largest.max_step_tokens),
        )
        self._steps = options.steps
        self.residuals: list[dict[str, Any]] = []
        self.models: list[CostModel] = []  # of the steps of each replay
        engine = self._engine(self._runner, limits(options))
        say("loaded")
        tilus.compile_ahead(lambda: self._runner.rehearse(()))
        say("compiled")
        self._runner.capture(lambda done, total: None)
        warm_up(engine, lambda done, total: None)
        say("captured")
        for config in (replace(largest, max_batch=5), limits(options)):
            measure_steps(self._engine(self._runner, config))  # which keeps them
        self.known = CostModel(self._steps, rows=self._runner.rows)
        say("steps measured")

    def __call__(self, plan: list[PlannedRequest], config: EngineConfig, max_tokens: int) -> Outcome:
        lengths = {str(index): planned.output_tokens for index, planned in enumerate(plan)}
        engine = self._engine(PlannedEnds(self._runner, lengths), config)
        engine.cost.device, engine.cost.host = watched = (
            Remembered(self.known.device, self._runner.rows), Remembered(self.known.host, self._runner.rows),
        )  # fmt: skip
        gc.collect()
        gc.freeze()  # as the server does when it is ready
        seen = replay(engine, plan, RealClock(), max_tokens)
        engine.check()
        case = f"replay {len(self.models)}"
        for name, times in zip(("device", "host"), watched):
            self.residuals += times.residuals(case=case, resource=name)
        own = CostModel(rows=self._runner.rows)
        own.device, own.host = (times.alone() for times in watched)
        self.models.append(own)
        outcome = Outcome(summarise(seen), engine.scheduler.num_recomputed, engine.scheduler.num_swapped)
        say(f"{case}: {outcome.summary.duration:.1f} s")
        return outcome

    def _engine(self, runner: Runner, config: EngineConfig) -> Engine:
        return Engine(
            runner, PlainVocabulary(), config, RealClock(), cost=CostModel(self._steps, rows=self._runner.rows)
        )


def agreement(case: str, gpu: list[Outcome], simulated: list[Outcome]) -> list[dict[str, Any]]:
    metrics = (
        ("inter-token latency, p99", p99, "ms"),
        ("throughput", rate, "tokens/s"),
        ("time to first token, mean", first_token, "ms"),
        ("time a token, mean", time_a_token, "ms"),
    )
    return [
        row(f"agreement {case} {index}", name, value(found), unit, value(other), AGREEMENT)
        for index, (found, other) in enumerate(zip(gpu, simulated))
        for name, value, unit in metrics
    ]


def measure(options: argparse.Namespace, report: dict[str, Any]) -> None:
    gpu = Gpu(options) if options.runner != "sim" else None
    rows = rows_on_gpu(options.max_batch, max(options.max_step_tokens, options.prefill_tokens))
    known = CostModel(options.steps, rows=rows if options.steps else unpadded)  # before the first replay
    in_theory = simulator(known)
    report["steps"] = "measured" if known.is_fitted else "estimated"
    at_once = scaled(conversation(options), rate=1e9)
    longest = max(planned.output_tokens for planned in at_once)
    served = in_theory(at_once, limits(options), longest).summary.requests_per_second
    for case, compare in (
        ("conversation", lambda run: compare_chunks(options, run, served)),
        ("long answers", lambda run: compare_admission(options, run)),
    ):
        first = 0 if gpu is None else len(gpu.models)
        rows, outcomes = compare(gpu or in_theory)
        if gpu is not None:
            rows += agreement(case, outcomes, compare(in_theory)[1])
            rows += agreement(f"{case}, own steps", outcomes, compare(simulator(known, gpu.models[first:]))[1])
            report["residuals"] = gpu.residuals
        report["rows"] += rows
        for found in rows:
            print(*found.values(), sep="  ", flush=True)
        say(case)
        for found in gpu.residuals if gpu is not None else ():
            print(*found.values(), sep="  ", file=sys.stderr)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runner", choices=("sim", "cuda", "cpu"), default="sim")
    add("--trace", type=Path, help="of conversations; default: requests with BurstGPT's statistics")
    add("--requests", type=int, default=600, help="of each case (default 600)")
    add("--longest", type=int, default=4096, help="tokens of long answers (default 4096)")
    add("--few-pages", type=int, default=4000, help="of the cache for long answers (default 4000)")
    add("--num-pages", type=int, default=30000, help="of the cache for conversations (default 30000)")
    add("--max-batch", type=int, default=256, help="requests at a time (default 256)")
    add("--max-step-tokens", type=int, default=1024, help="tokens of a step (default 1024)")
    add("--context", type=int, default=16384, help="tokens of a request (default 16384)")
    add("--itl-slo", type=float, nargs="+", default=[30.0], help="milliseconds between two tokens (default 30)")
    add("--steps", type=Path, help="times of steps: read, or with --runner cuda written")
    add("--prefill-tokens", type=int, default=8192, help="of a step of prompts first (default 8192)")
    add("--out", type=Path, help="write the JSON here")
    add("--config", type=Path, help="a config.json; default: that of Llama-3-8B")
    parser.set_defaults(layers=None, weight_dtype="int4", group=128)
    options = parser.parse_args()
    if options.runner != "sim" and options.steps is None:
        parser.error("--runner cuda measures steps: say with --steps where they go")
    return options


def main() -> None:
    options = options_of()
    report: dict[str, Any] = {
        "runner": options.runner, "trace": options.trace and options.trace.name, "rows": [],
        "options": {name: value for name, value in vars(options).items() if isinstance(value, int | float | list)},
    }  # fmt: skip
    if options.runner == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no GPU: `tilus doctor` says what is missing")
        report["device"] = torch.cuda.get_device_name(0)
    measure(options, report)


if __name__ == "__main__":
    main()
