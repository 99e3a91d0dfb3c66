"""The error of the layout algebra."""

from __future__ import annotations

from tilus.errors import TilusError


class LayoutError(TilusError):
    """A layout that does not exist: a wrong shape, an inexact quotient, a value that a thread does not own."""
