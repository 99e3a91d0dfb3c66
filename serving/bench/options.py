"""The command line of `python -m serving bench`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from serving.bench.events import Json
from serving.bench.summary import METRICS, Slo
from serving.bench.target import ENDPOINTS, Endpoint
from serving.bench.workload import PATTERNS, LengthRange, Pattern

T = TypeVar("T")
Add = Callable[..., argparse.Action]

_ABOUT = """
Load for any server with OpenAI's interface, and how well it was answered: time to first token (ttft), time per output token
(tpot), inter-token latency (itl), time to the end (e2e), throughput, goodput. Requests arrive at their own times whatever the
server does, and latencies count from then; with --users they come from users who wait for their answers. The environment
variable OPENAI_API_KEY is sent as the key. Ctrl-C ends the run and still reports.
"""
_EXAMPLES = """examples:
  python -m serving bench --rate 2 --limit 100 --input-tokens 100:400 --output-tokens 64 --ignore-eos
  python -m serving bench --arrivals gamma --cv 2 --rate 4 --slo ttft=0.5 --slo itl=0.05 --json run.json --plot run.svg
  python -m serving bench --users 8 --endpoint chat
  python -m serving bench --trace AzureLLMInferenceTrace_conv.csv --scale 0.5 --limit 500 --ignore-eos
"""


@dataclass(frozen=True)
class BenchOptions:
    """What `python -m serving bench` was asked to do; `options` of the JSON report."""

    url: str
    model: str | None
    endpoint: Endpoint
    ignore_eos: bool
    body: Json
    timeout: float
    retries: int
    arrivals: Pattern | None
    rate: float | None
    cv: float | None
    users: int | None
    limit: int | None
    input_tokens: LengthRange | None
    output_tokens: LengthRange | None
    trace: Path | None
    burstgpt: bool
    scale: float | None
    length_scale: float
    seed: int
    slo: tuple[Slo, ...]
    json: Path | None
    raw: bool
    plot: Path | None


def parse_args(arguments: Sequence[str]) -> BenchOptions:
    """Exits with a message on a wrong command line, as programs do."""
    parser = build_parser()
    found = parser.parse_args(arguments)
    found.slo = tuple(found.slo)
    options = BenchOptions(**vars(found))
    is_trace = options.trace is not None or options.burstgpt
    conflicts = (
        ("--trace and --burstgpt are both workloads", options.trace is not None and options.burstgpt),
        ("--scale is for --trace and --burstgpt; synthetic arrivals have --rate", options.scale and not is_trace),
        ("--rate and --scale both say how fast a trace goes", options.rate and options.scale),
        ("--arrivals is not for a trace, which has its own", options.arrivals and is_trace),
        (
            "--input-tokens and --output-tokens are not for a trace, which has its own",
            is_trace and (options.input_tokens or options.output_tokens),
        ),
        ("--cv is for --arrivals gamma", options.cv and options.arrivals != "gamma"),
        (
            "--users wait for answers, so --arrivals, --rate and --scale mean nothing to them",
            options.users and (options.arrivals or options.rate or options.scale),
        ),
        ("--raw adds to the file of --json", options.raw and options.json is None),
    )
    for message, is_wrong in conflicts:
        if is_wrong:
            parser.error(message)
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving bench",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server(parser.add_argument_group("server").add_argument)
    _add_arrivals(parser.add_argument_group("arrivals").add_argument)
    _add_workload(parser.add_argument_group("workload").add_argument)
    _add_report(parser.add_argument_group("report").add_argument)
    return parser


def _add_server(add: Add) -> None:
    add("--url", default="http://127.0.0.1:8000", help="the server, with or without /v1 (default: %(default)s)")
    add("--model", metavar="NAME", help="the model to ask for; default: the server's only one")
    add("--endpoint", choices=ENDPOINTS, default="completions", help="what to ask (default: %(default)s)")
    add("--ignore-eos", action="store_true", help="make answers as long as asked for (not in OpenAI's own interface)")
    add(
        "--body",
        type=_checked(_json_object, "a JSON object"),
        default={},
        metavar="JSON",
        help="fields for every request",
    )
    add("--timeout", type=_positive, default=600.0, metavar="SECONDS", help="for a request (default: %(default)g)")
    add("--retries", type=_count(0), default=5, metavar="N", help="after status 429, as Retry-After says (default: 5)")


def _add_arrivals(add: Add) -> None:
    add("--arrivals", choices=PATTERNS, help="how gaps between requests are distributed (default: poisson)")
    add("--rate", type=_positive, metavar="R", help="requests a second (default: 1); a trace is stretched to it")
    add("--cv", type=_positive, metavar="CV", help="coefficient of variation of gamma gaps (default: 2; 1 is poisson)")
    add("--users", type=_count(1), metavar="N", help="closed loop: so many users, each with one request at a time")


def _add_workload(add: Add) -> None:
    lengths = _checked(LengthRange.parse, "N or LOW:HIGH, at least 1")
    add("--limit", type=_count(1), metavar="N", help="how many requests (default: 100, or a whole trace)")
    add("--input-tokens", type=lengths, metavar="N|LOW:HIGH", help="tokens of a prompt (default: 128)")
    add("--output-tokens", type=lengths, metavar="N|LOW:HIGH", help="tokens of an answer (default: 64)")
    add("--trace", type=Path, metavar="FILE", help="a trace: Azure 2023 or BurstGPT (CSV), or Mooncake (JSON lines)")
    add("--burstgpt", action="store_true", help="requests that are generated with the statistics of BurstGPT")
    add("--scale", type=_positive, metavar="S", help="a trace S times as fast")
    add("--length-scale", type=_positive, default=1.0, metavar="S", help="S times as many tokens (default: 1)")
    add("--seed", type=_count(0), default=0, metavar="N", help="of arrivals, lengths and words (default: 0)")


def _add_report(add: Add) -> None:
    slo = _checked(Slo.parse, f"one of {', '.join(METRICS)}, then = and seconds")
    add(
        "--slo",
        type=slo,
        action="append",
        default=[],
        metavar="METRIC=SECONDS",
        help="a limit for goodput; may be repeated",
    )
    add("--json", type=Path, metavar="FILE", help="write the report there")
    add("--raw", action="store_true", help="with every request in it")
    add("--plot", type=Path, metavar="FILE.svg", help="draw latencies and throughput over time")


def _checked(parse: Callable[[str], T], expected: str) -> Callable[[str], T]:
    """A parser for argparse that says what was expected."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be {expected}") from None

    return checked


def _positive(text: str) -> float:
    def parse(text: str) -> float:
        value = float(text)
        if not 0 < value < math.inf:
            raise ValueError(text)
        return value

    return _checked(parse, "a number above 0")(text)


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError(text)
        return value

    return _checked(parse, f"a whole number of at least {least}")


def _json_object(text: str) -> Json:
    value: Any = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return cast(Json, value)
