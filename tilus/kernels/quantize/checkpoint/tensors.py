"""The tensors of a checkpoint by name, over all its files, and what readers of formats make of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint.safetensors import Array, SafetensorsFile, StoredTensor
from tilus.kernels.quantize.matrix import QuantizedMatrix

Settings = Mapping[str, Any]
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Module:
    """A quantised weight: the names of the tensors that make it up, and how to read it."""

    parts: frozenset[str]
    read: Callable[[], QuantizedMatrix]


class Tensors(Mapping[str, StoredTensor]):
    """The tensors of a directory (one file, or shards with an index) or of a single .safetensors file.

    Files are opened when a tensor of theirs is first used. Raises TilusError for missing and damaged files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = cache(SafetensorsFile)
        self._file_of = self._index(path)

    def _index(self, path: Path) -> dict[str, Path]:
        if path.is_file():
            return dict.fromkeys(self._open(path), path)
        shards = read_json(path / INDEX).get("weight_map")
        if isinstance(shards, dict):
            return {name: self._shard(path, name, file) for name, file in cast(dict[str, object], shards).items()}
        if not (path / WHOLE).is_file():
            raise TilusError(f"{path} has neither {WHOLE} nor {INDEX}")
        return dict.fromkeys(self._open(path / WHOLE), path / WHOLE)

    @staticmethod
    def _shard(path: Path, name: str, file: object) -> Path:
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise TilusError(
                f"{path / INDEX}: tensor {name} is in {file!r}, expected the name of a file beside the index"
            )
        return path / file

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._file_of:
            raise TilusError(f"{self.path} has no tensor {name}; it has {len(self._file_of)} others")
        file = self._open(self._file_of[name])
        if name not in file:
            raise TilusError(f"{file.path} has no tensor {name}, although {INDEX} says so")
        return file[name]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def modules(self, suffix: str) -> list[str]:
        """The modules that have a tensor of this name: those of `a.b.qweight` for suffix `.qweight` include `a.b`."""
        return [name.removesuffix(suffix) for name in self._file_of if name.endswith(suffix)]

    def take(self, name: str, dtypes: Sequence[str], shape: Sequence[int | None]) -> StoredTensor:
        """A tensor that must have one of these dtypes and this shape, in which None stands for any size."""
        tensor = self[name]
        if tensor.dtype not in dtypes:
            raise TilusError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(dtypes)}")
        fits = len(tensor.shape) == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape))
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise TilusError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")
        return tensor

    def array(self, name: str, dtypes: Sequence[str], shape: Sequence[int | None]) -> Array:
        """The values of such a tensor."""
        return self.take(name, dtypes, shape).array()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = cast(object, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise TilusError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise TilusError(f"{path} is not a JSON object")
    return cast(dict[str, Any], found)


def integer_setting(settings: Settings, key: str, default: int | None = None) -> int:
    """A whole number of the quantisation's configuration; raises TilusError for anything else."""
    value = settings.get(key, default)
    if type(value) is not int:
        found = "is missing" if value is None else f"is {value!r}"
        raise TilusError(f"quantization_config: {key} {found}, expected an integer")
    return value
