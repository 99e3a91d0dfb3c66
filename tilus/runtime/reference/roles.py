"""Roles of a block, one at a time: each runs until it waits for something that is not there yet, then the next one goes on.

A role runs in a thread of its own, which is what Python has for code that stops in the middle of nested calls; a role that waits
hands over to the block's own thread, which picks the next in turn. So exactly one runs at any time, in an order that is the same
in every run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from tilus.errors import Note, TilusError


class _Cancelled(BaseException):
    """Ends a role whose block has failed."""


class Turn:
    """A role on its way. name: its warps. ready: what it waits for. error: how it ended, when not at its end."""

    def __init__(self, name: str, run: Callable[[Turn], None]) -> None:
        self.name = name
        self.finished = False
        self.ready: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self._run = run
        self._refusal: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name=f"tilus-role-{name}", daemon=True)
        self._thread.start()

    def wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Called by the role: let others run until `ready`.

        Raises: TilusError with `what` when nobody else can go on.
        """
        self.ready = ready
        self._back.release()
        self._go.acquire()
        if isinstance(self._refusal, TilusError):
            self._refusal = TilusError(what())
        if self._refusal is not None:
            raise self._refusal

    def resume(self) -> None:
        """Called by the block: let the role run until it waits or ends."""
        self._go.release()
        self._back.acquire()

    def end(self, refusal: BaseException) -> None:
        """Called by the block: make the role's wait, or its start, raise."""
        if not self.finished:
            self._refusal = refusal
            self.resume()

    def _main(self) -> None:
        self._go.acquire()
        try:
            if self._refusal is None:
                with np.errstate(all="ignore"):  # a setting of each thread
                    self._run(self)
        except BaseException as error:  # which the block's thread raises
            self.error = error
        self.finished = True
        self._back.release()


def run_side_by_side(roles: Sequence[tuple[str, Callable[[Turn], None]]]) -> None:
    """Run roles, given by name, until all are at their end.

    Raises: TilusError for a mistake in one of them, and when all that are left wait.
    """
    turns = [Turn(name, run) for name, run in roles]
    try:
        while not all(turn.finished for turn in turns):
            able = [turn for turn in turns if not turn.finished and turn.ready()]
            if not able:
                raise _deadlock(turns)
            for turn in able:
                if turn.ready():
                    turn.resume()
                if turn.error is not None:
                    raise turn.error
    finally:
        for turn in turns:
            turn.end(_Cancelled())


def _deadlock(turns: Sequence[Turn]) -> TilusError:
    waits: list[Note] = []
    for turn in turns:
        if turn.finished:
            waits.append(Note(f"{turn.name}: at the end", None))
            continue
        turn.end(TilusError("waits"))
        if not isinstance(turn.error, TilusError):
            raise turn.error or TilusError(f"{turn.name} ended without an error")
        waits.append(Note(f"{turn.name}: {turn.error.message}", turn.error.loc))
    where = next(note.loc for note in waits if note.loc is not None) if any(note.loc for note in waits) else None
    return TilusError(
        "the roles wait for each other, and nobody can go on",
        loc=where,
        notes=waits,
        hint="every phase needs its arrivals: a consumer starts with phase 0, a producer that waits for free stages with 1",
    )
