"""Roles of a block, one at a time: each runs until it waits for something that is not there yet, then the next one goes on.

A role runs in a thread of its own, which is what Python has for code that stops in the middle of nested calls; a role that waits
hands over to the block's own thread, which picks the next in turn. So exactly one runs at any time, in an order that is the same
in every run. The blocks of a cluster take turns in the same way, and each of them may have roles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from tilus.errors import Note, TilusError


class _Cancelled(BaseException):
    """Ends a role whose block has failed."""


class Turn:
    """A role on its way. name: its warps. ready: whether it can go on. error: how it ended, when not at its end."""

    def __init__(self, name: str, run: Callable[[Turn], None]) -> None:
        self.name = name
        self.finished = False
        self.ready: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self._run = run
        self._stuck = self._cancelled = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._main, name=f"tilus {name}", daemon=True).start()

    def wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Called by the role: let others run until `ready`.

        Raises: TilusError with `what` when nobody else can go on.
        """
        if not self.pause(ready):
            raise TilusError(what())

    def pause(self, ready: Callable[[], bool]) -> bool:
        """The same; False when nobody else can go on."""
        self.ready = ready
        self._back.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled
        return not self._stuck

    def resume(self) -> None:
        """Called by the block: let the role run until it waits or ends."""
        self._go.release()
        self._back.acquire()

    def give_up(self) -> TilusError:
        """Called by the block: what the role waits for, when that never comes."""
        self._stuck = True
        self.resume()
        if isinstance(self.error, TilusError):
            return self.error
        raise self.error or TilusError(f"{self.name} ended without what it waited for")

    def cancel(self) -> None:
        """Called by the block: end the role."""
        if not self.finished:
            self._cancelled = True
            self.resume()

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                with np.errstate(all="ignore"):  # a setting of each thread
                    self._run(self)
        except BaseException as error:  # which the block's thread raises
            self.error = error
        self.finished = True
        self._back.release()


def run_side_by_side(
    roles: Sequence[tuple[str, Callable[[Turn], None]]], block: Turn | None = None, *, who: str = "roles"
) -> None:
    """Run roles, given by name, until all are at their end.

    block: the turn of their block, where others may help them on. who: what they are, when not roles.

    Raises: TilusError for a mistake in one of them, and when all that are left wait.
    """
    turns = [Turn(name, run) for name, run in roles]

    def able() -> list[Turn]:
        return [turn for turn in turns if not turn.finished and turn.ready()]

    try:
        while not all(turn.finished for turn in turns):
            if not able() and (block is None or not block.pause(lambda: bool(able()))):
                raise _deadlock(turns, who)
            for turn in able():
                if turn.ready():
                    turn.resume()
                if turn.error is not None:
                    raise turn.error
    finally:
        for turn in turns:
            turn.cancel()


def _deadlock(turns: Sequence[Turn], who: str) -> TilusError:
    notes: list[Note] = []
    for turn in turns:
        if turn.finished:
            notes.append(Note(f"{turn.name}: at the end", None))
        else:
            error = turn.give_up()
            own = [] if error.notes else [Note(error.message, error.loc)]
            notes += [Note(f"{turn.name}: {note.message}", note.loc) for note in (*own, *error.notes)]
    return TilusError(
        f"the {who} wait for each other, and nobody can go on",
        notes=notes,
        hint="every phase needs its arrivals; a consumer starts with phase 0, a producer that waits for free stages with 1",
    )
