"""Packed weights on disk: the same bits at the next start, and never anything else than what was written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import CPU, write_tiny
from torch_kernels import TorchKernels

import tilus.kernels
from serving import build, weight_file
from serving.loader import Checkpoint, open_checkpoint
from serving.packing import PackedWeights, pack_weights
from serving.quantize import WEIGHT_DTYPES, StoredMatrix
from serving.weight_cache import WeightCache, moved, packed_form
from tilus.dtypes import dtype
from tilus.kernels.quantize import QuantizedMatrix

FORM = packed_form(tilus.kernels, CPU)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


@pytest.fixture(scope="module")
def packed(tiny_directory: Path) -> PackedWeights:
    return pack_weights(open_checkpoint(tiny_directory), tilus.kernels, CPU)


def arrays(weights: PackedWeights) -> dict[str, torch.Tensor]:
    parts = {
        f"{name}.{index}.{kind}": array
        for name, linear in weights.linears.items()
        for index, part in enumerate(linear)
        for kind, array in part.arrays.items()
    }
    return {**weights.tensors, **parts}


def headers(weights: PackedWeights) -> dict[str, list[object]]:
    return {name: [part.header for part in parts] for name, parts in weights.linears.items()}


def assert_same(found: PackedWeights, expected: PackedWeights) -> None:
    assert headers(found) == headers(expected)
    mine, theirs = arrays(found), arrays(expected)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
        bits = [a.contiguous().reshape(-1).view(torch.uint8) for a in (array, theirs[name])]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_the_same_bits_come_back(cache_dir: Path, tiny_directory: Path, name: str) -> None:
    expected = pack_weights(open_checkpoint(tiny_directory, dtype(name)), tilus.kernels, CPU)
    cache = WeightCache(tiny_directory, name, FORM)
    assert cache.load() is None
    stored = cache.store(expected)
    assert stored is not expected
    for found in (stored, WeightCache(tiny_directory, name, FORM).load()):
        assert_same(found, expected)
        assert {array.data_ptr() % 4096 for array in arrays(found).values()} == {0}
    assert os.listdir(cache_dir) == [cache.path.name]


def test_what_is_written_to_a_mapped_array_stays_out_of_the_file(
    cache_dir: Path, tiny_directory: Path, packed: PackedWeights
) -> None:
    cache = WeightCache(tiny_directory, "int8", FORM)
    cache.store(packed).tensors["output_norm"].zero_()
    assert_same(cache.load(), packed)


def test_no_entry_is_no_warning(cache_dir: Path, tiny_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert WeightCache(tiny_directory, "int8", FORM).load() is None
    assert caplog.messages == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_entry_is_not_used(
    cache_dir: Path, tiny_directory: Path, packed: PackedWeights, data: st.DataObject
) -> None:
    """Any flipped bit, and any other length."""
    cache = WeightCache(tiny_directory, "int8", FORM)
    cache.store(packed)
    whole = bytearray(cache.path.read_bytes())
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        size = data.draw(st.integers(0, len(whole) - 1))
        whole = whole[:size] if data.draw(st.booleans()) else whole + bytes(1 + size)
    cache.path.write_bytes(whole)
    assert cache.load() is None
    assert_same(cache.store(packed), packed)  # built again


@pytest.mark.parametrize("content", [b"", b"GGUF", b"tilusW01" + bytes(100), bytes(5000)])
def test_foreign_files_are_not_used(
    cache_dir: Path, tiny_directory: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    cache = WeightCache(tiny_directory, "int8", FORM)
    cache_dir.mkdir(parents=True)
    cache.path.write_bytes(content)
    assert cache.load() is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"making the weights again: {cache.path} ")


def test_an_entry_of_another_key_or_layout_is_not_used(
    cache_dir: Path, tiny_directory: Path, packed: PackedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = (WeightCache(tiny_directory, name, FORM) for name in ("int8", "uint4"))
    mine.store(packed)
    mine.path.rename(other.path)
    assert other.load() is None
    mine.store(packed)
    monkeypatch.setattr("tilus.kernels.quantize.header.LAYOUT_VERSION", 99)
    assert mine.load() is None


def test_everything_that_decides_the_form_is_in_the_key(cache_dir: Path, model: Path) -> None:
    first = WeightCache(model, "int8", FORM)
    assert WeightCache(model, "int8", FORM).path == first.path
    assert WeightCache(model.parent / "." / "tiny", "int8", FORM).path == first.path
    others = [WeightCache(model, "uint4", FORM), WeightCache(model, "int8", "another")]
    os.utime(model / "model.safetensors", ns=(1, 1))
    others.append(WeightCache(model, "int8", FORM))
    (model / "config.json").write_text(json.dumps({}))
    others.append(WeightCache(model, "int8", FORM))
    assert len({cache.key for cache in (first, *others)}) == 5


def test_a_changed_model_gets_a_new_entry_and_loses_the_old_one(
    cache_dir: Path, model: Path, tiny_directory: Path, packed: PackedWeights
) -> None:
    another_model = WeightCache(tiny_directory, "int8", FORM)
    another_model.store(packed)
    old = WeightCache(model, "int8", FORM)
    mapped = old.store(packed)
    os.utime(model / "model.safetensors", ns=(5, 5))
    new = WeightCache(model, "int8", FORM)
    assert new.load() is None
    new.store(packed)
    assert sorted(os.listdir(cache_dir)) == sorted([new.path.name, another_model.path.name])
    assert_same(mapped, packed)  # who still uses the old one is not harmed


def test_a_dead_writers_file_is_removed_and_a_living_ones_kept(
    cache_dir: Path, tiny_directory: Path, packed: PackedWeights
) -> None:
    cache = WeightCache(tiny_directory, "int8", FORM)
    cache_dir.mkdir(parents=True)
    dead, living = (cache.path.with_name(f"{cache.path.name}.{n}{weight_file.TEMPORARY}") for n in (1, 2))
    dead.touch()
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.store(packed)
        assert sorted(os.listdir(cache_dir)) == sorted([cache.path.name, living.name])


@pytest.mark.parametrize("turn", ["before the writer's lock", "after its check"])
def test_a_file_that_another_process_takes_for_abandoned_is_written_again(
    turn: str, cache_dir: Path, tiny_directory: Path, packed: PackedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server cleans up between the moments in which another one creates its file and locks it, or right after."""
    cache, lock, calls = WeightCache(tiny_directory, "int8", FORM), fcntl.flock, 0

    def clean_up() -> None:
        (temporary,) = cache_dir.iterdir()
        with contextlib.suppress(OSError):
            weight_file.remove_abandoned(temporary)

    def with_another(file: BinaryIO, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1 and turn.startswith("before"):
            clean_up()
        lock(file, operation)
        if calls == 1 and turn.startswith("after"):
            clean_up()

    monkeypatch.setattr(fcntl, "flock", with_another)
    assert_same(cache.store(packed), packed)
    assert calls == (3 if turn.startswith("before") else 2)
    assert os.listdir(cache_dir) == [cache.path.name]


def test_a_directory_that_cannot_be_written_costs_one_warning(
    tmp_path: Path,
    tiny_directory: Path,
    packed: PackedWeights,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "file"))
    cache = WeightCache(tiny_directory, "int8", FORM)
    if (found := cache.load()) is None:
        found = cache.store(packed)
    assert found is packed
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == [
        f"cannot keep the weights in {tmp_path}/file/weights (Not a directory): they are made at every start; "
        "set TILUS_CACHE_DIR to a directory that can be written and has room"
    ]


