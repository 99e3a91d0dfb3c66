"""Libraries on disk: what distinguishes entries, and what happens when compilers, processes or disks misbehave."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from cpu_programs import COUNTING, ROOT, TIMEOUT_S, kernel, python, script
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus import config
from tilus.errors import TilusError, TilusErrors
from tilus.runtime.cpu import build, features, intrinsics, temporary, toolchain

REAL = toolchain.find_compiler()
HOST = features.host_cpu(REAL)


class Compiler:
    """A program that counts its runs and then is the real compiler, or does what a test wants."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "cc"
        self.does()

    def does(self, instead: str = "") -> None:
        """For kernels; what it says of itself and of the CPU is the real one's."""
        real = " ".join(REAL.command)
        script(
            self.path,
            f'case "$*" in *--version*|*-dM*) exec {real} "$@";; esac\n'
            f'echo "$*" >> "{self.directory}/log"\n{instead or f"exec {real}"} "$@"',
        )

    @property
    def commands(self) -> list[str]:
        """The arguments of each run."""
        log = self.directory / "log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def runs(self) -> int:
        return len(self.commands)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compiler]:
    """An empty cache, a process that has loaded nothing, and a compiler that counts."""
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("_loaded", "_displaced"):
        monkeypatch.setattr(build, name, {})
    monkeypatch.setattr(build, "_warned_about", set())
    counting = Compiler(tmp_path / "compiler")
    monkeypatch.setenv("TILUS_CC", str(counting.path))
    yield counting
    toolchain._find.cache_clear()


def entries(pattern: str = "*.so") -> list[Path]:
    return sorted((config.cache_dir() / "cpu").glob(pattern))


def answer(number: int) -> str:
    """A text whose library can be told from any other."""
    return f"int answer(void) {{ return {number}; }}\n"


def test_a_library_is_compiled_once_and_loaded_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.load(answer(42))
    assert library.answer() == 42 and build.load(answer(42)) is library
    monkeypatch.setattr(build, "_loaded", {})  # as in another process
    assert build.load(answer(42)).answer() == 42
    assert compiler.runs == 1 and len(entries()) == 1


def test_math_vectors_and_atomics_link(compiler: Compiler) -> None:
    text = "#include <math.h>\n#include <stdint.h>\ntypedef float v16 __attribute__((vector_size(64)));\n"
    text += "_Thread_local int hits; float f(float x) { v16 v = {}; v += expf(x) + tanhf(x); hits++; return v[15]; }\n"
    function = build.load(text).f
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    assert abs(function(1.0) - 3.4798760) < 1e-5


WITH_INTRINSICS = pytest.mark.skipif(
    HOST.arch != "x86_64" or not REAL.is_gcc, reason="the header is that of x86, gcc's way to parse it once"
)
VECTORS = f"{intrinsics.HEADER}\nint lanes(void) {{ return %d + _mm_cvtsi128_si32(_mm_set1_epi32(1)); }}\n"


@WITH_INTRINSICS
def test_the_header_of_intrinsics_is_parsed_once(compiler: Compiler) -> None:
    assert build.load(VECTORS % 1).lanes() == 2
    (header,) = entries("*.gch")
    before = header.stat()
    assert build.load(VECTORS % 2).lanes() == 3 and compiler.runs == 3 and entries("*.gch") == [header]
    assert header.stat().st_mtime_ns == before.st_mtime_ns
    build.load(answer(1))
    build.load(intrinsics.WITHOUT + VECTORS % 3)
    assert [line.count("-include") for line in compiler.commands] == [0, 1, 1, 0, 0]


@WITH_INTRINSICS
def test_a_damaged_header_is_parsed_again(compiler: Compiler) -> None:
    build.load(VECTORS % 1)
    (header,) = entries("*.gch")
    header.write_bytes(header.read_bytes()[:9000000])
    assert build.load(VECTORS % 2).lanes() == 3 and not header.exists()
    assert build.load(VECTORS % 3).lanes() == 4 and header.stat().st_size > 9000000


@WITH_INTRINSICS
def test_a_text_is_refused_with_what_the_compiler_says_without_the_parsed_header(compiler: Compiler) -> None:
    with pytest.raises(TilusError, match=r"kernel\.c:2.*error") as caught:
        build.load(f"{intrinsics.HEADER}\nint x = y;\n")
    assert "-include" not in str(caught.value)


def test_everything_in_the_key_distinguishes(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        build.key(COUNTING, REAL, HOST),
        build.key(COUNTING + " ", REAL, HOST),
        build.key(COUNTING, replace(REAL, version=REAL.version + ".1"), HOST),
        build.key(COUNTING, replace(REAL, command=("python", "-m", "ziglang", "cc")), HOST),  # other flags
        build.key(COUNTING, REAL, replace(HOST, arch="aarch64")),
        build.key(COUNTING, REAL, replace(HOST, fingerprint="0" * 64)),
    ]
    monkeypatch.setenv("TILUS_CFLAGS", "-g -DNAME='a b'")
    keys.append(build.key(COUNTING, REAL, HOST))
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("glibc", "9.99"))
    keys.append(build.key(COUNTING, REAL, HOST))
    assert all(a != b for a, b in combinations(keys, 2))


