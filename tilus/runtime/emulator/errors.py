"""The error of a kernel that does something wrong while it runs."""

from __future__ import annotations

from tilus.errors import TilusError


class EmulatorError(TilusError):
    """A fault of a running kernel: names the PTX line, the user's line, the thread and the block."""


class RaceError(EmulatorError):
    """Two threads touch the same shared or global bytes, one of them writing, with nothing that orders them."""


class DeadlockError(EmulatorError):
    """No thread can go on: lists who waits for what."""
