"""Where NVIDIA's command-line tools (ptxas, nvdisasm, cuobjdump) are on this machine, and which version they are."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tilus.errors import TilusError

_VERSION = re.compile(r"release (\d+)\.(\d+), V([\d.]+)")
_VERSION_TIMEOUT_S = 60

# CUDA release -> newest PTX ISA version its ptxas reads (PTX ISA, "Release Notes", table "PTX Release History").
_PTX_OF_CUDA_12 = {0: (8, 0), 1: (8, 1), 2: (8, 2), 3: (8, 3), 4: (8, 4), 5: (8, 5), 6: (8, 5), 7: (8, 6), 8: (8, 7)}


@dataclass(frozen=True)
class Tool:
    """One executable of the CUDA toolkit. `version` is the full one (`13.0.88`), `release` its (major, minor)."""

    path: Path
    version: str
    release: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.path.name} {self.version} ({self.path})"

    @property
    def max_ptx_version(self) -> tuple[int, int]:
        """The newest PTX ISA version that a ptxas of this release reads."""
        major, minor = self.release
        if major >= 13:
            return (major - 4, minor)
        if major == 12:
            return _PTX_OF_CUDA_12.get(minor, (8, 8))
        return (7, min(minor, 8))


def candidates(name: str) -> Iterator[Path]:
    """Paths of every executable called `name`, best first, each once.

    Order: NVIDIA's wheels (their version is pinned by our own dependencies), PATH, CUDA_HOME / CUDA_PATH, and the copy
    inside triton, which comes with CUDA builds of torch and is the oldest.
    """
    seen: set[Path] = set()
    for path in _places(name):
        if path not in seen and os.access(path, os.X_OK) and path.is_file():
            seen.add(path)
            yield path


def _places(name: str) -> Iterator[Path]:
    for root in _package_dirs("nvidia"):
        yield from sorted(root.glob(f"*/bin/{name}"))
    on_path = shutil.which(name)
    if on_path:
        yield Path(on_path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / name
    for root in _package_dirs("triton"):
        yield from sorted((root / "backends" / "nvidia" / "bin").glob(f"{name}*"))


def _package_dirs(package: str) -> list[Path]:
    """Directories of a top-level package, without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(entry) for entry in (spec.submodule_search_locations or ())] if spec else []


def probe(path: Path) -> Tool:
    """The tool at `path` with its version; asked of the executable once per path and modification time.

    Raises: TilusError when it cannot be run or does not report a CUDA version.
    """
    try:
        mtime_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise TilusError(f"cannot use {path}: {error.strerror}") from error
    return _probe(path, mtime_ns)


@functools.lru_cache(maxsize=64)
def _probe(path: Path, mtime_ns: int) -> Tool:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TilusError(f"cannot run {path} --version: {error}") from error
    match = _VERSION.search(done.stdout)
    if match is None:
        raise TilusError(
            f"{path} --version printed {done.stdout.strip()[-200:]!r}, expected a line with 'release X.Y, VX.Y.Z'",
            hint="is this a tool of the CUDA toolkit?",
        )
    return Tool(path, match[3], (int(match[1]), int(match[2])))
