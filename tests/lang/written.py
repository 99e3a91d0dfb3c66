"""Functions from source text, as if they had been written to a file."""

from __future__ import annotations

import itertools
import linecache
from typing import Any

_count = itertools.count()


def write(text: str, namespace: dict[str, Any], filename: str | None = None) -> dict[str, Any]:
    """Run `text` as a module whose source can be read back; returns its namespace."""
    name = filename or f"<written {next(_count)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = {"__name__": "written", **namespace}
    exec(compile(text, name, "exec", dont_inherit=True), names)
    return names
