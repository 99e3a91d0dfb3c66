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


class CompilePool:
    """Processes that compile, from the first `compile_all` that they are worth on to the end of the `with` block.

    processes: by default as many as there are usable CPUs, or none, where starting them takes longer than they save. They end
    when this process does, however it ends.
    """

    def __init__(self, processes: int | None = None) -> None:
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._pool is not None:
            failed = kind is not None  # whoever waits for an error does not wait for the rest
            self._pool.shutdown(wait=not failed, cancel_futures=failed)

    def compile_all(
        self, compiles: Sequence[Callable[[], Result]], *, done: Callable[[int, int], None] = lambda count, total: None
    ) -> list[Result]:
        """The results of all compiles, in their order. What they compile is in the disk cache then.

        compiles: pickled, as `functools.partial` of functions of modules, whose results are pickled, too. done: called here with
        (compiles done, compiles in all) after each.

        Raises: what a compile raises; TilusError when a process is ended from outside.
        """
        pool = self._pool = self._pool or self._started(len(compiles))
        if pool is None:
            results: list[Result] = []
            for compile in compiles:
                results.append(compile())
                done(len(results), len(compiles))
            return results
        try:
            futures = [pool.submit(compile) for compile in compiles]
            for finished, future in enumerate(as_completed(futures), start=1):
                future.result()
                done(finished, len(compiles))
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise TilusError(
                "a process that compiles kernels was ended by the system or by somebody",
                hint="processes import the main script: what it does belongs below `if __name__ == '__main__':`. If memory ran "
                "out, let fewer of them run: `taskset -c 0-3` in front of the command allows four",
            ) from error

    def _started(self, count: int) -> ProcessPoolExecutor | None:
        """As many processes as so many compiles are worth."""
        processes = min(self._processes or usable_cpus(), count)
        saved = count - count / max(processes, 1)
        if processes <= 1 or (self._processes is None and saved <= START):
            return None
        # New processes, not forks: a fork of a process with threads or a GPU's context may hang.
        return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)


def compile_all(
    compiles: Sequence[Callable[[], Result]], *, done: Callable[[int, int], None] = lambda count, total: None,
    processes: int | None = None,
) -> list[Result]:  # fmt: skip
    """`CompilePool.compile_all`, by processes of its own."""
    with CompilePool(processes) as pool:
        return pool.compile_all(compiles, done=done)


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """In a new process: it would wait for work for ever, were its parent killed."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
