"""Pictures of a run: how latencies are distributed, and throughput and requests over time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from serving.bench.record import Record

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart also by the colour-blind (Okabe and Ito)
_NUM_BINS = 60
_RC: dict[Any, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "svg.fonttype": "none",
    "svg.hashsalt": "tilus",
}

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def plot(records: Sequence[Record], title: str) -> str:
    """The picture of a run as SVG; the same run gives the same text."""
    with matplotlib.rc_context(_RC), io.StringIO() as file:
        draw(records, title).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()


def draw(records: Sequence[Record], title: str) -> Figure:
    """Latencies and tokens of the finished requests, and all requests in flight."""
    finished = [record for record in records if record.outcome == "finished"]
    end = max((record.end for record in records), default=0.0) or 1.0
    figure = Figure(figsize=(15, 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    distributions, throughputs, counts = figure.subplots(1, 3)

    latencies = {
        "ttft": [record.ttft for record in finished if record.ttft is not None],
        "tpot": [record.tpot for record in finished if record.tpot is not None],
        "itl": [gap for record in finished for gap in record.gaps],
        "e2e": [record.e2e for record in finished],
    }
    for (name, seconds), colour in zip(latencies.items(), _COLOURS):
        if seconds:
            distributions.ecdf(np.multiply(seconds, 1e3), label=name, color=colour)
    distributions.set(xscale="log", xlabel="latency (ms)", ylabel="part of values")
    if finished:
        distributions.legend()

    rates, edges = throughput(finished, end)
    throughputs.stairs(rates, edges, color=_COLOURS[0])
    throughputs.set(xlabel="time (s)", ylabel="output tokens/s", xlim=(0, end), ylim=(0, None))

    counts.step(*in_flight(records, end), where="post", color=_COLOURS[0])
    counts.set(xlabel="time (s)", ylabel="requests in flight", xlim=(0, end), ylim=(0, None))
    counts.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def throughput(finished: Sequence[Record], end: float) -> Curve:
    """Output tokens a second in equal bins from 0 to `end`, and the bins' edges; an answer's tokens lie evenly on its chunks."""
    times = [time for record in finished for time in record.token_times]
    tokens = [record.num_output / len(record.token_times) for record in finished for _ in record.token_times]
    sums, edges = np.histogram(times, bins=_NUM_BINS, range=(0, end), weights=tokens)
    return sums * (_NUM_BINS / end), edges


def in_flight(records: Sequence[Record], end: float) -> Curve:
    """The times when requests were sent or ended, with 0 and `end`; and how many were sent and not ended from each on."""
    sent = np.sort([record.sent for record in records])
    ended = np.sort([record.end for record in records])
    times = np.unique(np.concatenate(([0.0], sent, ended, [end])))
    counts = np.searchsorted(sent, times, side="right") - np.searchsorted(ended, times, side="right")
    return times, counts.astype(np.float64)
