"""Elements at indices of a tile: numpy's, for every layout and axis; indices outside of the tensor read as zero."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tile_programs import WARP_COUNTS, run_all, values_of

from tilus.dtypes import DataType, bf16, f16, f32, int8, int32, uint4
from tilus.errors import TilusError
from tilus.instructions.cast import cast
from tilus.instructions.gather import gather
from tilus.instructions.memory import load, store
from tilus.ir.builder import IRBuilder
from tilus.ir.tensor import GlobalTensor
from tilus.kernels.columns import take_columns


@given(
    st.randoms(use_true_random=False), st.sampled_from([f32, f16, bf16, int8, int32]), st.sampled_from(WARP_COUNTS),
    st.integers(0, 1), st.integers(-3, 3),
)  # fmt: skip
def test_gather(rng: random.Random, dtype: DataType, warps: int, axis: int, offset: int) -> None:
    """The offset is added to the indices; the other axis may reach outside, too."""
    generator = np.random.default_rng(rng.getrandbits(32))
    shape = (rng.randrange(1, 9), rng.choice([8, 12, 33]))
    source = tuple(rng.randrange(1, 40) for _ in range(2))
    x = values_of(rng, dtype, source)
    index = generator.integers(-2, source[axis] + 2, shape[axis]).astype(np.int32)
    places = [np.arange(shape[0])[:, None], np.arange(shape[1])[None]]
    places[axis] = index.reshape(places[axis].shape) + offset
    rows, columns = np.broadcast_arrays(*places)
    inside = (rows >= 0) & (rows < source[0]) & (columns >= 0) & (columns < source[1])
    expected = np.where(inside, x[np.where(inside, rows, 0), np.where(inside, columns, 0)], 0)

    def build(b: IRBuilder, x: GlobalTensor, index: GlobalTensor, y: GlobalTensor) -> None:
        offsets = [offset if d == axis else 0 for d in range(2)]
        at = load.build(b, index, [0], [shape[axis]])
        store.build(b, y, [0, 0], gather.build(b, x, offsets, at, shape, axis=axis))

    arrays = {"x": (dtype, x), "index": (int32, index), "y": (dtype, np.zeros(shape, x.dtype))}
    for found in run_all(build, arrays, warps):
        np.testing.assert_array_equal(found["y"], expected.astype(x.dtype))


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_take_columns(device: str, dtype: type) -> None:
    """Ragged in both directions, from rows that are strided."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 400)).astype(dtype)[:, 20:320]
    columns = rng.permutation(300).astype(np.int32)
    np.testing.assert_array_equal(take_columns(x, columns, device=device), x[:, columns])


def test_columns_that_do_not_fit() -> None:
    with pytest.raises(TilusError, match=r"x of shape \[4\] and columns of shape \[2\], expected \[M, S\] and \[K\]"):
        take_columns(np.zeros(4, np.float16), np.zeros(2, np.int32))


@pytest.mark.parametrize(
    ("dtype", "index_dtype", "message"),
    [
        (uint4, int32, "gather from x of uint4: single elements are read, expected whole bytes"),
        (f16, f32, "gather: indices of f32, expected int32"),
    ],
)
def test_misfits(dtype: DataType, index_dtype: DataType, message: str) -> None:
    def build(b: IRBuilder, x: GlobalTensor, index: GlobalTensor) -> None:
        gather.build(b, x, [0], cast.build(b, load.build(b, index, [0], [32]), index_dtype), [32])

    from tile_programs import compile_function, function, get_target, tensor

    tensors = {"x": tensor("x", dtype, [64]), "index": tensor("index", int32, [32])}
    with pytest.raises(TilusError, match=message):
        compile_function(function(build, tensors, 1), get_target("sm_90a"))
