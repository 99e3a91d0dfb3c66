"""Showing how far something is: a bar on a terminal, a line for each quarter in a log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator

import click


@contextlib.contextmanager
def progress(label: str, unit: str) -> Generator[Callable[[int, int], None]]:
    """On stderr. What is given is called with (done, total), first with done = 0."""
    if not sys.stderr.isatty():
        yield lambda done, total: _log(label, unit, done, total)
        return
    with contextlib.ExitStack() as stack:
        bars: list[click.progressbar] = []  # type: ignore[valid-type]

        def show(done: int, total: int) -> None:
            if not bars:
                bar = click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True)
                bars.append(stack.enter_context(bar))
            bars[0].update(done - bars[0].pos)

        yield show


def _log(label: str, unit: str, done: int, total: int) -> None:
    if done and done * 4 // total != (done - 1) * 4 // total:
        print(f"{label}: {unit} {done} of {total}", file=sys.stderr, flush=True)
