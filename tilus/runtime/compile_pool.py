"""Compiling many kernels at once: in processes, since Python's part of a compile is more than half of it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tilus.errors import TilusError

Result = TypeVar("Result")

START = 4  # compiles that take as long as a process takes to start


def compile_all(
    compiles: Sequence[Callable[[], Result]], *, done: Callable[[int, int], None] = lambda count, total: None,
    processes: int | None = None,
) -> list[Result]:  # fmt: skip
    """The results of all compiles, in their order. What they compile is in the disk cache then.

    compiles: pickled, as `functools.partial` of functions of modules, whose results are pickled, too. done: called here with
    (compiles done, compiles in all) after each. processes: by default as many as there are usable CPUs, or none, where starting
    them takes longer than they save. They end when this process does, however it ends.

    Raises: what a compile raises; TilusError when a process was ended from outside.
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
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        futures = [pool.submit(compile) for compile in compiles]
        try:
            for finished, future in enumerate(as_completed(futures), start=1):
                future.result()
                done(finished, len(compiles))
        except BrokenProcessPool as error:
            raise TilusError(
                f"one of {count} processes that compile kernels was ended by the system or by somebody",
                hint="if memory ran out, let fewer of them run: taskset -c 0-3 limits them to four",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever waits for an error does not wait for the rest
            raise
        return [future.result() for future in futures]


def _end_with_parent() -> None:
    """In a new process: it would wait for work for ever, were its parent killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
