"""The header of x86's intrinsics, parsed once: gcc takes half a second for it, longer than for most kernels."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from tilus import config
from tilus.errors import TilusError
from tilus.runtime.cache import write_atomically
from tilus.runtime.cpu import toolchain
from tilus.runtime.cpu.toolchain import CCompiler

HEADER = "#include <immintrin.h>"
WITHOUT = "#define TL_NO_INTRINSICS\n"  # in front of a text that never comes to the header
_TIMEOUT_S = 60.0


def parsed(source: str, compiler: CCompiler, flags: tuple[str, ...], fingerprint: str) -> tuple[str, ...]:
    """Flags that give a text what an earlier run made of the header (GCC manual, Precompiled Headers); none where that fails, and
    where the text or the compiler has no use for them.

    flags: those of the run. fingerprint: of the CPU as the compiler sees it. It takes about 25 MB of the cache.
    """
    if not compiler.is_gcc or HEADER not in source or WITHOUT in source:
        return ()
    name = hashlib.sha256("\0".join((compiler.version, *flags, fingerprint)).encode()).hexdigest()
    header = config.cache_dir() / "cpu" / f"intrinsics-{name}.h"
    found = Path(f"{header}.gch")
    try:
        if not found.is_file():
            write_atomically(header, f"{HEADER}\n".encode())
            write_atomically(found, _parse(compiler, flags, header))
    except (OSError, TilusError):  # the cache cannot be written, or there is no such header
        return ()
    return "-include", str(header)


def forget(flags: tuple[str, ...]) -> None:
    """Parse the header again when it is next asked for. flags: of `parsed`."""
    Path(f"{flags[1]}.gch").unlink(missing_ok=True)


def _parse(compiler: CCompiler, flags: tuple[str, ...], header: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="tilus-") as work:
        output = Path(work, "intrinsics.gch")
        command = [*compiler.command, *flags, "-x", "c-header", str(header), "-o", output.name]
        toolchain.run(command, timeout_s=_TIMEOUT_S, cwd=Path(work))
        return output.read_bytes()
