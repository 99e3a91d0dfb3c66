"""How many kernels this process had to compile because no cache had them."""

from __future__ import annotations

import itertools

_counter = itertools.count()
_seen = 0


def note() -> None:
    """A kernel was compiled; any thread may say so."""
    global _seen
    _seen = next(_counter) + 1


def num_compilations() -> int:
    """Kernels that the assembler or the C compiler was called for in this process so far; those on the disk do not count."""
    return _seen
