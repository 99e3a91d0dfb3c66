"""What the tests of tensor copies share: kernels that copy one tile, and tiles that only copies from a tensor may have."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import tilus
from tilus import Const, Tensor, f16, f32, int32, uint8

Array = npt.NDArray[Any]


@tilus.kernel
def fetch(
    x: Tensor["T", "a", "b", "c"], y: Tensor["T", "p", "q"], i: int32, j: int32, piece: int32, *, shape: Const,
    dims: Const = None, stage: Const = 1, warps: Const = 1, evict: Const = None,
):  # fmt: skip
    """A tile of rank 2 through one of three stages of shared memory. piece: where it starts in its rows, in 16 bytes."""
    tilus.grid(1, warps=warps)
    tile = tilus.shared(x.dtype, [3, *shape])
    full = tilus.mbarrier(3)
    tilus.arrive(full[stage], nbytes=tile[stage].nbytes)
    k = piece * (16 // x.dtype.nbytes)
    tilus.copy_tensor(tile[stage], x, [i, j, k], barrier=full[stage], evict=evict, dims=dims)
    tilus.wait_barrier(full[stage], 0)
    tilus.store(y, [0, 0], tilus.load_shared(tile[stage]))


@tilus.kernel
def put(
    x: Tensor["T", "p", "q"], y: Tensor["T", "a", "b", "c"], i: int32, j: int32, piece: int32, *, shape: Const,
    dims: Const = None, warps: Const = 1, evict: Const = None,
):  # fmt: skip
    tilus.grid(1, warps=warps)
    tile = tilus.shared(x.dtype, [2, *shape])
    tilus.store_shared(tile[1], tilus.load(x, [0, 0], shape))
    tilus.fence_async()
    tilus.sync()
    tilus.store_tensor(y, [i, j, piece * (16 // y.dtype.nbytes)], tile[1], evict=evict, dims=dims)
    tilus.commit_stores()
    tilus.wait_stores(reads_only=True)
    tilus.wait_stores()


def drawn(dtype: Any, shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).integers(1, 200, shape).astype(dtype.numpy)


# Tiles that start in front of the tensor, which only copies from it may.
IN_FRONT = [
    (f16, (3, 40, 96), (8, 32), None, (2, -3, 80)),
    (f16, (3, 40, 96), (8, 32), None, (2, -8, 32)),
    (f16, (3, 40, 96), (8, 32), None, (2, 4, -8)),
    (f16, (3, 40, 96), (8, 32), None, (-1, 4, 8)),
    (f16, (3, 40, 96), (24, 48), None, (2, 20, -40)),
    (uint8, (2, 20, 80), (16, 80), None, (1, 10, -16)),
    (f32, (4, 9, 64), (1, 256), None, (0, 8, -100)),
    (f32, (9, 3, 64), (8, 16), (0, 2), (-5, 2, 56)),
]


def arguments(dtype: Any, offsets: tuple[int, ...]) -> tuple[int, ...]:
    """The last offset in pieces of 16 bytes, as the kernels take it."""
    piece, rest = divmod(offsets[-1] * dtype.nbytes, 16)
    assert rest == 0
    return (*offsets[:-1], piece)
