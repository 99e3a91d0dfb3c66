"""C text to a loaded shared library, from the disk when it has been built before.

An entry of the cache is the library itself with a trailer behind it: the features it was built for and a checksum over
all of it. It is written whole (temporary file, then an atomic rename), so any number of processes, also of different
machines, may share a directory; an entry that is damaged or asks for more than this CPU has is built again. A directory
that cannot be used costs one warning, not the kernel.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tilus import config
from tilus.errors import TilusError, raise_all
from tilus.runtime import compilations
from tilus.runtime.cache import write_atomically
from tilus.runtime.cpu import intrinsics, temporary, toolchain
from tilus.runtime.cpu.features import HostCpu, host_cpu, native_flags
from tilus.runtime.cpu.threads import usable_cpus
from tilus.runtime.cpu.toolchain import CCompiler

COMPILE_TIMEOUT_S = 600.0

# No errno changes what a float operation costs, not which of them run; contraction would change bits. Part of the key.
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fno-semantic-interposition", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp-simd"),
)
_ZIG_FLAGS = ("-fno-sanitize=undefined",)  # on by default there
# Part of the key and of the checksum, so that entries of another layout are never read.
_FORMAT = b"tilus-c-1"
_DIGEST_NBYTES = hashlib.sha256().digest_size
_LENGTH_NBYTES = 8
_OUTPUT_TAIL = 3000  # characters of a failed compiler's output that are shown

_loaded: dict[str, ctypes.CDLL] = {}
_displaced: dict[str, Path] = {}  # entries that the cache cannot hold
_warned_about: set[Path] = set()


def load(source: str) -> ctypes.CDLL:
    """The library that this C text compiles to, loaded once per process.

    Raises: TilusError when there is no compiler, when it refuses the text, or when the library cannot be loaded.
    """
    compiler = toolchain.find_compiler()
    name = key(source, compiler, host_cpu(compiler))
    return _loaded[name] if name in _loaded else load_built(build(source))


def load_built(path: Path) -> ctypes.CDLL:
    """The library at a path that `build` or `find` gave, loaded once per process. Raises: TilusError when it cannot be loaded."""
    name = path.stem
    if name not in _loaded:
        _loaded[name] = _open(name, path)
    return _loaded[name]


def _open(name: str, path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # a disk from which nothing may be executed
        if name in _displaced:
            raise TilusError(
                f"cannot load the compiled kernel {path}: {error}",
                hint="set TILUS_CACHE_DIR or TMPDIR to a directory on a disk that is not mounted noexec",
            ) from error
        _warn(path.parent, f"cannot load kernels from {path.parent} ({error})")
        return _open(name, _displace(name, path.read_bytes()))


def build(source: str) -> Path:
    """The path of the library that this C text compiles to; built when there is no good one yet.

    Raises: TilusError when there is no compiler, or when it refuses the text.
    """
    compiler = toolchain.find_compiler()
    host = host_cpu(compiler)
    name = key(source, compiler, host)
    found = find(name, host)
    if found is not None:
        return found
    library = seal(_compile(source, name, compiler), host)
    compilations.note()
    path = _path(name)
    try:
        return _write(path, library)
    except OSError as error:
        _warn(path.parent, f"cannot write the kernel cache in {path.parent} ({error.strerror})")
        return _displace(name, library)


def find(name: str, host: HostCpu) -> Path | None:
    """The library of that name; None when there is no good one."""
    path = _displaced.get(name, _path(name))
    return path if is_whole(path, host) else None


def _path(name: str) -> Path:
    return config.cache_dir() / "cpu" / f"{name}.so"


def _displace(name: str, library: bytes) -> Path:
    _displaced[name] = _write(temporary.directory() / f"{name}.so", library)
    return _displaced[name]


def compile_many(sources: Iterable[str], progress: Callable[[int, int], None] | None = None) -> None:
    """Build many C texts, as many at once as there are usable CPUs; `load` then takes them from the cache.

    progress: called in this thread with the number of texts that are done and of all, each time one is done.

    Raises: TilusError with every mistake, after all others are built.
    """
    distinct = list(dict.fromkeys(sources))
    errors: list[TilusError] = []
    with ThreadPoolExecutor(min(usable_cpus(), max(1, len(distinct)))) as pool:
        futures = [pool.submit(build, source) for source in distinct]
        for done, future in enumerate(as_completed(futures), start=1):
            error = future.exception()
            if isinstance(error, TilusError):
                errors.append(error)
            elif error is not None:
                raise error
            if progress is not None:
                progress(done, len(distinct))
    raise_all(errors)


def flags(compiler: CCompiler) -> tuple[str, ...]:
    """All flags but the file names, in order."""
    return (*_FLAGS, *native_flags(compiler), *(_ZIG_FLAGS if compiler.is_zig else ()), *config.cflags())


def key(source: str, compiler: CCompiler, host: HostCpu) -> str:
    """The name of an entry: sha256 over the text and over all that decides what is made of it and where it runs."""
    digest = hashlib.sha256(_FORMAT)
    libc = " ".join(platform.libc_ver())  # a library may ask for the version that it was linked with
    for part in (compiler.version, " ".join(flags(compiler)), host.arch, host.fingerprint, libc, source):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def seal(library: bytes, host: HostCpu) -> bytes:
    """A library with its trailer, which the loader ignores."""
    header = json.dumps({"arch": host.arch, "features": sorted(host.macros)}).encode()
    body = library + header + len(header).to_bytes(_LENGTH_NBYTES, "little")
    return body + hashlib.sha256(_FORMAT + body).digest()


def is_whole(path: Path, host: HostCpu) -> bool:
    """Whether the entry is there, undamaged, and asks for nothing that this CPU lacks."""
    try:
        data = path.read_bytes()
    except OSError:  # absent or unreadable: writing it will say so if it matters
        return False
    body, checksum = data[:-_DIGEST_NBYTES], data[-_DIGEST_NBYTES:]
    if hashlib.sha256(_FORMAT + body).digest() != checksum:
        return False
    end = len(body) - _LENGTH_NBYTES
    header = json.loads(body[end - int.from_bytes(body[end:], "little") : end])
    return header["arch"] == host.arch and host.macros.issuperset(header["features"])


def assembly(source: str) -> str:
    """The machine code that `build` makes of this C text, as the compiler writes it down. Nothing is kept.

    Raises: as `build`.
    """
    compiler = toolchain.find_compiler()
    return _compile(source, key(source, compiler, host_cpu(compiler)), compiler, "-S").decode()


def _compile(source: str, name: str, compiler: CCompiler, *stop_at: str) -> bytes:
    """A library, or what the compiler has when it is told to stop earlier (`-S`)."""
    with tempfile.TemporaryDirectory(prefix="tilus-") as work:
        text, output = Path(work, "kernel.c"), Path(work, "kernel.out")
        text.write_text(source)
        header = intrinsics.parsed(source, compiler, flags(compiler), host_cpu(compiler).fingerprint)
        status, log = 0, ""
        for more in dict.fromkeys((header, ())):
            command = [*compiler.command, *flags(compiler), *more, *stop_at, text.name, "-o", output.name, "-lm"]
            status, log = toolchain.run(command, timeout_s=COMPILE_TIMEOUT_S, cwd=Path(work))
            if status == 0 and output.is_file():
                if more != header:  # which was damaged
                    intrinsics.forget(header)
                return output.read_bytes()
    kept = _keep(source, name)
    expected = "assembly" if stop_at else "a library"
    raise TilusError(
        f"{compiler} failed with exit status {status} on {kept}, expected {expected}:\n{log.rstrip()[-_OUTPUT_TAIL:]}",
        hint=f"to see it again: {' '.join(compiler.command)} {' '.join(flags(compiler))} {kept} -o /dev/null -lm",
    )


def _keep(source: str, name: str) -> Path:
    """Leave a refused text behind for whoever looks into it."""
    try:
        return _write(config.cache_dir() / "cpu" / f"{name}.c", source.encode())
    except OSError:
        return _write(Path(tempfile.gettempdir(), f"tilus-{name}.c"), source.encode())


def _write(path: Path, data: bytes) -> Path:
    write_atomically(path, data)
    return path


def _warn(directory: Path, what: str) -> None:
    if directory not in _warned_about:
        _warned_about.add(directory)
        warnings.warn(
            f"{what}: kernels are compiled anew in each process; set TILUS_CACHE_DIR to a writeable directory",
            stacklevel=2,
        )
