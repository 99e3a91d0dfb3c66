"""Pictures of a run as SVG: how latencies are distributed, and throughput and requests over time. Needs no other library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from serving.bench.record import Record

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart also by the colour-blind (Okabe and Ito)
_WIDTH, _HEIGHT = 420, 260  # of the inside of a panel, in pixels
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 40, 24, 52
_NUM_BINS = 60

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Axis:
    """From values to parts of the axis' length; ticks are the values to name."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def part(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return (value - low) / (high - low)


def plot(records: Sequence[Record], title: str) -> str:
    """The picture of a run: latencies and tokens of the finished requests, and all requests in flight."""
    finished = [record for record in records if record.outcome == "finished"]
    latencies = {
        "ttft": [record.ttft for record in finished if record.ttft is not None],
        "tpot": [record.tpot for record in finished if record.tpot is not None],
        "itl": [gap for record in finished for gap in record.gaps],
        "e2e": [record.e2e for record in finished],
    }
    curves = {name: cumulative(values) for name, values in latencies.items() if values}
    values = [x for points in curves.values() for x, _ in points]
    end = max((record.end for record in records), default=0.0) or 1.0
    panels = (
        _panel(curves, _log_axis("latency (ms)", values), _Axis("part of values", 0, 1, (0, 0.25, 0.5, 0.75, 1))),
        _over_time(throughput(finished, end), end, "output tokens/s"),
        _over_time(in_flight(records, end), end, "requests in flight"),
    )
    step = _LEFT + _WIDTH + _RIGHT
    body = "".join(f'<g transform="translate({i * step + _LEFT},{_TOP})">{panel}</g>' for i, panel in enumerate(panels))
    width, height = step * len(panels), _TOP + _HEIGHT + _BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>{body}</svg>\n'
    )


def cumulative(seconds: Sequence[float]) -> Points:
    """The distribution function's points (milliseconds, part of values up to there), at most some hundreds."""
    data = np.sort(np.asarray(seconds, np.float64)) * 1e3
    parts = np.arange(1, data.size + 1) / data.size
    chosen = np.unique(np.rint(np.linspace(0, data.size - 1, min(data.size, 400))).astype(int))
    return [(float(data[i]), float(parts[i])) for i in chosen]


def throughput(finished: Sequence[Record], end: float) -> Points:
    """(middle in seconds, output tokens a second) of equal bins from 0 to `end`; an answer's tokens lie evenly on its chunks."""
    times = [time for record in finished for time in record.token_times]
    tokens = [record.num_output / len(record.token_times) for record in finished for _ in record.token_times]
    sums, edges = np.histogram(times, bins=_NUM_BINS, range=(0, end), weights=tokens)
    width = end / _NUM_BINS
    return [(float(edge) + width / 2, float(total) / width) for edge, total in zip(edges, sums)]


def in_flight(records: Sequence[Record], end: float) -> Points:
    """(seconds, requests sent and not ended then) at equal distances from 0 to `end`."""
    times = np.linspace(0, end, 4 * _NUM_BINS + 1)
    sent = np.sort([record.sent for record in records])
    ended = np.sort([record.end for record in records])
    counts = np.searchsorted(sent, times, side="right") - np.searchsorted(ended, times, side="right")
    return [(float(time), float(count)) for time, count in zip(times, counts)]


def _over_time(points: Points, end: float, label: str) -> str:
    highest = max(value for _, value in points) or 1.0
    return _panel({label: points}, _linear_axis("time (s)", end), _linear_axis(label, highest))


def _linear_axis(label: str, high: float) -> _Axis:
    """From 0 to the next round number, with some four to ten round ticks."""
    unit = 10 ** math.floor(math.log10(high))
    step = next(unit * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if high / (unit * factor) <= 10)
    num_steps = math.ceil(high / step - 1e-9)
    return _Axis(label, 0, num_steps * step, tuple(i * step for i in range(num_steps + 1)))


def _log_axis(label: str, values: Sequence[float]) -> _Axis:
    """Whole decades around the positive values."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    return _Axis(label, 10.0**low, 10.0**high, tuple(10.0**i for i in range(low, high + 1)), is_log=True)


def _panel(curves: dict[str, Points], x_axis: _Axis, y_axis: _Axis) -> str:
    def x(value: float) -> float:
        return round(x_axis.part(value) * _WIDTH, 1)

    def y(value: float) -> float:
        return round((1 - y_axis.part(value)) * _HEIGHT, 1)

    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#888"/>']
    for tick in x_axis.ticks:
        parts.append(f'<path d="M{x(tick)} 0V{_HEIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick)}" y="{_HEIGHT + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y_axis.ticks:
        parts.append(f'<path d="M0 {y(tick)}H{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 36}" text-anchor="middle">{escape(x_axis.label)}</text>')
    parts.append(
        f'<text transform="translate(-46,{_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_axis.label)}</text>'
    )
    for i, (name, points) in enumerate(curves.items()):
        line = " ".join(f"{x(px)},{y(py)}" for px, py in points)
        parts.append(
            f'<polyline id="{escape(name)}" points="{line}" fill="none" stroke="{_COLOURS[i]}" stroke-width="1.5"/>'
        )
        if len(curves) > 1:
            parts.append(
                f'<text x="{_WIDTH - 40 * (len(curves) - i)}" y="-6" fill="{_COLOURS[i]}">{escape(name)}</text>'
            )
    return "".join(parts)
