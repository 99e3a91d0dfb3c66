"""Matrix products on other types of tensor cores: one kernel for int8, 8-bit floats and tf32.

`dot` takes the instruction from the dtypes (docs/language.md has the table): int8 adds up in int32 and is exact, 8-bit floats and
tf32 add up in f32. The second operand is [n, k], as weights are stored: rows of both are consecutive along k, so both arrive
from shared memory by ldmatrix, whatever the width of an element. f32 has no product of its own; cast to tf32 it keeps 11 bits.
"""

import numpy as np

import tilus
from tilus import Const, Tensor, float8_e4m3, int8, tf32


@tilus.kernel
def matmul(
    a: Tensor["t", "m", "k"],
    b: Tensor["t", "n", "k"],
    c: Tensor["sum", "m", "n"],
    *,
    operand: Const,
    bm: Const = 64,
    bn: Const = 64,
):
    m, n = c.shape
    tilus.grid(tilus.cdiv(m, bm), tilus.cdiv(n, bn), warps=4)
    i, j = tilus.block_id(0) * bm, tilus.block_id(1) * bn
    bk = 64 // a.dtype.nbytes
    a_tile = tilus.shared(a.dtype, [bm, bk])
    b_tile = tilus.shared(b.dtype, [bn, bk])
    acc = tilus.zeros([bm, bn], c.dtype)
    for kk in tilus.range(0, a.shape[1], bk):
        tilus.copy_async(a, [i, kk], a_tile)
        tilus.copy_async(b, [j, kk], b_tile)
        tilus.commit()
        tilus.wait(0)
        tilus.sync()
        left, right = tilus.load_shared(a_tile), tilus.load_shared(b_tile)
        acc = tilus.dot(left.to(operand), right.to(operand).T, acc)
        tilus.sync()
    tilus.store(c, [i, j], acc)


def main(m: int = 100, n: int = 72, k: int = 160) -> None:
    rng = np.random.default_rng(0)

    a, b = (rng.integers(-128, 128, shape, np.int8) for shape in ((m, k), (n, k)))
    c = np.empty((m, n), np.int32)
    matmul(a, b, c, operand=int8)
    assert np.array_equal(c, a.astype(np.int32) @ b.T.astype(np.int32))

    # Integers of few bits: their products and sums are exact in every type, in any order.
    codes = [float8_e4m3.encode(rng.integers(-4, 5, shape)) for shape in ((m, k), (n, k))]
    x, y = (tilus.packed(code, float8_e4m3, code.shape) for code in codes)
    c = np.empty((m, n), np.float32)
    matmul(x, y, c, operand=float8_e4m3)
    values = [float8_e4m3.decode(code) for code in codes]
    assert np.array_equal(c, values[0] @ values[1].T)

    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (n, k)))
    matmul(a, b, c, operand=tf32)
    rounded = [tf32.round(x).astype(np.float64) for x in (a, b)]
    # Sums in f32, in any order: at most k roundings of 2^-24 each, relative to the sum of magnitudes.
    bound = k * 2.0**-23 * (np.abs(rounded[0]) @ np.abs(rounded[1]).T)
    assert (np.abs(c - rounded[0] @ rounded[1].T) <= bound).all()
    print(f"matmul_types: {m} x {n} x {k} on {int8}, {float8_e4m3} and {tf32} agrees with numpy")


if __name__ == "__main__":
    main()
