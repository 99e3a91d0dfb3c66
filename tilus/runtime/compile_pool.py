"""Compiling many kernels at once: in processes, since Python's part of a compile is more than half of it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Result = TypeVar("Result")

START = 4  # compiles that take as long as a process takes to start


def compile_all(
    compiles: Sequence[Callable[[], Result]], *, done: Callable[[int, int], None] = lambda count, total: None,
    processes: int | None = None,
) -> list[Result]:  # fmt: skip
    """The results of all compiles, in their order. What they compile is in the disk cache then.

    compiles: pickled, as `functools.partial` of functions of modules, whose results are pickled, too. done: called here with
    (compiles done, compiles in all) after each. processes: by default as many as there are usable CPUs, or none, where starting
    them takes longer than they save. Raises: what a compile raises.
    """
    count = min(processes or usable_cpus(), len(compiles))
    saved = len(compiles) - len(compiles) / max(count, 1)
    if count <= 1 or (processes is None and saved <= START):
        results: list[Result] = []
        for compile in compiles:
            results.append(compile())
            done(len(results), len(compiles))
        return results
    # New processes, not forks: a fork of a process with threads or a GPU's context may hang.
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile) for compile in compiles]
        for finished, future in enumerate(as_completed(futures), start=1):
            future.result()
            done(finished, len(compiles))
        return [future.result() for future in futures]


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
