"""The smallest kernel: each block loads a tile of both vectors, adds them and stores the sum.

    python examples/vector_add.py                            # on the GPU if there is one, else on numpy
    TILUS_DEVICE=emulator python examples/vector_add.py      # the same PTX that a GPU would run, on the CPU

Sizes need not be multiples of the tile: what lies outside of a tensor reads as zero and is not written.
"""

import numpy as np

import tilus
from tilus import Const, Tensor, f32


@tilus.kernel
def vector_add(x: Tensor[f32, "n"], y: Tensor[f32, "n"], out: Tensor[f32, "n"], *, block: Const = 1024):
    tilus.grid(tilus.cdiv(out.shape[0], block), warps=4)
    first = tilus.block_id(0) * block
    tilus.store(out, [first], tilus.load(x, [first], [block]) + tilus.load(y, [first], [block]))


def main(n: int = 5000) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, n), np.float32)
    out = np.empty_like(x)
    vector_add(x, y, out)
    np.testing.assert_array_equal(out, x + y)
    print(f"vector_add: {n} sums equal numpy's")


if __name__ == "__main__":
    main()
