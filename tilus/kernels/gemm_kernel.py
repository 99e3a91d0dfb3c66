"""The dense product on Hopper: y^T = W x^T. The weight is the left operand, so that few tokens waste no rows of tensor cores.

A block computes tiles of `rows` outputs by `tokens`, one after the other. One role brings operands (TMA) into a ring of
stages, each of 128 bytes along K. Each warpgroup beside it multiplies 64 of the rows (wgmma), scales and rounds its sums, and
gives them to a tensor copy. Warpgroups do not wait for each other, so that one stores while another still multiplies, and
stages of the next tile fill meanwhile.

Few tokens read weights and do little else. Then warpgroups take turns along K (`splits`), and blocks of a cluster have parts
of K each (`blocks`); sums meet in shared memory, always in the same order. With many tokens blocks of a cluster bring parts of
the same activations (`share_x`) or weights (`share_w`) for each other instead.
"""

from __future__ import annotations

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.dtypes import DataType
from tilus.kernels.gemm_schedule import GROUP_ROWS, ROW_NBYTES, Plan
from tilus.kernels.linear_results import finished, offsets_of
from tilus.kernels.warpgroup_sums import Sums

GROUP_WARPS = 4
COPYING = 40  # registers of a thread that brings operands
BAND = 8  # neighbouring rows of clusters that take turns, so that what they read is found in the L2 cache


@tilus.kernel
def gemm_kernel(
    x: Tensor["act", "m", "k"],
    w: Tensor["weight", "n", "k"],
    y: Tensor["out", "m", "width"],
    scale: f32,
    launched: int32,
    x_scale: Tensor[f32, "m"] = None,
    w_scale: Tensor[f32, "n"] = None,
    bias: Tensor["bias_type", "n"] = None,
    *,
    plan: Const,
    constant: Const = False,
    activation: Const = None,
):
    """activation: of a gated weight, whose results are half as many as its rows."""
    tilus.grid(launched, warps=plan.warps, cluster=plan.team)
    tilus.launch_dependents()
    tiles = Tiles(plan, x.shape[0], w.shape[0], launched)
    constants = [w, w_scale, bias] if constant else []
    depth = ROW_NBYTES // x.dtype.nbytes
    all_steps = tilus.cdiv(x.shape[1], depth)
    part = tilus.cluster_rank() if plan.blocks > 1 else 0
    begin = part * all_steps // plan.blocks
    steps = (part + 1) * all_steps // plan.blocks - begin

    ring = Ring(plan, x, w, tiles.rank)
    sum_type = int32 if x.dtype.is_integer else f32
    own_sums = [Sums(plan.splits, plan.tokens, 32 * GROUP_WARPS, sum_type, turns=True) for _ in range(plan.groups)]
    all_sums = [Sums(plan.blocks, plan.tokens, 32 * GROUP_WARPS, sum_type, turns=True) for _ in range(plan.groups)]
    if plan.team > 1:
        tilus.cluster_sync()

    copying = None if plan.registers is None else COPYING
    with tilus.warps(GROUP_WARPS * plan.warpgroups, plan.copiers, registers=copying):
        ring.fill(tiles, begin, steps, constants)

    for split in range(plan.splits):
        for group in range(plan.groups):
            number = split * plan.groups + group
            with tilus.warps(GROUP_WARPS * number, GROUP_WARPS, registers=plan.registers):
                tilus.wait_dependencies(constant=constants)
                if split > 0:
                    for index in tilus.range(tiles.count):
                        total = ring.products(group, split, index * steps, steps, sum_type)
                        own_sums[group].give(total, split, index)
                else:
                    results = Results(plan, y, (scale, x_scale, w_scale, bias), activation)
                    for index in tilus.range(tiles.count):
                        row, token = tiles.at(index)
                        row += group * GROUP_ROWS
                        factors = results.factors(row, token)
                        total = ring.products(group, 0, index * steps, steps, sum_type)
                        total = own_sums[group].added_to(total, index)
                        if part > 0:
                            all_sums[group].give(total, part, index, block=0)
                        else:
                            total = all_sums[group].added_to(total, index, across=True)
                            results.store(total, factors, row, token, index)
                    tilus.wait_stores()


