"""Showing how far something is, and how long it took: a bar on a terminal, a line for each quarter in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator

import click


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str, unit: str) -> Generator[Callable[[int, int], None]]:
    """On stderr. What is given is called with (done, total), first with done = 0. At the end the seconds are told, unless it was
    never called."""
    start, shown = time.monotonic(), False
    with contextlib.ExitStack() as stack:
        bars: list[click.progressbar] = []  # type: ignore[valid-type]

        def show(done: int, total: int) -> None:
            nonlocal shown
            shown = True
            if not sys.stderr.isatty():
                if done and done * 4 // total != (done - 1) * 4 // total:
                    say(f"{label}: {unit} {done} of {total}")
                return
            if not bars or bars[0].length != total:
                bars[:] = [
                    stack.enter_context(click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True))
                ]
            bars[0].update(done - bars[0].pos)

        yield show
    if shown:
        say(f"{label}: {time.monotonic() - start:.1f} s")
