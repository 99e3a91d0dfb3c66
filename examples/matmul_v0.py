"""Matrix product, step 0: tensor cores, fed straight from global memory.

A block computes one tile of c. `dot` picks the tensor-core instruction, and with it which thread holds which element of its
operands; the loads take over that layout. In it a thread has pairs of neighbours of a and single elements of b, so every load is
narrow, and each warp fetches again what its neighbours have fetched already. `matmul.report()` shows it: 32 bits a load of a,
16 bits a load of b. Correct and short; step 1 makes the loads wide.
"""

import numpy as np

import tilus
from tilus import Const, Tensor, f16


@tilus.kernel
def matmul(
    a: Tensor[f16, "m", "k"],
    b: Tensor[f16, "k", "n"],
    c: Tensor[f16, "m", "n"],
    *,
    bm: Const = 64,
    bn: Const = 64,
    bk: Const = 16,
):
    m, n = c.shape
    tilus.grid(tilus.cdiv(m, bm), tilus.cdiv(n, bn), warps=4)
    i, j = tilus.block_id(0) * bm, tilus.block_id(1) * bn
    acc = tilus.zeros([bm, bn])
    for kk in tilus.range(0, a.shape[1], bk):
        acc = tilus.dot(tilus.load(a, [i, kk], [bm, bk]), tilus.load(b, [kk, j], [bk, bn]), acc)
    tilus.store(c, [i, j], acc.to(f16))


def main(m: int = 200, n: int = 136, k: int = 96) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((m, k), (k, n)))
    c = np.empty((m, n), np.float16)
    matmul(a, b, c)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, expected, rtol=2**-10, atol=2**-12)  # one rounding to f16, sums in f32
    print(f"matmul_v0: {m} x {n} x {k} agrees with numpy")


if __name__ == "__main__":
    main()
