"""A directory of this process for libraries that the cache cannot hold; it goes when the process ends."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path


@functools.cache
def directory() -> Path:
    """The directory, made when it is first asked for. Libraries that are loaded from it outlive its removal."""
    made = Path(tempfile.mkdtemp(prefix="tilus-cpu-"))
    atexit.register(_remove, made, os.getpid())
    return made


def _remove(made: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child that exits must not take it from its parent
        shutil.rmtree(made, ignore_errors=True)
