"""Plans that tuning found, on disk: one small file for each problem and device, shared by any number of processes.

A plan is a frozen dataclass of some kernel, written as the name of its class and its fields. An entry carries its own key and
checksum: one that is damaged, of another version or of a plan that no longer exists counts as absent, and the next tuning
writes it anew.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from tilus import config
from tilus.errors import TilusError
from tilus.runtime.cache import write_atomically

# Part of every key, so that entries of another form are never read.
_FORMAT = "tilus-plans-1"


@dataclass(frozen=True)
class Key:
    """What a winner holds for.

    family: of kernels that solve the same problem, with a number that is raised when the meaning of their plans changes.
    device: the name that the driver gives the GPU. problem: shapes and types, as text.
    """

    family: str
    device: str
    problem: str

    @property
    def path(self) -> Path:
        """The entry's file, in `config.cache_dir()`."""
        text = json.dumps([_FORMAT, _version(), self.family, self.device, self.problem])
        return config.cache_dir() / "plans" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


@dataclass(frozen=True)
class Measurement:
    """One candidate: microseconds of a launch, or None with a note that says why there is no time."""

    plan: Any
    us: float | None
    note: str | None = None


@dataclass(frozen=True)
class Tuned:
    """What tuning found. measurements: of all candidates, the first of which is used without tuning. best: index of the winner,
    which has a time.
    """

    measurements: tuple[Measurement, ...]
    best: int

    @property
    def plan(self) -> Any:
        return self.measurements[self.best].plan

    @property
    def us(self) -> float:
        found = self.measurements[self.best].us
        return float("nan") if found is None else found

    @property
    def heuristic_us(self) -> float | None:
        """Microseconds without tuning; None when that plan does not compile or is wrong."""
        return self.measurements[0].us

    @property
    def ratio(self) -> float | None:
        """How many times as long the plan without tuning takes: at least 1."""
        return None if self.heuristic_us is None else self.heuristic_us / self.us


# What this process has read or written, by file; None where there was no entry.
_known: dict[Path, Tuned | None] = {}
_warned_about: set[Path] = set()


def recall(key: Key, kinds: Sequence[type]) -> Tuned | None:
    """What `remember` stored for this key, by this or another process; None when there is none. Each file is read once.

    kinds: the dataclasses that a plan may be.
    """
    path = key.path
    if path not in _known:
        _known[path] = _read(path, key, {kind.__name__: kind for kind in kinds})
    return _known[path]


def remember(key: Key, tuned: Tuned) -> None:
    """Store a result for all processes; warn once per directory when that is impossible. This process knows it in any case."""
    entry = {
        "key": asdict(key),
        "best": tuned.best,
        "measurements": [{"plan": plan_to_json(m.plan), "us": m.us, "note": m.note} for m in tuned.measurements],
    }
    path = key.path
    _known[path] = tuned
    try:
        write_atomically(path, json.dumps({"checksum": _checksum(entry), "entry": entry}, indent=1).encode())
    except OSError as error:
        if path.parent not in _warned_about:
            _warned_about.add(path.parent)
            warnings.warn(
                f"cannot write tuned plans into {path.parent} ({error.strerror}): each process tunes anew; "
                "set TILUS_CACHE_DIR to a writeable directory",
                stacklevel=2,
            )


def forget() -> None:
    """Read the files again when they are asked for next; other processes may have written some."""
    _known.clear()


def plan_to_json(plan: Any) -> dict[str, Any]:
    """{kind: name of the class, its fields}."""
    return {"kind": type(plan).__name__, **asdict(plan)}


def plan_from_json(data: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    """The plan that `plan_to_json` wrote. Raises: ValueError for another class or other fields than those of `kinds`."""
    values = dict(data)
    kind = kinds.get(str(values.pop("kind", None)))
    if kind is None or set(values) != {field.name for field in fields(kind)}:
        raise ValueError(f"a plan {dict(data)}, expected one of {', '.join(kinds)} with its fields")
    return kind(**values)


def _read(path: Path, key: Key, kinds: Mapping[str, type]) -> Tuned | None:
    try:
        document = json.loads(path.read_bytes())
        entry = document["entry"]
        if document["checksum"] != _checksum(entry) or entry["key"] != asdict(key):
            return None
        measurements = cast("list[dict[str, Any]]", entry["measurements"])
        found = (Measurement(plan_from_json(m["plan"], kinds), m["us"], m["note"]) for m in measurements)
        return Tuned(tuple(found), entry["best"])
    except (OSError, ValueError, KeyError, TypeError, TilusError):  # absent, damaged, or a plan that is refused by now
        return None


def _checksum(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


@functools.cache
def _version() -> str:
    """Another version of tilus makes other code of the same plan."""
    try:
        return importlib.metadata.version("tilus")
    except importlib.metadata.PackageNotFoundError:  # a source tree that is only on the path
        return "unknown"
