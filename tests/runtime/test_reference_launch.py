"""Laws of a launch: how arguments bind, what is refused, and that neither chunks nor threads can be seen."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_oracle import Atomic, Fill, Give, Load, Probe, Store, function, tensor

from tilus.dtypes import DataType, bf16, boolean, f16, f32, int32, int64, pack_bits, uint3, uint4, unpack_bits
from tilus.errors import TilusError
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import BlockId, Var, binary, cast, const
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import For, Inst
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.runtime.reference import run_reference

X, Y = BlockId(0), BlockId(1)
N, M = Var("n", int32), Var("m", int32)
GRID = (1, 1, 1)


def matrix(name: str, dtype: DataType = f32, rows: Any = N, columns: Any = M) -> GlobalTensor:
    return tensor(name, dtype, (rows, columns), (Var(f"{name}_s0", int64), Var(f"{name}_s1", int64)))


def observe(params: tuple[GlobalTensor | Var, ...], scalar: Var, args: dict[str, Any]) -> Any:
    """The value of a scalar variable in a launch."""
    t, seen = RegisterTensor(scalar.dtype, (1,)), []
    run_reference(function(Fill(t, scalar), Probe(t, GRID, seen), params=params), args, GRID)
    return seen[0].item()


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from([f32, f16, bf16, boolean, int64]))
def test_dims_and_strides_count_elements(rows: int, columns: int, transposed: bool, dtype: DataType) -> None:
    array = np.zeros((rows, 2 * columns), dtype.numpy or dtype.storage)[:, ::2]
    array = array.T if transposed else array
    a = matrix("a", dtype)
    assert observe((a,), N, {"a": array}) == array.shape[0]
    assert observe((a,), M, {"a": array}) == array.shape[1]
    for dim in range(2):
        if array.shape[dim] > 1:
            assert observe((a,), a.strides[dim], {"a": array}) == array.strides[dim] // array.itemsize


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"a": np.zeros((2, 3), np.float32)}, "kernel got the arguments a, expected a, b, c"),
        ({"a": [1]}, "argument a is list, expected a numpy array"),
        ({"a": np.zeros((2, 3))}, "argument a has dtype float64, expected float32 for f32"),
        ({"a": np.zeros(3, np.float32)}, "argument a has 1 dimensions, expected 2"),
        (
            {"b": np.zeros((2, 3), np.float32)},
            "dimension 0 of b is 2, but m is 3 in another argument, expected the same",
        ),
        ({"b": np.zeros((3, 8), np.float32)}, "dimension 1 of b is 8, expected 4"),
        ({"c": 1.5}, "argument c is float, expected an integer for int32"),
        ({"c": 2**31}, "argument c is 2147483648, expected -2147483648 to 2147483647 for int32"),
        ({"c": 10}, "c is 10, expected a multiple of 4"),
        ({"c": 4}, "c is 4, expected at least 8"),
        ({"c": 20}, "c is 20, expected at most 16"),
    ],
)
def test_unfit_arguments_are_refused(args: dict[str, Any], message: str) -> None:
    params = (matrix("a"), matrix("b", f32, M, 4), Var("c", int32, lower=8, upper=16, multiple_of=4))
    fit = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((3, 4), np.float32), "c": 8}
    run_reference(function(params=params), fit, GRID)
    given_args = args if "expected a, b, c" in message else fit | args
    with pytest.raises(TilusError) as caught:
        run_reference(function(params=params), given_args, GRID)
    assert caught.value.message == message


def test_packed_tensors_find_their_dims() -> None:
    a, n = tensor("a", uint4, (N, M), (M, 1)), Var("extra", int32)
    assert observe((a,), M, {"a": np.zeros((2, 3), np.uint8)}) == 6
    assert observe((a, matrix("b")), N, {"a": np.zeros(3, np.uint8), "b": np.zeros((2, 3), np.float32)}) == 2
    with pytest.raises(TilusError, match=r"dimension n of a is unknown: its 3 bytes hold packed uint4"):
        observe((a,), N, {"a": np.zeros(3, np.uint8)})
    with pytest.raises(TilusError, match=r"argument a has 4 bytes, expected 3 for uint4\[2, 3\]"):
        observe((a, matrix("b")), N, {"a": np.zeros(4, np.uint8), "b": np.zeros((2, 3), np.float32)})
    with pytest.raises(TilusError, match="argument a is not contiguous"):
        observe((a, n), n, {"a": np.zeros((4, 4), np.uint8)[:, ::2], "extra": 0})


def test_a_view_larger_than_its_memory_is_refused() -> None:
    base = tensor("a", f32, (4,))
    wide = GlobalTensor(f32, (const(9),), (const(1),), base.base, name="wide")
    t = RegisterTensor(f32, (8,))
    fn = function(Load(t, wide, (const(0),), (0,)), params=(base,))
    with pytest.raises(TilusError, match=r"element 4 of the memory behind it, expected 0 <= element < 4"):
        run_reference(fn, {"a": np.zeros(4, np.float32)}, GRID)


def test_unfit_tiles_are_refused() -> None:
    t = RegisterTensor(f32, (2,), name="acc")
    for value in (np.zeros((1, 1, 1, 3), np.float32), np.zeros((1, 1, 1, 2)), np.zeros((1, 2), np.float32)):
        with pytest.raises(TilusError, match=r"tile acc got .*, expected float32\[gx, gy, gz, \*\[2\]\]"):
            run_reference(function(Give(t, value)), {}, GRID)


def doubled_rows(dtype: DataType, shape: tuple[int, int]) -> Function:
    """y = x, and in column 4 * i + 1 the number of the block and of its last iteration: all ways to touch memory."""
    x, y, buffer = tensor("x", dtype, shape), tensor("y", dtype, shape), SharedTensor(dtype, (4,))
    t, mark, i = RegisterTensor(dtype, (4,)), RegisterTensor(dtype, (1,), mutable=True), Var("i", int32)
    at = (X, binary("*", Y, 4))
    step = Inst(Fill(mark, cast(binary("+", i, 1), dtype)))
    return function(
        Load(t, x, at, (1,)), Store(buffer, t, (const(0),), (0,)), Fill(mark, cast(binary("%", Y, 4), dtype)),
        For(i, const(0), binary("%", X, 3), 1, step), Load(t, buffer, (const(0),), (0,)),
        Store(y, t, at, (1,)), Store(y, mark, (X, binary("+", at[1], 1)), (1,)), params=(x, y),
    )  # fmt: skip


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 4)), st.sampled_from([f32, int32, uint3]), st.integers(1, 300),
    st.integers(1, 3),
)  # fmt: skip
def test_chunks_and_threads_cannot_be_seen(
    grid: tuple[int, int], dtype: DataType, max_chunk_nbytes: int, max_threads: int
) -> None:
    shape = (grid[0], 4 * grid[1] - 1)
    values = np.random.default_rng(0).integers(0, 8, shape).astype(dtype.compute)
    codes = dtype.encode(values)
    x = pack_bits(codes.reshape(-1), dtype) if dtype.nbits < 8 else codes.view(dtype.numpy)
    y = np.zeros_like(x)
    run_reference(
        doubled_rows(dtype, shape), {"x": x, "y": y}, (*grid, 1),
        max_chunk_nbytes=max_chunk_nbytes, max_threads=max_threads,
    )  # fmt: skip
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        values[row, 4 * column + 1] = row % 3 or column % 4
    found = unpack_bits(y, dtype, values.size).reshape(shape) if dtype.nbits < 8 else y
    np.testing.assert_array_equal(found, values)


@dataclass(frozen=True, eq=False)
class Thread(Instruction):
    """Notes the thread that runs the chunk."""

    mnemonic = "test.thread"

    seen: set[threading.Thread]

    def evaluate(self, env: Evaluation) -> None:
        self.seen.add(threading.current_thread())


@pytest.mark.parametrize(("dtype", "atomic", "alone"), [(f32, False, False), (f32, True, True), (uint4, False, True)])
def test_chunks_run_side_by_side_only_where_blocks_cannot_meet(dtype: DataType, atomic: bool, alone: bool) -> None:
    """Atomic updates happen in block order, and packed neighbours share bytes."""
    y, t, seen = tensor("y", dtype, (64,)), RegisterTensor(dtype, (1,)), set[threading.Thread]()
    write = Atomic(t, y, t, (X,), (0,), "add") if atomic else Store(y, t, (X,), (0,))
    fn = function(Fill(t, const(1, dtype)), Thread(seen), write, params=(y,))
    memory = np.zeros(64, np.float32) if dtype == f32 else np.zeros(32, np.uint8)
    run_reference(fn, {"y": memory}, (64, 1, 1), max_chunk_nbytes=1, max_threads=2)
    assert (seen == {threading.current_thread()}) == alone


def test_errors_of_threads_reach_the_caller() -> None:
    x, t = tensor("x", f32, (4,)), RegisterTensor(f32, (1,))
    fn = function(Load(t, x, (X,), (0,), checked=False), params=(x,))
    with pytest.raises(TilusError, match=r"load of x in block \(4, 0, 0\), tile element \[0\]: index 4"):
        run_reference(fn, {"x": np.zeros(4, np.float32)}, (9, 1, 1), max_chunk_nbytes=1, max_threads=2)


def test_an_empty_grid_runs_nothing() -> None:
    t = RegisterTensor(f32, (1,))
    for grid in ((0, 1, 1), (2, 0, 1), (1, 1, 0)):
        run_reference(function(Give(t, np.zeros(1))), {}, grid)


def test_compiled_functions_live_as_long_as_the_function() -> None:
    fn = function(Fill(RegisterTensor(f32, (1,)), const(0.0)))
    run_reference(fn, {}, GRID)
    alive = weakref.ref(fn)
    del fn
    gc.collect()
    assert alive() is None
