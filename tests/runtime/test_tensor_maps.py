"""Tensor maps on their way to the hardware: what the driver is asked to encode, how often, and what is refused.

Functions named `in_stub_*` run in a process whose driver is a stub, which stores the numbers that a map is made from.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from libcuda_stub import Stub, failure
from python_calls import MOST_CALLS, calls_of

import tilus
from tilus import Const, Tensor, f16, f32, int32, uint64

Run = Callable[..., Any]
UINT16, UINT32 = 1, 2  # CU_TENSOR_MAP_DATA_TYPE
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


def recorded(stub: Stub) -> dict[str, Any]:
    """The map that the last launch passed, as the numbers that it was encoded from, innermost dim first."""
    words = list(stub.last.map)
    rank = words[2]
    box = [int(extent) for extent in np.array(words[14:16], np.uint64).view(np.uint32)]
    return {
        "address": words[0], "type": words[1], "swizzle": words[3], "interleave and fill": words[4],
        "shape": words[5 : 5 + rank], "strides": words[10 : 9 + rank], "box": box[:rank],
    }  # fmt: skip


def in_stub_encoded(arrays: list[dict[str, Any]], options: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """What the last of several launches encodes, and how many were encoded."""
    stub = Stub()
    stub.expect_parameters(kinds)
    kernel = (fetch_of_three if len(arrays[0]["shape"]) == 3 else fetch).on("cuda")
    before = stub.counter("stub_encodes")
    for array in arrays:
        kernel(on_gpu(**array), **options)
    return {**recorded(stub), "encodes": stub.counter("stub_encodes") - before}


MATRIX = {"address": 0x7000, "shape": (50, 96), "strides": (96, 1)}
PLAIN = ["ptr", "i32", "i32", "i32", "map"]


def encoded(shape: list[int], strides: list[int], box: list[int], swizzle: int, **others: Any) -> dict[str, Any]:
    defaults = {"address": 0x7000, "type": UINT16, "interleave and fill": 0, "encodes": 1}
    return {**defaults, "shape": shape, "strides": strides, "box": box, "swizzle": swizzle, **others}


@pytest.mark.parametrize(
    ("arrays", "options", "kinds", "expected"),
    [
        ([MATRIX], {"first": 0}, PLAIN, encoded([96, 50], [192], [64, 16], SWIZZLE_128B)),
        (
            [{**MATRIX, "strides": (104, 1)}],
            {"first": 0},
            ["ptr", *["i32"] * 4, "map"],
            encoded([96, 50], [208], [64, 16], SWIZZLE_128B),
        ),
        ([MATRIX], {"first": 0, "columns": 32}, PLAIN, encoded([96, 50], [192], [32, 16], SWIZZLE_64B)),
        ([MATRIX], {"first": 0, "columns": 80}, PLAIN, encoded([96, 50], [192], [16, 16], SWIZZLE_32B)),
        ([MATRIX], {"first": 0, "rows": 4}, PLAIN, encoded([96, 50], [192], [64, 4], SWIZZLE_NONE)),
        (
            [MATRIX],
            {"first": 5, "part": True},
            PLAIN,
            encoded([96, 8], [192], [64, 16], SWIZZLE_128B, address=0x7000 + 5 * 192),
        ),
        (  # the stride of a dim with one element means nothing, and may be one that the hardware refuses
            [{"address": 0x7000, "shape": (1, 9, 32), "strides": (7, 32, 1), "typestr": "<f4"}],
            {},
            ["ptr", "i32", "i32", "map"],
            encoded([32, 9, 1], [128, 16], [32, 4, 1], SWIZZLE_NONE, type=UINT32),
        ),
        (  # the map of an address is remembered
            [{**MATRIX, "address": 0x8000}, {**MATRIX, "address": 0x9010}] * 3,
            {"first": 0},
            PLAIN,
            encoded([96, 50], [192], [64, 16], SWIZZLE_128B, address=0x9010, encodes=2),
        ),
        (  # but not for another shape
            [{**MATRIX, "shape": (52, 96)}, {**MATRIX, "shape": (51, 96)}],
            {"first": 0},
            PLAIN,
            encoded([96, 51], [192], [64, 16], SWIZZLE_128B, encodes=2),
        ),
    ],
)  # fmt: skip
def test_the_map_of_an_argument(
    in_stub: Run, arrays: list[Any], options: dict[str, Any], kinds: list[str], expected: dict[str, Any]
) -> None:
    assert in_stub(in_stub_encoded, arrays, options, kinds) == expected


@tilus.kernel(varying=("m",))
def fetch_two(x: Tensor[f16, "m", "k"], weight: Tensor[f16, "n", "k"]):
    tilus.grid(1, warps=1)
    tiles = tilus.shared(f16, [2, 8, 64])
    full = tilus.shared(uint64, [1])
    tilus.copy_tensor(tiles[0], x, [0, 0], barrier=full[0])
    tilus.copy_tensor(tiles[1], weight, [0, 0], barrier=full[0])


def in_stub_shared(rows: list[int], layers: int) -> int:
    """How many maps are encoded for inputs of so many rows and the weights of so many layers."""
    stub = Stub()
    stub.expect_parameters(["ptr", "ptr", "i32", "i32", "i32", "map", "map"])
    before = stub.counter("stub_encodes")
    for m in rows:
        for layer in range(layers):
            fetch_two.on("cuda")(on_gpu(0x7000, (m, 96), (96, 1)), on_gpu(0x10000 * (layer + 1), (50, 96), (96, 1)))
    return stub.counter("stub_encodes") - before


def test_calls_with_other_sizes_share_the_maps_that_these_do_not_change(in_stub: Run) -> None:
    """An input has a map for each number of rows, and a weight has one."""
    rows, layers = [5, 6, 7, 5, 6], 4
    assert in_stub(in_stub_shared, rows, layers) == len(set(rows)) + layers


def in_stub_staged() -> tuple[int, int, int]:
    stub = Stub()
    stub.expect_parameters(PLAIN)
    fetch.on("cuda")(np.zeros((50, 96), np.float16), 0)
    return stub.last.args[0], stub.last.map[0], stub.counter("stub_live_allocations")


def test_the_map_of_an_array_that_was_copied_to_the_gpu(in_stub: Run) -> None:
    pointer, mapped, left = in_stub(in_stub_staged)
    assert pointer == mapped != 0 and left == 0


def in_stub_empty() -> int:
    stub = Stub()
    stub.expect_parameters(("ptr", "i32", "i32", "map"))
    before = stub.last.count
    nothing.on("cuda")(on_gpu(0x7000, (0, 64), (64, 1), "<f4"))
    return stub.last.count - before


def test_no_blocks_need_no_map(in_stub: Run) -> None:
    assert in_stub(in_stub_empty) == 0


def in_stub_refused(array: dict[str, Any], kinds: list[str], fails: bool) -> str:
    stub = Stub()
    stub.expect_parameters(kinds)
    if fails:
        stub.fail("cuTensorMapEncodeTiled", 1)
    return failure(lambda: fetch.on("cuda")(on_gpu(**array), 0))


@pytest.mark.parametrize(
    ("array", "kinds", "message"),
    [
        (
            {**MATRIX, "address": 0x7008},
            PLAIN,
            "a tensor copy of x: its address is 28680 bytes, expected a multiple of 16",
        ),
        (
            {**MATRIX, "strides": (100, 1)},
            ["ptr", *["i32"] * 4, "map"],
            "a tensor copy of x: the stride of dim 0 is 200 bytes, expected a multiple of 16",
        ),
        ({**MATRIX, "shape": (0, 96)}, PLAIN, "a tensor copy of x: dim 0 has 0 elements, expected 1 to 4294967295"),
    ],
)
def test_what_the_hardware_cannot_copy_is_refused_at_the_launch(
    in_stub: Run, array: dict[str, Any], kinds: list[str], message: str
) -> None:
    assert in_stub(in_stub_refused, array, kinds, False).startswith(message)


def test_an_error_of_the_driver_is_shown(in_stub: Run) -> None:
    message = in_stub(in_stub_refused, {**MATRIX, "address": 0xF000}, PLAIN, True)
    assert "cuTensorMapEncodeTiled failed with CUDA_ERROR_INVALID_VALUE (1)" in message


def in_stub_calls() -> float:
    launch = Stub().launcher(("ptr", "ptr", "ptr", "i32", "i32", "map", "map")).launch
    maps = {0x7000: bytes(128)}
    return calls_of("launch(64, 2, 1, 1, 2, 3, 4, 5, maps[0x7000], maps[0x7000])", launch=launch, maps=maps)


def test_a_launch_with_maps_costs_little_python(in_stub: Run) -> None:
    assert in_stub(in_stub_calls) < MOST_CALLS
