"""Compiled kernels on disk: machine code keyed by everything that went into it.

An entry is one file, written whole (temporary file, then an atomic rename), so that any number of processes may share a
directory. It starts with its own checksum: a truncated or damaged entry is simply built again. A directory that cannot
be used costs one warning, not the kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from tilus import config
from tilus.ptx import assembler
from tilus.ptx.assembler import Cubin, KernelUsage
from tilus.ptx.toolchain import Tool
from tilus.runtime import compilations
from tilus.target import Target

# Part of the key and of the checksum, so that entries of another layout are never read.
_FORMAT = ("tilus-cubin-1 " + " ".join(field.name for field in fields(KernelUsage))).encode()
_DIGEST_NBYTES = hashlib.sha256().digest_size

_warned_about: set[Path] = set()


def assemble(ptx: str, target: Target, *, options: Sequence[str] = (), allow_spills: bool = False) -> Cubin:
    """What `tilus.ptx.assembler.assemble` returns, from the disk when it has been built before.

    The cache is in `config.cache_dir()`; raises what the assembler raises.
    """
    tool = assembler.find_assembler(assembler.ptx_version(ptx))
    path = path_of(key(ptx, target, tool, options))
    cubin = load(path, tool)
    if cubin is None:
        cubin = assembler.assemble(ptx, target, options=options, allow_spills=True, assembler=tool)
        store(path, cubin)
        compilations.note()
    if not allow_spills:
        assembler.require_no_spills(cubin)
    return cubin


def path_of(name: str) -> Path:
    """Where the entry of that name is, or would be."""
    return config.cache_dir() / "cubin" / name


def key(ptx: str, target: Target, tool: Tool, options: Sequence[str]) -> str:
    """The name of an entry: sha256 over the PTX text, the target, the assembler's version and its flags."""
    digest = hashlib.sha256(_FORMAT)
    for part in (target.name, tool.version, str(len(options)), *options, ptx):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def load(path: Path, tool: Tool) -> Cubin | None:
    """The entry at `path`, or None when there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:  # absent or unreadable: `store` will say so if it matters
        return None
    checksum, payload = data[:_DIGEST_NBYTES], data[_DIGEST_NBYTES:]
    if hashlib.sha256(_FORMAT + payload).digest() != checksum:
        return None
    header, _, machine_code = payload.partition(b"\n")
    fields = json.loads(header)
    return Cubin(machine_code, tuple(KernelUsage(**usage) for usage in fields["kernels"]), fields["log"], tool)


def store(path: Path, cubin: Cubin) -> None:
    """Write an entry; warn once per directory when that is impossible."""
    header = json.dumps({"kernels": [asdict(usage) for usage in cubin.kernels], "log": cubin.log})
    payload = header.encode() + b"\n" + cubin.cubin
    try:
        write_atomically(path, hashlib.sha256(_FORMAT + payload).digest() + payload)
    except OSError as error:
        if path.parent not in _warned_about:
            _warned_about.add(path.parent)
            warnings.warn(
                f"cannot write the kernel cache in {path.parent} ({error.strerror}): kernels are compiled anew in each "
                "process; set TILUS_CACHE_DIR to a writeable directory",
                stacklevel=2,
            )


def write_atomically(path: Path, data: bytes) -> None:
    """Create or replace a file so that no reader ever sees part of it. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
