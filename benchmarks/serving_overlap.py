"""What a GPU waits for the host between decode steps: `python benchmarks/serving_overlap.py [--out FILE]`.

A model of the shape of --config (Llama-3-8B by default) with random weights answers --batch requests at once through the
server's engine: in the plain loop, overlapped, and served, which is overlapped in a thread of its own while another one words the
answers. Prompts are not computed: the cache holds random numbers. All must choose the same tokens. Times are those of the trace,
which --trace keeps. A gap is between the events behind a step's graph and in front of the next one's; the host's time is what the
engine takes to schedule, launch and commit a step.

Output, as JSON:
    device, torch, python, model, weight_dtype, group, kv_dtype, context, steps
    rows    list of {case, metric, value, unit, baseline: the plain loop's value, limit: what was aimed at, or null}
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_decode import PAGE, READ, add_model_options, fill, numbers, open_model

from serving.async_engine import AsyncEngine
from serving.config import KV_DTYPES, EngineConfig
from serving.core import Batch, Request, SampledToken, SamplingParams, StepOutput
from serving.engine import Engine
from serving.runner import TorchRunner
from serving.step_shapes import GraphLimits
from serving.trace import Trace

WARM_UP = 8  # steps, in which graphs are captured
LIMITS_MS = {1: 2.1, 16: 3.0, 64: 4.0}
GAP_US, HOST_US = 60, 500
HOST = ("schedule", "launch", "commit")
WAYS = ("plain", "overlapped", "served")


class Bytes:
    """A vocabulary as large as the model's, whose text costs something."""

    eos_ids = frozenset[int]()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids: tuple[int, ...], skip_special: bool = True) -> str:
        return bytes(token_id % 95 + 32 for token_id in ids).decode()


class Spans(Trace):
    """Keeps the spans of one run apart."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.found: dict[str, list[tuple[float, float]]] = {}

    def add(self, track: str, name: str, start: float, end: float) -> None:
        super().add(track, name, start, end)
        self.found.setdefault("GPU" if track == "GPU" else name, []).append((start, end))


class Prefilled:
    """The runner, to which prompts are known: their step chooses token 0 for all."""

    def __init__(self, runner: TorchRunner, size: int) -> None:
        self._runner = runner
        self._size = size

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        if len(batch.items) != self._size:
            raise SystemExit(f"a step has {len(batch.items)} sequences, expected {self._size}")
        if batch.items[0].start > 0:
            return self._runner.launch(batch)
        self._runner._rows = {item.request_id: row for row, item in enumerate(batch.items)}
        self._runner._sampler.tokens.zero_()
        output = StepOutput(((SampledToken(0),),) * len(batch.items))
        return lambda: output


def last_token(options: argparse.Namespace) -> int:
    return options.context + WARM_UP + options.steps + 4


def num_pages(size: int, options: argparse.Namespace) -> int:
    """An eighth more than all need: no policy of admission lets anybody wait."""
    return size * -(-last_token(options) // PAGE) * 9 // 8 + 1


@dataclass(frozen=True)
class Run:
    """Tokens by request, and the spans of the steps that count, by name."""

    tokens: dict[str, list[int]]
    spans: dict[str, list[tuple[float, float]]]

    @property
    def step_ms(self) -> float:
        starts = [start for start, _ in self.spans.get("GPU", self.spans["launch"])]
        return (starts[-1] - starts[0]) * 1e3 / (len(starts) - 1)

    @property
    def host_us(self) -> float:
        return sum(median_length(self.spans[name]) for name in HOST) * 1e6

    @property
    def graph_ms(self) -> float:
        return median_length(self.spans["GPU"]) * 1e3

    def gap_us(self, quantile: float) -> float:
        gaps = [after[0] - before[1] for before, after in pairwise(self.spans["GPU"])]
        return float(np.quantile(gaps, quantile)) * 1e6


def median_length(spans: list[tuple[float, float]]) -> float:
    return statistics.median(end - start for start, end in spans)


def run(runner: TorchRunner, vocab_size: int, size: int, way: str, trace: Spans, options: argparse.Namespace) -> Run:
    """way: one of WAYS."""
    config = EngineConfig(
        num_pages=num_pages(size, options), max_model_len=last_token(options), page_size=PAGE, max_batch=size,
        max_step_tokens=size * options.context, prefix_cache=False, overlap=way != "plain",
    )  # fmt: skip
    engine = Engine(Prefilled(runner, size), Bytes(vocab_size), config, time.monotonic, trace=trace)
    params = SamplingParams(temperature=0, ignore_eos=True)
    requests = [Request(str(index), (index % 256,) * options.context, params) for index in range(size)]
    gc.freeze()  # as the server does when it is ready
    trace.found = {}
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    if way == "served":
        asyncio.run(serve(engine, requests, tokens))
    else:
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += [token.token_id for token in output.tokens]
    spans = {name: found[WARM_UP : WARM_UP + options.steps] for name, found in trace.found.items()}
    return Run(tokens, spans)


async def serve(engine: Engine, requests: list[Request], tokens: dict[str, list[int]]) -> None:
    """The engine in its thread; here, events are worded for clients. Both want Python's lock."""
    server = AsyncEngine(engine, max_waiting=0)
    server.start()
    async for output in server.submit(requests):
        tokens[output.request_id] += [token.token_id for token in output.tokens]
        json.dumps(
            {"id": output.request_id, "object": "text_completion", "choices": [{"index": 0, "text": output.text}]}
        )
    await server.stop()


