"""C texts with the shape of generated kernels, processes of their own, and compilers that misbehave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120  # of a process that takes a second or so: whatever hangs ends here


def kernel(body: str, declarations: str = "") -> str:
    """A kernel whose `body` runs for each `block`; `args` are its slots."""
    return (
        f"#include <math.h>\n#include <stdint.h>\n{declarations}\n"
        "void tilus_blocks(const uint64_t *args, const int32_t *grid, int64_t first, int64_t last) {\n"
        f"    for (int64_t block = first; block < last; block++) {{ {body} }}\n}}\n"
    )


COUNTING = kernel("((int64_t *)args[0])[block] += 1;")
"""Adds 1 at the place of each block."""


def python(program: str, **environment: str) -> str:
    """What a program prints in a new process in which warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT / "tests" / "runtime",
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
