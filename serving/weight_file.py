"""Packed weights in one file that is mapped into memory, not read: a server starts at once, and several share the pages.

    magic, size of the header, sha256 of the header | header: JSON | arrays, each at a multiple of a page

The header names the arrays and holds what the packed weights say of themselves, as they write it. Written whole under another
name and then renamed, so that no reader sees part of a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.packing import PackedWeights
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedWeight, WeightHeader

FORMAT_VERSION = 2
TEMPORARY = ".part"
_MAGIC = f"tilusW{FORMAT_VERSION:02}".encode()
_PREFIX = struct.Struct("<8sQ32s")
_PAGE = 4096  # arrays begin at multiples of it, so that every alignment that a kernel may want is met
_Bytes = npt.NDArray[np.uint8]


def write(path: Path, key: str, weights: PackedWeights) -> None:
    """Create or replace a file of packed weights, whose linear layers are QuantizedWeight, on any device. key: what a reader must
    ask for. Raises: OSError."""
    layout = _Layout()
    tensors = {name: layout.place(tensor) for name, tensor in weights.tensors.items()}
    linears = {
        name: [
            {
                "header": part.header.to_json(),
                "arrays": {key: layout.place(array) for key, array in part.arrays.items()},
            }
            for part in parts
        ]
        for name, parts in weights.linears.items()
    }
    entries = {"key": key, "sum": layout.sum, "nbytes": layout.nbytes, "tensors": tensors, "linears": linears}
    header = json.dumps(entries).encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with _opened_and_locked(temporary) as file:
            file.write(_PREFIX.pack(_MAGIC, len(header), hashlib.sha256(header).digest()) + header)
            layout.write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _opened_and_locked(temporary: Path) -> BinaryIO:
    """A new file whose lock says that its writer lives. Until it is locked, `remove_abandoned` may take it away."""
    while True:
        file = temporary.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_named(file, temporary):
            return file
        file.close()


def remove_abandoned(temporary: Path) -> None:
    """Remove a temporary file unless its writer lives. Raises: OSError when it does, or when the file is gone."""
    with temporary.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_named(file, temporary):  # whoever removes or renames a file has locked it
            temporary.unlink()


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Whether this is the name of an open file still."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def read(path: Path, key: str) -> PackedWeights:
    """The weights in a file, mapped: pages are shared with other processes until somebody writes to them.

    Raises: TilusError for a file that is damaged, cut short, of another key, or no file of packed weights; OSError.
    """
    if path.stat().st_size < _PREFIX.size:
        raise TilusError(f"{path} has {path.stat().st_size} bytes, expected at least {_PREFIX.size}")
    # Copy-on-write, since torch has no tensors of memory that must not be written.
    mapped = np.asarray(np.memmap(path, np.uint8, mode="c"))
    magic, size, digest = _PREFIX.unpack(mapped[: _PREFIX.size].tobytes())
    header = mapped[_PREFIX.size : _PREFIX.size + size].tobytes()
    if magic != _MAGIC or hashlib.sha256(header).digest() != digest:
        raise TilusError(f"{path} is no file of packed weights of format {FORMAT_VERSION}, or its header is damaged")
    entries = json.loads(header)
    if entries["key"] != key:
        raise TilusError(f"{path} has weights with key {entries['key']}, expected {key}")
    data = mapped[_round_up(_PREFIX.size + size) :]
    if data.nbytes != entries["nbytes"] or _word_sum(data) != entries["sum"]:
        raise TilusError(f"{path} is damaged: its arrays are cut short or not what was written")
    return _weights(data, entries)


def _weights(data: _Bytes, entries: dict[str, Any]) -> PackedWeights:
    def tensor(place: tuple[str, list[int], int]) -> Tensor:
        dtype, shape, start = place
        array = np.ndarray(shape, dtype, data, start)
        return torch.from_numpy(array)

    def weight(part: dict[str, Any]) -> QuantizedWeight:
        header = WeightHeader.from_json(part["header"])
        return QuantizedWeight.from_arrays(header, {name: tensor(place) for name, place in part["arrays"].items()})

    tensors = {name: tensor(place) for name, place in entries["tensors"].items()}
    linears = {name: tuple(weight(part) for part in parts) for name, parts in entries["linears"].items()}
    return PackedWeights(tensors, linears)


class _Layout:
    """Gives arrays their places in the file, one after the other."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.sum = 0
        self._tensors: list[Tensor] = []

    def place(self, tensor: Tensor) -> tuple[str, list[int], int]:
        """numpy's dtype, the shape and the first byte of a tensor."""
        array = _array(tensor)
        start, self.nbytes = self.nbytes, self.nbytes + _round_up(array.nbytes)
        self.sum = (self.sum + _word_sum(array.reshape(-1).view(np.uint8))) % 2**64
        self._tensors.append(tensor)
        return array.dtype.str, list(array.shape), start

    def write(self, file: BinaryIO) -> None:
        for (
            tensor
        ) in self._tensors:  # those of a GPU come one by one, once more: all at once may be too many for this memory
            file.write(bytes(-file.tell() % _PAGE))
            file.write(_array(tensor).reshape(-1).view(np.uint8).data)
        file.write(bytes(-file.tell() % _PAGE))


def _array(tensor: Tensor) -> npt.NDArray[np.generic]:
    return tensor.contiguous().cpu().numpy()


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _word_sum(flat: _Bytes) -> int:
    """The sum of 64-bit words, modulo 2^64: notices flipped bits and pages that were lost, at the speed of the memory."""
    words = flat[: flat.nbytes // 8 * 8].view(np.uint64)
    rest = flat[words.nbytes :].tobytes()
    return (int(words.sum()) + int.from_bytes(rest, "little")) % 2**64
