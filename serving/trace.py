"""Where the time of steps goes, as a file in Chrome's trace event format, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tilus.errors import TilusError

MAX_SPANS = 200_000  # of some 100 bytes in the file: the last ones are kept


class Trace:
    """Collects spans on tracks, in seconds of `time.perf_counter`. Only the thread that makes them may write it."""

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise TilusError(f"the trace goes to {path}, but {path.parent} is no directory")
        self._path = path
        self._spans = deque[tuple[str, str, float, float]](maxlen=MAX_SPANS)

    def add(self, track: str, name: str, start: float, end: float) -> None:
        self._spans.append((track, name, start, end))

    @contextmanager
    def span(self, name: str) -> Generator[None]:
        """On the track of the engine."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add("engine", name, start, time.perf_counter())

    def write(self) -> None:
        """All that is known, or nothing: a file that is there is replaced when the new one is complete."""
        spans = list(self._spans)
        origin = min((start for _, _, start, _ in spans), default=0.0)
        tracks = {track: number for number, track in enumerate(sorted({track for track, *_ in spans}))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": track}}
            for track, number in tracks.items()
        ]
        for track, name, start, end in spans:
            microseconds = {"ts": round((start - origin) * 1e6, 1), "dur": round((end - start) * 1e6, 1)}
            events.append({"ph": "X", "name": name, "pid": 0, "tid": tracks[track]} | microseconds)
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        new.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        new.replace(self._path)
