"""Every environment variable that tilus reads, typed; a bad value raises and names the variable."""

from __future__ import annotations

import os
from pathlib import Path

from tilus.errors import TilusError

DEVICES = ("auto", "reference", "emulator", "cuda")


def device() -> str:
    """TILUS_DEVICE: where kernels run when the call does not say: auto (default), reference, emulator or cuda."""
    value = os.environ.get("TILUS_DEVICE", "auto")
    if value not in DEVICES:
        raise TilusError(f"TILUS_DEVICE is {value!r}, expected one of {', '.join(DEVICES)}")
    return value


def cache_dir() -> Path:
    """TILUS_CACHE_DIR: where compiled kernels and packed weights are kept; default ~/.cache/tilus (or under XDG_CACHE_HOME)."""
    value = os.environ.get("TILUS_CACHE_DIR")
    if value:
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilus"


def ptxas() -> str | None:
    """TILUS_PTXAS: path of the assembler to use instead of the one that is found; must exist."""
    value = os.environ.get("TILUS_PTXAS")
    if value and not Path(value).is_file():
        raise TilusError(
            f"TILUS_PTXAS is {value!r}, which is not a file", hint="unset it or point it at a ptxas binary"
        )
    return value or None


def dump_dir() -> Path | None:
    """TILUS_DUMP_DIR: when set, the IR after each pass and the PTX of every kernel are written under it."""
    value = os.environ.get("TILUS_DUMP_DIR")
    return Path(value) if value else None
