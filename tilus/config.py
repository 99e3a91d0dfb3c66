"""Every environment variable that tilus reads, typed; a bad value raises and names the variable."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from tilus.errors import TilusError

DEVICES = ("auto", "reference", "emulator", "cpu", "cuda")
MAX_THREADS = 1024


def device() -> str:
    """TILUS_DEVICE: where kernels run when the call does not say: auto (default), reference, emulator, cpu or cuda."""
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


def cc() -> str | None:
    """TILUS_CC: the C compiler to use instead of the one that is found, a path or a name on PATH; must exist."""
    value = os.environ.get("TILUS_CC")
    if not value:
        return None
    found = shutil.which(value)
    if found is None:
        raise TilusError(
            f"TILUS_CC is {value!r}, expected a program",
            hint="unset it or point it at a C compiler, such as gcc or clang",
        )
    return str(Path(found).absolute())


def cflags() -> tuple[str, ...]:
    """TILUS_CFLAGS: flags for the C compiler behind those of tilus, in a shell's words; the last of several -O counts."""
    value = os.environ.get("TILUS_CFLAGS", "")
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise TilusError(f"TILUS_CFLAGS is {value!r}, expected flags in a shell's words: {error}") from error


def num_threads() -> int | None:
    """TILUS_NUM_THREADS: how many threads run a kernel on the CPU, 1 to 1024; None: as many as there are usable CPUs."""
    value = os.environ.get("TILUS_NUM_THREADS")
    if not value:
        return None
    is_short_number = value.isascii() and value.isdigit() and len(value) <= len(str(MAX_THREADS))
    if not is_short_number or not 1 <= int(value) <= MAX_THREADS:
        raise TilusError(
            f"TILUS_NUM_THREADS is {value!r}, expected a whole number from 1 to {MAX_THREADS}",
            hint="unset it to use every CPU that this process may use",
        )
    return int(value)


def dependent_launch() -> bool:
    """TILUS_DEPENDENT_LAUNCH: 0 lets every kernel start after the end of the one before it, to measure the gain; default 1."""
    value = os.environ.get("TILUS_DEPENDENT_LAUNCH", "1")
    if value not in ("0", "1"):
        raise TilusError(f"TILUS_DEPENDENT_LAUNCH is {value!r}, expected 0 or 1")
    return value == "1"


def autotune() -> bool:
    """TILUS_AUTOTUNE: 1 measures plans of a kernel for every problem that it first meets, in seconds each; default 0."""
    value = os.environ.get("TILUS_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise TilusError(f"TILUS_AUTOTUNE is {value!r}, expected 0 or 1", hint="`tilus tune` tunes ahead of time")
    return value == "1"


def kernel_index() -> bool:
    """TILUS_KERNEL_INDEX: 0 translates kernels of tilus anew in each process, also those that are on the disk, as programs need
    that change tilus' own modules while they run; default 1."""
    value = os.environ.get("TILUS_KERNEL_INDEX", "1")
    if value not in ("0", "1"):
        raise TilusError(f"TILUS_KERNEL_INDEX is {value!r}, expected 0 or 1")
    return value == "1"


def debug() -> bool:
    """TILUS_DEBUG: 1 checks block tables, lengths, positions and slots before attention and appends run, and the server's books
    after each step; default 0."""
    value = os.environ.get("TILUS_DEBUG", "0")
    if value not in ("0", "1"):
        raise TilusError(f"TILUS_DEBUG is {value!r}, expected 0 or 1")
    return value == "1"


def dump_dir() -> Path | None:
    """TILUS_DUMP_DIR: when set, the IR after each pass and the PTX or C of every kernel are written under it."""
    value = os.environ.get("TILUS_DUMP_DIR")
    return Path(value) if value else None


def api_key() -> str | None:
    """TILUS_API_KEY: what clients of the server must send, where its command line does not say."""
    return os.environ.get("TILUS_API_KEY") or None