class Tiles:
    """The tiles of a block, in bands of rows in which rows vary fastest, so that what is read again is found in the L2 cache."""

    def __init__(self, plan: Plan, m, n, launched):
        self.plan = plan
        self.last = max(m - plan.tokens, 0)
        self.rank = tilus.cluster_rank() if plan.blocks == 1 else 0
        self.first, self.teams = tilus.block_id(0) // plan.team, launched // plan.team
        self.token_tiles = tilus.cdiv(m, plan.tokens * plan.share_w)
        self.row_tiles = tilus.cdiv(n, plan.rows * plan.share_x)
        self.count = tilus.cdiv(self.token_tiles * self.row_tiles - self.first, self.teams)

    def at(self, index):
        """Row and token at which a tile starts. The last of several has tokens of the one in front, too, and none behind the end,
        for which copies take long."""
        plan = self.plan
        number = self.first + index * self.teams
        band = number // (BAND * self.token_tiles)
        height = min(self.row_tiles - band * BAND, BAND)
        within = number - band * BAND * self.token_tiles
        row, token = band * BAND + within % height, within // height
        row = row * plan.share_x + self.rank % plan.share_x
        token = token * plan.share_w + self.rank // plan.share_x
        return row * plan.rows, min(token * plan.tokens, self.last)


