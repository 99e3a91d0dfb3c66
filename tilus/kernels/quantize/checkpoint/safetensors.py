"""Safetensors files: tensors as views of the mapped file. No byte of a tensor is read before it is used.

Format: https://github.com/huggingface/safetensors: u64 length, a JSON header with dtype, shape and place of each tensor, data.
Read here and not by the package of that name, which gives numpy neither bfloat16 nor 8-bit floats.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, bf16, f16, f32, float8_e4m3, float8_e5m2, float8_e8m0
from tilus.errors import TilusError

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

_PLAIN = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
_NBYTES = {name: np.dtype(code).itemsize for name, code in _PLAIN.items()} | {
    "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
# The type in which numbers stored so are exact.
FLOAT_DTYPES: dict[str, DataType] = {
    "F16": f16, "BF16": bf16, "F32": f32, "F8_E4M3": float8_e4m3, "F8_E5M2": float8_e5m2, "F8_E8M0": float8_e8m0,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as stored. dtype: safetensors' name of it. data: its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Bytes

    def array(self) -> Array:
        """Floats of at most 32 bits as float32, exactly; everything else as it is stored."""
        match self.dtype:
            case "BF16":
                flat = (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
            case "F8_E4M3" | "F8_E5M2":
                flat = FLOAT_DTYPES[self.dtype].decode(self.data)
            case "F8_E8M0":
                flat = float8_e8m0.decode(self.data)
            case "F16":
                flat = self.data.view("<f2").astype(np.float32)
            case _:
                flat = self.data.view(_PLAIN[self.dtype])
        return flat.reshape(self.shape)

    def codes(self) -> Bytes:
        """The bytes of a tensor of one-byte elements, in its shape."""
        return self.data.reshape(self.shape)


class SafetensorsFile(Mapping[str, StoredTensor]):
    """An open file. Raises TilusError when it is no safetensors file, is cut short, or contradicts itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise TilusError(f"{path} cannot be read: {error.strerror}") from error
        header_nbytes = int.from_bytes(data[:8], "little")
        if size < 8 or header_nbytes < 2 or data[8:9] != b"{":
            raise TilusError(f"{path} is not a safetensors file: it does not start with the size of a JSON header")
        if 8 + header_nbytes > size:
            raise TilusError(f"{path} is cut short: {size} bytes, but the header ends at {8 + header_nbytes}")
        self._data = np.frombuffer(data, np.uint8)[8 + header_nbytes :]
        self._entries = self._parse(data[8 : 8 + header_nbytes])
        self._check_places()

    def _parse(self, header: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        try:
            found = cast(object, json.loads(header))
        except (ValueError, RecursionError) as error:
            raise TilusError(f"{self.path} has a damaged header: {error}") from error
        if not isinstance(found, dict):
            raise TilusError(f"{self.path} has a damaged header: expected a JSON object")
        entries = cast(dict[str, object], found)
        entries.pop("__metadata__", None)
        return {name: self._entry(name, entry) for name, entry in entries.items()}

    def _entry(self, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
                type(size) is int and size >= 0 for size in shape
            ):
                sizes = tuple(int(cast(int, size)) for size in shape)
            case _:
                raise TilusError(f"{self.path}: the header's entry of {name} is damaged: {str(entry)[:200]}")
        if dtype not in _NBYTES:
            raise TilusError(f"{self.path}: {name} has dtype {dtype}, but supported are {', '.join(_NBYTES)}")
        nbytes = math.prod(sizes) * _NBYTES[dtype]
        if end - begin != nbytes:
            raise TilusError(
                f"{self.path}: {name} of shape {list(sizes)} and dtype {dtype} takes {nbytes} bytes, "
                f"but its place, {begin} to {end}, has {end - begin}"
            )
        return dtype, sizes, begin, end

    def _check_places(self) -> None:
        """Tensors must lie one after the other and fill the file, as the format demands."""
        expected = 0
        for name, (_, _, begin, end) in sorted(self._entries.items(), key=lambda item: item[1][2:]):
            if begin != expected:
                raise TilusError(f"{self.path}: {name} begins at byte {begin} of the data, expected {expected}")
            expected = end
            if end > self._data.size:
                raise TilusError(f"{self.path} is cut short: {self._data.size} bytes of data, but {name} ends at {end}")
        if expected != self._data.size:
            raise TilusError(f"{self.path} has {self._data.size} bytes of data, but its tensors end at {expected}")

    def __getitem__(self, name: str) -> StoredTensor:
        dtype, shape, begin, end = self._entries[name]
        return StoredTensor(name, dtype, shape, self._data[begin:end])

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
