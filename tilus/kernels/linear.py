"""Quantised linear layers: y = x W^T + b for weights of any 1- to 8-bit type and every scheme of `QuantizedMatrix`.

The weight is the left operand of the tensor cores and tokens are columns, so one packed weight serves every batch size and a
batch of one wastes no rows. Weights go straight from global memory to registers, the next tiles on their way while these are
multiplied. The warps of a block work on different tiles along K and add up at the end; blocks may split K further.

**What is exact.** Tensor cores multiply activations by bare codes (or code minus zero point), which f16 and bf16 hold exactly,
and add up in f32. Scales and minimums multiply these sums in f32, once for each group: y = sum over groups of
scale * (sum of x * code) + minimum * (sum of x). So no weight is ever rounded, whatever the types of activations and scales
are; scales may have the range of f32 (e8m0). Only the entries of a table are rounded, once, to the activations' type. The global
scale and the bias follow in f32, and y is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tilus
from tilus import Const, Tensor, config, f16, f32, int32, uint8
from tilus.dtypes import DTYPES, DataType
from tilus.errors import TilusError
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.columns import take_columns
from tilus.kernels.quantize.factors import E8M0, factor_dtype
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import (
    TILE,
    WHOLE,
    activation_layout,
    block_sets,
    byte_layout,
    code_layout,
    factor_layout,
    fragment_layout,
    parts,
)
from tilus.layout import local, replicated

EMULATED_SMS = 132  # an H100


@dataclass(frozen=True)
class Step:
    """What a block does in one step along K, as compile-time numbers.

    Each of `warps` warps multiplies `depth` tiles of 64 columns. A step has `pieces` parts per warp with factors of their own; or
    `sharing` warps have the same factors.
    """

    span: int
    warps: int
    depth: int

    @property
    def tiles(self) -> int:
        return self.warps * self.depth

    @property
    def columns(self) -> int:
        """Of a warp."""
        return self.depth * TILE

    @property
    def sets(self) -> int:
        return block_sets(self.span, self.warps, self.depth)

    @property
    def pieces(self) -> int:
        return max(1, self.sets // self.warps)

    @property
    def sharing(self) -> int:
        return max(1, self.warps // self.sets)


def load_codes(codes, row_tile, tile, wdtype: DataType, step: Step):
    """The bytes of a step's tiles."""
    shape = [step.tiles, TILE * TILE // 8 * wdtype.nbits]
    return tilus.load(codes, [row_tile, tile, 0], shape=shape, layout=byte_layout(wdtype, step.warps, step.depth))


def factor_values(raw, dtype: DataType, compute: DataType, step: Step):
    """[sets, 64] in the order of rows, as numbers of type `compute`."""
    layout = factor_layout(step.sets, step.warps, 1)
    if dtype == E8M0:  # the exponent of an f32; 2^-127 is a subnormal
        bits = tilus.maximum(tilus.cast(raw, int32) << 23, 1 << 22)
        values = tilus.view(tilus.with_layout(bits, layout), f32, [step.sets, 8, 8], layout)
    else:
        values = tilus.view(raw, dtype, [step.sets, 8, 8], layout)
    return tilus.reshape(tilus.transpose(tilus.cast(values, compute), [0, 2, 1]), [step.sets, TILE])


def piece_of_factors(values, piece: int, step: Step):
    """The factors of each warp's piece, to broadcast over accumulators [warps / sharing, sharing, 4, 16, tokens]."""
    if step.pieces > 1:
        values = tilus.select(tilus.reshape(values, [step.warps, step.pieces, TILE]), 1, piece)
    return tilus.reshape(values, [step.warps // step.sharing, 1, 4, 16, 1])


def weight_tile(raw, zeros, table, wdtype: DataType, act: DataType, step: Step):
    """The bare numbers [warps, 64, columns] of `act` that a step's codes stand for, zero points subtracted."""
    layout = fragment_layout(step.warps, step.depth)
    own = code_layout(wdtype, step.warps, step.depth, lookup=table is not None)
    shape = [step.warps, TILE, step.columns]
    if table is not None:
        codes = tilus.view(raw, DTYPES[f"uint{wdtype.nbits}"], shape, own)
        return tilus.lookup(table, codes)
    numbers = tilus.cast(tilus.view(raw, wdtype, shape, own), act, layout=layout)
    if zeros is None:
        return numbers
    split = tilus.reshape(numbers, [step.warps // step.sharing, step.sharing, TILE, step.pieces, -1])
    points = tilus.reshape(zeros, [step.warps // step.sharing, step.pieces, TILE])
    by_row = tilus.reshape(tilus.transpose(points, [0, 2, 1]), [step.warps // step.sharing, 1, TILE, step.pieces, 1])
    return tilus.reshape(split - by_row, shape)


def activation_tile(x, tokens: int, step: Step):
    """[tokens, tiles * 64] as the right operand [warps, columns, tokens], its rows in the column order of packed weights."""
    pieces = parts(step.span)
    split = tilus.reshape(x, [tokens, step.warps, step.depth, pieces, 4, 4 // pieces, 2, 2])
    return tilus.reshape(tilus.transpose(split, [1, 2, 3, 5, 6, 4, 7, 0]), [step.warps, step.columns, tokens])


def piece_of_operands(w, x, piece: int, step: Step):
    """The columns of one piece: [warps, 64, columns / pieces] and [warps, columns / pieces, tokens]."""
    if step.pieces == 1:
        return w, x
    tokens, width = x.shape[2], step.columns // step.pieces
    left = tilus.select(tilus.reshape(w, [step.warps, TILE, step.pieces, width]), 2, piece)
    return left, tilus.select(tilus.reshape(x, [step.warps, step.pieces, width, tokens]), 1, piece)


def sums_of_activations(x, step: Step, acc=None):
    """For each token the sum of [warps, columns, tokens] over the columns, in each of 16 rows: a product with ones."""
    ones = tilus.full([step.warps, 16, x.shape[1]], 1.0, x.dtype)
    return tilus.dot(ones, x, acc)


def scaled_sum(total, part, sums, scales, mins, piece: int, step: Step):
    """total + scales * part + mins * sums, with the factors of one piece."""
    tokens = part.shape[2]
    shape = [step.warps // step.sharing, step.sharing, 4, 16, tokens]
    result = tilus.fma(
        tilus.reshape(part, shape), piece_of_factors(scales, piece, step), tilus.reshape(total, shape)
    )
    if mins is not None:
        by_row = tilus.broadcast(piece_of_factors(mins, piece, step), shape)
        result = tilus.fma(by_row, tilus.reshape(sums, [shape[0], shape[1], 1, 16, tokens]), result)
    return tilus.reshape(result, [step.warps, TILE, tokens])


def add_groups(total, w, x, scales, mins, step: Step):
    """total + the product of a step, each group's part scaled by its own factors."""
    for piece in range(step.pieces):
        left, right = piece_of_operands(w, x, piece, step)
        sums = None if mins is None else sums_of_activations(right, step)
        total = scaled_sum(total, tilus.dot(left, right), sums, scales, mins, piece, step)
    return total


class Factors:
    """The sets of factors of one step, in registers: scales, and where there are any minimums and zero points."""

    def __init__(self, arrays, dtypes, act: DataType, row_tile, step: Step):
        self.arrays = arrays
        self.dtypes = dtypes
        self.act = act
        self.row_tile = row_tile
        self.step = step

    def fetch(self, tile):
        """Load the factors that serve the tiles from `tile` on."""
        scales, mins, zeros = self.arrays
        self.scales = self.load(scales, self.dtypes[0], tile)
        if mins is not None:
            self.mins = self.load(mins, self.dtypes[1], tile)
        if zeros is not None:
            self.zeros = self.load(zeros, f16, tile)

    def load(self, array, dtype: DataType, tile):
        step = self.step
        first = 0 if step.span == WHOLE else tile * TILE // step.span
        layout = factor_layout(step.sets, step.warps, dtype.nbytes)
        return tilus.load(array, [self.row_tile, first, 0, 0], shape=[step.sets, 8, 8 * dtype.nbytes], layout=layout)

    def numbers(self):
        """Scales and minimums [sets, 64] in f32, zero points in the activations' type; None for what is not there."""
        _, mins, zeros = self.arrays
        return (
            factor_values(self.scales, self.dtypes[0], f32, self.step),
            None if mins is None else factor_values(self.mins, self.dtypes[1], f32, self.step),
            None if zeros is None else factor_values(self.zeros, f16, self.act, self.step),
        )


@tilus.kernel
def quantized_linear(
    x: Tensor["act", "m", "k"],
    codes: Tensor[uint8, "tiles_n", "tiles_k", "tile_nbytes"],
    scales: Tensor[uint8, "tiles_n", "sets", 8, "scale_nbytes"],
    y: Tensor["out", "m", "n"],
    global_scale: f32,
    mins: Tensor[uint8, "tiles_n", "sets", 8, "min_nbytes"] = None,
    zeros: Tensor[uint8, "tiles_n", "sets", 8, "zero_nbytes"] = None,
    table: Tensor[f32, 16] = None,
    bias: Tensor["bias_type", "n"] = None,
    partial: Tensor[f32, "splits", "m", "n"] = None,
    tickets: Tensor[int32, "blocks"] = None,
    *,
    wdtype: Const,
    scale_dtype: Const,
    mins_dtype: Const = None,
    span: Const,
    tokens: Const,
    warps: Const,
    depth: Const,
):
    m = y.shape[0]
    splits = 1 if partial is None else partial.shape[0]
    tilus.grid(codes.shape[0], tilus.cdiv(m, tokens), splits, warps=warps, blocks_per_sm=2 if tokens == 8 else 1)
    step = Step(span, warps, depth)
    row_tile = tilus.block_id(0)
    first_token = tilus.block_id(1) * tokens
    per_split = tilus.cdiv(tilus.cdiv(codes.shape[1], step.tiles), splits) * step.tiles
    begin = tilus.block_id(2) * per_split
    end = min(begin + per_split, codes.shape[1])
    own_codes = tilus.narrow(codes, 1, 0, end)  # the last step asks for tiles behind the end: they are not read
    lookup_table = None if table is None else load_table(table, x.dtype, warps)

    factors = Factors((scales, mins, zeros), (scale_dtype, mins_dtype), x.dtype, row_tile, step)
    factors.fetch(begin)
    raw = load_codes(own_codes, row_tile, begin, wdtype, step)
    total = tilus.zeros([warps, TILE, tokens], f32)
    sums = tilus.zeros([warps, 16, tokens], f32)
    for tile in tilus.range(begin, end, step.tiles):
        columns = tilus.load(
            x, [first_token, tile * TILE], [tokens, step.tiles * TILE], layout=activation_layout(tokens, span, warps, depth)
        )
        raw_now = raw
        scale, minimum, zero = factors.numbers()
        raw = load_codes(own_codes, row_tile, tile + step.tiles, wdtype, step)
        if span != WHOLE:
            factors.fetch(tile + step.tiles)
        w = weight_tile(raw_now, zero, lookup_table, wdtype, x.dtype, step)
        right = activation_tile(columns, tokens, step)
        if span != WHOLE:
            total = add_groups(total, w, right, scale, minimum, step)
        else:
            total = tilus.dot(w, right, total)
            if mins is not None:
                sums = sums_of_activations(right, step, sums)
    if span == WHOLE:
        scale, minimum, zero = factors.numbers()
        total = scaled_sum(tilus.zeros([warps, TILE, tokens], f32), total, sums, scale, minimum, 0, step)

    result = tilus.sum(total, axis=0)
    if partial is None:
        y_tile = finished(result, global_scale, bias, row_tile, y.dtype, [TILE, 1])
        tilus.store(y, [first_token, row_tile * TILE], y_tile, dims=[1, 0])
    else:
        tilus.store(partial, [tilus.block_id(2), first_token, row_tile * TILE], result, dims=[2, 1])
        add_splits(y, partial, tickets, global_scale, bias, first_token, row_tile, tokens, splits)


def finished(result, global_scale, bias, row_tile, dtype: DataType, shape):
    """The sums as they are stored: times the global scale, plus the bias, rounded once. shape: of the bias, to broadcast."""
    scaled = result * global_scale
    if bias is not None:
        scaled = scaled + tilus.reshape(tilus.cast(tilus.load(bias, [row_tile * TILE], [TILE]), f32), shape)
    return tilus.cast(scaled, dtype)


def add_splits(y, partial, tickets, global_scale, bias, first_token, row_tile, tokens: int, splits):
    """The block that arrives last adds up the partial sums, always in the same order, and resets the counter."""
    slot = tilus.block_id(1) * tilus.grid_dim(0) + row_tile
    arrived = tilus.atomic_add(tickets, [slot], 1)
    if arrived == splits - 1:
        summed = tilus.load(partial, [0, first_token, row_tile * TILE], shape=[tokens, TILE])
        for split in tilus.range(1, splits):
            summed = summed + tilus.load(partial, [split, first_token, row_tile * TILE], shape=[tokens, TILE])
        y_tile = finished(summed, global_scale, bias, row_tile, y.dtype, [1, TILE])
        tilus.store(y, [first_token, row_tile * TILE], y_tile)
        tilus.atomic_add(tickets, [slot], -splits)


def load_table(table, act: DataType, warps: int):
    """The entries of a table in every thread, rounded to the activations' type."""
    layout = replicated(32 * warps, 1) * local(16)
    return tilus.cast(tilus.load(table, [0], [16], layout=layout), act)


@dataclass(frozen=True)
class Schedule:
    """How a product is cut: tokens per block, warps along K per block, tiles per warp and step, blocks along K per row of tiles."""

    tokens: int
    warps: int
    depth: int
    splits: int


@lru_cache(maxsize=4096)
def schedule(m: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int) -> Schedule:
    """A schedule for a GPU: enough blocks to fill it, at least two steps per warp and split. Chosen from a sweep on an H100.

    num_sms 0 stands for the reference execution, which likes few large tiles.
    """
    if num_sms == 0:
        return Schedule(max(8, min(64, -(-m // 8) * 8)), _power_of_two(min(tiles_k, 32)), 1, 1)
    if m <= 16:
        tokens = 8 if m <= 8 else 16
    else:  # 32 tokens a block read each weight half as often, 16 fill a GPU twice as easily
        tokens = 32 if 2 * tiles_n * -(-m // 32) >= 3 * num_sms else 16
    blocks = tiles_n * -(-m // tokens)
    if tokens == 32:
        return Schedule(tokens, min(2, _power_of_two(tiles_k)), 1, 1)
    if blocks >= num_sms:
        warps = 8 if tokens == 8 and nbits <= 6 else 4  # eight warps of wider codes have too few registers
        return Schedule(tokens, min(warps, _power_of_two(tiles_k)), 1, 1)
    warps = min(4, _power_of_two(tiles_k))
    return Schedule(tokens, warps, 1, max(1, min(2 * num_sms // blocks, tiles_k // (2 * warps), 16)))


def _power_of_two(count: int) -> int:
    """The largest power of two up to `count`: warps that share factors divide their span."""
    return 1 << (count.bit_length() - 1)


def linear(
    x: Any, weight: QuantizedWeight, *, bias: Any | None = None, out_dtype: Any = None, out: Any = None,
    device: str | None = None,
) -> Any:  # fmt: skip
    """x [M, K] of f16 or bf16 times the transpose of a packed weight (N, K), plus a bias [N]: [M, N] of `out_dtype`.

    x, bias, out: torch tensors or numpy arrays, on the weight's device. bias: f16, bf16 or f32, added in f32. out_dtype: by
    default that of x. out: written in place when given. device: where to run (reference, emulator, cuda), by default as the
    arguments say.
    Raises: TilusError when K, dtypes or devices do not fit.
    """
    n, k = weight.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise TilusError(f"linear: x has shape {list(x.shape)}, the weight is {[n, k]}", hint=f"x must be [M, {k}]")
    if str(x.dtype).removeprefix("torch.") not in ("float16", "bfloat16"):
        raise TilusError(f"linear: x has dtype {x.dtype}, expected float16 or bfloat16", hint="convert it: x.half()")
    if bias is not None and tuple(bias.shape) != (n,):
        raise TilusError(f"linear: bias has shape {list(bias.shape)}, expected {[n]} for the weight of {[n, k]}")
    m = int(x.shape[0])
    y = empty(x, (m, n), out_dtype) if out is None else out
    if m == 0:
        return y
    tiles_n, tiles_k = int(weight.codes.shape[0]), int(weight.codes.shape[1])
    plan = schedule(m, tiles_n, tiles_k, weight.dtype.nbits, _num_sms(x, device))
    launch(x if weight.columns is None else take_columns(x, weight.columns, device=device), weight, y, bias, plan, device)
    return y


def launch(x: Any, weight: QuantizedWeight, y: Any, bias: Any | None, plan: Schedule, device: str | None) -> None:
    """The kernel with a given schedule, on activations whose columns are in the order of the weight's."""
    m, n = (int(extent) for extent in y.shape)
    header = weight.header
    partial = tickets = None
    if plan.splits > 1:
        partial = empty(x, (plan.splits, m, n), "float32")
        tickets = counters(x, int(weight.codes.shape[0]) * -(-m // plan.tokens))
    quantized_linear.on(device)(
        x, weight.codes, weight.scales, y, header.global_scale, weight.mins, weight.zeros, weight.table, bias, partial, tickets,
        wdtype=header.dtype, scale_dtype=factor_dtype(header.scale_dtype),
        mins_dtype=None if header.mins_dtype is None else factor_dtype(header.mins_dtype),
        span=header.span, tokens=plan.tokens, warps=plan.warps, depth=plan.depth,
    )  # fmt: skip


def _num_sms(x: Any, device: str | None) -> int:
    """Of the GPU that the product is made for: the one that runs it, or the one that the emulator stands for."""
    if is_cuda(x):
        from tilus.runtime import cuda

        return cuda.device(x.get_device()).num_sms
    match device or config.device():
        case "cuda":
            from tilus.runtime import cuda

            return cuda.current_device().num_sms
        case "emulator":
            return EMULATED_SMS
        case _:
            return 0
