"""Compiling in processes: order, progress, what they raise, and when they are worth it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

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


def end(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_is_killed_is_an_error() -> None:
    with pytest.raises(TilusError, match=r"a process that compiles kernels was ended(.|\n)*If memory ran out"):
        compile_all([partial(end, 1), partial(end, 2)], processes=2)


def test_a_script_that_starts_again_in_each_process_is_told_how_not_to(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from tilus.runtime.compile_pool import compile_all\n"
        "compile_all([partial(pow, 2, 3), partial(pow, 3, 2)], processes=2)\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert "hint: processes import the main script: what it does belongs below `if __name__" in found.stderr


def wait(path: str) -> None:
    Path(path, str(os.getpid())).touch()
    time.sleep(60)


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "from functools import partial\nfrom test_compile_pool import wait\nfrom tilus.runtime.compile_pool import compile_all\n"
        f"if __name__ == '__main__':\n    compile_all([partial(wait, {str(tmp_path)!r})] * 2, processes=2)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        until(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(Path("/proc", child.name).exists() for child in tmp_path.iterdir()))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
