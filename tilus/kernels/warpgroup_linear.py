"""Quantised linear layers on the tensor cores of Hopper's warpgroups: y = x W^T + b from the packed weights of `linear`.

A block computes 64 or 128 rows of the weight for `tokens` tokens. A producer warp keeps `stages` steps of `depth` tiles along K
on their way: packed codes and factors by bulk copies, activations by TMA. Warpgroups unpack codes into registers, which are the
left operand of wgmma, and take turns along K (`splits`): while one waits for its product, the others unpack. Their sums meet in
shared memory, those of `blocks` blocks along K in that of the first, always in the same order.

Sums of a group are scaled in f32, as in `linear`, so no weight is ever rounded. The producer asks for the first weights before it
waits for the kernel in front (programmatic dependent launch).
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, f16, f32, uint8
from tilus.dtypes import DTYPES, DataType
from tilus.kernels.byte_operands import UNPACKINGS, as_f32, exponent_of
from tilus.kernels.linear_step import residual
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE
from tilus.kernels.warpgroup_operands import Shape, Unpacking, copy_weights, table_entries, tile_nbytes
from tilus.kernels.warpgroup_schedule import STORED_TOKENS, WarpgroupPlan
from tilus.lang.kernel import Kernel
from tilus.layout import local


@tilus.kernel
def warpgroup_linear(
    x: Tensor["act", "m", "k"],
    codes: Tensor[uint8, "tiles_n", "codes_nbytes"],
    scales: Tensor[uint8, "tiles_n", "scales_nbytes"],
    y: Tensor["out", "m", "n"],
    global_scale: f32,
    mins: Tensor[uint8, "tiles_n", "mins_nbytes"] = None,
    zeros: Tensor[uint8, "tiles_n", "zeros_nbytes"] = None,
    table: Tensor[f32, 16] = None,
    bias: Tensor["bias_type", "n"] = None,
    x_scale: Tensor[f32, "m"] = None,
    *,
    wdtype: Const,
    scale_dtype: Const,
    mins_dtype: Const = None,
    span: Const,
    plan: Const,
):
    rows, splits, blocks = plan.rows, plan.splits, plan.blocks
    shape = plan.shape(span)
    group_warps, copiers = 4 * rows, 1 if plan.registers is None else 4
    tilus.grid(
        tilus.cdiv(codes.shape[0], rows) * blocks,
        tilus.cdiv(y.shape[0], plan.tokens),
        warps=group_warps * splits + copiers,
        cluster=blocks,
        blocks_per_sm=plan.blocks_per_sm,
    )
    tilus.launch_dependents()
    rank = tilus.block_id(0) % blocks
    row_tile, token = tilus.block_id(0) // blocks * rows, tilus.block_id(1) * plan.tokens
    all_steps = codes.shape[1] // (plan.depth * tile_nbytes(wdtype))
    begin = all_steps * rank // blocks
    steps = all_steps * (rank + 1) // blocks - begin

    factors = [(scales, scale_dtype), (mins, mins_dtype), (zeros, f16)]
    constant = [codes, scales, mins, zeros, table, bias]
    stages = Stages(plan.stages, x, codes, wdtype, factors, shape)
    own_sums = Sums(splits, plan.tokens, 32 * group_warps)
    all_sums = Sums(blocks, plan.tokens, 32 * group_warps)
    if blocks > 1:
        tilus.cluster_sync()

    with tilus.warps(group_warps * splits, copiers, registers=None if plan.registers is None else 40):
        stages.fill(row_tile, token, begin, steps, constant)

    for split in range(splits):
        with tilus.warps(group_warps * split, group_warps, registers=plan.registers):
            tilus.wait_dependencies(constant=constant)
            entries = table_entries(table, x.dtype, 32 * group_warps)
            if x_scale is None:
                kind, numbers, exponent = Unpacking, x.dtype, residual(wdtype, x.dtype, table, zeros, MMA)
            else:
                kind, numbers, exponent = UNPACKINGS[x.dtype], f16, exponent_of(wdtype, x.dtype, zeros is not None)
            unpacked = kind(wdtype, (scale_dtype, mins_dtype), numbers, entries, exponent, shape)
            once = unpacked.whole(factors, row_tile) if span == WHOLE else None
            total = sum_of_steps(unpacked, stages, once, split, steps, plan)
            if split > 0:
                own_sums.give(total, split)
            else:
                total = own_sums.added_to(total)
                if rank > 0:
                    all_sums.give(total, rank, block=0)
                else:
                    total = all_sums.added_to(total) * (global_scale * 2.0**exponent)
                    if x_scale is not None:
                        total = total * tilus.load(x_scale, [token], [plan.tokens])
                    result = tilus.cast(with_bias(total, bias, row_tile), y.dtype)
                    store_rows(y, [token, row_tile * TILE], result, 32 * group_warps)


class Stages:
    """Steps on their way through shared memory, each with a barrier that says that it is there and one that it is free."""

    def __init__(self, count: int, x, codes, wdtype: DataType, factors, shape: Shape):
        self.count = count
        self.shape = shape
        self.sources = (x, codes, factors)
        self.codes = tilus.shared(uint8, [count, shape.rows, shape.depth * tile_nbytes(wdtype)])
        self.x = tilus.shared(x.dtype, [count, shape.tokens, shape.columns])
        self.factors = [
            None
            if array is None or shape.span == WHOLE
            else tilus.shared(uint8, [count, shape.rows, shape.sets * TILE * dtype.nbytes])
            for array, dtype in factors
        ]
        self.full = tilus.mbarrier(count)
        self.empty = tilus.mbarrier(count)

    def fill(self, row_tile, token, begin, steps, constant):
        """The producer: `steps` steps from `begin` on. It asks for the first weights before the kernel in front has ended."""
        ahead = min(steps, self.count)
        for i in tilus.range(ahead):
            self.copy_weights(i, row_tile, begin + i)
        tilus.wait_dependencies(constant=constant)
        for i in tilus.range(ahead):
            self.copy_activations(i, token, begin + i)
        for i in tilus.range(ahead, steps):
            stage = i % self.count
            tilus.wait_barrier(self.empty[stage], (i // self.count + 1) % 2)
            self.copy_weights(stage, row_tile, begin + i)
            self.copy_activations(stage, token, begin + i)

    def copy_weights(self, stage, row_tile, step):
        """Ask for codes and factors, and tell the barrier how much is to come, activations included."""
        nbytes = self.codes[0].nbytes + self.x[0].nbytes
        for buffer in self.factors:
            if buffer is not None:
                nbytes = nbytes + buffer[0].nbytes
        tilus.arrive(self.full[stage], nbytes=nbytes)
        _, codes, factors = self.sources
        copy_weights(codes, factors, self.codes, self.factors, self.full, stage, row_tile, step, self.shape)

    def copy_activations(self, stage, token, step):
        start = [token, step * self.shape.columns]
        tilus.copy_tensor(self.x[stage], self.sources[0], start, barrier=self.full[stage])

    def of(self, step):
        """The stage of a step that is there."""
        return step % self.count

    def wait(self, step):
        """The stage of a step, once it is there."""
        stage = step % self.count
        tilus.wait_barrier(self.full[stage], step // self.count % 2)
        return stage


class Sums:
    """Where the first of `count` warpgroups, or blocks of a cluster, finds the sums of the others: once, or turn by turn."""

    def __init__(self, count: int, tokens: int, threads: int, turns: bool = False):
        self.count = count
        self.buffers = tilus.shared(f32, [max(1, count - 1), tokens // 8, threads, 4])
        self.done = tilus.mbarrier(1, arrivals=max(1, count - 1))
        self.taken = tilus.mbarrier() if turns else None

    def give(self, total, index, block=None, turn=0):
        """Leave the sums of the index-th, from 1 on, to the first one, which `block` of the cluster has (None: this one)."""
        if self.taken is not None:
            tilus.wait_barrier(self.taken, (turn + 1) % 2)
        tilus.store_shared(self.buffers[index - 1], by_thread(total), block=block)
        tilus.arrive(self.done[0], block=block)

    def added_to(self, total, turn=0):
        """Of the first one, plus those of the others, always in the same order."""
        if self.count == 1:
            return total
        tilus.wait_barrier(self.done[0], turn % 2)
        total = total + sum_of(self.buffers, total)
        if self.taken is not None:
            tilus.arrive(self.taken)
        return total


def with_bias(result, bias, row_tile):
    if bias is None:
        return result
    offsets = tilus.cast(tilus.load(bias, [row_tile * TILE], [result.shape[0]]), f32)
    return result + tilus.reshape(offsets, [result.shape[0], 1])


def by_thread(total):
    """[rows, tokens] of wgmma as [tokens / 8, threads, 4], so that a thread moves 16 bytes beside those of its neighbours."""
    rows, tokens = total.shape
    split = tilus.reshape(total, [rows // 16, 2, 8, tokens // 8, 4, 2])
    return tilus.reshape(tilus.transpose(split, [3, 0, 2, 4, 1, 5]), [tokens // 8, 2 * rows, 4])


def sum_of(buffers, total):
    """The sum of what `by_thread` made of other warpgroups' sums, like `total`."""
    rows, tokens = total.shape
    added = tilus.load_shared(buffers[0])
    for index in range(1, buffers.shape[0]):
        added = added + tilus.load_shared(buffers[index])
    split = tilus.reshape(added, [tokens // 8, rows // 16, 8, 4, 2, 2])
    return tilus.reshape(tilus.transpose(split, [1, 4, 2, 0, 3, 5]), [rows, tokens])


def store_rows(y, start, result, threads: int):
    """Write [rows, tokens] of wgmma to y [tokens, rows] in runs along the rows, some tokens at a time."""
    rows, tokens = result.shape
    part = min(tokens, STORED_TOKENS)
    size = min(8, part * rows // threads)
    layout = local(part * rows // (size * threads), 1).spatial(threads * size // rows, rows // size).local(1, size)
    for index in range(tokens // part):
        some = tilus.select(tilus.reshape(result, [rows, tokens // part, part]), 1, index)
        runs = tilus.with_layout(tilus.transpose(some), layout)
        tilus.store(y, [start[0] + index * part, start[1]], runs)


def sum_of_steps(unpacked: Unpacking, stages: Stages, once, split: int, steps, plan: WarpgroupPlan):
    """The products of a warpgroup's steps: `split`, `split + plan.splits`, ..."""
    total = tilus.zeros([TILE * plan.rows, plan.tokens], f32)
    if plan.scaled:
        return add_scaled(total, unpacked, stages, once, split, steps, plan)
    if plan.overlap == "steps" and unpacked.factor_dtypes[1] is None:
        return add_ahead(total, unpacked, stages, once, split, steps, plan)
    return add_groups(total, unpacked, stages, once, split, steps, plan)


def add_groups(total, unpacked, stages: Stages, once, split: int, steps, plan: WarpgroupPlan):
    """total + the products of a warpgroup's steps, piece by piece; with overlap the next is unpacked meanwhile."""
    shape, act = unpacked.shape, stages.x.dtype
    extents = (TILE * plan.rows, plan.tokens, shape.width)
    later = int(plan.overlap == "step")  # pieces after which one is scaled
    for i in tilus.range(split, steps, plan.splits):
        stage = stages.wait(i)
        under_way = []
        for piece in range(shape.pieces):
            scale, minimum, zero = once if once is not None else unpacked.factors(stages.factors, stage, piece)
            left, offsets = unpacked.weights(stages.codes, stage, piece, zero), [0, piece * shape.width]
            part = tilus.wgmma(left, stages.x[stage], shape=extents, y_offsets=offsets)
            sum_x = None
            if minimum is not None:
                ones = tilus.full([TILE * plan.rows, shape.width], 1, act)
                sum_x = tilus.wgmma(ones, stages.x[stage], shape=extents, y_offsets=offsets)
            under_way = [*under_way, (part, scale, sum_x, minimum)]
            if piece >= later:
                tilus.wgmma_wait(later if minimum is None else 2 * later)
                total = scaled_sum(total, *under_way[piece - later])
        if later > 0:
            tilus.wgmma_wait()
            total = scaled_sum(total, *under_way[shape.pieces - 1])
        tilus.arrive(stages.empty[stage])
    return total


def add_ahead(total, unpacked, stages: Stages, once, split: int, steps, plan: WarpgroupPlan):
    """The same without minimums. While tensor cores work on a piece, the next one is unpacked, be it of the next step."""
    shape = unpacked.shape
    extents = (TILE * plan.rows, plan.tokens, shape.width)
    together = shape.pieces // shape.sets  # pieces with the same factors, which are added up before they are scaled
    first = tilus.zeros([TILE * plan.rows, shape.width], stages.x.dtype)
    if split < steps:
        first = unpacked.piece(stages.codes, stages.factors, stages.wait(split), 0, once)
    for i in tilus.range(split, steps, plan.splits):
        stage = stages.of(i)
        part = tilus.wgmma(first, stages.x[stage], shape=extents, y_offsets=[0, 0])
        for piece in range(1, shape.pieces):
            left, offsets = unpacked.piece(stages.codes, stages.factors, stage, piece, once), [0, piece * shape.width]
            if piece % together == 0:
                tilus.wgmma_wait()
                total = tilus.fma(as_f32(part), unpacked.scale(stages.factors, stage, piece - 1, once), total)
                part = tilus.wgmma(left, stages.x[stage], shape=extents, y_offsets=offsets)
            else:
                part = tilus.wgmma(left, stages.x[stage], part, shape=extents, y_offsets=offsets)
        scale = unpacked.scale(stages.factors, stage, shape.pieces - 1, once)
        tilus.wgmma_wait(together - 1)  # no longer is the first piece read
        following = i + plan.splits
        if following < steps:
            next_stage = stages.wait(following)
            first = unpacked.piece(stages.codes, stages.factors, next_stage, 0, once)
        tilus.wgmma_wait()
        total = tilus.fma(as_f32(part), scale, total)
        tilus.arrive(stages.empty[stage])
    return total


def scaled_sum(total, part, scale, sum_x, minimum):
    """total + scale * part + minimum * sum_x, of the latter what there is."""
    result = tilus.fma(as_f32(part), scale, total)
    return result if minimum is None else tilus.fma(as_f32(sum_x), minimum, result)


def add_scaled(total, unpacked, stages: Stages, once, split: int, steps, plan: WarpgroupPlan):
    """The same with weights that are multiplied by their scales before the product, and rounded to the activations' type."""
    shape, act = unpacked.shape, stages.x.dtype
    extents = (TILE * plan.rows, plan.tokens, shape.width)
    before = 0
    for i in tilus.range(split, steps, plan.splits):
        stage = stages.wait(i)
        for piece in range(shape.pieces):
            scale, minimum, zero = once if once is not None else unpacked.factors(stages.factors, stage, piece)
            left = unpacked.weights(stages.codes, stage, piece, zero) * tilus.cast(scale, act)
            if minimum is not None:
                left = left + tilus.cast(minimum, act)
            total = tilus.wgmma(left, stages.x[stage], total, shape=extents, y_offsets=[0, piece * shape.width])
            tilus.wgmma_wait(1)
            if piece == 0 and i > split:
                tilus.arrive(stages.empty[before])
        before = stage
    tilus.wgmma_wait()
    return total


def kernel_call(
    x: Any, weight: QuantizedWeight, y: Any, bias: Any | None, plan: WarpgroupPlan, x_scale: Any | None = None
) -> tuple[Kernel, list[Any], dict[str, Any]]:
    """The kernel with its arguments and compile-time values, for activations whose columns are in the order of the weight's."""
    header = weight.header
    codes, scales, mins, zeros = (
        None if array is None else array.reshape(array.shape[0], -1)
        for array in (weight.codes, weight.scales, weight.mins, weight.zeros)
    )
    values = {
        "wdtype": header.dtype, "scale_dtype": DTYPES[header.scale_dtype],
        "mins_dtype": None if header.mins_dtype is None else DTYPES[header.mins_dtype],
        "span": header.span, "plan": plan,
    }  # fmt: skip
    arguments = [x, codes, scales, y, header.global_scale, mins, zeros, weight.table, bias, x_scale]
    return warpgroup_linear, arguments, values
