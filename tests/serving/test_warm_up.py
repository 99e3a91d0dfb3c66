"""The warm-up gives an answer and leaves nothing, and phases say how far they are."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from serving_fakes import FakeRunner, FakeVocabulary, ManualClock

from serving.config import EngineConfig
from serving.core import Batch, StepOutput
from serving.cost_model import StepWork
from serving.engine import Engine
from serving.progress import progress
from serving.warm_up import measure_steps, warm_up


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, [[40], [1]]),
        ({"max_step_tokens": 32}, [[32], [1]]),
        ({"max_model_len": 2}, [[1]]),
        ({"num_pages": 3}, [[11]]),
    ],
)
@pytest.mark.parametrize("overlap", [False, True])
def test_one_short_answer(limits: dict[str, Any], steps: list[list[int]], overlap: bool) -> None:
    config = EngineConfig(**({"num_pages": 100, "max_model_len": 200, "page_size": 4, "overlap": overlap} | limits))
    runner, calls = FakeRunner(config.page_size, lazy=overlap), []
    engine = Engine(runner, FakeVocabulary(), config, ManualClock())
    warm_up(engine, lambda done, total: calls.append((done, total)))
    assert not engine.has_work and engine.pages.num_free == config.num_pages
    assert [[len(item.token_ids) for item in batch.items] for batch in runner.batches] == steps
    total = len(steps)
    assert calls[0] == (0, total) and calls[-1] == (total, total) and all(done <= total for done, _ in calls)


def test_measured_steps_teach_the_cost_model_and_nothing_else() -> None:
    """A step takes 1 ms and 1 us a token here."""

    class Timed(FakeRunner):
        def execute(self, batch: Batch) -> StepOutput:
            clock.time += 1e-3 + 1e-6 * sum(len(item.token_ids) for item in batch.items)
            return super().execute(batch)

    clock, config = ManualClock(), EngineConfig(num_pages=400, max_model_len=200, page_size=4)
    runner = Timed(4)
    engine = Engine(runner, FakeVocabulary(), config, clock)
    measure_steps(engine)
    steps = [[len(item.token_ids) for item in batch.items] for batch in runner.batches]
    for beside in (1, 4):  # nothing is found in the cache
        sizes = {sum(counts) - counts.count(1) for counts in steps if counts.count(1) == beside}
        assert sizes >= {16, 24, 36, 54, 81, 121, 182}
    for work in (StepWork(1, 100, 100), StepWork(300, 900, 9000, prompts=True)):
        assert engine.cost.predict(work) == pytest.approx(1e-3 + 1e-6 * work.tokens, rel=1e-3)
    assert not engine.has_work and engine.pages.num_free == 400


def test_a_log_gets_a_line_for_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("packing weights", "layer") as show:
        for done in range(9):
            show(done, 8)
    *quarters, end = capsys.readouterr().err.splitlines()
    assert quarters == [f"packing weights: layer {done} of 8" for done in (2, 4, 6, 8)]
    assert re.fullmatch(r"packing weights: 0\.\d s", end)


def test_a_phase_without_anything_to_do_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("compiling kernels", "kernel"):
        pass
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("packing weights", "layer") as show:
        for done in range(9):
            show(done, 8)
    assert "packing weights" in terminal.getvalue()
    assert "8/8" in terminal.getvalue()


def test_another_round_gets_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("compiling kernels", "kernel") as show:
        for done, total in ((1, 2), (2, 2), (1, 3), (3, 3)):
            show(done, total)
    assert "2/2" in terminal.getvalue() and "3/3" in terminal.getvalue()
