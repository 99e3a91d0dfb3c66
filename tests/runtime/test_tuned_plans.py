"""Tuned plans on disk: what distinguishes keys, what comes back, and what happens when processes or disks misbehave."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus.errors import TilusError
from tilus.runtime import tuned_plans
from tilus.runtime.tuned_plans import Key, Measurement, Tuned, plan_from_json, plan_to_json, recall, remember


@dataclass(frozen=True)
class Rows:
    rows: int
    fast: bool = False


@dataclass(frozen=True)
class Columns:
    columns: int


KINDS = (Rows, Columns)
KEY = Key("family-1", "some GPU", "[1, 2]")
FOUND = Tuned((Measurement(Rows(1), 3.5), Measurement(Columns(2), 1.25), Measurement(Rows(3), None, "spills")), best=1)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "cache"))
    yield
    tuned_plans.forget()


def from_disk(key: Key, kinds: tuple[type, ...] = KINDS) -> Tuned | None:
    """As a new process would find it."""
    tuned_plans.forget()
    return recall(key, kinds)


def test_what_is_remembered_comes_back() -> None:
    assert recall(KEY, KINDS) is None
    remember(KEY, FOUND)
    assert recall(KEY, KINDS) is FOUND
    assert from_disk(KEY) == FOUND
    assert (FOUND.plan, FOUND.us, FOUND.heuristic_us, FOUND.ratio) == (Columns(2), 1.25, 3.5, 2.8)
    assert Tuned((Measurement(Rows(1), None, "spills"), Measurement(Rows(2), 1.0)), 1).ratio is None


@given(st.builds(Rows, st.integers(), st.booleans()) | st.builds(Columns, st.integers()))
def test_plans_are_text(plan: Rows | Columns) -> None:
    text = json.dumps(plan_to_json(plan))
    assert plan_from_json(json.loads(text), {kind.__name__: kind for kind in KINDS}) == plan


def test_everything_in_the_key_distinguishes(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [KEY, replace(KEY, family="family-2"), replace(KEY, device="other"), replace(KEY, problem="[1, 3]")]
    paths = [key.path for key in keys]
    tuned_plans._version.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "another version of tilus")
    paths.append(KEY.path)
    tuned_plans._version.cache_clear()
    assert all(a != b for a, b in combinations(paths, 2))


def test_a_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(KEY, FOUND)
    tuned_plans.forget()
    reads: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or real(path))
    absent = replace(KEY, device="none")
    for _ in range(3):
        assert recall(KEY, KINDS) == FOUND and recall(absent, KINDS) is None
    assert reads == [KEY.path, absent.path]


def test_any_damage_counts_as_absent_and_is_mended() -> None:
    remember(KEY, FOUND)
    data = KEY.path.read_bytes()
    damaged = [data[:n] for n in range(0, len(data), 37)] + [
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"checksum": 1, "entry": 2}',
    ]
    damaged += [
        data.replace(b"1.25", b"9.25"),
        data.replace(b'"best": 1', b'"best": 0'),
        data.replace(b'"rows": 3', b'"rows": 4'),
    ]
    assert len(set(damaged)) == len(damaged)
    for bad in damaged:
        KEY.path.write_bytes(bad)
        assert from_disk(KEY) is None, bad
        remember(KEY, FOUND)
        assert from_disk(KEY) == FOUND


def test_an_entry_of_another_key_or_plan_counts_as_absent() -> None:
    remember(KEY, FOUND)
    other = replace(KEY, device="other GPU")
    other.path.write_bytes(KEY.path.read_bytes())
    assert from_disk(other) is None
    assert from_disk(KEY, (Rows,)) is None  # Columns is no plan any more

    @dataclass(frozen=True)
    class Columns:
        columns: int
        more: int

    assert from_disk(KEY, (Rows, Columns)) is None
    assert from_disk(KEY) == FOUND


def test_a_plan_that_is_refused_by_now_counts_as_absent() -> None:
    remember(KEY, FOUND)

    @dataclass(frozen=True)
    class Rows:
        rows: int
        fast: bool

        def __post_init__(self) -> None:
            raise TilusError("no such plan")

    assert from_disk(KEY, (Rows, Columns)) is None


def test_an_unusable_directory_warns_once_and_this_process_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot write tuned plans into .*TILUS_CACHE_DIR"):
        remember(KEY, FOUND)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remember(replace(KEY, device="other"), FOUND)
    assert recall(KEY, KINDS) is FOUND
    assert from_disk(KEY) is None


def write_and_read(directory: str, number: int, count: int) -> int:
    """In a process of its own: how many of the reads found one of the whole entries that processes write."""
    import os

    os.environ["TILUS_CACHE_DIR"] = directory
    whole = 0
    for _ in range(count):
        remember(KEY, replace(FOUND, measurements=(Measurement(Rows(number), 2.0), *FOUND.measurements[1:])))
        found = from_disk(KEY)
        whole += found is not None and asdict(found)["measurements"][1:] == asdict(FOUND)["measurements"][1:]
    return whole


def test_many_processes_share_one_entry(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        whole = pool.starmap(write_and_read, [(str(tmp_path), number, 100) for number in range(3)])
    assert whole == [100] * 3
    assert len(list((tmp_path / "plans").iterdir())) == 1
