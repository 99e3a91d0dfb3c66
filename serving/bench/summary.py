"""From what was observed to what is reported: distributions, throughput, goodput, errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from serving.bench.load import Observations
from serving.bench.record import Record

METRICS = ("ttft", "tpot", "itl", "e2e")
_LATE = 0.010  # seconds at the 99th percentile from which on the client's own delays are worth a warning
_WRONG_LENGTH = 0.05  # part by which mean token counts may miss what was asked for without a warning


@dataclass(frozen=True)
class Distribution:
    """Of `count` times in seconds. Percentiles are interpolated linearly between the two nearest values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None when there are no values."""
        data = np.fromiter(values, np.float64)
        if not data.size:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(data, (50, 90, 99)))
        return cls(data.size, float(data.mean()), p50, p90, p99, float(data.max()))


@dataclass(frozen=True)
class Slo:
    """A limit in seconds on a metric of a request: ttft, tpot, e2e, or itl, which is the longest of its gaps.

    An answer of one token has no gaps and keeps limits on them; an answer of none never came and keeps no limit on ttft.
    """

    metric: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From `METRIC=SECONDS`. Raises ValueError on anything else."""
        metric, _, limit = text.partition("=")
        found = cls(metric, float(limit))
        if metric not in METRICS or not 0 < found.limit < math.inf:
            raise ValueError(text)
        return found

    def holds(self, record: Record) -> bool:
        values = {"ttft": record.ttft, "tpot": record.tpot, "itl": max(record.gaps, default=None), "e2e": record.e2e}
        value = values[self.metric]
        return self.metric != "ttft" if value is None else value <= self.limit


@dataclass(frozen=True)
class Goodput:
    """Finished requests that kept all limits: how many, a second, and as a part of those sent."""

    slos: tuple[Slo, ...]
    count: int
    per_second: float
    fraction: float


@dataclass(frozen=True)
class ErrorCount:
    kind: str
    count: int
    example: str


@dataclass(frozen=True)
class Summary:
    """A run in numbers. Times are in seconds, throughput is a second of `duration`, the time until the last end.

    planned = sent + unsent and sent = finished + failed + cancelled. Latencies, tokens and throughput are those of finished
    requests. late: how far behind its plan the client sent; lag: how late it woke up. asked_*: mean tokens a request was
    to have; input_tokens, output_tokens: what it had in the mean.
    """

    planned: int
    sent: int
    unsent: int
    finished: int
    failed: int
    cancelled: int
    retries: int
    interrupted: bool
    duration: float
    requests_per_second: float
    input_tokens_per_second: float
    output_tokens_per_second: float
    asked_input_tokens: float
    asked_output_tokens: float
    input_tokens: float | None
    output_tokens: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    late: Distribution | None
    lag: Distribution | None
    goodput: Goodput | None
    errors: tuple[ErrorCount, ...]
    warnings: tuple[str, ...]


def summarise(seen: Observations, slos: Sequence[Slo] = ()) -> Summary:
    records = seen.records
    outcomes = Counter(record.outcome for record in records)
    finished = [record for record in records if record.outcome == "finished"]
    counted = [record.input_tokens for record in finished if record.input_tokens is not None]
    duration = max((record.end for record in records), default=0.0)
    per_second = 1 / duration if duration > 0 else 0.0
    late, lag = Distribution.of(record.late for record in records), Distribution.of(seen.lags)
    return Summary(
        planned=seen.num_planned,
        sent=len(records),
        unsent=seen.num_planned - len(records),
        finished=outcomes["finished"],
        failed=outcomes["failed"],
        cancelled=outcomes["cancelled"],
        retries=sum(record.retries for record in records),
        interrupted=seen.interrupted,
        duration=duration,
        requests_per_second=len(finished) * per_second,
        input_tokens_per_second=sum(counted) * per_second,
        output_tokens_per_second=sum(record.num_output for record in finished) * per_second,
        asked_input_tokens=_mean([record.asked_input_tokens for record in finished]) or 0.0,
        asked_output_tokens=_mean([record.asked_output_tokens for record in finished]) or 0.0,
        input_tokens=_mean(counted),
        output_tokens=_mean([record.num_output for record in finished]) or 0.0,
        ttft=Distribution.of(record.ttft for record in finished if record.ttft is not None),
        tpot=Distribution.of(record.tpot for record in finished if record.tpot is not None),
        itl=Distribution.of(gap for record in finished for gap in record.gaps),
        e2e=Distribution.of(record.e2e for record in finished),
        late=late,
        lag=lag,
        goodput=_goodput(finished, len(records), per_second, tuple(slos)) if slos else None,
        errors=_errors(records),
        warnings=tuple(_warnings(finished, late, lag)),
    )


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None


def _goodput(finished: Sequence[Record], sent: int, per_second: float, slos: tuple[Slo, ...]) -> Goodput:
    count = sum(all(slo.holds(record) for slo in slos) for record in finished)
    return Goodput(slos, count, count * per_second, count / sent if sent else 0.0)


def _errors(records: Sequence[Record]) -> tuple[ErrorCount, ...]:
    """Failures by kind, the most frequent first, each with the first message."""
    failures = [record.failure for record in records if record.failure is not None]
    counts = Counter(failure.kind for failure in failures)
    examples = {failure.kind: failure.message for failure in reversed(failures)}
    return tuple(ErrorCount(kind, count, examples[kind]) for kind, count in counts.most_common())


def _warnings(finished: Sequence[Record], late: Distribution | None, lag: Distribution | None) -> Iterable[str]:
    """What makes the numbers mean something else than they seem to."""
    for found, what in ((late, "sent requests late by"), (lag, "woke up late by")):
        if found is not None and found.p99 > _LATE:
            yield (
                f"the client itself {what} {found.p99 * 1e3:.0f} ms at the 99th percentile: latencies hold its own delays; "
                "lower the rate, or run it on another machine"
            )
    without = sum(record.output_tokens is None for record in finished)
    if without:
        yield f"{without} answers came without usage: their chunks were counted as tokens, their prompts not at all"
    for name, ask, pairs in (
        ("input", "", [(r.asked_input_tokens, r.input_tokens) for r in finished]),
        ("output", "; --ignore-eos asks for all of them", [(r.asked_output_tokens, r.num_output) for r in finished]),
    ):
        known = [(asked, found) for asked, found in pairs if found is not None]
        asked, found = sum(asked for asked, _ in known), sum(found for _, found in known)
        if abs(found - asked) > _WRONG_LENGTH * asked:
            yield f"{name} tokens were {found / len(known):.1f} a request, but {asked / len(known):.1f} were asked for{ask}"
