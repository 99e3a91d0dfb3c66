"""Reading GGUF files: metadata, and tensors as views of the mapped file. No byte of a tensor is read before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint import ggml
from tilus.kernels.quantize.checkpoint.ggml import BlockFormat, block_format
from tilus.kernels.quantize.matrix import QuantizedMatrix

_T = TypeVar("_T")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST_ARRAY = 8
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor as stored. shape: slowest dimension first, as in numpy. rows: uint8 [rows, bytes of a row]."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    rows: npt.NDArray[np.uint8]


class _Cursor:
    """Reads values one after the other, and refuses to read past the end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._path = path
        self._buffer = buffer
        self.offset = 0

    def take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self._buffer):
            raise TilusError(f"{self._path} is cut short: {len(self._buffer)} bytes, but the header goes on to {end}")
        data = self._buffer[self.offset : end]
        self.offset = end
        return data

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def strings(self, count: int) -> list[str]:
        """As many calls of `string`: vocabularies have a hundred thousand, and a server waits for them."""
        length_at, buffer, size, start = _LENGTH.unpack_from, self._buffer, len(self._buffer), self.offset
        found: list[str] = []
        for _ in range(count):
            begin = start + 8
            end = begin + length_at(buffer, start)[0] if begin <= size else begin
            if end > size:
                self.take(end - self.offset)  # refuses what is cut short
            found.append(buffer[begin:end].decode("utf-8", errors="replace"))
            start = end
        self.offset = start
        return found

    def value(self, kind: int, depth: int = 0) -> object:
        """One metadata value of the given type id; arrays are lists."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise TilusError(f"{self._path}: metadata type {kind} at byte {self.offset}, but types go from 0 to 12")
        if depth == _DEEPEST_ARRAY:
            raise TilusError(f"{self._path}: arrays at byte {self.offset} are nested more than {depth} deep")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            data = self.take(count * struct.calcsize("<" + _SCALARS[element]))
            return list(struct.unpack(f"<{count}{_SCALARS[element]}", data))
        if element == _STRING:
            return self.strings(count)
        return [self.value(element, depth + 1) for _ in range(count)]


class GGUFFile:
    """An open GGUF file. `metadata` by key, `tensors` by name.

    Raises TilusError when it is no GGUF file, is cut short, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise TilusError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes, a header has 24")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(path, buffer)
        magic, version = cursor.take(4), cursor.number("I")
        if magic != b"GGUF":
            raise TilusError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
        if version not in (2, 3):
            raise TilusError(f"{path} has GGUF version {version}, expected 2 or 3 (little endian)")
        num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
        self.metadata = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(num_keys)}
        records = [self._record(cursor) for _ in range(num_tensors)]
        alignment = self.integer("general.alignment", 32)
        if alignment < 1:
            raise TilusError(f"{path}: general.alignment is {alignment}, expected a positive number")
        data_start = -(-cursor.offset // alignment) * alignment
        self.tensors = {
            name: self._tensor(buffer, name, shape, kind, data_start + offset) for name, shape, kind, offset in records
        }

    @staticmethod
    def _record(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = cursor.string(), cursor.number("I")
        fastest_first = [cursor.number("Q") for _ in range(rank)]
        return name, tuple(reversed(fastest_first)), cursor.number("I"), cursor.number("Q")

    def _tensor(self, buffer: mmap.mmap, name: str, shape: tuple[int, ...], kind: int, start: int) -> GGUFTensor:
        format = block_format(kind, name)
        width = shape[-1] if shape else 1
        if width % format.block_size:
            raise TilusError(
                f"{self.path}: rows of {name} have {width} values, but {format.name} packs {format.block_size} together"
            )
        row_bytes = width // format.block_size * format.block_nbytes
        num_rows = math.prod(shape[:-1])
        end = start + num_rows * row_bytes
        if end > len(buffer):
            raise TilusError(f"{self.path} is cut short: {len(buffer)} bytes, but {name} ends at {end}")
        rows = np.frombuffer(buffer, np.uint8)[start:end].reshape(num_rows, row_bytes)
        return GGUFTensor(name, shape, format, rows)

    def tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise TilusError(f"{self.path} has no tensor {name}; it has {len(self.tensors)} others")
        return self.tensors[name]

    def first_row(self, name: str) -> QuantizedMatrix | npt.NDArray[np.float32]:
        """`read` of a matrix, or of the first one of a stack, but only its first row: how the tensor is stored, at no cost."""
        tensor = self.tensor(name)
        row = replace(tensor, shape=(1, tensor.shape[-1]), rows=tensor.rows[:1])
        return self._values(row)

    def read(self, name: str, index: int | None = None) -> QuantizedMatrix | npt.NDArray[np.float32]:
        """A tensor's codes and scales, or its values as float32 where it is stored as floats. index: of a matrix in a stack.

        Raises: TilusError for what is not there.
        """
        tensor = self.tensor(name)
        if index is None:
            return self._values(tensor)
        if len(tensor.shape) != 3 or not 0 <= index < tensor.shape[0]:
            raise TilusError(
                f"{self.path}: {name} has shape {list(tensor.shape)}, expected a stack with a matrix {index}"
            )
        count = tensor.shape[1]
        return self._values(
            replace(tensor, shape=tensor.shape[1:], rows=tensor.rows[index * count : (index + 1) * count])
        )

    def _values(self, tensor: GGUFTensor) -> QuantizedMatrix | npt.NDArray[np.float32]:
        if tensor.format.is_float:
            return ggml.to_floats(tensor.rows, tensor.format).reshape(tensor.shape)
        if len(tensor.shape) != 2:
            raise TilusError(
                f"{self.path}: {tensor.name} is stored as {tensor.format.name} with shape {list(tensor.shape)}, "
                "but quantised tensors must be matrices"
            )
        return ggml.unpack(tensor.rows, tensor.format)

    def integer(self, key: str, default: int | None = None) -> int:
        return self._get(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        return self._get(key, float, default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._get(key, bool, default)

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, str, default)

    def texts(self, key: str) -> list[str]:
        return self._list(key, str)

    def integers(self, key: str) -> list[int]:
        return self._list(key, int)

    def numbers(self, key: str) -> list[float]:
        return self._list(key, float)

    def _get(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self.metadata.get(key, default)
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is {value!r}"
            raise TilusError(f"{self.path}: metadata key {key} {found}, expected {kind.__name__}")
        return value

    def _list(self, key: str, kind: type[_T]) -> list[_T]:
        values = self._get(key, list, None)
        if values and not isinstance(values[0], kind):
            raise TilusError(
                f"{self.path}: metadata key {key} holds {type(values[0]).__name__}, expected {kind.__name__}"
            )
        return values
