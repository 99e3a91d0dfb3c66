"""Errors that people see: the user's own line with a caret, what was found, what was expected, and a way out."""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Loc:
    """A position in a user's source file. `line` and `column` count from 1; `end_column` is exclusive."""

    file: str
    line: int
    column: int = 1
    end_column: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    def snippet(self) -> str:
        """The source line with a caret under the position; empty when the file cannot be read."""
        text = linecache.getline(self.file, self.line).rstrip("\n")
        if not text.strip():
            return ""
        end = self.end_column if self.end_column is not None else self.column + 1
        width = max(1, min(end, len(text) + 1) - self.column)
        gutter = f"{self.line:>5} | "
        return f"{gutter}{text}\n{' ' * (len(gutter) + self.column - 1)}{'^' * width}"


def _place(loc: Loc | None) -> list[str]:
    if loc is None:
        return []
    snippet = loc.snippet()
    return [f"  at {loc}" + (f"\n{snippet}" if snippet else "")]


@dataclass(frozen=True)
class Note:
    """What another line has to do with a mistake; shown with a caret of its own."""

    message: str
    loc: Loc | None


class TilusError(Exception):
    """A mistake that a user can mend.

    message: what was found and what was expected, with both values.
    loc: where in the user's code; its line is shown with a caret.
    notes: the other lines that it takes to understand the mistake.
    hint: what to do instead.
    """

    def __init__(
        self, message: str, *, loc: Loc | None = None, hint: str | None = None, notes: Sequence[Note] = ()
    ) -> None:
        self.message = message
        self.loc = loc
        self.hint = hint
        self.notes = tuple(notes)
        super().__init__(self.render())

    def render(self) -> str:
        parts = [self.message, *_place(self.loc)]
        for note in self.notes:
            parts += [f"  note: {note.message}", *_place(note.loc)]
        if self.hint:
            parts.append(f"  hint: {self.hint}")
        return "\n".join(parts)

    def at(self, loc: Loc | None, notes: Sequence[Note] = ()) -> TilusError:
        """The same error with a location, unless it already has one, and with further notes."""
        if not notes and (self.loc is not None or loc is None):
            return self
        return TilusError(self.message, loc=self.loc or loc, hint=self.hint, notes=(*self.notes, *notes))


class TilusErrors(TilusError):
    """Several mistakes found in one go; `errors` holds each of them."""

    def __init__(self, errors: Sequence[TilusError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.message, loc=first.loc, hint=first.hint, notes=first.notes)

    def render(self) -> str:
        return "\n".join(error.render() for error in self.errors)


def raise_all(errors: Sequence[TilusError]) -> None:
    """Raise nothing, the one error, or all of them together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise TilusErrors(errors)