def test_a_full_disk_leaves_nothing_behind(
    cache_dir: Path,
    tiny_directory: Path,
    packed: PackedWeights,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert WeightCache(tiny_directory, "int8", FORM).store(packed) is packed
    assert "(No space left on device)" in caplog.messages[0]
    assert os.listdir(cache_dir) == []


@pytest.mark.gpu
def test_weights_of_a_gpu_come_back_with_the_same_bits(cache_dir: Path, tiny_directory: Path) -> None:
    gpu = torch.device("cuda")
    packed = pack_weights(open_checkpoint(tiny_directory), tilus.kernels, gpu)
    cache = WeightCache(tiny_directory, "int8", packed_form(tilus.kernels, gpu))
    assert cache.store(packed) is packed
    found = cache.load()
    assert found is not None
    loaded = arrays(moved(found, gpu))
    for name, array in arrays(packed).items():
        assert loaded[name].device.type == "cuda" and torch.equal(loaded[name].cpu(), array.cpu()), name


def test_a_gpu_keeps_only_what_is_quantised_while_loading(cache_dir: Path, tiny_checkpoint: Checkpoint) -> None:
    def pack(matrix: QuantizedMatrix, device: torch.device) -> object:
        return tilus.kernels.quantize.pack(matrix, CPU, order="mma")

    kernels: Any = SimpleNamespace(quantize=SimpleNamespace(pack=pack))
    stored = replace(tiny_checkpoint, weights=SimpleNamespace(stored=lambda name: StoredMatrix(False, None, 1, 1)))
    path, gpu = tiny_checkpoint.weights._tensors.path, torch.device("cuda")
    assert build._cache(path, "int8", stored, kernels, gpu) is None
    kept = build._cache(path, "int8", tiny_checkpoint, kernels, gpu)
    assert kept is not None and kept.path != WeightCache(path, "int8", FORM).path  # packed otherwise than for a CPU
    assert build._cache(path, "int8", stored, tilus.kernels, CPU) is not None


def test_kernels_with_a_form_of_their_own_have_no_cache() -> None:
    assert packed_form(TorchKernels(), CPU) is None


_PROGRAM = """
import sys
from pathlib import Path
import torch
import tilus.kernels
from serving.loader import open_checkpoint
from serving.packing import pack_weights
from serving.weight_cache import WeightCache, moved, packed_form

model, cpu = Path(sys.argv[1]), torch.device("cpu")
packed = pack_weights(open_checkpoint(model), tilus.kernels, cpu)
cache = WeightCache(model, "int8", packed_form(tilus.kernels, cpu))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    assert cache.store(packed) is not packed
    assert cache.load() is not None
"""


def test_two_processes_at_once(cache_dir: Path, tiny_directory: Path, packed: PackedWeights) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _PROGRAM, str(tiny_directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=120) == ("", "")
        assert process.returncode == 0
    cache = WeightCache(tiny_directory, "int8", FORM)
    assert os.listdir(cache_dir) == [cache.path.name]
    assert_same(cache.load(), packed)


def test_a_checkout_that_is_not_installed_has_a_cache_too(
    cache_dir: Path, model: Path, packed: PackedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    installed = WeightCache(model, "int8", FORM or "").key
    monkeypatch.setattr(importlib.metadata, "version", version)
    cache = WeightCache(model, "int8", FORM or "")
    assert cache.key != installed
    assert headers(cache.store(packed)) == headers(packed)
