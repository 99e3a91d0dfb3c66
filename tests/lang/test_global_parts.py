"""Parts of global tensors: slices mean what they mean in Python, and nothing outside of a part is read or written."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, f16, int32

BOUNDS = [None, 0, 1, 3, 5, 9, -1, -4, -9]


@tilus.kernel
def copy_slice(x: Tensor[int32, "n", "m"], y: Tensor[int32, 8, 8], *, rows: Const, columns: Const):
    tilus.grid(1, warps=1)
    part = x[rows[0] : rows[1], columns[0] : columns[1]]
    tilus.store(y, [0, 0], tilus.load(part, [0, 0], [8, 8]))


@pytest.mark.parametrize(("start", "stop"), [*itertools.product(BOUNDS, BOUNDS)])
def test_slices_with_constant_bounds_are_those_of_python(start: int | None, stop: int | None) -> None:
    x = np.arange(1, 31, dtype=np.int32).reshape(5, 6)
    for part, consts in [
        (x[start:stop], {"rows": (start, stop), "columns": (None, None)}),
        (x[1:, start:stop], {"rows": (1, None), "columns": (start, stop)}),
    ]:
        y = np.full((8, 8), -1, np.int32)
        copy_slice.on("reference")(x, y, **consts)
        expected = np.zeros((8, 8), np.int32)
        expected[: part.shape[0], : part.shape[1]] = part
        np.testing.assert_array_equal(y, expected)


@tilus.kernel
def ragged(x: Tensor[int32, "n", 4], starts: Tensor[int32, "s"], y: Tensor[int32, "n", 4]):
    """Adds to the rows from starts[i] on the same rows, read in another way."""
    tilus.grid(starts.shape[0] - 1, warps=1)
    i = tilus.block_id(0)
    begin, end = starts[i], starts[i + 1]
    rows = tilus.load(x[begin:end], [0, 0], [16, 4])
    same = tilus.load(tilus.narrow(x, 0, begin, end - begin), [0, 0], [16, 4])
    tilus.store(y[begin:end], [0, 0], rows + same)


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator"])
def test_parts_of_blocks_do_not_overlap(device: str) -> None:
    starts = np.array([0, 3, 3, 10, 11, 20], np.int32)
    x = np.arange(96, dtype=np.int32).reshape(24, 4)
    y = np.full_like(x, -1)
    ragged.on(device)(x, starts, y)
    expected = np.where(np.arange(24)[:, None] < 20, 2 * x, -1)
    np.testing.assert_array_equal(y, expected)


@given(begin=st.integers(0, 12), end=st.integers(0, 12))
def test_run_time_bounds_are_cut_to_the_tensor(begin: int, end: int) -> None:
    x = np.arange(1, 9, dtype=np.int32)
    for device in ("reference", "cpu", "emulator"):
        y = np.full(16, -1, np.int32)
        run_time_slice.on(device)(x, y, begin, end)
        part = x[begin:end]
        np.testing.assert_array_equal(y, np.pad(part, (0, 16 - len(part))))


@tilus.kernel
def run_time_slice(x: Tensor[int32, "n"], y: Tensor[int32, 16], begin: int32, end: int32):
    tilus.grid(1, warps=1)
    tilus.store(y, [0], tilus.load(x[begin:end], [0], [16]))


@tilus.kernel
def ring(x: Tensor[f16, "n", 64], y: Tensor[f16, "n", 64], *, stages: Const):
    """Copies 16 rows at a time through a ring of stages; stage numbers are remainders of sums."""
    tilus.grid(1, warps=1)
    buffer = tilus.shared(f16, [stages, 16, 64])
    for i in tilus.range(x.shape[0] // 16):
        tilus.store_shared(buffer[(i + stages - 1) % stages], tilus.load(x, [i * 16, 0], [16, 64]))
        tilus.sync()
        tilus.store(y, [i * 16, 0], tilus.load_shared(buffer[(i - 1) % stages]))
        tilus.sync()


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_remainders_index_shared_memory_from_inside(stages: int, device: str) -> None:
    x: Any = np.random.default_rng(stages).standard_normal((80, 64)).astype(np.float16)
    y = np.zeros_like(x)
    ring.on(device)(x, y, stages=stages)
    np.testing.assert_array_equal(x, y)
