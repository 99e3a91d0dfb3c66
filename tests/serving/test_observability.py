"""What the engine tells about itself: traces of steps, a line for each request, and its own checks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from serving_fakes import FakeRunner, FakeVocabulary, ManualClock

from serving import trace as tracing
from serving.config import EngineConfig
from serving.core import Batch, Request, SamplingParams
from serving.engine import Engine
from serving.request_log import request_line
from serving.trace import Trace
from tilus.errors import TilusError

CONFIG = EngineConfig(num_pages=16, max_model_len=30, page_size=3, max_batch=1, request_timeout=30.0, overlap=True)


class SlowRunner(FakeRunner):
    """Two seconds a step."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(CONFIG.page_size, lazy=True)
        self._clock = clock

    def execute(self, batch: Batch):
        self._clock.time += 2.0
        return super().execute(batch)


def add(engine: Engine, name: str, max_tokens: int) -> None:
    engine.add(Request(name, (1, 2), SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)))


def spans_of(path: Path) -> list[tuple[str, str, float, float]]:
    """Track, name, start and end, in the file's order."""
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    return [(tracks[e["tid"]], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]


def test_a_trace_has_the_parts_of_every_step_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    engine = Engine(FakeRunner(3, lazy=True), FakeVocabulary(), CONFIG, ManualClock(), trace=Trace(path))
    add(engine, "r", 3)
    while engine.has_work:
        engine.step()
    assert engine.trace is not None and not path.exists()
    engine.trace.write()
    spans = spans_of(path)
    first, step = ["schedule", "launch"], ["schedule", "launch", "wait", "commit"]
    assert [name for _, name, _, _ in spans] == first + step + step + ["schedule", "wait", "commit"]
    assert {track for track, *_ in spans} == {"engine"}
    ends = [(start, end) for _, _, start, end in spans]
    assert ends[0][0] == 0 and all(start <= end for start, end in ends)
    assert all(end <= start + 0.2 for (_, end), (start, _) in pairwise(ends)), "times are rounded to 0.1 us"


def test_a_trace_keeps_the_last_spans_and_replaces_a_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MAX_SPANS", 3)
    path = tmp_path / "trace.json"
    path.write_text("what was there")
    trace = Trace(path)
    for second in range(5):
        trace.add("GPU", str(second), 10.0 + second, 10.5 + second)
    with monkeypatch.context() as full:
        full.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            trace.write()
    assert path.read_text() == "what was there"
    trace.write()
    assert spans_of(path) == [("GPU", str(n), (n - 2) * 1e6, (n - 1.5) * 1e6) for n in (2, 3, 4)]


def test_a_trace_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(TilusError, match=r"the trace goes to .*nowhere.x\.json, but .*nowhere is no directory"):
        Trace(tmp_path / "nowhere" / "x.json")


def test_a_line_says_where_the_time_of_a_request_went() -> None:
    """Whatever its end: two seconds a step, one request at a time, and the third one's deadline passes in the queue.

    With overlap the second one's first step is launched when the first one's last step begins.
    """
    clock, lines = ManualClock(), list[str]()
    engine = Engine(SlowRunner(clock), FakeVocabulary(), CONFIG, clock)
    for name, length in (("first", 4), ("leaves", 20), ("late", 20)):
        add(engine, name, length)
    sequences = {seq.id: seq for seq in engine.scheduler.waiting}
    for step in range(40):
        start = clock.time
        for output in engine.step():
            if output.finish_reason is not None:
                now = start if output.finish_reason == "timeout" else clock.time
                lines.append(request_line(sequences[output.request_id], output.finish_reason, now))
        if step == 9:
            engine.abort("leaves")
            lines.append(request_line(sequences["leaves"], "abort", clock.time))
            clock.time = 31.0
    assert not engine.has_work
    assert lines == [
        "request first length: 2 tokens in, 4 out; queued 0.0 ms, prefill 2000.0 ms, decode 6000.0 ms (2000.00 a token)",
        "request leaves abort: 2 tokens in, 5 out; queued 6000.0 ms, prefill 4000.0 ms, decode 8000.0 ms (2000.00 a token)",
        "request late timeout: 2 tokens in, 0 out; queued 31000.0 ms",
    ]


def test_the_books_are_checked_after_each_step_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    for debug, finds in (("0", False), ("1", True)):
        monkeypatch.setenv("TILUS_DEBUG", debug)
        engine = Engine(FakeRunner(3), FakeVocabulary(), CONFIG, ManualClock())
        add(engine, "r", 5)
        engine.step()
        engine.pages.reserve("ghost", 1)
        if finds:
            with pytest.raises(TilusError, match=r"pages belong to \['ghost', 'r'\]"):
                engine.step()
        else:
            engine.step()