class Ring:
    """Stages of both operands, each with a barrier that says that it is there and one that it is free.

    The blocks of a cluster are numbered along rows first: `share_x` neighbours have the same tokens.
    """

    def __init__(self, plan: Plan, x, w, rank):
        self.plan, self.x, self.w, self.rank = plan, x, w, rank
        self.depth = ROW_NBYTES // x.dtype.nbytes
        self.w_tiles = tilus.shared(w.dtype, [plan.stages, plan.rows, self.depth])
        self.x_tiles = tilus.shared(x.dtype, [plan.stages, plan.tokens, self.depth])
        self.full = tilus.mbarrier(plan.stages)
        self.empty = tilus.mbarrier(plan.stages, arrivals=plan.groups * (plan.share_x + plan.share_w - 1))

    def fill(self, tiles: Tiles, begin, steps, constants):
        """The producer: all steps of all tiles. It asks for the first constant weights before the kernel in front has ended."""
        stages = self.plan.stages
        ahead = min(steps, stages)
        if len(constants) == 0:
            tilus.wait_dependencies()
        row, token = tiles.at(0)
        for step in tilus.range(ahead):
            self.copy_weights(step, row, begin + step)
        if len(constants) > 0:
            tilus.wait_dependencies(constant=constants)
        for step in tilus.range(ahead):
            self.copy_activations(step, token, begin + step)
        filled = ahead
        for index in tilus.range(tiles.count):
            row, token = tiles.at(index)
            for step in tilus.range(filled - index * steps, steps):
                stage = filled % stages
                tilus.wait_barrier(self.empty[stage], (filled // stages + 1) % 2)
                self.copy_weights(stage, row, begin + step)
                self.copy_activations(stage, token, begin + step)
                filled += 1

    def copy_weights(self, stage, row, step):
        """Ask for this block's part of the rows, and tell the barrier how much is to come, activations included."""
        plan = self.plan
        tilus.arrive(self.full[stage], nbytes=self.w_tiles[0].nbytes + self.x_tiles[0].nbytes)
        part = plan.rows // plan.share_w
        start = self.rank // plan.share_x * part
        tilus.copy_tensor(
            self.w_tiles[stage], self.w, [row + start, step * self.depth], shape=[part, self.depth], dst_offsets=[start, 0],
            barrier=self.full[stage], multicast=self.same_rows(), evict="first" if plan.once else None,
        )  # fmt: skip

    def copy_activations(self, stage, token, step):
        plan = self.plan
        part = plan.tokens // plan.share_x
        start = self.rank % plan.share_x * part
        tilus.copy_tensor(
            self.x_tiles[stage], self.x, [token + start, step * self.depth], shape=[part, self.depth],
            dst_offsets=[start, 0], barrier=self.full[stage], multicast=self.same_tokens(),
        )  # fmt: skip

    def same_rows(self):
        """Mask of the blocks with this block's rows; None where it is alone."""
        plan = self.plan
        if plan.share_w == 1:
            return None
        return sum(1 << plan.share_x * other for other in range(plan.share_w)) << self.rank % plan.share_x

    def same_tokens(self):
        """Mask of the blocks with this block's tokens; None where it is alone."""
        plan = self.plan
        if plan.share_x == 1:
            return None
        return ((1 << plan.share_x) - 1) << self.rank // plan.share_x * plan.share_x

    def products(self, group: int, split: int, first, steps, sum_type: DataType):
        """The sums [64, tokens] of one warpgroup's steps of a tile, the first step of which has the number `first` in the ring.
        Step number i belongs to split i % splits."""
        plan = self.plan
        stages, splits = plan.stages, plan.splits
        extents = (GROUP_ROWS, plan.tokens, self.depth)
        total = tilus.zeros([GROUP_ROWS, plan.tokens], sum_type)
        start = (split + (splits - 1) * first) % splits
        for step in tilus.range(start, steps, splits):
            stage = (first + step) % stages
            tilus.wait_barrier(self.full[stage], (first + step) // stages % 2)
            total = tilus.wgmma(
                self.w_tiles[stage], self.x_tiles[stage], total, shape=extents, x_offsets=[group * GROUP_ROWS, 0]
            )
            tilus.wgmma_wait(1)
            if step > start:
                self.give_back((first + step + stages - splits) % stages)
        tilus.wgmma_wait()
        if start < steps:
            last = first + start + (steps - 1 - start) // splits * splits
            self.give_back(last % stages)
        return total

    def give_back(self, stage):
        """All blocks that bring parts of this stage may fill it again."""
        plan = self.plan
        if plan.share_x * plan.share_w == 1:
            tilus.arrive(self.empty[stage])
            return
        row, token = self.rank % plan.share_x, self.rank // plan.share_x
        for other in range(plan.share_x):
            tilus.arrive(self.empty[stage], block=token * plan.share_x + other, reads_only=True)
        for further in range(1, plan.share_w):
            other = (token + further) % plan.share_w
            tilus.arrive(self.empty[stage], block=other * plan.share_x + row, reads_only=True)


class Results:
    """What a warpgroup makes of its sums, and the two buffers from which it is stored in turn, some tokens at a time."""

    def __init__(self, plan: Plan, y, factors, activation):
        self.y, self.activation = y, activation
        self.scale, self.x_scale, self.w_scale, self.bias = factors
        self.stored = plan.stored
        self.per_output = 1 if activation is None else 2
        self.buffers = tilus.shared(y.dtype, [2, plan.stored, GROUP_ROWS // self.per_output])

    def factors(self, row, token):
        """Factors and offsets of the rows of y^T, [64, 1], and scales of the tokens that are stored first; None where there are
        none. They are asked for in front of the products, so that nobody waits for them."""
        by_row = self.scale
        if self.w_scale is not None:
            by_row = tilus.reshape(tilus.load(self.w_scale, [row], [GROUP_ROWS]), [GROUP_ROWS, 1]) * self.scale
        offsets = offsets_of(self.bias, row, GROUP_ROWS, self.activation is not None)
        return by_row, offsets, self.token_scales(token)

    def token_scales(self, token):
        return None if self.x_scale is None else tilus.load(self.x_scale, [token], [self.stored])

    def store(self, total, factors, row, token, number):
        """Scale and round the sums [64, tokens] of tile `number`, and start to store what becomes of them, [tokens, 64 or 32]."""
        part = self.stored
        rows, tokens = total.shape
        by_row, offsets, scales = factors
        parts = tilus.reshape(total, [rows, tokens // part, part])
        for index in range(tokens // part):
            result = tilus.select(parts, 1, index).to(f32) * by_row
            if scales is not None:
                result = result * (scales if index == 0 else self.token_scales(token + index * part))
            result = finished(result, offsets, self.activation)
            tilus.wait_stores(1, reads_only=True)
            tilus.sync()
            buffer = self.buffers[(number * (tokens // part) + index) % 2]
            tilus.store_shared(buffer, result.to(self.y.dtype).T)
            tilus.fence_async()
            tilus.sync()
            tilus.store_tensor(self.y, [token + index * part, row // self.per_output], buffer)
            tilus.commit_stores()
