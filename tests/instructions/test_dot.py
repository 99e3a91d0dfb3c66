"""Products of tiles with themselves: one tile as both operands of `dot`."""

from __future__ import annotations

import numpy as np
import pytest

import tilus
from tilus import Tensor, f16, f32


@tilus.kernel
def square(a: Tensor[f16, 32, 32], c: Tensor[f32, 32, 32]):
    tilus.grid(1, warps=2)
    tile = tilus.load(a, [0, 0], shape=[32, 32])
    tilus.store(c, [0, 0], tilus.dot(tile, tile))


@pytest.mark.parametrize("device", ["reference", "emulator"])
def test_both_operands_are_one_tile(device: str) -> None:
    a = np.random.default_rng(0).integers(-8, 8, (32, 32)).astype(np.float16)
    c = np.zeros((32, 32), np.float32)
    square.on(device)(a, c)
    assert np.array_equal(c, a.astype(np.float32) @ a.astype(np.float32))  # integers: exact in any order
