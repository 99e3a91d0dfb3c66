"""Tensor maps on their way to the hardware: what the driver is asked to encode, how often, and what is refused.

Functions named `in_stub_*` run in a process whose driver is a stub, which stores the numbers that a map is made from.
"""

from __future__ import annotations

import struct
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from libcuda_stub import Stub, failure

import tilus
from tilus import Const, Tensor, dtypes, f16, f32, int32, uint64
from tilus.codegen.tensor_map import PlacedMap
from tilus.ptx.module import Kernel, Param
from tilus.runtime.emulator import MapArgument
from tilus.runtime.emulator.arguments import load_arguments

Run = Callable[..., Any]
UINT8, UINT16, UINT32 = 0, 1, 2  # CU_TENSOR_MAP_DATA_TYPE
SWIZZLE_NONE, SWIZZLE_32B, SWIZZLE_64B, SWIZZLE_128B = range(4)  # CU_TENSOR_MAP_SWIZZLE


@tilus.kernel
def fetch(x: Tensor[f16, "m", "k"], first: int32, *, rows: Const = 16, columns: Const = 64, part: Const = False):
    tilus.grid(2, warps=1)
    tile = tilus.shared(f16, [rows, columns])
    full = tilus.shared(uint64, [1])
    source = tilus.narrow(x, 0, first, 8) if part else x
    tilus.copy_tensor(tile, source, [0, 0], barrier=full[0])


@tilus.kernel
def fetch_of_three(x: Tensor["T", "b", "m", "k"]):
    tilus.grid(1, warps=1)
    tile = tilus.shared(x.dtype, [4, 32])
    full = tilus.shared(uint64, [1])
    tilus.copy_tensor(tile, x, [1, 0, 0], barrier=full[0])


@tilus.kernel
def nothing(x: Tensor[f32, "m", "k"]):
    tilus.grid(x.shape[0], warps=1)
    tile = tilus.shared(f32, [4, 32])
    full = tilus.shared(uint64, [1])
    tilus.copy_tensor(tile, x, [0, 0], barrier=full[0])


def on_gpu(address: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str = "<f2") -> Any:
    """An array in the memory of the stub's GPU; strides in elements."""
    nbytes = int(typestr[2:])
    interface = {"shape": shape, "typestr": typestr, "data": (address, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__={**interface, "strides": tuple(nbytes * s for s in strides)})


def stub_map(
    address: int, dtype: int, shape: list[int], strides: list[int], box: list[int], swizzle: int
) -> dict[str, Any]:
    return {"address": address, "type": dtype, "shape": shape, "strides": strides, "box": box, "swizzle": swizzle}


def recorded(stub: Stub) -> dict[str, Any]:
    """The map that the last launch passed, as the numbers that it was encoded from."""
    words = list(stub.last.map)
    rank = words[2]
    box = [int(extent) for extent in np.array(words[14:16], np.uint64).view(np.uint32)]
    assert words[4] == 0  # no interleave, zeros outside
    return stub_map(words[0], words[1], words[5 : 5 + rank], words[10 : 9 + rank], box[:rank], words[3])


def in_stub_encoded(case: str) -> tuple[dict[str, Any], int]:
    """What is encoded, and how often in three launches."""
    stub = Stub()
    stub.expect_parameters(("ptr", "i32", "i32", "i32", "map"))
    before = stub.counter("stub_encodes")
    run = fetch.on("cuda")
    match case:
        case "matrix":
            launch = lambda: run(on_gpu(0x7000, (50, 96), (96, 1)), 0)
        case "rows apart":
            stub.expect_parameters(("ptr", "i32", "i32", "i32", "i32", "map"))
            launch = lambda: run(on_gpu(0x7000, (50, 96), (104, 1)), 0)
        case "narrow box":
            launch = lambda: run(on_gpu(0x7000, (50, 96), (96, 1)), 0, columns=32)
        case "no swizzle":
            launch = lambda: run(on_gpu(0x7000, (50, 96), (96, 1)), 0, rows=4, columns=8)
        case "part":
            launch = lambda: run(on_gpu(0x7000, (50, 96), (96, 1)), 5, part=True)
        case _:
            stub.expect_parameters(("ptr", "i32", "i32", "map"))
            run = fetch_of_three.on("cuda")
            launch = lambda: run(on_gpu(0x7000, (1, 9, 32), (7, 32, 1), "<f4"))
    for _ in range(3):
        launch()
    return recorded(stub), stub.counter("stub_encodes") - before


if __name__ == "__main__":
    pass
