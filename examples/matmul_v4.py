"""Matrix product, step 4: whole rows on the way out.

The accumulators lie in registers as the tensor cores leave them: a thread holds pairs of neighbouring elements, so step 3 writes
4 bytes at a time. Here the result goes through shared memory once more and is read back in rows, eight neighbouring elements
a thread, so that each store writes 16 bytes and a warp's stores lie side by side.

In a row-major buffer the eight rows that a warp writes at a time would meet in the same memory banks. `swizzled` gives each row
another order of its 16-byte chunks; what the layout is changes speed, never results.
"""

import numpy as np

import tilus
from tilus import Const, Tensor, f16
from tilus.layout import swizzled


@tilus.kernel
def matmul(
    a: Tensor[f16, "m", "k"],
    b: Tensor[f16, "k", "n"],
    c: Tensor[f16, "m", "n"],
    *,
    bm: Const = 128,
    bn: Const = 128,
    bk: Const = 32,
    stages: Const = 3,
):
    m, n = c.shape
    tilus.grid(tilus.cdiv(m, bm), tilus.cdiv(n, bn), warps=8)
    i, j = tilus.block_id(0) * bm, tilus.block_id(1) * bn
    a_tiles = tilus.shared(f16, [stages, bm, bk])
    b_tiles = tilus.shared(f16, [stages, bk, bn])

    def fetch(tile, stage):
        tilus.copy_async(a, [i, tile * bk], a_tiles[stage])
        tilus.copy_async(b, [tile * bk, j], b_tiles[stage])
        tilus.commit()

    for tile in range(stages - 1):
        fetch(tile, tile)
    acc = tilus.zeros([bm, bn])
    for tile in tilus.range(tilus.cdiv(a.shape[1], bk)):
        tilus.wait(stages - 2)
        tilus.sync()
        fetch(tile + (stages - 1), (tile + (stages - 1)) % stages)
        stage = tile % stages
        acc = tilus.dot(tilus.load_shared(a_tiles[stage]), tilus.load_shared(b_tiles[stage]), acc)
    c_tile = tilus.shared(f16, [bm, bn], layout=swizzled((bm, bn), f16.nbytes))
    tilus.store_shared(c_tile, acc.to(f16))
    tilus.sync()
    tilus.store(c, [i, j], tilus.load_shared(c_tile))


def main(m: int = 200, n: int = 136, k: int = 96) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((m, k), (k, n)))
    c = np.empty((m, n), np.float16)
    matmul(a, b, c)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, expected, rtol=2**-10, atol=2**-12)  # one rounding to f16, sums in f32
    print(f"matmul_v4: {m} x {n} x {k} agrees with numpy")


if __name__ == "__main__":
    main()
