"""The kernel cache: what distinguishes entries, and what happens when processes or disks misbehave."""

from __future__ import annotations

import multiprocessing
import warnings
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus import config
from tilus.errors import TilusError
from tilus.ptx import assembler
from tilus.runtime import cache
from tilus.target import TARGETS, Target

SM90 = TARGETS["sm_90a"]
PTX = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 x)
.reqntid 128, 1, 1
{
    .reg .b64 %d<2>;
    .reg .b32 %r<2>;
    ld.param.u64 %d0, [x];
    mov.u32 %r0, %tid.x;
    st.global.u32 [%d0], %r0;
    ret;
}
"""
SPILLING = "\n".join(
    [".version 8.0", ".target sm_90a", ".address_size 64", ".visible .entry k(.param .u64 x)", ".reqntid 128, 1, 1"]
    + [".maxnreg 24", "{", ".reg .b32 %r<64>;", ".reg .b64 %d<1>;", "ld.param.u64 %d0, [x];"]
    + [f"ld.volatile.global.u32 %r{i}, [%d0+{4 * i}];" for i in range(64)]
    + [f"st.volatile.global.u32 [%d0+{4 * i}], %r{63 - i};" for i in range(64)]
    + ["ret;", "}", ""]
)


class Assembler:
    """Counts the runs of the real assembler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        real = assembler.assemble

        def counting(*args: object, **kwargs: object) -> assembler.Cubin:
            self.runs += 1
            return real(*args, **kwargs)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(assembler, "assemble", counting)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Assembler:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "cache"))
    return Assembler(monkeypatch)


def entry() -> Path:
    (path,) = (config.cache_dir() / "cubin").iterdir()
    return path


def test_the_second_time_comes_from_the_disk_and_is_equal(counted: Assembler) -> None:
    first = cache.assemble(PTX, SM90)
    assert cache.assemble(PTX, SM90) == first
    assert counted.runs == 1
    assert first.kernel("k").registers > 0 and "Used" in first.log


def test_everything_in_the_key_distinguishes() -> None:
    tool = assembler.find_assembler()
    keys = [
        cache.key(PTX, SM90, tool, ()),
        cache.key(PTX + " ", SM90, tool, ()),
        cache.key(PTX, TARGETS["sm_100a"], tool, ()),
        cache.key(PTX, SM90, replace(tool, version="13.9.9"), ()),
        cache.key(PTX, SM90, tool, ("-O1",)),
        cache.key(PTX, SM90, tool, ("-O", "1")),
        cache.key(PTX, SM90, tool, ("-O1", "")),
    ]
    assert all(a != b for a, b in combinations(keys, 2))
    assert cache.key(PTX, SM90, replace(tool, path=Path("/elsewhere/ptxas")), ()) == keys[0]  # the version counts


@settings(max_examples=30)
@given(st.lists(st.text(max_size=4), max_size=3), st.lists(st.text(max_size=4), max_size=3))
def test_no_two_option_lists_share_a_key(a: list[str], b: list[str]) -> None:
    tool = assembler.find_assembler()
    assert (cache.key(PTX, SM90, tool, a) == cache.key(PTX, SM90, tool, b)) == (a == b)


def test_any_damage_rebuilds_the_entry_silently(counted: Assembler) -> None:
    good = cache.assemble(PTX, SM90)
    path = entry()
    data = path.read_bytes()
    cuts = [0, 1, 31, 32, 33, 100, len(data) // 2, len(data) - 1]
    flips = [0, 31, 32, 40, len(data) // 2, len(data) - 1]
    damaged = [data[:n] for n in cuts] + [data + b"x"]
    damaged += [data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :] for n in flips]
    for count, bad in enumerate(damaged, start=2):
        path.write_bytes(bad)
        assert cache.assemble(PTX, SM90) == good
        assert counted.runs == count
        assert path.read_bytes() != bad  # mended on the disk too
    assert cache.assemble(PTX, SM90) == good
    assert counted.runs == 1 + len(damaged)


def test_an_unusable_directory_warns_once_and_works(
    counted: Assembler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot write the kernel cache in .*TILUS_CACHE_DIR"):
        first = cache.assemble(PTX, SM90)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.assemble(PTX, SM90).kernels == first.kernels
    assert counted.runs == 2


def test_spills_are_refused_from_the_cache_too(counted: Assembler) -> None:
    assert cache.assemble(SPILLING, SM90, allow_spills=True).kernel("k").spill_store_nbytes > 0
    for _ in range(2):
        with pytest.raises(TilusError, match="'k' spills"):
            cache.assemble(SPILLING, SM90)
    assert counted.runs == 1


def test_a_refused_kernel_leaves_no_entry(counted: Assembler) -> None:
    with pytest.raises(TilusError, match="refuses the PTX"):
        cache.assemble(PTX.replace("ret;", "oops;"), SM90)
    assert not config.cache_dir().exists()


def test_a_failed_write_leaves_neither_entry_nor_temporary_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write_atomically(tmp_path / "entry", b"data")
    assert list(tmp_path.iterdir()) == []


def build_repeatedly(directory: str, target: Target, count: int) -> set[bytes]:
    """In a process of its own: read, damage and rebuild one entry, over and over."""
    import os

    os.environ["TILUS_CACHE_DIR"] = directory
    seen: set[bytes] = set()
    tool = assembler.find_assembler()
    cubin = assembler.assemble(PTX, target)
    path = config.cache_dir() / "cubin" / cache.key(PTX, target, tool, ())
    for _ in range(count):
        cache.store(path, cubin)
        loaded = cache.load(path, tool)
        seen.add(loaded.cubin if loaded else b"partial")
    return seen


def test_many_processes_share_one_entry(tmp_path: Path) -> None:
    """A rename is atomic: no reader ever sees part of an entry, however many processes write it."""
    expected = assembler.assemble(PTX, SM90).cubin
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(build_repeatedly, [(str(tmp_path), SM90, 200)] * 3)
    assert results == [{expected}] * 3
    assert len(list((tmp_path / "cubin").iterdir())) == 1
