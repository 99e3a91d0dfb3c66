"""Softmax of every row: reductions, and a mask where "outside reads as zero" is not what the mathematics needs.

One block computes one row and keeps it in registers between the load and the store. The tile is wider than the row: the
elements beyond it arrive as zeros, but a maximum and a sum of exponentials need minus infinity there.
"""

import math

import numpy as np

import tilus
from tilus import Const, Tensor, f32


@tilus.kernel
def softmax(x: Tensor[f32, "rows", "columns"], out: Tensor[f32, "rows", "columns"], *, width: Const):
    tilus.grid(x.shape[0], warps=4)
    row = tilus.block_id(0)
    inside = tilus.arange(width) < x.shape[1]
    values = tilus.where(inside, tilus.load(x, [row, 0], [width]), -math.inf)
    weights = tilus.exp(values - tilus.max(values, 0, keepdims=True))
    tilus.store(out, [row, 0], weights / tilus.sum(weights, 0, keepdims=True))


def main(rows: int = 7, columns: int = 1000) -> None:
    x = 4 * np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    out = np.empty_like(x)
    softmax(x, out, width=1 << (columns - 1).bit_length())
    weights = np.exp(np.float64(x) - x.max(1, keepdims=True))
    np.testing.assert_allclose(out, weights / weights.sum(1, keepdims=True), rtol=1e-5)
    print(f"softmax: {rows} rows of {columns} agree with numpy")


if __name__ == "__main__":
    main()
