"""`python -m serving simulate`: the server's own engine and scheduler on a clock that is only counted, under planned requests.

Nothing is computed: a step takes what a cost model says, and an answer ends where the plan says. What differs between policies
can so be seen in seconds, without a GPU. `replay` also runs a plan on a real runner in real time."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from serving.bench.command import make_plan
from serving.bench.load import Observations
from serving.bench.options import parse_args as parse_workload
from serving.bench.record import Record
from serving.bench.report import write_json
from serving.bench.summary import Distribution, Summary, summarise
from serving.bench.workload import PlannedRequest, mean_rate
from serving.config import EngineConfig
from serving.core import Batch, Request, Runner, SampledToken, SamplingParams, StepOutput
from serving.cost_model import CostModel, Rows, StepTimes, StepWork
from serving.engine import Engine
from serving.step_shapes import GraphLimits, StepShapes
from tilus.errors import TilusError

EOS = 0
GREEDY = SamplingParams(temperature=0)
POLICIES: Mapping[str, Mapping[str, object]] = {
    "past-future": {},
    "aggressive": {"admission": "aggressive"},
    "conservative": {"admission": "conservative"},
    "prefill first": {"prefill_first": True, "itl_slo": None},
}


class ReplayClock(Protocol):
    def __call__(self) -> float: ...

    def wait_until(self, moment: float) -> None: ...


class VirtualClock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


class PlainVocabulary:
    """Tokens without text, as many as any model has; EOS ends an answer."""

    vocab_size = 2**18
    eos_ids = frozenset({EOS})

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "." * len(ids)


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of a step on the device, of the host's time for it, and of the copy of a page."""

    device: Callable[[StepWork], float]
    host: Callable[[StepWork], float] = lambda work: 0.0
    page_copy: float = 0.0

    @classmethod
    def of(cls, cost: CostModel) -> Pace:
        """Steps take what is predicted, times what one of those that are known, drawn by chance, differed by."""
        return cls(_scattered(cost.device), _scattered(cost.host), cost.page_copy_seconds)


def _scattered(times: StepTimes) -> Callable[[StepWork], float]:
    ratios, rng = times.ratios(), np.random.default_rng(0)

    def seconds(work: StepWork) -> float:
        of_kind = ratios[work.prompts > 0]
        return times.predict(work) * (float(of_kind[rng.integers(len(of_kind))]) if len(of_kind) else 1.0)

    return seconds


class SimRunner:
    """The host takes its time for each step; the device runs one after the other, each from when the host began with it. It
    samples tokens that are not EOS."""

    def __init__(self, clock: VirtualClock, pace: Pace) -> None:
        self._clock = clock
        self._pace = pace
        self._busy_until = 0.0

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        work, now = StepWork.of(batch), self._clock()
        self._clock.wait_until(now + self._pace.host(work))
        seconds = self._pace.device(work) + self._pace.page_copy * len(batch.copies)
        done = self._busy_until = max(self._busy_until, now) + seconds

        def wait() -> StepOutput:
            self._clock.wait_until(done)
            return StepOutput(((SampledToken(EOS + 1),),) * len(batch.sampled))

        return wait


class PlannedEnds:
    """A runner whose answers end where the plan says: lengths, by request, with EOS as their last token."""

    def __init__(self, runner: Runner, lengths: Mapping[str, int]) -> None:
        self._runner = runner
        self._lengths = lengths

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        wait = self._runner.launch(batch)
        ends = tuple(item.draw + 1 >= self._lengths[item.request_id] for item in batch.sampled)

        def with_ends() -> StepOutput:
            wait()
            return StepOutput(tuple((SampledToken(EOS if end else EOS + 1),) for end in ends))

        return with_ends


def rows_on_gpu(max_batch: int, max_step_tokens: int) -> Rows:
    """Of steps as a GPU computes them, those that are made up included."""
    return StepShapes(GraphLimits(max_batch, 1, max_step_tokens), torch.device("cuda")).rows


def roofline(work: StepWork) -> float:
    """Seconds of a step of Llama-3-8B with 4-bit weights and a cache of 16 bits on an H100: 15 GFLOP a token and 0.5 MFLOP a pair
    at 55 % of 790 TFLOP/s, 4.7 GB of weights and 128 KiB a key at 2.6 TB/s, mostly beside each other, and 0.9 ms of launches.
    An estimate from these rates, not a measurement.
    """
    compute = (2 * 7.5e9 * work.tokens + 4 * 32 * 4096 * work.pairs) / (0.55 * 790e12)
    memory = (4.7e9 + 131072 * work.kv_tokens) / 2.6e12
    return max(compute, memory) + 0.15 * min(compute, memory) + 0.9e-3


ESTIMATE = Pace(roofline)


