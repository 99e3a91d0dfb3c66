"""What a GPU waits for the host between decode steps: `python benchmarks/serving_overlap.py [--out FILE]`.

A model of the shape of --config (Llama-3-8B by default) with random weights answers --batch requests at once through the
server's engine, overlapped and plain. Their prompts are not computed: the cache holds random numbers. Both loops must choose the
same tokens. All is timed with a trace, which --trace keeps. A gap is between the events behind a step's graph and in front of the
next one's; the host's time is what the engine takes to schedule, launch and commit a step.

Output, as JSON:
    device, torch, python, model, weight_dtype, group, kv_dtype, context, steps
    rows    list of {case, metric, value, unit, baseline: the plain loop's value, limit: what was aimed at, or null}
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_decode import PAGE, READ, fill, numbers, open_model

from serving.config import KV_DTYPES, EngineConfig
from serving.core import Batch, MonotonicClock, Request, SampledToken, SamplingParams, StepOutput
from serving.decode_graph import GraphLimits
from serving.engine import Engine
from serving.model import Model
from serving.runner import TorchRunner
from serving.trace import Trace

WARM_UP = 8  # steps, in which graphs are captured
LIMITS_MS = {1: 2.1, 16: 3.0, 64: 4.0}
GAP_US, HOST_US = 60, 500
HOST = ("schedule", "launch", "commit")


class Bytes:
    """A vocabulary as large as the model's, whose text costs something."""

    eos_ids = frozenset[int]()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids: list[int]) -> str:
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

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        if batch.items[0].start > 0:
            return self._runner.launch(batch)
        self._runner._rows = {item.request_id: row for row, item in enumerate(batch.items)}
        self._runner._sampler.tokens.zero_()
        output = StepOutput(((SampledToken(0),),) * len(batch.items))
        return lambda: output


def run(runner: TorchRunner, model: Model, size: int, overlap: bool, trace: Spans, options: argparse.Namespace) -> Any:
    """Milliseconds a step, the tokens, and the spans of the steps that were timed."""
    last = options.context + WARM_UP + options.steps + 4
    config = EngineConfig(
        num_pages=size * -(-last // PAGE), max_model_len=last, page_size=PAGE, max_batch=size,
        max_step_tokens=size * options.context, prefix_cache=False, overlap=overlap,
    )  # fmt: skip
    engine = Engine(Prefilled(runner), Bytes(model.config.vocab_size), config, MonotonicClock(), trace=trace)
    for index in range(size):
        params = SamplingParams(temperature=0, ignore_eos=True)
        engine.add(Request(str(index), (index % 256,) * options.context, params))
    tokens: dict[str, list[int]] = {}

    def steps(count: int) -> None:
        for _ in range(count):
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)

    steps(WARM_UP)
    gc.freeze()  # as the server does when it is ready
    trace.found = {}
    start = time.perf_counter()
    steps(options.steps)
    elapsed = (time.perf_counter() - start) * 1e3 / options.steps
    spans = trace.found
    while engine.has_work:
        steps(1)
    return elapsed, tokens, spans


def rows_of(case: str, size: int, overlapped: Any, plain: Any, read_ms: float) -> list[dict[str, Any]]:
    def row(metric: str, unit: str, value: Callable[[Any], float], limit: float | None) -> dict[str, Any]:
        found = {"value": round(value(overlapped), 3), "unit": unit, "baseline": round(value(plain), 3), "limit": limit}
        return {"case": case, "metric": metric} | found

    def gap(quantile: float) -> Callable[[Any], float]:
        return lambda run: (
            float(np.quantile([b[0] - a[1] for a, b in zip(run[2]["GPU"], run[2]["GPU"][1:])], quantile)) * 1e6
        )

    def host(run: Any) -> float:
        return sum(statistics.median(end - start for start, end in run[2][name]) for name in HOST) * 1e6

    def graph(run: Any) -> float:
        return statistics.median(end - start for start, end in run[2]["GPU"]) * 1e3

    rows = [
        row("time a step", "ms", lambda run: run[0], LIMITS_MS.get(size)),
        row("host's time a step", "us", host, HOST_US),
    ]
    if "GPU" in plain[2]:
        rows += [
            row("gap between graphs, p50", "us", gap(0.5), GAP_US),
            row("gap between graphs, p99", "us", gap(0.99), None),
            row("graph", "ms", graph, round(1.35 * read_ms, 3)),
        ]
    return rows


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    model, weights_nbytes = open_model(options, options.device)
    rows: list[dict[str, Any]] = []
    for size in options.batch:
        pages = -(-(options.context + WARM_UP + options.steps + 4) // PAGE)
        trace = Spans(options.trace or Path("trace.json"))
        runner = TorchRunner(
            model, size * pages, PAGE, device, kv_dtype=options.kv_dtype, max_rows=size, graphs=GraphLimits(size, pages),
            trace=trace,
        )  # fmt: skip
        fill(runner.kv_pool)
        plain = run(runner, model, size, False, trace, options)
        overlapped = run(runner, model, size, True, trace, options)
        if plain[1] != overlapped[1]:
            wrong = [name for name in plain[1] if plain[1][name] != overlapped[1].get(name)]
            raise SystemExit(
                f"batch {size}: {len(wrong)} requests got other tokens with overlap, {wrong[:8]} among them"
            )
        nbytes = weights_nbytes + size * -(-options.context // PAGE) * runner.kv_pool.shape.nbytes
        rows += rows_of(f"batch {size}", size, overlapped, plain, nbytes / READ / 1e3)
        if options.trace is not None:
            trace.write()
        print(
            *(f"{r['case']:9} {r['metric']:26}{r['value']:10} {r['unit']}  plain {r['baseline']}" for r in rows[-5:]),
            sep="\n",
        )
    return rows


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a config.json; default: that of Llama-3-8B")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has: to compile kernels ahead")
    parser.add_argument("--weight-dtype", default="int4", help="type of the weights (default int4)")
    parser.add_argument("--group", type=int, default=128, help="weights that share a scale (default 128)")
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
        "model": str(options.config or "Llama-3-8B"), "weight_dtype": options.weight_dtype, "group": options.group,
        "kv_dtype": options.kv_dtype, "context": options.context, "steps": options.steps, "rows": rows,
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
