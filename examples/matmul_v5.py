"""Matrix product, step 5: Hopper's way (sm_90a). Copies and products run by themselves; threads only start and wait for them.

One warp is the *producer*: it starts tensor copies (TMA), which bring whole tiles into shared memory, zeros where a tile leaves
the matrix, in the order of bytes that tensor cores want. Two warpgroups are the *consumers*: `wgmma` reads both tiles from shared
memory, so nothing passes through registers but the sums.

The two sides meet at barriers in shared memory, two for each stage. `full` counts the bytes that have landed, `empty` says that
the products which read the stage are done. A barrier's phases take turns between 0 and 1 every time that the stages have gone
round. Nobody ever waits for the whole block.

One product is always under way: the consumers begin the next one before they wait for the last, and then give its stage back.
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
    bk: Const = 64,
    stages: Const = 4,
):
    m, n = c.shape
    tilus.grid(tilus.cdiv(m, bm), tilus.cdiv(n, bn), warps=9)
    i, j = tilus.block_id(0) * bm, tilus.block_id(1) * bn
    steps = tilus.cdiv(a.shape[1], bk)
    a_tiles = tilus.shared(f16, [stages, bm, bk])
    b_tiles = tilus.shared(f16, [stages, bk, bn])
    full, empty = tilus.mbarrier(stages), tilus.mbarrier(stages)

    with tilus.warps(8, 1):
        for step in tilus.range(steps):
            stage, phase = step % stages, step // stages % 2
            tilus.wait_barrier(empty[stage], 1 - phase)  # in the first round all stages are empty
            tilus.arrive(full[stage], nbytes=(bm + bn) * bk * f16.nbytes)
            tilus.copy_tensor(a_tiles[stage], a, [i, step * bk], barrier=full[stage])
            tilus.copy_tensor(b_tiles[stage], b, [step * bk, j], barrier=full[stage])

    with tilus.warps(0, 8):
        acc = tilus.zeros([bm, bn])
        for step in tilus.range(steps):
            stage, phase = step % stages, step // stages % 2
            tilus.wait_barrier(full[stage], phase)
            acc = tilus.wgmma(a_tiles[stage], b_tiles[stage], acc, y_transposed=True)  # y is [n, k] unless it is said
            tilus.wgmma_wait(1)
            if step > 0:
                tilus.arrive(empty[(step - 1) % stages])
        tilus.wgmma_wait()
        c_tile = tilus.shared(f16, [bm, bn])
        tilus.store_shared(c_tile, acc.to(f16))
        tilus.fence_async()  # what threads wrote must be seen by the copy
        tilus.sync()
        tilus.store_tensor(c, [i, j], c_tile)
        tilus.commit_stores()
        tilus.wait_stores()


def main(m: int = 200, n: int = 136, k: int = 320) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((m, k), (k, n)))
    c = np.empty((m, n), np.float16)
    matmul(a, b, c)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, expected, rtol=2**-10, atol=2**-11)  # one rounding to f16, sums in f32
    print(f"matmul_v5: {m} x {n} x {k} agrees with numpy")


if __name__ == "__main__":
    main()
