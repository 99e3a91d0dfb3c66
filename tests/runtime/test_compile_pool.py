"""Compiling in processes: order, progress, what they raise, and when they are worth it."""

from __future__ import annotations

import os
from functools import partial

import pytest

from tilus.errors import TilusError
from tilus.runtime import compile_pool
from tilus.runtime.compile_pool import compile_all


def square(number: int) -> tuple[int, int]:
    if number < 0:
        raise TilusError(f"cannot compile {number}", hint="take another")
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_results_are_in_order_and_progress_is_told(processes: int) -> None:
    steps: list[tuple[int, int]] = []
    jobs = [partial(square, number) for number in range(5)]
    results = compile_all(jobs, done=lambda count, total: steps.append((count, total)), processes=processes)
    assert [result for result, _ in results] == [0, 1, 4, 9, 16]
    assert (os.getpid() in {process for _, process in results}) == (processes == 1)
    assert steps == [(count, 5) for count in range(1, 6)]
    with pytest.raises(TilusError, match=r"cannot compile -1\n  hint: take another"):
        compile_all([partial(square, 1), partial(square, -1)], processes=processes)


def test_processes_where_they_save_more_than_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def pool(count: int, context: object, initializer: object) -> None:
        started.append(count)
        raise InterruptedError

    monkeypatch.setattr(compile_pool, "ProcessPoolExecutor", pool)
    for cpus, jobs, expected in (
        (1, 100, []),
        (2, 8, []),
        (2, 9, [2]),
        (16, 5, []),
        (16, 6, [6]),
        (16, 40, [16]),
        (4, 0, []),
    ):
        monkeypatch.setattr(compile_pool, "usable_cpus", lambda cpus=cpus: cpus)
        started.clear()
        if expected:
            with pytest.raises(InterruptedError):
                compile_all([partial(square, 1)] * jobs)
        else:
            assert len(compile_all([partial(square, 1)] * jobs)) == jobs
        assert started == expected
