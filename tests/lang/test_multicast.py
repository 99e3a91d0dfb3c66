"""Copies that land in several blocks of a cluster: each brings a part of what all of them want."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, f16, uint8
from tilus.errors import TilusError
from tilus.ptx.assembler import assemble
from tilus.target import get_target

# The emulator has no clusters.
DEVICES = ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]


@tilus.kernel
def broadcast(
    x: Tensor[f16, "m", "k"], w: Tensor[uint8, "blocks", "k", 64], y: Tensor[f16, "blocks", "m", "k"],
    z: Tensor[uint8, "clusters", "c", "k", 64], *, c: Const, rows: Const, stages: Const = 2,
):  # fmt: skip
    """Every block of a cluster sees the whole x, of which it copies `rows` rows itself, and the w of all blocks."""
    tilus.grid(w.shape[0], warps=5, cluster=c)
    xs = tilus.shared(f16, [stages, c, rows, 64])
    ws = tilus.shared(uint8, [stages, c, 64, 64])
    full = tilus.mbarrier(stages)
    empty = tilus.mbarrier(stages, arrivals=c)
    block, rank = tilus.block_id(0), tilus.cluster_rank()
    steps = x.shape[1] // 64
    everybody = (1 << c) - 1
    tilus.cluster_sync()
    with tilus.warps(4, 1):
        for i in tilus.range(steps):
            s = i % stages
            tilus.wait_barrier(empty[s], 1 - i // stages % 2)
            tilus.arrive(full[s], nbytes=xs[s].nbytes + ws[s].nbytes)
            tilus.copy_tensor(xs[s, rank], x, [rank * rows, i * 64], barrier=full[s], multicast=everybody)
            tilus.copy_bulk(ws[s, rank], w[block], [i * 64, 0], barrier=full[s], multicast=everybody, evict="first")
    with tilus.warps(0, 4):
        for i in tilus.range(steps):
            s = i % stages
            tilus.wait_barrier(full[s], i // stages % 2)
            for r in tilus.static_range(c):
                tilus.store(y, [block, r * rows, i * 64], tilus.load_shared(xs[s, r]))
            tilus.store(z, [block // c, 0, i * 64, 0], tilus.load_shared(ws[s]), dims=(1, 2, 3))
            for r in tilus.static_range(c):
                tilus.arrive(empty[s], block=r)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("c", [1, 2, 4])
def test_every_block_gets_what_all_of_them_copy(device: str, c: int) -> None:
    rng = np.random.default_rng(c)
    x = rng.standard_normal((8 * c, 320)).astype(np.float16)
    w = rng.integers(0, 256, (2 * c, 320, 64)).astype(np.uint8)
    y, z = np.zeros((2 * c, *x.shape), np.float16), np.zeros((2, c, 320, 64), np.uint8)
    broadcast.on(device)(x, w, y, z, c=c, rows=8)
    np.testing.assert_array_equal(y, np.broadcast_to(x, y.shape))
    np.testing.assert_array_equal(z, w.reshape(z.shape))


@tilus.kernel
def to_one(x: Tensor[uint8, "blocks", 64], y: Tensor[uint8, "blocks", 64], *, c: Const):
    """A mask that differs from block to block: everybody copies for its neighbour."""
    tilus.grid(x.shape[0], warps=1, cluster=c)
    tile = tilus.shared(uint8, [64])
    full = tilus.mbarrier(1)
    neighbour = (tilus.cluster_rank() + 1) % c
    tilus.cluster_sync()
    tilus.arrive(full, nbytes=64)
    tilus.copy_bulk(tile, x[tilus.block_id(0)], [0], barrier=full, multicast=1 << neighbour)
    tilus.wait_barrier(full, 0)
    tilus.store(y[tilus.block_id(0)], [0], tilus.load_shared(tile))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("c", [1, 2, 3, 8])
def test_masks_may_differ_from_block_to_block(device: str, c: int) -> None:
    x = np.random.default_rng(c).integers(0, 256, (2 * c, 64)).astype(np.uint8)
    y = np.zeros_like(x)
    to_one.on(device)(x, y, c=c)
    np.testing.assert_array_equal(y, np.roll(x.reshape(2, c, 64), 1, axis=1).reshape(x.shape))


def test_alone_a_block_copies_for_itself() -> None:
    assert ".multicast::cluster" not in to_one.ptx(c=1)
    assert to_one.ptx(c=2).count(".multicast::cluster ") == 1


@pytest.mark.parametrize("c", [1, 2, 4])
def test_the_assembler_takes_it(c: int) -> None:
    target = get_target("sm_90a")
    assert assemble(broadcast.ptx(c=c, rows=8), target).kernels[0].spill_store_nbytes == 0


@tilus.kernel
def mistaken(x: Tensor[uint8, "n", 64], *, mask: Const, sync: Const = True):
    tilus.grid(2, warps=1, cluster=2)
    tile = tilus.shared(uint8, [2, 64])
    full = tilus.mbarrier(1)
    if sync:
        tilus.cluster_sync()
    tilus.copy_bulk(tile, x, [0, 0], barrier=full, multicast=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mask": 0},
            "copy_bulk: multicast=0, expected a mask of the 2 blocks of the cluster, 1 to 3",
        ),
        (
            {"mask": 4},
            "copy_bulk: multicast=4, expected a mask of the 2 blocks of the cluster, 1 to 3",
        ),
        (
            {"mask": 3, "sync": False},
            "copy_bulk touches another block of the cluster before tilus.cluster_sync: it may not have started",
        ),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TilusError) as error:
        mistaken.ptx(**options)
    assert error.value.message == message
