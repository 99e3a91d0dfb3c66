"""When a GPU did what: events in its stream, put on the clock of the trace."""

from __future__ import annotations

import time

import torch

from serving.trace import Trace


class GpuSpans:
    """Adds the time between two points of the current stream to a trace."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._origin = torch.cuda.Event(enable_timing=True)
        self._origin.record()
        self._origin.synchronize()
        self._started = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """This point of the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Waits until the GPU is there."""
        end.synchronize()
        first, last = (self._started + self._origin.elapsed_time(event) / 1e3 for event in (start, end))
        self._trace.add("GPU", name, first, last)