def test_flags_of_the_user_come_last(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they win, and one word of a shell is one argument."""
    text = "#ifdef __OPTIMIZE__\nint fast(void) { return 1; }\n#else\nint fast(void) { return ANSWER; }\n#endif\n"
    monkeypatch.setenv("TILUS_CFLAGS", "-O0 '-DANSWER=40 + 2'")
    assert build.flags(REAL)[-2:] == ("-O0", "-DANSWER=40 + 2") and build.load(text).fast() == 42
    monkeypatch.delenv("TILUS_CFLAGS")
    assert build.load(text).fast() == 1 and compiler.runs == 2
    monkeypatch.setenv("TILUS_CFLAGS", "-DNAME='a")
    with pytest.raises(TilusError, match="TILUS_CFLAGS is \"-DNAME='a\", expected flags in a shell's words"):
        build.load(text)


def test_any_damage_rebuilds_the_entry_silently(compiler: Compiler) -> None:
    path = build.build(COUNTING)
    data = path.read_bytes()
    cuts = [0, 1, 31, 32, 40, 41, 100, len(data) // 2, len(data) - 33, len(data) - 1]
    flips = [0, 16, len(data) // 2, len(data) - 60, len(data) - 40, len(data) - 33, len(data) - 32, len(data) - 1]
    damaged = [data[:n] for n in cuts] + [data + b"x"]
    damaged += [data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :] for n in flips]
    for count, bad in enumerate(damaged, start=2):
        path.write_bytes(bad)
        assert not build.is_whole(path, HOST)
        if count <= 4:  # a few with the compiler
            assert build.build(COUNTING) == path and compiler.runs == count
            assert build.is_whole(path, HOST)
    path.write_bytes(data)
    assert build.is_whole(path, HOST)


def test_a_truncated_entry_is_not_loaded(compiler: Compiler) -> None:
    """In a process of its own: a library that ends too early would end it too."""
    path = build.build(answer(7))
    path.write_bytes(path.read_bytes()[:4096])
    program = f"from tilus.runtime.cpu import build; print(build.load({answer(7)!r}).answer())"
    assert python(program) == "7\n"
    assert compiler.runs == 2 and build.is_whole(path, HOST)


@settings(max_examples=50)
@given(st.binary(max_size=200), st.sets(st.sampled_from(sorted(features.MACROS)), max_size=6))
def test_an_entry_is_whole_exactly_where_its_features_are(data: bytes, macros: set[str]) -> None:
    builder = replace(HOST, macros=frozenset(macros))
    path = temporary.directory() / "entry.so"
    path.write_bytes(build.seal(data, builder))
    assert build.is_whole(path, builder) and path.read_bytes().startswith(data)
    assert build.is_whole(path, HOST) == (macros <= HOST.macros)
    for less in macros:
        assert not build.is_whole(path, replace(builder, macros=frozenset(macros - {less})))
    assert not build.is_whole(path, replace(builder, arch="riscv64"))


def test_another_machine_on_the_same_disk_builds_its_own(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = build.build(COUNTING)
    better = replace(HOST, macros=HOST.macros | {"__AVX1024F__"}, fingerprint="f" * 64)
    monkeypatch.setattr(build, "host_cpu", lambda compiler: better)
    theirs = build.build(COUNTING)
    assert theirs != mine and compiler.runs == 2 and len(entries()) == 2
    monkeypatch.setattr(build, "host_cpu", lambda compiler: HOST)
    theirs.replace(mine)  # whatever put it there
    assert build.build(COUNTING) == mine and compiler.runs == 3
    assert build.is_whole(mine, HOST)


def test_assembly_is_what_the_compiler_writes_and_is_not_kept(compiler: Compiler) -> None:
    assert re.search(r"^answer:$", build.assembly(answer(42)), re.MULTILINE)
    assert compiler.runs == 1 and entries() == []
    with pytest.raises(TilusError, match=r"failed with exit status 1 on \S+\.c, expected assembly:"):
        build.assembly("int f(void) { return nothing; }\n")


def test_a_refused_text_is_kept_and_shown(compiler: Compiler) -> None:
    with pytest.raises(TilusError) as caught:
        build.load("int f(void) { return nothing; }\n")
    text = str(caught.value)
    (kept,) = entries("*.c")
    assert kept.read_text() == "int f(void) { return nothing; }\n" and str(kept) in text
    assert "exit status 1" in text and "nothing" in text and "hint: to see it again: " in text
    again = subprocess.run(text.split("to see it again: ")[1], shell=True, capture_output=True, text=True)
    assert again.returncode == 1 and "nothing" in again.stderr
    assert entries() == []


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        ("yes 'a long complaint' | head -c 100000; echo the end; exit 3; :", "the end"),
        ("kill -9 $$; :", "exit status -9"),
        ("exit 0; :", "exit status 0"),  # and no library
        ("printf '\\377\\376 bytes'; exit 1; :", "bytes"),
    ],
)
def test_a_compiler_that_fails(compiler: Compiler, does: str, expected: str) -> None:
    compiler.does(does)
    with pytest.raises(TilusError, match=r"failed with exit status") as caught:
        build.load(COUNTING)
    assert expected in str(caught.value) and len(str(caught.value)) < 6000
    compiler.does()
    assert build.load(COUNTING).tilus_blocks


def test_a_text_that_takes_too_long(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.5)
    compiler.does("sleep 60; :")
    with pytest.raises(TilusError, match=r"ran for more than 0.5 s and was stopped"):
        build.load(COUNTING)


def test_a_cache_that_cannot_be_written(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot write the kernel cache in .*TILUS_CACHE_DIR") as caught:
        assert build.load(answer(1)).answer() == 1
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load(answer(2)).answer() == 2
        assert build.build(answer(2)).parent == temporary.directory()
    assert compiler.runs == 2  # the process finds them again
    with pytest.raises(TilusError, match="failed with exit status 1 on") as refused:
        build.load("oops\n")
    kept = Path(str(refused.value).split(" on ")[1].split(",")[0])
    assert kept.read_text() == "oops\n"
    kept.unlink()


def test_a_disk_from_which_nothing_may_be_executed(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL

    def mapped(name: str) -> ctypes.CDLL:
        if name.startswith(str(config.cache_dir())):
            raise OSError(f"{name}: failed to map segment from shared object")
        return real(name)

    monkeypatch.setattr(build.ctypes, "CDLL", mapped)
    with pytest.warns(UserWarning, match="cannot load kernels from .*failed to map segment"):
        assert build.load(answer(3)).answer() == 3
    monkeypatch.setenv("TILUS_CACHE_DIR", str(temporary.directory()))
    monkeypatch.setattr(build, "_loaded", {})
    with pytest.raises(TilusError, match="cannot load the compiled kernel") as caught:
        build.load(answer(3))
    assert "noexec" in str(caught.value)


def test_the_temporary_directory_goes_with_the_process(compiler: Compiler, tmp_path: Path) -> None:
    """And not with a child of it that ends earlier."""
    (tmp_path / "file").write_text("")
    program = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from tilus.runtime.cpu import build, temporary\n"
        f"print(build.load({answer(5)!r}).answer(), temporary.directory(), flush=True)\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit()\n"
        "os.waitpid(child, 0); print(temporary.directory().is_dir())"
    )
    number, directory, is_there = python(program, TILUS_CACHE_DIR=str(tmp_path / "file" / "cache")).split()
    assert (number, is_there) == ("5", "True") and not Path(directory).exists()


def test_processes_that_build_the_same_at_once(compiler: Compiler) -> None:
    program = f"from tilus.runtime.cpu import build; print(build.load({answer(9)!r}).answer())"
    command = [sys.executable, "-W", "error", "-c", program]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=TIMEOUT_S)[0] for process in processes] == ["9\n"] * 3
    assert len(list((config.cache_dir() / "cpu").iterdir())) == 1  # and no temporary file
    assert 1 <= compiler.runs <= 3
    assert build.is_whole(entries()[0], HOST)


def test_no_reader_sees_part_of_an_entry(compiler: Compiler) -> None:
    path = build.build(COUNTING)
    library = path.read_bytes()
    writers = [threading.Thread(target=lambda: [build._write(path, library) for _ in range(200)]) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert build.is_whole(path, HOST)


def test_many_at_once_with_progress(compiler: Compiler) -> None:
    texts = [answer(n % 5) for n in range(8)]
    reports: list[tuple[int, int]] = []
    build.compile_many(texts, lambda done, count: reports.append((done, count)))
    assert reports == [(n, 5) for n in range(1, 6)]
    assert compiler.runs == 5
    assert [build.load(text).answer() for text in texts] == [n % 5 for n in range(8)]
    build.compile_many([])
    build.compile_many(texts)
    assert compiler.runs == 5


def test_many_at_once_report_every_mistake_and_build_the_rest(compiler: Compiler) -> None:
    with pytest.raises(TilusErrors) as caught:
        build.compile_many(["int a = first;", answer(1), "int b = second;", answer(2)])
    assert len(caught.value.errors) == 2
    assert all(word in str(caught.value) for word in ("first", "second"))
    assert build.load(answer(1)).answer() + build.load(answer(2)).answer() == 3
    assert compiler.runs == 4


def test_kernels_of_one_process_keep_their_own_names(compiler: Compiler) -> None:
    """All are called tilus_blocks, and their static data too is their own."""
    libraries = [build.load(kernel(f"seen = {n};", "int seen;")) for n in (1, 2)]
    for library in libraries:
        library.tilus_blocks(None, None, ctypes.c_int64(0), ctypes.c_int64(1))
    assert [ctypes.c_int.in_dll(library, "seen").value for library in libraries] == [1, 2]
