"""Values survive the way through shared memory, whatever the layouts of memory and tiles are: vectors, matrices and copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor
from tilus.layout import (
    RegisterLayout,
    SharedLayout,
    atoms,
    auto,
    column_major,
    padded,
    row_major,
    spatial,
    strided,
    swizzled,
    wgmma_operands,
)

SHAPE = (32, 64)
MEMORIES = {
    "chosen": None,
    "padded by one": padded(SHAPE, 1),
    "padded": padded(SHAPE, 8),
    "column-major": column_major(SHAPE),
    "swizzled": swizzled(SHAPE, 2),
    "swizzled by words": row_major(SHAPE).swizzled(1, 5, 5),
    "columns swizzled": row_major((64, 32)).swizzled(3, 2, 3).permute((1, 0)),
    "core matrices": wgmma_operands(SHAPE, 2)[-1],
    "digits of three": strided(((2, 16), 64), ((3200, 96), 1)),
}
TILES = {
    "rows": spatial(2, 32).local(16, 2),
    "columns": auto(SHAPE, 64, 8, order=(0, 1)),
    "replicated": spatial(8, 4).replicated(2).local(4, 16),
    "a": spatial(2, 1).local(1, 4) * atoms.mma_a(),
    "b": spatial(1, 2).local(2, 4) * atoms.mma_b(),
    "accumulator": spatial(2, 1).local(1, 8) * atoms.mma_c(),
}


@pytest.fixture(params=["emulator", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@tilus.kernel
def through(x: Tensor["t", "m", "n"], y: Tensor["t", "m", "n"], *, memory: Const, tile: Const):
    tilus.grid(1, warps=2)
    s = tilus.shared(x.dtype, tile.shape, layout=memory)
    tilus.store_shared(s, tilus.load(x, [0, 0], shape=tile.shape))
    tilus.sync()
    value = tilus.load_shared(s, layout=tile)
    tilus.sync()
    tilus.store_shared(s, tilus.zeros(tile.shape, x.dtype))
    tilus.sync()
    tilus.store_shared(s, value)
    tilus.sync()
    tilus.store(y, [0, 0], tilus.load_shared(s))


@tilus.kernel
def parts(x: Tensor["t", "m", "n"], y: Tensor["t", "m", "n"], *, memory: Const, tile: Const):
    tilus.grid(1, warps=2)
    rows, columns = tile.shape
    ring = tilus.shared(x.dtype, [2, rows, columns], layout=None if memory is None else memory.stages(2))
    for part in tilus.range(tilus.cdiv(x.shape[0], rows)):
        stage = part % 2
        tilus.copy_async(x, [part * rows, 0], ring[stage])
        tilus.commit()
        tilus.wait(0)
        tilus.sync()
        tilus.store(y, [part * rows, 0], tilus.load_shared(ring[stage], layout=tile))


def values(dtype: Any, rows: int) -> Any:
    return np.random.default_rng(0).integers(0, 100, (rows, SHAPE[1])).astype(dtype)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_tiles(tile: RegisterLayout, memory: SharedLayout | None, device: str) -> None:
    x = values(np.float16, 32)
    y = np.zeros_like(x)
    through.on(device)(x, y, memory=memory, tile=tile)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("memory", [None, padded(SHAPE, 16), swizzled(SHAPE, 2), column_major(SHAPE)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64], ids=lambda t: t.__name__)
def test_other_widths(dtype: Any, memory: SharedLayout | None, device: str) -> None:
    x = values(dtype, 32)
    y = np.zeros_like(x)
    matrices = spatial(2, 1).local(2, 4) * atoms.ldmatrix(8)
    through.on(device)(x, y, memory=memory, tile=matrices)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("memory", [None, padded(SHAPE, 8), swizzled(SHAPE, 2), wgmma_operands(SHAPE, 2)[3]], ids=str)
@pytest.mark.parametrize("tile", [TILES["a"], TILES["b"], TILES["columns"]], ids=str)
def test_copies_into_a_ring(tile: RegisterLayout, memory: SharedLayout | None, device: str) -> None:
    x = values(np.float16, 80)
    y = np.zeros_like(x)
    parts.on(device)(x, y, memory=memory, tile=tile)
    np.testing.assert_array_equal(y, x)
