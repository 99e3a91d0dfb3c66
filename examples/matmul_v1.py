"""Matrix product, step 1: through shared memory.

The tiles are loaded once per block, 16 bytes a thread and neighbours side by side, and put into shared memory, where the warps
read them as tensor-core fragments. The buffers have no layout here: because `dot` reads from them, the compiler swizzles them so
that `ldmatrix` has no bank conflicts.

Two barriers a trip: nobody reads before all have written, and nobody overwrites before all have read.
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
    bk: Const = 32,
):
    m, n = c.shape
    tilus.grid(tilus.cdiv(m, bm), tilus.cdiv(n, bn), warps=4)
    i, j = tilus.block_id(0) * bm, tilus.block_id(1) * bn
    a_tile = tilus.shared(f16, [bm, bk])
    b_tile = tilus.shared(f16, [bk, bn])
    acc = tilus.zeros([bm, bn])
    for kk in tilus.range(0, a.shape[1], bk):
        tilus.store_shared(a_tile, tilus.load(a, [i, kk], [bm, bk]))
        tilus.store_shared(b_tile, tilus.load(b, [kk, j], [bk, bn]))
        tilus.sync()
        acc = tilus.dot(tilus.load_shared(a_tile), tilus.load_shared(b_tile), acc)
        tilus.sync()
    tilus.store(c, [i, j], acc.to(f16))


def main(m: int = 200, n: int = 136, k: int = 96) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((m, k), (k, n)))
    c = np.empty((m, n), np.float16)
    matmul(a, b, c)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, expected, rtol=2**-10, atol=2**-12)  # one rounding to f16, sums in f32
    print(f"matmul_v1: {m} x {n} x {k} agrees with numpy")


if __name__ == "__main__":
    main()
