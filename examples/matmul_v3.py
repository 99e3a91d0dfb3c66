"""Matrix product, step 3: a pipeline of asynchronous copies.

Until now the tensor cores waited for memory in every trip. `copy_async` moves a tile to shared memory in the background, without
registers in between; `commit` closes a group of copies and `wait(p)` returns when at most p groups are still under way. With
`stages` buffers, `stages - 1` tiles are on their way while one is multiplied.

One barrier a trip is enough: after it, all warps have finished the previous trip, whose buffer is the one that is filled next.
Copies beyond the end of k fetch nothing and leave zeros, which nobody uses; they keep the count of groups simple.
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
    tilus.store(c, [i, j], acc.to(f16))


def main(m: int = 200, n: int = 136, k: int = 96) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((m, k), (k, n)))
    c = np.empty((m, n), np.float16)
    matmul(a, b, c)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, expected, rtol=2**-10, atol=2**-12)  # one rounding to f16, sums in f32
    print(f"matmul_v3: {m} x {n} x {k} agrees with numpy")


if __name__ == "__main__":
    main()
