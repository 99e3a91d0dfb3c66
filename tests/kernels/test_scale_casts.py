"""float8_e8m0, the type of block scales, in kernels: every code to every float, and rounding back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

import tilus
from tilus import Tensor, bf16, f16, f32
from tilus.dtypes import float8_e8m0


@tilus.kernel
def scales(
    codes: Tensor[float8_e8m0, 256],
    singles: Tensor[f32, 256],
    brains: Tensor[bf16, 256],
    halves: Tensor[f16, 256],
    values: Tensor[f32, "n"],
    rounded: Tensor[float8_e8m0, "n"],
):
    tilus.grid(1, warps=2)
    tile = tilus.load(codes, [0], shape=[256])
    tilus.store(singles, [0], tilus.cast(tile, f32))
    tilus.store(brains, [0], tilus.cast(tile, bf16))
    tilus.store(halves, [0], tilus.cast(tile, f16))
    for i in tilus.range(0, values.shape[0], 256):
        tilus.store(rounded, [i], tilus.cast(tilus.load(values, [i], shape=[256]), float8_e8m0))


def test_every_scale_and_every_rounding(device: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    positive = np.random.default_rng(0).integers(0x00800000, 0x7F800000, 1000, np.uint32).view(np.float32)
    middles = np.float32(1.5) * expected[1:254]
    values = np.concatenate(
        [positive, middles, np.nextafter(middles, np.float32(0)), np.float32([np.nan, 0.0, -1.0, np.inf])]
    )
    values = values[values != 1.5 * 2.0**127]  # saturates here, and is NaN in ml_dtypes
    values[values > 2.0**127] = 2.0**127
    singles, rounded = np.empty(256, np.float32), np.zeros(len(values), np.uint8)
    brains, halves = torch.empty(256, dtype=torch.bfloat16), np.empty(256, np.float16)
    scales.on(device)(
        tilus.packed(codes, float8_e8m0, (256,)), singles, brains, halves, values,
        tilus.packed(rounded, float8_e8m0, (len(values),)),
    )  # fmt: skip
    np.testing.assert_array_equal(singles, expected)
    np.testing.assert_array_equal(brains.float().numpy(), expected)
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_array_equal(halves, expected.astype(np.float16))
    wanted = values.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    wanted[-3:] = 0, 0, 254
    np.testing.assert_array_equal(rounded, wanted)
