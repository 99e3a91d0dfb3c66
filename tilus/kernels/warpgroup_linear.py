"""Quantised linear layers on the tensor cores of Hopper's warpgroups: y = x W^T + b from the packed weights of `linear`.

A block computes 64 or 128 rows of the weight for `tokens` tokens. A producer warp keeps `stages` steps of `depth` tiles along K
on their way: packed codes and factors by bulk copies, activations by TMA. Warpgroups unpack codes into registers, which are the
left operand of wgmma, and take turns along K (`splits`): while one waits for its product, the others unpack. Their sums meet in
shared memory, those of `blocks` blocks along K in that of the first, always in the same order.

Sums of a group are scaled in f32, as in `linear`, so no weight is rounded, but by plans that are `scaled`: of more than 128
tokens, and of more than 8 or 16 where groups have fewer columns than a tile, or minimums. Norms in front and behind may be parts
of the kernel (`deferred_norm`). The producer asks for the first weights before it waits for the kernel in front (programmatic
dependent launch).
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, f16, f32, int32, uint8
from tilus.dtypes import DTYPES, DataType
from tilus.kernels.activation import Activation
from tilus.kernels.allocate import counters, empty
from tilus.kernels.byte_operands import UNPACKINGS, exponent_of
from tilus.kernels.deferred_norm import NO_NORMS, Norms, RootMeanSquares
from tilus.kernels.linear_step import residual
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE
from tilus.kernels.warpgroup_operands import Unpacking, table_entries, tile_nbytes
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_products import sum_of_steps
from tilus.kernels.warpgroup_results import Results
from tilus.kernels.warpgroup_stages import Stages
from tilus.kernels.warpgroup_sums import Sums
from tilus.kernels.warpgroup_tiles import Tiles
from tilus.lang.kernel import Kernel


@tilus.kernel(varying=("m", "tiles_n"))
def warpgroup_linear(
    x: Tensor["act", "m", "k"],
    codes: Tensor[uint8, "tiles_n", "codes_nbytes"],
    scales: Tensor[uint8, "tiles_n", "scales_nbytes"],
    y: Tensor["out", "m", "width"],
    global_scale: f32,
    launched: int32,
    eps: f32,
    stream_scale: f32,
    mins: Tensor[uint8, "tiles_n", "mins_nbytes"] = None,
    zeros: Tensor[uint8, "tiles_n", "zeros_nbytes"] = None,
    table: Tensor[f32, 16] = None,
    bias: Tensor["bias_type", "biases"] = None,
    partial: Tensor[f32, "places", 2, "eights", "threads", 4] = None,
    tickets: Tensor[int32, "counters"] = None,
    x_scale: Tensor[f32, "m"] = None,
    x_squares: Tensor[f32, "m", "x_parts"] = None,
    stream: Tensor[f32, "m", "width"] = None,
    norm: Tensor[f32, "width"] = None,
    squares: Tensor[f32, "m", "parts"] = None,
    *,
    wdtype: Const,
    scale_dtype: Const,
    mins_dtype: Const = None,
    span: Const,
    plan: Const,
    activation: Const = None,
    eights: Const = None,
    threads: Const = None,
    x_parts: Const = None,
):
    rows, splits = plan.rows, plan.splits
    shape = plan.shape(span)
    group_warps, alone = 4 * rows, plan.registers is None
    finders = 0 if x_squares is None else 1 if alone else 2
    copiers = 1 if alone else 4 - finders
    token_tiles = tilus.cdiv(y.shape[0], plan.tokens)
    tilus.grid(
        launched,
        1 if plan.launched else token_tiles,
        warps=group_warps * splits + copiers + finders,
        cluster=plan.blocks * plan.sharing,
        blocks_per_sm=plan.blocks_per_sm,
        ends_alone=plan.sharing == 1,  # only the first block's memory is written to, and that waits for it
    )
    tilus.launch_dependents()
    row_tiles = tilus.cdiv(codes.shape[0], rows * plan.sharing)
    steps = codes.shape[1] // (plan.depth * tile_nbytes(wdtype))
    tiles = Tiles(plan, row_tiles, (y.shape[0], token_tiles), steps, launched)

    factors = [(scales, scale_dtype), (mins, mins_dtype), (zeros, f16)]
    constant = [codes, scales, mins, zeros, table, bias, norm]
    stages = Stages(plan, x, codes, wdtype, factors, shape, tiles.group)
    own_sums = Sums(splits, plan.tokens, 32 * group_warps, turns=plan.launched > 0 and splits > 1)
    roots = RootMeanSquares(x_squares, plan.tokens, x_parts, turns=plan.launched > 0)
    all_sums = Sums(plan.blocks, plan.tokens, 32 * group_warps)
    if plan.blocks * plan.sharing > 1:
        tilus.cluster_sync()

    with tilus.warps(group_warps * splits, copiers, registers=None if alone else 40):
        stages.fill(tiles, constant)

    if finders > 0:
        with tilus.warps(group_warps * splits + copiers, finders, registers=None if alone else 40):
            tilus.wait_dependencies(constant=constant)
            roots.find(tiles, eps, finders)

    after = None if stream is None else (stream, norm, squares, stream_scale)
    for split in range(splits):
        with tilus.warps(group_warps * split, group_warps, registers=plan.registers):
            tilus.wait_dependencies(constant=constant)
            entries = table_entries(table, x.dtype, 32 * group_warps)
            unpacked = unpacking(wdtype, (scale_dtype, mins_dtype), x, x_scale, zeros, entries, shape, plan.scaled)
            scaling = (global_scale * 2.0**unpacked.exponent, x_scale)
            results = Results(y, after, plan, activation, scaling, bias, roots)
            work = Multiplying(tiles, stages, factors, (own_sums, all_sums), roots, (partial, tickets))
            work.each_tile(split, unpacked, results)


class Multiplying:
    """What a warpgroup does of each tile of its block: the products of its steps, and of the first one what becomes of all sums.

    sums: of the warpgroups along K, and of the blocks along K. joint: sums and tickets of tiles in which two blocks meet.
    """

    def __init__(self, tiles: Tiles, stages: Stages, factors, sums, roots: RootMeanSquares, joint):
        self.tiles, self.stages, self.factors, self.roots = tiles, stages, factors, roots
        self.own_sums, self.all_sums = sums
        self.joint = joint

    def each_tile(self, split: int, unpacked: Unpacking, results: Results):
        """split: which of the warpgroups along K this is."""
        tiles, stages, plan = self.tiles, self.stages, self.tiles.plan
        for index in tiles.numbers():
            row_tile, token = tiles.start(index)
            begin, end = tiles.extent(index)
            once = unpacked.whole(self.factors, row_tile) if unpacked.shape.span == WHOLE else None
            first = tiles.before(index)
            stages.begin_tile(first)
            # Each warpgroup always takes the same stages, so that it sees all their phases.
            turn = (split + first * (plan.splits - 1)) % plan.splits if plan.launched else split
            total = sum_of_steps(unpacked, stages, once, turn, end - begin, plan)
            if split > 0:
                self.own_sums.give(total, split, index)
            else:
                results.begin(token, row_tile)
                self.store(self.own_sums.added_to(total, index), index, results)

    def store(self, total, index, results: Results):
        """Of the sums of this block, which another one may have to add to its own."""
        tiles, (partial, tickets) = self.tiles, self.joint
        if tiles.part > 0:
            self.all_sums.give(total, tiles.part, block=tiles.own)
        else:
            row_tile, token = tiles.start(index)
            total, complete = self.all_sums.added_to(total), 1
            if tiles.plan.streamed:
                total, complete = tiles.joined(total, partial, tickets, index)
            self.roots.wait(index)
            if complete == 1:
                results.store(total, token, row_tile)
            self.roots.free()


def unpacking(wdtype, factor_dtypes, x, x_scale, zeros, entries, shape, scaled: bool):
    """From codes to operands of the activations' type: 16-bit floats, or with scales of tokens what multiplies 8 bits."""
    if x_scale is None:
        exponent = residual(wdtype, x.dtype, entries, zeros, MMA)
        if scaled and exponent != 0 and loses_bits(wdtype, factor_dtypes, x.dtype, exponent):
            exponent = 0
        return Unpacking(wdtype, factor_dtypes, x.dtype, entries, exponent, shape)
    exponent = exponent_of(wdtype, x.dtype, zeros is not None)
    return UNPACKINGS[x.dtype](wdtype, factor_dtypes, f16, entries, exponent, shape)


