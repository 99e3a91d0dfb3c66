"""Kernel arguments: arrays become buffers of emulated global memory, and all arguments the bytes of parameter space.

A tensor-map parameter (`.param .align 64 .b8 name[128]`) takes a `TensorMap`, which names its array by position.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.errors import TilusError
from tilus.ptx.module import Kernel, Param
from tilus.runtime.emulator.memory_space import MemorySpace
from tilus.runtime.emulator.tensor_map import TENSOR_MAP_NBYTES, TensorMap

GLOBAL_BASE = 0x7F_4000_0000_00
_PAGE = 256

Argument = int | float | npt.NDArray[Any] | TensorMap


@dataclass(frozen=True, eq=False)
class Arguments:
    """memory: global memory with the arrays in it. params: the parameter space. arrays: (name of the first parameter,
    array, offset of its first byte in the memory)."""

    memory: MemorySpace
    params: bytes
    arrays: tuple[tuple[str, npt.NDArray[Any], int], ...]

    def write_back(self) -> None:
        """Copy what the kernel left in memory to the arrays.

        Raises: TilusError when it has written to a read-only array.
        """
        for name, array, offset in self.arrays:
            new = self.memory.data[offset : offset + array.nbytes]
            old = array.reshape(-1).view(np.uint8)
            if array.flags.writeable:
                old[:] = new
            elif not np.array_equal(old, new):
                raise TilusError(f"the kernel writes to argument {name!r}, which is read-only")


def load_arguments(kernel: Kernel, args: Sequence[Argument]) -> Arguments:
    """Lay the arguments of a launch out. Arrays that overlap lie in one buffer, as they do in the caller's memory.

    Raises: TilusError when number, kind or range of the arguments do not fit the parameters.
    """
    if len(args) != len(kernel.params):
        names = ", ".join(param.name for param in kernel.params)
        raise TilusError(f"kernel {kernel.name!r} got {len(args)} arguments, expected {len(kernel.params)}: {names}")
    arrays = [
        (param.name, _checked_array(param, value))
        for param, value in zip(kernel.params, args, strict=True)
        if isinstance(value, np.ndarray)
    ]
    buffers = _merge_overlapping(arrays)
    memory = MemorySpace(GLOBAL_BASE, _PAGE, [(name, stop - start, _PAGE) for name, start, stop in buffers])
    placed = [(name, array, _offset(array, buffers, memory)) for name, array in arrays]
    for _, array, offset in placed:
        memory.data[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
    addresses = {name: memory.base + offset for name, _, offset in placed}
    params = bytearray()
    for param, position, value in zip(kernel.params, param_offsets(kernel), args, strict=True):
        params.extend(bytes(position - len(params)))
        if isinstance(value, np.ndarray):
            params += struct.pack("<Q", addresses[param.name])
        elif isinstance(value, TensorMap):
            params += _tensor_map_bytes(kernel, param, value, addresses)
        else:
            params += _scalar_bytes(param, value)
    return Arguments(memory, bytes(params), tuple(placed))


def _checked_array(param: Param, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if param.type not in ("u64", "b64", "s64") or param.count is not None:
        raise TilusError(f"parameter {param.name!r} of type .{param.type} got an array, expected a number")
    if not array.flags.c_contiguous:
        raise TilusError(
            f"argument {param.name!r} has strides {array.strides}, expected a C-contiguous array",
            hint="pass numpy.ascontiguousarray(...)",
        )
    return array


def _tensor_map_bytes(kernel: Kernel, param: Param, value: TensorMap, addresses: dict[str, int]) -> bytes:
    if (param.type, param.count) != ("b8", TENSOR_MAP_NBYTES) or (param.align or 1) % 64:
        raise TilusError(f"parameter {param.name!r} got a tensor map, expected .align 64 .b8 [{TENSOR_MAP_NBYTES}]")
    names = [other.name for other in kernel.params]
    name = names[value.param] if 0 <= value.param < len(names) else None
    if name not in addresses:
        raise TilusError(f"{value}: argument {value.param} is no array, expected one of those of {sorted(addresses)}")
    return value.encode(addresses[name] + value.offset_nbytes)


def _host_address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _merge_overlapping(arrays: list[tuple[str, npt.NDArray[Any]]]) -> list[tuple[str, int, int]]:
    """(names, first and one past the last host address) of each connected range of host memory."""
    spans = sorted((_host_address(array), _host_address(array) + array.nbytes, name) for name, array in arrays)
    merged: list[tuple[str, int, int]] = []
    for start, stop, name in spans:
        if merged and (start < merged[-1][2] or (start, stop) == merged[-1][1:]):
            names, first, last = merged[-1]
            merged[-1] = (f"{names}/{name}", first, max(last, stop))
        else:
            merged.append((name, start, stop))
    return merged


def _offset(array: npt.NDArray[Any], buffers: list[tuple[str, int, int]], memory: MemorySpace) -> int:
    """Where an array's first byte lies in the memory."""
    host = _host_address(array)
    for index, (_, start, stop) in enumerate(buffers):
        if start <= host and host + array.nbytes <= stop:
            return memory.buffers[index].start + host - start
    raise ValueError(f"array at {host:#x} is in no buffer")


def param_offsets(kernel: Kernel) -> list[int]:
    """Byte offset of each parameter in the parameter space: natural alignment, in order."""
    offsets: list[int] = []
    cursor = 0
    for param in kernel.params:
        size = int(param.type[1:]) // 8
        align = param.align or size
        cursor = -(-cursor // align) * align
        offsets.append(cursor)
        cursor += size * (param.count or 1)
    return offsets


def _scalar_bytes(param: Param, value: float) -> bytes:
    kind, nbytes = param.type[0], int(param.type[1:]) // 8
    if param.count is not None:
        raise TilusError(f"parameter {param.name!r} is an array of {param.count} .{param.type}, got {value!r}")
    if kind == "f":
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[nbytes], value)
    low, high = (-(1 << (nbytes * 8 - 1)), 1 << (nbytes * 8))
    number = int(value)
    if number != value or not low <= number < high:
        raise TilusError(f"parameter {param.name!r} of type .{param.type} got {value!r}, expected an integer in range")
    return (number & (high - 1)).to_bytes(nbytes, "little")
