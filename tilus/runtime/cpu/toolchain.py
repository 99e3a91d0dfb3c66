"""Which C compiler builds kernels for this CPU, and how it is run."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilus import config
from tilus.errors import TilusError
from tilus.runtime.cpu import temporary

INSTALL_HINT = "install gcc or clang, `pip install ziglang`, or set TILUS_CC to a C compiler"
_NAMES = ("cc", "gcc", "clang")
_VERSION_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class CCompiler:
    """A C compiler. command: the words that start it. version: the first line of what it says about itself."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{self.version} ({' '.join(self.command)})"

    @property
    def is_gcc(self) -> bool:
        return "clang" not in self.version and not self.is_zig

    @property
    def is_zig(self) -> bool:
        """zig's clang, which has its own words for this machine and its own cache."""
        return self.command[-2:] == ("ziglang", "cc")


def find_compiler() -> CCompiler:
    """The C compiler to use, looked for once per process and setting.

    Order: TILUS_CC, then cc, gcc and clang on PATH, then the package `ziglang`; the first that runs wins.

    Raises: TilusError when TILUS_CC names none, or when there is none.
    """
    return _find(config.cc(), os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=16)
def _find(chosen: str | None, path: str) -> CCompiler:
    if chosen is not None:
        return _probe((chosen,))
    failures: list[str] = []
    for command in _candidates(path):
        try:
            return _probe(command)
        except TilusError as error:
            failures.append(error.message)
    looked = f"looked for {', '.join(_NAMES)} on PATH and for the package ziglang"
    raise TilusError("; ".join([f"no C compiler found: {looked}", *failures]), hint=INSTALL_HINT)


def _candidates(path: str) -> Iterator[tuple[str, ...]]:
    for name in _NAMES:
        found = shutil.which(name, path=path)
        if found:
            yield (found,)
    if importlib.util.find_spec("ziglang") is not None:
        yield (sys.executable, "-m", "ziglang", "cc")


def _probe(command: tuple[str, ...]) -> CCompiler:
    status, output = run([*command, "--version"], timeout_s=_VERSION_TIMEOUT_S)
    if status != 0 or not output.strip():
        raise TilusError(
            f"{' '.join(command)} --version ended with status {status}, expected a version: {output.strip()[-200:]!r}",
            hint=INSTALL_HINT,
        )
    return CCompiler(command, output.strip().splitlines()[0])


def run(command: Sequence[str], *, timeout_s: float, cwd: Path | None = None, stdin: str = "") -> tuple[int, str]:
    """Run a compiler: its exit status and all that it printed.

    Raises: TilusError when it cannot be started or takes longer than `timeout_s` seconds; it is then ended together with
    the programs that it started.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=_environment(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise TilusError(f"cannot run {command[0]}: {error.strerror}", hint=INSTALL_HINT) from error
    with process:
        try:
            output, _ = process.communicate(stdin, timeout=timeout_s)
        except BaseException as error:  # an interrupt must not leave the compiler proper behind either
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TilusError(
                    f"{' '.join(command[:4])} ran for more than {timeout_s:g} s and was stopped",
                    hint="its time grows faster than the kernel: use smaller tiles or unroll less",
                ) from error
            raise
    return process.returncode, output


def _environment(command: Sequence[str]) -> dict[str, str]:
    """Messages in English; for zig a place for its own cache, without which it does not run."""
    environment = {**os.environ, "LC_ALL": "C"}
    if "ziglang" in command:
        for variable in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
            environment.setdefault(variable, str(_zig_cache()))
    return environment


def _zig_cache() -> Path:
    path = config.cache_dir() / "cpu" / "zig"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # where kernels cannot be kept either
        return temporary.directory() / "zig"
    return path if os.access(path, os.W_OK) else temporary.directory() / "zig"