def loses_bits(wdtype: DataType, factor_dtypes, act: DataType, exponent: int) -> bool:
    """Whether a weight, number / 2^exponent * scale + minimum, may have bits below the least number of its type: usual weights
    are about 0.01, which is little of what f16 holds. Products with scales of 8 bits may not, those with scales of f16 may."""
    scale, minimum = factor_dtypes
    return (
        minimum is not None
        or wdtype.smallest_subnormal * scale.smallest_subnormal < act.smallest_subnormal * 2.0**exponent
    )


def kernel_call(
    x: Any, weight: QuantizedWeight, y: Any, bias: Any | None, plan: WarpgroupPlan, activation: Activation | None = None,
    x_scale: Any | None = None, norms: Norms = NO_NORMS,
) -> tuple[Kernel, list[Any], dict[str, Any]]:  # fmt: skip
    """The kernel with its arguments and compile-time values, for activations whose columns are in the order of the weight's.
    activation: of a gated weight. norms: in front of the layer, and behind it."""
    header = weight.header
    codes, scales, mins, zeros = (
        None if array is None else array.reshape(array.shape[0], -1)
        for array in (weight.codes, weight.scales, weight.mins, weight.zeros)
    )
    values = {
        "wdtype": header.dtype, "scale_dtype": DTYPES[header.scale_dtype],
        "mins_dtype": None if header.mins_dtype is None else DTYPES[header.mins_dtype],
        "span": header.span, "plan": plan, "activation": activation,
    }  # fmt: skip
    m, n = int(y.shape[0]), weight.shape[0]
    cluster, partial, tickets = plan.blocks * plan.sharing, None, None
    row_tiles, token_tiles = -(-n // (TILE * plan.rows * plan.sharing)), -(-m // plan.tokens)
    teams = min(row_tiles * token_tiles, plan.launched // cluster) if plan.launched else row_tiles
    launched = cluster * teams
    if plan.streamed:
        partial = empty(x, (launched + 1, 2, plan.tokens // 8, 128 * plan.rows, 4), "float32")
        tickets = counters(x, launched + 1)
        values |= {"eights": plan.tokens // 8, "threads": 128 * plan.rows}
    before, after = norms.before, norms.after
    if before is not None:
        values |= {"x_parts": before.squares.shape[1]}
    arguments = [
        x, codes, scales, y, header.global_scale, launched,
        0.0 if before is None else before.eps, 1.0 if after is None else after.scale,
        mins, zeros, weight.table, bias, partial, tickets, x_scale,
        None if before is None else before.squares,
        *((None, None, None) if after is None else (after.stream, after.weight, after.squares)),
    ]  # fmt: skip
    return warpgroup_linear, arguments, values
