"""The products of a warpgroup's steps of a quantised linear layer on Hopper: unpack, multiply, scale, piece by piece."""

from __future__ import annotations

import tilus
from tilus import f32
from tilus.kernels.byte_operands import as_f32
from tilus.kernels.quantize.tiles import TILE
from tilus.kernels.warpgroup_operands import Unpacking
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_stages import Stages


def sum_of_steps(unpacked: Unpacking, stages: Stages, once, begin, steps, plan: WarpgroupPlan):
    """The products of a warpgroup's steps: `begin`, `begin + plan.splits`, ..."""
    total = tilus.zeros([TILE * plan.rows, plan.tokens], f32)
    if plan.scaled:
        return add_scaled(total, unpacked, stages, once, begin, steps, plan)
    if plan.overlap == "steps" and unpacked.factor_dtypes[1] is None:
        return add_ahead(total, unpacked, stages, once, begin, steps, plan)
    if plan.overlap == "others" and unpacked.factor_dtypes[1] is None:
        return add_narrow(total, unpacked, stages, once, begin, steps, plan)
    return add_groups(total, unpacked, stages, once, begin, steps, plan)


def add_groups(total, unpacked, stages: Stages, once, begin, steps, plan: WarpgroupPlan):
    """total + the products of a warpgroup's steps, piece by piece; with overlap the next is unpacked meanwhile."""
    if plan.unit == "mma":
        return add_fragments(total, unpacked, stages, once, begin, steps, plan)
    shape, act = unpacked.shape, stages.x.dtype
    extents = (TILE * plan.rows, plan.tokens, shape.width)
    later = int(plan.overlap == "step")  # pieces after which one is scaled
    for i in tilus.range(begin, steps, plan.splits):
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
        stages.give_back(stage)
    return total


def add_fragments(total, unpacked, stages: Stages, once, begin, steps, plan: WarpgroupPlan):
    """The same by the products of single warps. Each loads all activations, which are few."""
    shape, act = unpacked.shape, stages.x.dtype
    for i in tilus.range(begin, steps, plan.splits):
        stage = stages.wait(i)
        for piece in range(shape.pieces):
            scale, minimum, zero = once if once is not None else unpacked.factors(stages.factors, stage, piece)
            left = unpacked.weights(stages.codes, stage, piece, zero)
            x = tilus.load_shared(stages.x[stage], [0, piece * shape.width], [plan.tokens, shape.width])
            right, sum_x = tilus.transpose(x), None
            if minimum is not None:
                sum_x = tilus.dot(tilus.full([TILE * plan.rows, shape.width], 1, act), right)
            total = scaled_sum(total, tilus.dot(left, right), scale, sum_x, minimum)
        stages.give_back(stage)
    return total


def add_ahead(total, unpacked, stages: Stages, once, begin, steps, plan: WarpgroupPlan):
    """The same without minimums. While tensor cores work on a piece, the next one is unpacked, be it of the next step."""
    shape = unpacked.shape
    extents = (TILE * plan.rows, plan.tokens, shape.width)
    together = shape.pieces // shape.sets  # pieces with the same factors, which are added up before they are scaled
    first = tilus.zeros([TILE * plan.rows, shape.width], stages.x.dtype)
    if begin < steps:
        stage = stages.wait(begin)
        first = unpacked.piece(stages.codes, stages.factors, stage, 0, once)
    for i in tilus.range(begin, steps, plan.splits):
        stage = stages.at(i)
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
        stages.give_back(stage)
    return total


def add_narrow(total, unpacked, stages: Stages, once, begin, steps, plan: WarpgroupPlan):
    """The same without minimums, in few registers: while tensor cores work on a piece, other warpgroups unpack.

    Scales are asked for in front of the products: `give_back` waits for loads, and products of others would keep one behind the
    last product waiting for long.
    """
    shape = unpacked.shape
    extents = (TILE * plan.rows, plan.tokens, shape.width)
    together = shape.pieces // shape.sets  # pieces with the same factors, which are added up before they are scaled
    for i in tilus.range(begin, steps, plan.splits):
        stage = stages.wait(i)
        for first in range(0, shape.pieces, together):
            part, scale = None, unpacked.scale(stages.factors, stage, first, once)
            for piece in range(first, first + together):
                left, offsets = (
                    unpacked.piece(stages.codes, stages.factors, stage, piece, once),
                    [0, piece * shape.width],
                )
                part = tilus.wgmma(left, stages.x[stage], part, shape=extents, y_offsets=offsets)
                tilus.wgmma_wait()
            total = tilus.fma(as_f32(part), scale, total)
        stages.give_back(stage)
    return total


def scaled_sum(total, part, scale, sum_x, minimum):
    """total + scale * part + minimum * sum_x, of the latter what there is."""
    result = tilus.fma(as_f32(part), scale, total)
    return result if minimum is None else tilus.fma(as_f32(sum_x), minimum, result)


def add_scaled(total, unpacked, stages: Stages, once, begin, steps, plan: WarpgroupPlan):
    """The same with weights that are multiplied by their scales before the product, and rounded to the activations' type.

    Those of a whole tile are ready before its first product: were some made while the others' products are under way, ptxas would
    serialise all products (C7513).
    """
    shape, act = unpacked.shape, stages.x.dtype
    extents = (TILE * plan.rows, plan.tokens, shape.width)
    before = 0
    for i in tilus.range(begin, steps, plan.splits):
        stage = stages.wait(i)
        together = TILE // shape.width  # pieces of a tile
        for first in range(0, shape.pieces, together):
            lefts = []
            for piece in range(first, first + together):
                scale, minimum, zero = once if once is not None else unpacked.factors(stages.factors, stage, piece)
                left, factor = unpacked.weights(stages.codes, stage, piece, zero), tilus.cast(scale, act)
                if minimum is None:
                    lefts = [*lefts, left * factor]
                else:
                    lefts = [*lefts, tilus.fma(left, factor, tilus.cast(minimum, act))]
            for part in range(together):
                offsets = [0, (first + part) * shape.width]
                total = tilus.wgmma(lefts[part], stages.x[stage], total, shape=extents, y_offsets=offsets)
            tilus.wgmma_wait(together if shape.pieces > together else 0)
            if first == 0 and i > begin:
                stages.give_back(before)
        before = stage
    tilus.wgmma_wait()
    if plan.launched and begin < steps:
        stages.give_back(before)
    return total