def replay(
    engine: Engine, plan: Sequence[PlannedRequest], clock: ReplayClock, max_tokens: int | None = None
) -> Observations:
    """Ask for a plan's answers at its times, as an open loop does. Requests are named "0", "1", ... in its order.

    max_tokens: what each may have at most; None for what the plan says, so that the scheduler knows it.
    """
    seen, start = Observations(len(plan)), clock()
    sent, times = dict[int, float](), [list[float]() for _ in plan]
    coming = deque(enumerate(plan))
    while coming or engine.has_work:
        now = clock() - start
        while coming and coming[0][1].arrival <= now:
            index, planned = coming.popleft()
            params = dataclasses.replace(GREEDY, max_tokens=max_tokens or planned.output_tokens)
            engine.add(Request(str(index), (1 + index % 251,) * planned.input_tokens, params))
            sent[index] = now
        if not engine.has_work:
            clock.wait_until(start + coming[0][1].arrival)
            continue
        outputs = engine.step()
        now = clock() - start
        for output in outputs:
            index = int(output.request_id)
            planned, mine = plan[index], times[index]
            mine.extend([now] * len(output.tokens))
            if output.finish_reason is not None:
                outcome = "finished" if output.finish_reason in ("stop", "length") else "failed"
                seen.records.append(Record(
                    index, planned.arrival, sent[index], tuple(mine), now, outcome, None, 0,
                    planned.input_tokens, planned.output_tokens, planned.input_tokens, len(mine),
                ))  # fmt: skip
    seen.records.sort(key=lambda record: record.index)
    return seen


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a replay. recomputed, swapped: how often a request lost its place."""

    summary: Summary
    recomputed: int
    swapped: int


def simulate(
    plan: Sequence[PlannedRequest],
    config: EngineConfig,
    pace: Pace = ESTIMATE,
    max_tokens: int | None = None,
    cost: CostModel | None = None,
) -> Outcome:
    """Replay a plan in virtual time. cost: what the engine knows of steps; it learns as it does in a server."""
    clock = VirtualClock()
    runner = PlannedEnds(
        SimRunner(clock, pace), {str(index): planned.output_tokens for index, planned in enumerate(plan)}
    )
    cost = CostModel(page_copy_seconds=pace.page_copy) if cost is None else cost
    engine = Engine(runner, PlainVocabulary(), config, clock, cost=cost)
    seen = replay(engine, plan, clock, max_tokens)
    engine.check()
    return Outcome(summarise(seen), engine.scheduler.num_recomputed, engine.scheduler.num_swapped)


COLUMNS = ("requests/s", "tokens/s", "ttft p50", "ttft p99", "itl p50", "itl p99", "itl max", "evicted")


def numbers(outcome: Outcome) -> tuple[float, ...]:
    """By COLUMNS, times in milliseconds."""
    s = outcome.summary
    none = Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    ttft, itl = s.ttft or none, s.itl or none
    times = (ttft.p50, ttft.p99, itl.p50, itl.p99, itl.max)
    evicted = outcome.recomputed + outcome.swapped
    return s.requests_per_second, s.output_tokens_per_second, *(1e3 * value for value in times), float(evicted)


def main(arguments: Sequence[str]) -> int:
    """The process's exit status: 0, or 1 when the plan or the limits are impossible."""
    own, rest = _parser().parse_known_args(arguments)
    workload = parse_workload(rest)
    try:
        plan = make_plan(workload)
        longest = max(planned.input_tokens + (own.max_tokens or planned.output_tokens) for planned in plan)
        limits = EngineConfig(
            own.num_pages, longest, max_batch=own.max_batch, max_step_tokens=own.max_step_tokens, request_timeout=1e9,
            prefix_cache=False, itl_slo=own.itl_slo and own.itl_slo / 1e3, overlap=True,
        )  # fmt: skip
        known = None if own.steps is None else _measured(own.steps, rows_on_gpu(own.max_batch, own.max_step_tokens))
        print(f"{len(plan)} requests, {mean_rate(plan):.2f} a second; times in ms", file=sys.stderr)
        print(f"{'':14}" + "".join(f"{name:>12}" for name in COLUMNS))
        report: dict[str, dict[str, float]] = {}
        for name, policy in POLICIES.items():
            config, pace = dataclasses.replace(limits, **policy), ESTIMATE if known is None else Pace.of(known)
            outcome = simulate(plan, config, pace, own.max_tokens, copy.deepcopy(known))
            report[name] = dict(zip(COLUMNS, numbers(outcome)))
            print(f"{name:14}" + "".join(f"{value:12.2f}" for value in report[name].values()), flush=True)
        if workload.json is not None:
            write_json(workload.json, {"requests": len(plan), "policies": report})
    except TilusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving simulate",
        description="The server's scheduler in virtual time: one line for each policy, on the same requests.",
        epilog="Requests are planned by the options of `python -m serving bench` for arrivals and workload, and --json.",
    )
    add = parser.add_argument
    add("--steps", type=Path, metavar="FILE", help="times of steps, as servers leave them in steps/ of the cache directory; "
        "default: an estimate for Llama-3-8B in 4 bits on an H100")  # fmt: skip
    add("--num-pages", type=int, default=30000, metavar="N", help="of 16 tokens (default: %(default)s)")
    add("--max-batch", type=int, default=256, metavar="N", help="requests at a time (default: %(default)s)")
    add("--max-step-tokens", type=int, default=1024, metavar="N", help="of a step (default: %(default)s)")
    add("--itl-slo", type=float, metavar="MS", help="between two tokens, but for prefill first")
    add("--max-tokens", type=int, metavar="N", help="what clients allow; default: what they will get")
    return parser


def _measured(path: Path, rows: Rows) -> CostModel:
    cost = CostModel(path, rows=rows)
    if not cost.is_fitted:
        raise TilusError(
            f"{path} holds no times of steps", hint="take a file of steps/ in the cache directory of a server"
        )
    return cost
