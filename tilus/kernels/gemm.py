"""Dense linear layers on Hopper: y = x W^T (+ bias) for 16-bit and 8-bit floats.

The weight is the left operand and tokens are columns, y^T = W x^T, so that a few tokens waste no rows of the tensor cores. A block
computes tiles of `rows` outputs by `tokens`, one after the other, as many blocks as fit run at once. One warpgroup brings operands
(TMA) into a ring of stages, two multiply them (wgmma), scale and round the sums, and give them to a tensor copy, which
transposed stores have put in order. While they do that, the stages of the next tile fill.

In a cluster, blocks with the same tokens bring one part of them each, for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import empty, is_cuda
from tilus.runtime.execute import place

BAND = 8  # neighbouring rows of clusters that take turns, so that what they read is found in the L2 cache
CONSUMERS, PRODUCERS = 8, 4  # warps
ROW_NBYTES = 128  # of an operand's tile: the widest swizzle


@tilus.kernel
def gemm_kernel(
    x: Tensor["x_type", "m", "k"],
    w: Tensor["w_type", "n", "k"],
    y: Tensor["out", "m", "n"],
    scale: f32,
    blocks: int32,
    x_scale: Tensor[f32, "m"] = None,
    w_scale: Tensor[f32, "n"] = None,
    bias: Tensor["bias_type", "n"] = None,
    *,
    rows: Const = 128,
    tokens: Const = 256,
    stages: Const = 4,
    cluster: Const = 1,
):
    tilus.grid(blocks, warps=CONSUMERS + PRODUCERS, cluster=cluster)
    m, n = y.shape
    depth = ROW_NBYTES // x.dtype.nbytes
    steps = tilus.cdiv(x.shape[1], depth)
    w_tiles = tilus.shared(w.dtype, [stages, rows, depth])
    x_tiles = tilus.shared(x.dtype, [stages, tokens, depth])
    full, empty = tilus.mbarrier(stages), tilus.mbarrier(stages, arrivals=cluster)
    tilus.cluster_sync()

    rank, clusters = tilus.cluster_rank(), blocks // cluster
    first = tilus.block_id(0) // cluster
    token_tiles, row_tiles = tilus.cdiv(m, tokens), tilus.cdiv(n, rows * cluster)
    count = tilus.cdiv(token_tiles * row_tiles - first, clusters)

    def tile_at(index):
        """Row and token at which a tile starts: bands of rows, in which rows vary fastest."""
        number = first + index * clusters
        band = number // (BAND * token_tiles)
        height = min(row_tiles - band * BAND, BAND)
        within = number - band * BAND * token_tiles
        row = band * BAND + within % height
        return (row * cluster + rank) * rows, within // height * tokens

    with tilus.warps(CONSUMERS, PRODUCERS, registers=40):
        filled = 0
        for index in tilus.range(count):
            row, token = tile_at(index)
            for step in tilus.range(steps):
                stage = filled % stages
                tilus.wait_barrier(empty[stage], (filled // stages + 1) % 2)
                tilus.arrive(full[stage], nbytes=(rows + tokens) * ROW_NBYTES)
                tilus.copy_tensor(w_tiles[stage], w, [row, step * depth], barrier=full[stage])
                part = tokens // cluster
                tilus.copy_tensor(
                    x_tiles[stage], x, [token + rank * part, step * depth], shape=[part, depth],
                    dst_offsets=[rank * part, 0], barrier=full[stage], multicast=None if cluster == 1 else (1 << cluster) - 1,
                )  # fmt: skip
                filled += 1

    with tilus.warps(0, CONSUMERS, registers=232):
        used = 0
        y_tiles = tilus.shared(y.dtype, [2, min(tokens, 64), rows])
        for index in tilus.range(count):
            row, token = tile_at(index)
            total = tilus.zeros([rows, tokens])
            for step in tilus.range(steps):
                tilus.wait_barrier(full[used % stages], used // stages % 2)
                total = tilus.wgmma(w_tiles[used % stages], x_tiles[used % stages], total)
                tilus.wgmma_wait(1)
                if step > 0:
                    give_back(empty, (used + stages - 1) % stages, cluster)
                used += 1
            tilus.wgmma_wait()
            give_back(empty, (used + stages - 1) % stages, cluster)
            by_row = row_factors(scale, w_scale, bias, row, rows)
            store_tile(y, y_tiles, total, by_row, x_scale, row, token, index)
        tilus.wait_stores()


def give_back(empty, stage, cluster: int):
    """All blocks that bring parts of this stage may fill it again."""
    if cluster == 1:
        tilus.arrive(empty[stage])
    else:
        for rank in range(cluster):
            tilus.arrive(empty[stage], block=rank)


def row_factors(scale, w_scale, bias, row, rows: int):
    """Factors and offsets of the rows of y^T, [rows, 1]; None where there are none."""
    factor = scale
    if w_scale is not None:
        factor = tilus.reshape(tilus.load(w_scale, [row], [rows]), [rows, 1]) * scale
    offset = None
    if bias is not None:
        offset = tilus.reshape(tilus.load(bias, [row], [rows]).to(f32), [rows, 1])
    return factor, offset


def store_tile(y, y_tiles, total, by_row, x_scale, row, token, number):
    """Scale and round the sums [rows, tokens], and start to store them as [tokens, rows], some tokens at a time. Two buffers take
    turns, from tile `number` to tile, too."""
    part = y_tiles.shape[1]
    rows, tokens = total.shape
    factor, offset = by_row
    parts = tilus.reshape(total, [rows, tokens // part, part])
    for index in range(tokens // part):
        result = tilus.select(parts, 1, index) * factor
        if x_scale is not None:
            result = result * tilus.load(x_scale, [token + index * part], [part])
        if offset is not None:
            result = result + offset
        tilus.wait_stores(1, reads_only=True)
        tilus.sync()
        buffer = y_tiles[(number * (tokens // part) + index) % 2]
        tilus.store_shared(buffer, result.to(y.dtype).T)
        tilus.fence_async()
        tilus.sync()
        tilus.store_tensor(y, [token + index * part, row], buffer)
        tilus.commit_stores()