def rows_of(case: str, size: int, run: Run, plain: Run, read_ms: float) -> list[dict[str, Any]]:
    def row(metric: str, unit: str, value: Callable[[Run], float], limit: float | None) -> dict[str, Any]:
        found = {"value": round(value(run), 3), "unit": unit, "baseline": round(value(plain), 3), "limit": limit}
        return {"case": case, "metric": metric} | found

    rows = [
        row("time a step", "ms", lambda run: run.step_ms, LIMITS_MS.get(size)),
        row("host's time a step", "us", lambda run: run.host_us, HOST_US),
    ]
    if "GPU" in plain.spans:
        rows += [
            row("gap between graphs, p50", "us", lambda run: run.gap_us(0.5), GAP_US),
            row("gap between graphs, p99", "us", lambda run: run.gap_us(0.99), None),
            row("graph", "ms", lambda run: run.graph_ms, round(1.35 * read_ms, 3)),
        ]
    return rows


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    model, weights_nbytes = open_model(options, options.device)
    rows: list[dict[str, Any]] = []
    for size in options.batch:
        pages = -(-last_token(options) // PAGE)
        trace = Spans(options.trace or Path("trace.json"))
        runner = TorchRunner(
            model, num_pages(size, options), PAGE, device, kv_dtype=options.kv_dtype, max_rows=size,
            graphs=GraphLimits(size, pages, size), trace=trace,
        )  # fmt: skip
        fill(runner.kv_pool)
        runs = {way: run(runner, model.config.vocab_size, size, way, trace, options) for way in WAYS}
        plain = runs.pop("plain")
        nbytes = weights_nbytes + size * -(-options.context // PAGE) * runner.kv_pool.shape.nbytes
        for way, other in runs.items():
            wrong = [name for name in plain.tokens if plain.tokens[name] != other.tokens[name]]
            if wrong:
                raise SystemExit(f"batch {size}, {way}: {len(wrong)} requests got other tokens, {wrong[:8]} among them")
            rows += rows_of(f"batch {size}, {way}", size, other, plain, nbytes / READ / 1e3)
        if options.trace is not None:
            trace.write()
        for row in (row for row in rows if row["case"].startswith(f"batch {size},")):
            print(
                f"{row['case']:22}{row['metric']:26}{row['value']:10} {row['unit']}  plain {row['baseline']}",
                flush=True,
            )
    return rows


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="fp8")
    parser.add_argument("--batch", type=numbers, default=[1, 16, 64], help="requests, separated by commas")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt (default 1024)")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed (default 100)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program")
    parser.add_argument("--trace", type=Path, help="keep the trace of the last batch")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: `tilus doctor` says what is missing")
    rows = measure(options)
    report = {
        "device": torch.cuda.get_device_name(0) if options.device == "cuda" else platform.machine(),
        "torch": torch.__version__, "python": platform.python_version(),
        "model": options.config.stem if options.config else "Llama-3-8B",
        "weight_dtype": options.weight_dtype, "group": options.group,
        "kv_dtype": options.kv_dtype, "context": options.context, "steps": options.steps, "rows": rows,
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
