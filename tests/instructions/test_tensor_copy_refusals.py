"""Tensor copies that are refused: when the kernel is compiled, when it is launched, and when it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensor_copy_kernels import IN_FRONT, arguments, drawn, fetch, put

import tilus
from tilus import Const, Tensor, f16, int32, uint4
from tilus.errors import TilusError


@pytest.mark.parametrize("device", ["reference", "emulator"])
@pytest.mark.parametrize(("dtype", "extents", "shape", "dims", "offsets"), IN_FRONT)
def test_a_store_that_turns_out_to_start_in_front_of_the_tensor(
    device: str, dtype: Any, extents: tuple[int, ...], shape: tuple[int, int], dims: Any, offsets: tuple[int, ...]
) -> None:
    """The compiler cannot know the sign of an argument; the hardware stops the kernel."""
    d = next(d for d, offset in enumerate(offsets) if offset < 0)
    message = {
        "reference": f"store_tensor: offset {d} of y is {offsets[d]}, expected 0 or more",
        "emulator": rf"a store to a box at coordinates \({offsets[2]}, {offsets[1]}, {offsets[0]}\), expected 0 or more",
    }
    y = drawn(dtype, extents, 3)
    with pytest.raises(TilusError, match=message[device]):
        put.on(device)(drawn(dtype, shape, 2), y, *arguments(dtype, offsets), shape=shape, dims=dims)
    np.testing.assert_array_equal(y, drawn(dtype, extents, 3))


@tilus.kernel
def mistaken(
    x: Tensor[f16, "m", 64], odd: Tensor[f16, "m", 65], codes: Tensor[uint4, "m", 64], six: Tensor[f16, 1, 1, 1, 1, "m", 64],
    at: int32, *, case: Const,
):  # fmt: skip
    tilus.grid(1, warps=1)
    full = tilus.mbarrier(3)
    tile = tilus.shared(f16, [2, 8, 64], name="tile")
    match_dims = (1, 0)
    if case == "type":
        tilus.copy_tensor(tilus.shared(uint4, [8, 64]), codes, [0, 0], barrier=full[0])
    if case == "rank":
        tilus.copy_tensor(tile[0], six, [0, 0, 0, 0, 0, 0], barrier=full[0])
    if case == "order":
        tilus.copy_tensor(tilus.shared(f16, [64, 8]), x, [0, 0], dims=match_dims, barrier=full[0])
    if case == "last":
        tilus.copy_tensor(tilus.shared(f16, [64]), x, [0, 0], dims=(0,), barrier=full[0])
    if case == "stride":
        tilus.copy_tensor(tile[0], odd, [0, 0], barrier=full[0])
    if case == "row":
        tilus.copy_tensor(tilus.shared(f16, [8, 12]), x, [0, 0], barrier=full[0])
    if case == "large":
        tilus.copy_tensor(tilus.shared(f16, [264, 64]), x, [0, 0], barrier=full[0])
    if case == "start":
        tilus.copy_tensor(tilus.shared(f16, [2, 5, 24], name="stages")[1], x, [0, 0], barrier=full[0])
    if case == "block":
        tilus.copy_tensor(tile[0], tilus.narrow(x, 0, tilus.block_id(0) * 8, 8), [0, 0], barrier=full[0])
    if case == "inner":
        tilus.copy_tensor(tile[0], x, [0, 60], barrier=full[0])
    if case == "inner step":
        tilus.store_tensor(x, [0, at * 4], tile[0])
    if case == "inner unknown":
        tilus.copy_tensor(tile[0], x, [0, at], barrier=full[0])
    if case == "negative":
        tilus.store_tensor(x, [-8, 0], tile[0])
    if case == "negative inner":
        tilus.store_tensor(x, [at, -16], tile[0])
    if case == "negative block":
        tilus.store_tensor(x, [tilus.block_id(0) * 8 - 8, 0], tile[0])
    if case == "pinned":
        wide = tilus.shared(f16, [8, 64], layout=tilus.layout.padded([8, 64], 8))
        tilus.store_tensor(x, [0, 0], wide)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("type", "copy_tensor: codes of uint4, expected elements of 8, 16, 32 or 64 bits"),
        ("rank", "copy_tensor: six has rank 6, expected at most 5"),
        ("order", "copy_tensor: a tile along dims [1, 0] of x, expected ascending dims, the last one included"),
        ("last", "copy_tensor: a tile along dims [0] of x, expected ascending dims, the last one included"),
        ("stride", "copy_tensor: dim 0 of odd has a stride of 130 bytes, expected a multiple of 16"),
        (
            "row",
            "copy_tensor: a tile of shape [8, 12] of f16, whose rows are 24 bytes; expected at most 256 elements along each "
            "dim and rows of a multiple of 16 bytes",
        ),
        (
            "large",
            "copy_tensor: a tile of shape [264, 64] of f16, whose rows are 128 bytes; expected at most 256 elements along "
            "each dim and rows of a multiple of 16 bytes",
        ),
        ("start", "copy_tensor: the tile starts at multiples of 240 bytes of stages, expected 128 bytes"),
        (
            "block",
            "a tensor copy of x: where the view lies depends on block_id(0); expected a tensor that is known when the kernel is "
            "launched",
        ),
        (
            "inner",
            "copy_tensor: the last offset of x, 60, is known to be a multiple of 120 bytes, expected 16 bytes",
        ),
        (
            "inner step",
            "store_tensor: the last offset of x, (at * 4), is known to be a multiple of 8 bytes, expected 16 bytes",
        ),
        (
            "inner unknown",
            "copy_tensor: the last offset of x, at, is known to be a multiple of 2 bytes, expected 16 bytes",
        ),
        ("negative", "store_tensor: offset 0 of x, -8, may be -8, expected 0 or more"),
        ("negative inner", "store_tensor: offset 1 of x, -16, may be -16, expected 0 or more"),
        ("negative block", "store_tensor: offset 0 of x, ((block_id(0) * 8) - 8), may be -8, expected 0 or more"),
    ],
)
def test_mistakes(case: str, message: str) -> None:
    with pytest.raises(TilusError) as error:
        mistaken.ptx(case=case)
    assert error.value.message == message
    assert error.value.loc is not None and error.value.hint


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("inner", "copy_tensor: .* multiple of 120 bytes"),
        ("inner step", "store_tensor: .* multiple of 8 bytes"),
        ("negative block", "may be -8"),
    ],
)
def test_the_reference_refuses_what_the_compiler_does(case: str, message: str) -> None:
    x, odd = np.zeros((8, 64), np.float16), np.zeros((8, 65), np.float16)
    six, codes = np.zeros((1, 1, 1, 1, 8, 64), np.float16), tilus.packed(np.zeros(256, np.uint8), uint4, [8, 64])
    with pytest.raises(TilusError, match=message):
        mistaken.on("reference")(x, odd, codes, six, 0, case=case)


def test_a_pinned_layout_that_the_hardware_cannot_read() -> None:
    with pytest.raises(
        TilusError, match=r"store_tensor cannot work with layout strided\(.*\) of wide; expected one of row_major"
    ):
        mistaken.ptx(case="pinned")


def test_a_transposed_tensor_is_refused() -> None:
    x, y = drawn(f16, (1, 64, 40), 9), np.zeros((8, 40), np.float16)
    with pytest.raises(TilusError, match="the last dim of x has stride x_stride2, expected 1"):
        fetch.on("reference")(x.transpose(0, 2, 1), y, 0, 0, 0, shape=(8, 40))


def test_the_emulator_checks_addresses_at_the_launch() -> None:
    storage = np.zeros(8 + 40 * 64, np.float16)
    skew = (storage.ctypes.data // 2) % 8
    x = storage[8 - skew + 1 :][: 39 * 64].reshape(1, 39, 64)
    with pytest.raises(TilusError, match=r"a tensor copy of x: its address is [0-9]+ bytes, expected a multiple of 16"):
        fetch.on("emulator")(x, np.zeros((8, 64), np.float16), 0, 0, 0, shape=(8, 64))


def test_other_targets_are_refused() -> None:
    with pytest.raises(TilusError, match=r"tilus\.store_tensor needs sm_90a or a later GPU, the target is sm_89"):
        only_store.ptx(target="sm_89")
    with pytest.raises(TilusError, match=r"kernel only_store uses tilus\.store_tensor, which needs a GPU"):
        only_store.on("cpu")(np.zeros((8, 64), np.float16))


@tilus.kernel
def only_store(x: Tensor[f16, "m", 64]):
    tilus.grid(1, warps=1)
    tilus.store_tensor(x, [0, 0], tilus.shared(f16, [8, 64]))
