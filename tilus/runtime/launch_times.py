"""How long kernel launches take, for `tilus run --time`: recorded while `recording()` is active, at no cost otherwise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

Run = Callable[[Sequence[int], Sequence[Any], Sequence[Any]], None]

LaunchTimes = dict[tuple[str, str], list[float]]
"""Seconds of every launch by (kernel, device), in the order of the first launches."""

_recorders: list[LaunchTimes] = []


@contextmanager
def recording() -> Generator[LaunchTimes]:
    """Record the launches of kernels that are prepared inside of the block."""
    times: LaunchTimes = {}
    _recorders.append(times)
    try:
        yield times
    finally:
        _recorders.remove(times)


def watched(kernel: str, device: str, run: Run) -> Run:
    """The same launch, timed when somebody records. A timed launch on a GPU waits for the kernel."""
    if not _recorders:
        return run
    recorders = tuple(_recorders)

    def timed(pointers: Sequence[int], scalars: Sequence[Any], tensors: Sequence[Any]) -> None:
        _synchronize(device)
        start = time.perf_counter()
        run(pointers, scalars, tensors)
        _synchronize(device)
        seconds = time.perf_counter() - start
        for times in recorders:
            times.setdefault((kernel, device), []).append(seconds)

    return timed


def _synchronize(device: str) -> None:
    if device == "cuda":
        from tilus.runtime import cuda

        cuda.synchronize()


def render(times: LaunchTimes) -> str:
    """A line for each kernel and device: launches, first and median time (the first one warms up)."""
    if not times:
        return "no kernel was launched"
    width = max(len(kernel) for kernel, _ in times)
    return "\n".join(
        f"{kernel:<{width}}  {device:<9}  {len(seconds):>5} launches  "
        f"first {seconds[0] * 1e3:10.3f} ms  median {statistics.median(seconds) * 1e3:10.3f} ms"
        for (kernel, device), seconds in times.items()
    )
