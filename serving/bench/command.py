"""`python -m serving bench`: plan, send, report."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.bench import burstgpt
from serving.bench.client import HttpClient
from serving.bench.load import Load, Observations
from serving.bench.options import BenchOptions, parse_args
from serving.bench.prompts import PromptWriter, TokenCost
from serving.bench.record import Record
from serving.bench.report import report, table, write_json, write_text
from serving.bench.summary import Summary, summarise
from serving.bench.target import Target, find_model, token_cost
from serving.bench.traces import read_trace
from serving.bench.workload import LengthRange, PlannedRequest, arrival_times, at_rate, mean_rate, scaled, synthetic
from serving.progress import progress
from tilus.errors import TilusError

_DEFAULT_LIMIT = 100

Plot = Callable[[Sequence[Record], str], str]  # see serving.bench.plot


def main(arguments: Sequence[str]) -> int:
    """The process's exit status: 0 when requests finished, 1 when none did or it could not start, 130 after Ctrl-C."""
    options = parse_args(arguments)
    try:
        for path in (options.json, options.plot):  # before the run, not after
            if path is not None and not os.access(path.parent, os.W_OK):
                raise TilusError(f"cannot write {path}: {path.parent} is not a directory that can be written")
        plot = _find_plot() if options.plot is not None else None
        plan = make_plan(options)
        target, seen = asyncio.run(_run(options, plan))
        summary = summarise(seen, options.slo)
        title = _title(options, target, plan)
        print(table(summary, title))
        if options.json is not None:
            content = _content(options, target, summary, seen)
            _to(options.json, lambda path: write_json(path, content))
        if options.plot is not None and plot is not None:
            picture = plot(seen.records, title)
            _to(options.plot, lambda path: write_text(path, picture))
    except TilusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first request
        return 130
    return 130 if seen.interrupted else 0 if summary.finished else 1


def _find_plot() -> Plot:
    try:
        from serving.bench.plot import plot  # after matplotlib, which most runs do not need
    except ModuleNotFoundError as error:
        raise TilusError(f"--plot needs the package {error.name}", hint="pip install 'tilus[bench]'") from error
    return plot


def make_plan(options: BenchOptions) -> list[PlannedRequest]:
    """The requests to send. Raises TilusError when a trace is not what it should be."""
    rng = np.random.default_rng(options.seed)
    if options.trace is not None or options.burstgpt:
        if options.trace is not None:
            plan = read_trace(options.trace, options.limit)
        else:
            plan = burstgpt.generate(options.limit or _DEFAULT_LIMIT, rng)
        plan = at_rate(plan, options.rate) if options.rate else scaled(plan, rate=options.scale or 1.0)
    else:
        pattern, rate, count = options.arrivals or "poisson", options.rate or 1.0, options.limit or _DEFAULT_LIMIT
        arrivals = arrival_times(pattern, rate, count, rng, cv=options.cv or 2.0)
        inputs, outputs = options.input_tokens or LengthRange(128, 128), options.output_tokens or LengthRange(64, 64)
        plan = synthetic(arrivals, inputs, outputs, rng)
    return scaled(plan, length=options.length_scale)


async def _run(options: BenchOptions, plan: Sequence[PlannedRequest]) -> tuple[Target, Observations]:
    _allow_connections()
    http = HttpClient(options.url, os.environ.get("OPENAI_API_KEY"))
    try:
        fields: dict[str, Any] = (
            {"temperature": 0} | ({"ignore_eos": True} if options.ignore_eos else {}) | options.body
        )
        model = await find_model(http, options.model)
        target = Target(model, options.endpoint, fields, options.timeout, options.retries)
        cost, source = await token_cost(http, target, PromptWriter(options.seed, TokenCost(0.0, 1.0)))
        _say(
            f"{model} at {options.url}: a word has {cost.per_word:g} tokens, a prompt {cost.base:g} more (by {source})"
        )
        with progress("sending", "request") as show:
            load = Load(http, target, PromptWriter(options.seed, cost), plan, options.users, show)
            return target, await load.run(_stop_event())
    finally:
        await http.close()


def _allow_connections() -> None:
    """As many files as this process may have, up to 65,536: thousands of requests may wait for a server that is overloaded."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _stop_event() -> asyncio.Event:
    """Set by the first Ctrl-C or SIGTERM; a second one ends the process as usual."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop


def _title(options: BenchOptions, target: Target, plan: Sequence[PlannedRequest]) -> str:
    if options.users is not None:
        arrivals = f"closed loop of {options.users} users"
    else:
        source = options.trace.name if options.trace else "BurstGPT's statistics" if options.burstgpt else None
        arrivals = f"open loop, {source or options.arrivals or 'poisson'}, {mean_rate(plan):.2f} requests/s offered"
    return f"{target.model} at {options.url}, {target.endpoint}: {arrivals}"


def _content(options: BenchOptions, target: Target, summary: Summary, seen: Observations) -> dict[str, Any]:
    """Of the JSON report."""
    used = dataclasses.asdict(options) | {"model": target.model, "body": target.fields}
    paths = {name: str(value) for name, value in used.items() if isinstance(value, Path)}
    return report(summary, used | paths, seen.records if options.raw else None)


def _to(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise TilusError(f"cannot write {path}: {error.strerror or error}") from error
    _say(f"wrote {path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
