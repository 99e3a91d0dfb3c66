"""Index arithmetic that is hoisted out of code stands where all of its uses pass."""

from __future__ import annotations

import numpy as np
import pytest

import tilus
from tilus import Tensor, f32


@tilus.kernel
def sides(x: Tensor[f32, "n"], y: Tensor[f32, "n"]):
    tilus.grid(2, warps=1)
    for k in tilus.range(3):
        if k > 1:
            tilus.store(y, [k * 32], tilus.full([32], 1, f32))
        elif k == tilus.block_id(0):
            tilus.store(y, [k * 32], tilus.load(x, [k * 5 + 3], shape=[32]))
        else:
            tilus.store(y, [k * 32 + 96], tilus.load(x, [k * 7 + 4], shape=[32]))


@pytest.mark.parametrize("device", ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_only_the_second_side_of_a_branch_needs(device: str) -> None:
    x = np.arange(200, dtype=np.float32)
    y = np.zeros_like(x)
    sides.on(device)(x, y)
    expected = np.zeros_like(x)
    expected[:64] = np.concatenate([x[3:35], x[8:40]])
    expected[64:96] = 1
    expected[96:160] = np.concatenate([x[4:36], x[11:43]])
    np.testing.assert_array_equal(y, expected)
