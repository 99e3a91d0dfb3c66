"""The report: a table to read, and JSON to keep. docs/serving_bench.md describes the fields."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.bench.record import Record
from serving.bench.summary import METRICS, Distribution, Summary

FORMAT = 1  # of the JSON; counts up when a field changes its meaning or goes away


def table(summary: Summary, title: str) -> str:
    """The summary for a terminal; times in milliseconds."""
    s = summary
    counts = f"{s.sent} sent = {s.finished} finished + {s.failed} failed + {s.cancelled} cancelled"
    counts += f"; {s.unsent} of {s.planned} not sent" if s.unsent else ""
    counts += f"; sent again after 429: {s.retries} times" if s.retries else ""
    inputs = "unknown" if s.input_tokens is None else f"{s.input_tokens:.1f}"
    lines = [
        title + (" (interrupted)" if s.interrupted else ""),
        _row("requests", counts),
        _row("duration", f"{s.duration:.2f} s"),
        _row("throughput", f"{s.requests_per_second:.2f} requests/s"),
        _row("", f"{s.input_tokens_per_second:.1f} input tokens/s, {s.output_tokens_per_second:.1f} output tokens/s"),
        _row("a request", f"{inputs} input tokens, {s.output_tokens:.1f} output tokens"),
    ]
    if s.goodput is not None:
        limits = ", ".join(f"{slo.metric} <= {slo.limit:g} s" for slo in s.goodput.slos)
        lines.append(
            _row("goodput", f"{s.goodput.per_second:.2f} requests/s, {s.goodput.fraction:.1%} of those sent: {limits}")
        )
    lines += ["", _row("ms", "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p99", "max", "count")))]
    for name in (*METRICS, "late", "lag"):
        lines.append(_row(name, _times(getattr(s, name))))
    lines += [f"error: {error.count} x {error.kind}: {error.example}" for error in s.errors]
    lines += [f"warning: {warning}" for warning in s.warnings]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"  {name:<12}{value}"


def _times(found: Distribution | None) -> str:
    if found is None:
        return "".join(f"{'-':>10}" for _ in range(5)) + f"{0:>10}"
    times = (found.mean, found.p50, found.p90, found.p99, found.max)
    return "".join(f"{time * 1e3:>z10.2f}" for time in times) + f"{found.count:>10}"


def report(summary: Summary, options: Mapping[str, Any], records: Sequence[Record] | None) -> dict[str, Any]:
    """What `--json` writes. records: those of all requests sent, for `--raw`."""
    found: dict[str, Any] = {"format": FORMAT, "options": dict(options), "summary": dataclasses.asdict(summary)}
    if records is not None:
        found["requests"] = [dataclasses.asdict(record) for record in records]
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """All of it or nothing: an older file stays until the new one is complete."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
