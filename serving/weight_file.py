"""Packed weights in one file that is mapped into memory, not read: a server starts at once, and several share the pages.

    magic, bytes of the file and of the header, sum | header: JSON and blanks | arrays, each at a multiple of a page

The header names the arrays and holds what the packed weights say of themselves, as they write it. The sum is what makes all words
of the file add up to 0, which notices flipped bits and pages that were lost, at the speed of the memory. Written whole under
another name and then renamed, so that no reader sees part of a file.
"""

from __future__ import annotations

import fcntl
import json
import math
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

FORMAT_VERSION = 3
TEMPORARY = ".part"
_MAGIC = f"tilusW{FORMAT_VERSION:02}".encode()
_PREFIX = struct.Struct("<8sQQQ")
_PAGE = 4096  # arrays begin at multiples of it, so that every alignment that a kernel may want is met
_Bytes = npt.NDArray[np.uint8]


def write(path: Path, key: str, weights: PackedWeights) -> None:
    """Create or replace a file of packed weights, whose linear layers are QuantizedWeight, on any device. key: what a reader must
    ask for. Raises: OSError."""
    arrays: list[Tensor] = []
    end = 0

    def place(tensor: Tensor) -> tuple[str, list[int], int]:
        """torch's dtype, the shape and the first byte of a tensor, the next one in the file."""
        nonlocal end
        arrays.append(tensor)
        start, end = end, end + tensor.nbytes + -tensor.nbytes % _PAGE
        return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), start

    def described(part: QuantizedWeight) -> dict[str, Any]:
        return {"header": part.header.to_json(), "arrays": {name: place(array) for name, array in part.arrays.items()}}

    tensors = {name: place(tensor) for name, tensor in weights.tensors.items()}
    linears = {name: [described(part) for part in parts] for name, parts in weights.linears.items()}
    header = json.dumps({"key": key, "tensors": tensors, "linears": linears}).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % _PAGE)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with _opened_and_locked(temporary) as file:
            counts = _MAGIC, _PREFIX.size + len(header) + end, len(header)
            start = _PREFIX.pack(*counts, 0) + header
            file.write(start)
            total = _word_sum(np.frombuffer(start, np.uint8))
            for tensor in arrays:  # those of a GPU come one by one: all at once may be too many for this memory
                flat = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
                whole = np.pad(flat, (0, -len(flat) % _PAGE))
                file.write(whole.data)
                total += _word_sum(whole)
            file.seek(0)
            file.write(_PREFIX.pack(*counts, -total % 2**64))
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
    nbytes = path.stat().st_size
    if nbytes < _PAGE:
        raise TilusError(f"{path} has {nbytes} bytes, expected at least {_PAGE}")
    # Copy-on-write, since torch has no tensors of memory that must not be written.
    mapped = np.asarray(np.memmap(path, np.uint8, mode="c"))
    magic, expected, header_nbytes, _ = _PREFIX.unpack(mapped[: _PREFIX.size].tobytes())
    if magic != _MAGIC:
        raise TilusError(f"{path} is no file of packed weights of format {FORMAT_VERSION}")
    if nbytes != expected or _word_sum(mapped):
        raise TilusError(f"{path} is damaged: it has {nbytes} of {expected} bytes, or others than were written")
    end = _PREFIX.size + header_nbytes
    entries = json.loads(mapped[_PREFIX.size : end].tobytes())
    if entries["key"] != key:
        raise TilusError(f"{path} has weights with key {entries['key']}, expected {key}")
    data = torch.from_numpy(mapped[end:])

    def tensor(place: tuple[str, list[int], int]) -> Tensor:
        dtype, shape, start = getattr(torch, place[0]), place[1], place[2]
        return data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def weight(part: dict[str, Any]) -> QuantizedWeight:
        header = WeightHeader.from_json(part["header"])
        return QuantizedWeight.from_arrays(header, {name: tensor(place) for name, place in part["arrays"].items()})

    tensors = {name: tensor(place) for name, place in entries["tensors"].items()}
    linears = {name: tuple(weight(part) for part in parts) for name, parts in entries["linears"].items()}
    return PackedWeights(tensors, linears)


def _word_sum(words: _Bytes) -> int:
    """Of 64 bits, modulo 2^64."""
    return int(words.view(np.uint64).sum())
