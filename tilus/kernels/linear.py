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
from typing import Any

import tilus
from tilus import Const, Tensor, config, f16, f32, int32, uint4, uint8
from tilus.codegen.cast_plan import scale_exponent
from tilus.dtypes import DTYPES, DataType
from tilus.errors import TilusError
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.columns import take_columns
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import (
    TILE,
    WHOLE,
    activation_layout,
    byte_layout,
    factor_layout,
    fragment_layout,
    parts,
)
from tilus.kernels.schedule import Schedule, schedule
from tilus.layout import local, replicated
from tilus.ptx.assembler import SpillError

EMULATED_SMS = 132  # an H100
# Codes that a cast leaves divided by 2^r must not make products that f32 loses: bf16 has floats with r up to 126.
LARGEST_RESIDUAL = 16


@dataclass(frozen=True)
class Step:
    """What a block does in one step along K, as compile-time numbers.

    It works on `rows` rows of tiles, each by `warps` warps that multiply a tile of 64 columns. A tile has `pieces` sets of
    factors; or `sharing` warps have the same.
    """

    span: int
    rows: int
    warps: int

    @property
    def batch(self) -> int:
        """Products that the block's warps work on."""
        return self.rows * self.warps

    @property
    def sets(self) -> int:
        """Sets of factors for each row of tiles."""
        return 1 if self.span == WHOLE else max(1, self.warps * TILE // self.span)

    @property
    def pieces(self) -> int:
        return max(1, self.sets // self.warps)

    @property
    def sharing(self) -> int:
        return max(1, self.warps // self.sets)


def load_codes(codes, row_tile, tile, wdtype: DataType, step: Step):
    """The bytes of a step's tiles."""
    shape, layout = [step.rows, step.warps, TILE * TILE // 8 * wdtype.nbits], byte_layout(wdtype, step.rows, step.warps)
    return tilus.load(codes, [row_tile, tile, 0], shape=shape, layout=layout)


def factor_values(raw, dtype: DataType, compute: DataType, step: Step):
    """[rows * sets, 64] in the order of rows, as numbers of type `compute`."""
    shape, layout = [step.rows, step.sets, 8, 8], factor_layout(step.rows, step.sets, step.warps, 1)
    values = tilus.view(raw, dtype, shape, layout)
    return tilus.reshape(tilus.transpose(tilus.cast(values, compute), [0, 1, 3, 2]), [step.rows * step.sets, TILE])


def piece_of_factors(values, piece: int, step: Step):
    """The factors of each warp's piece, to broadcast over accumulators [batch / sharing, sharing, 4, 16, tokens]."""
    if step.pieces > 1:
        values = tilus.select(tilus.reshape(values, [step.batch, step.pieces, TILE]), 1, piece)
    return tilus.reshape(values, [step.batch // step.sharing, 1, 4, 16, 1])


def weight_tile(raw, zeros, table, wdtype: DataType, act: DataType, step: Step):
    """The bare numbers [batch, 64, 64] of `act` that a step's codes stand for, zero points subtracted.

    Without zero points they are divided by 2^`residual(...)`, so that most casts need no multiplication.
    """
    layout, shape = fragment_layout(step.batch), [step.batch, TILE, TILE]
    if table is not None:
        return tilus.lookup(table, tilus.view(raw, uint4, shape, layout))
    scaled = residual(wdtype, act, table, zeros) != 0
    numbers = tilus.unpack_codes(raw, wdtype, act, shape, layout, scaled=scaled)
    if zeros is None:
        return numbers
    split = tilus.reshape(numbers, [step.batch // step.sharing, step.sharing, TILE, step.pieces, -1])
    points = tilus.reshape(zeros, [step.batch // step.sharing, step.pieces, TILE])
    by_row = tilus.reshape(tilus.transpose(points, [0, 2, 1]), [step.batch // step.sharing, 1, TILE, step.pieces, 1])
    return tilus.reshape(split - by_row, shape)


def residual(wdtype: DataType, act: DataType, table, zeros) -> int:
    """The r for which `weight_tile` gives numbers divided by 2^r."""
    if table is not None or zeros is not None:
        return 0
    exponent = scale_exponent(wdtype, act)
    return exponent if exponent <= LARGEST_RESIDUAL else 0


def activation_tile(x, tokens: int, step: Step):
    """[tokens, warps * 64] as the right operand [batch, 64, tokens], its rows in the column order of packed weights."""
    pieces = parts(step.span)
    split = tilus.reshape(x, [tokens, step.warps, pieces, 4, 4 // pieces, 2, 2])
    shape = [1, step.warps, TILE, tokens]
    ordered = tilus.reshape(tilus.transpose(split, [1, 2, 4, 5, 3, 6, 0]), shape)
    shared = tilus.broadcast(ordered, [step.rows, *shape[1:]]) if step.rows > 1 else ordered
    return tilus.reshape(shared, [step.batch, TILE, tokens])


def piece_of_operands(w, x, piece: int, step: Step):
    """The columns of one piece: [batch, 64, 64 / pieces] and [batch, 64 / pieces, tokens]."""
    if step.pieces == 1:
        return w, x
    tokens, width = x.shape[2], TILE // step.pieces
    left = tilus.select(tilus.reshape(w, [step.batch, TILE, step.pieces, width]), 2, piece)
    return left, tilus.select(tilus.reshape(x, [step.batch, step.pieces, width, tokens]), 1, piece)


def sums_of_activations(x, step: Step, acc=None):
    """For each token the sum of [batch, columns, tokens] over the columns, in each of 16 rows: a product with ones."""
    ones = tilus.full([step.batch, 16, x.shape[1]], 1.0, x.dtype)
    return tilus.dot(ones, x, acc)


def scaled_sum(total, part, sums, scales, mins, piece: int, step: Step):
    """total + scales * part + mins * sums, with the factors of one piece."""
    tokens = part.shape[2]
    shape = [step.batch // step.sharing, step.sharing, 4, 16, tokens]
    result = tilus.fma(tilus.reshape(part, shape), piece_of_factors(scales, piece, step), tilus.reshape(total, shape))
    if mins is not None:
        by_row = tilus.broadcast(piece_of_factors(mins, piece, step), shape)
        result = tilus.fma(by_row, tilus.reshape(sums, [shape[0], shape[1], 1, 16, tokens]), result)
    return tilus.reshape(result, [step.batch, TILE, tokens])


def add_groups(total, w, x, scales, mins, step: Step):
    """total + the product of a step, each group's part scaled by its own factors."""
    for piece in range(step.pieces):
        left, right = piece_of_operands(w, x, piece, step)
        sums = None if mins is None else sums_of_activations(right, step)
        total = scaled_sum(total, tilus.dot(left, right), sums, scales, mins, piece, step)
    return total


class Weights:
    """The codes and factors of one step, in registers: what is fetched ahead, and read when its turn comes."""

    def __init__(self, codes, factors, dtypes, row_tile, step: Step):
        self.all_codes = codes
        self.factors = factors
        self.dtypes = dtypes
        self.row_tile = row_tile
        self.step = step

    def fetch(self, tile):
        """Load the codes of the tiles from `tile` on, and the factors that serve them, unless they are many or serve all of K."""
        self.codes = load_codes(self.all_codes, self.row_tile, tile, self.dtypes[0], self.step)
        if self.step.span != WHOLE and not self.has_many_factors():
            self.fetch_factors(tile)

    def has_many_factors(self):
        """Whether registers do not hold a second tile's factors; they are then loaded when their turn comes."""
        _, mins, zeros = self.factors
        nbytes = (
            self.dtypes[1].nbytes
            + (0 if mins is None else self.dtypes[2].nbytes)
            + (0 if zeros is None else f16.nbytes)
        )
        return self.step.pieces * nbytes > 8

    def fetch_factors(self, tile):
        scales, mins, zeros = self.factors
        self.scales = self.load(scales, self.dtypes[1], tile)
        if mins is not None:
            self.mins = self.load(mins, self.dtypes[2], tile)
        if zeros is not None:
            self.zeros = self.load(zeros, f16, tile)

    def load(self, array, dtype: DataType, tile):
        step = self.step
        first = 0 if step.span == WHOLE else tile * TILE // step.span
        shape, layout = (
            [step.rows, step.sets, 8, 8 * dtype.nbytes],
            factor_layout(step.rows, step.sets, step.warps, dtype.nbytes),
        )
        return tilus.load(array, [self.row_tile, first, 0, 0], shape=shape, layout=layout)

    def numbers(self, exponent: int, act: DataType):
        """Scales and minimums [rows * sets, 64] in f32, zero points in the activations' type; None for what is not there.

        Minimums are divided by 2^exponent, as the products are that they are added to.
        """
        _, mins, zeros = self.factors
        return (
            factor_values(self.scales, self.dtypes[1], f32, self.step),
            None if mins is None else factor_values(self.mins, self.dtypes[2], f32, self.step) * 2.0**-exponent,
            None if zeros is None else factor_values(self.zeros, f16, act, self.step),
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
    rows: Const,
    warps: Const,
    stages: Const,
    blocks_per_sm: Const,
):
    splits = 1 if partial is None else partial.shape[0]
    blocks = (tilus.cdiv(codes.shape[0], rows), tilus.cdiv(y.shape[0], tokens), splits)
    tilus.grid(*blocks, warps=rows * warps, blocks_per_sm=blocks_per_sm)
    step = Step(span, rows, warps)
    row_tile = tilus.block_id(0) * rows
    first_token = tilus.block_id(1) * tokens
    per_split = tilus.cdiv(tilus.cdiv(codes.shape[1], warps * stages), splits) * warps * stages
    begin = tilus.block_id(2) * per_split
    end = min(begin + per_split, codes.shape[1])
    own_codes = tilus.narrow(codes, 1, 0, end)  # the last steps ask for tiles behind the end: they are not read
    lookup_table = None if table is None else load_table(table, x.dtype, step.batch)
    exponent = residual(wdtype, x.dtype, table, zeros)
    dtypes = (wdtype, scale_dtype, mins_dtype)

    ahead = [Weights(own_codes, (scales, mins, zeros), dtypes, row_tile, step) for _ in range(stages)]
    once = None
    if span == WHOLE:
        ahead[0].fetch_factors(0)
        once = ahead[0].numbers(exponent, x.dtype)
    for index in range(stages):
        ahead[index].fetch(begin + index * warps)
    total = tilus.zeros([step.batch, TILE, tokens], f32)
    sums = tilus.zeros([step.batch, 16, tokens], f32)
    for first in tilus.range(begin, end, warps * stages):
        for stage, weights in enumerate(ahead):
            tile = first + stage * warps
            shape, layout = [tokens, warps * TILE], activation_layout(tokens, span, rows, warps)
            right = activation_tile(tilus.load(x, [first_token, tile * TILE], shape, layout=layout), tokens, step)
            raw = weights.codes
            if once is None and weights.has_many_factors():
                weights.fetch_factors(tile)
            scale, minimum, zero = once if once is not None else weights.numbers(exponent, x.dtype)
            weights.fetch(tile + warps * stages)
            w = weight_tile(raw, zero, lookup_table, wdtype, x.dtype, step)
            if once is None:
                total = add_groups(total, w, right, scale, minimum, step)
            else:
                total = tilus.dot(w, right, total)
                if mins is not None:
                    sums = sums_of_activations(right, step, sums)
    if once is not None:
        nothing = tilus.zeros([step.batch, TILE, tokens], f32)
        total = scaled_sum(nothing, total, sums, once[0], once[1], 0, step)

    by_row = tilus.sum(tilus.reshape(total, [rows, warps, TILE, tokens]), axis=1)
    result = tilus.reshape(by_row, [rows * TILE, tokens]) * 2.0**exponent
    if partial is None:
        y_tile = finished(result, global_scale, bias, row_tile, y.dtype, [rows * TILE, 1])
        tilus.store(y, [first_token, row_tile * TILE], y_tile, dims=[1, 0])
    else:
        tilus.store(partial, [tilus.block_id(2), first_token, row_tile * TILE], result, dims=[2, 1])
        add_splits(y, partial, tickets, global_scale, bias, first_token, row_tile, [tokens, rows * TILE], splits)


def finished(result, global_scale, bias, row_tile, dtype: DataType, shape):
    """The sums as they are stored: times the global scale, plus the bias, rounded once. shape: of the bias, to broadcast."""
    scaled = result * global_scale
    if bias is not None:
        offsets = tilus.cast(tilus.load(bias, [row_tile * TILE], [max(shape)]), f32)
        scaled = scaled + tilus.reshape(offsets, shape)
    return tilus.cast(scaled, dtype)


def add_splits(y, partial, tickets, global_scale, bias, first_token, row_tile, shape, splits):
    """The block that arrives last adds up the partial sums, always in the same order, and resets the counter."""
    slot = tilus.block_id(1) * tilus.grid_dim(0) + tilus.block_id(0)
    arrived = tilus.atomic_add(tickets, [slot], 1)
    if arrived == splits - 1:
        summed = tilus.load(partial, [0, first_token, row_tile * TILE], shape=shape)
        for split in tilus.range(1, splits):
            summed = summed + tilus.load(partial, [split, first_token, row_tile * TILE], shape=shape)
        y_tile = finished(summed, global_scale, bias, row_tile, y.dtype, [1, shape[1]])
        tilus.store(y, [first_token, row_tile * TILE], y_tile)
        tilus.atomic_add(tickets, [slot], -splits)


def load_table(table, act: DataType, warps: int):
    """The entries of a table in every thread, rounded to the activations' type."""
    layout = replicated(32 * warps, 1) * local(16)
    return tilus.cast(tilus.load(table, [0], [16], layout=layout), act)


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
    plan = schedule(m, tiles_n, tiles_k, weight.dtype.nbits, _num_sms(x, device), weight.header.factor_words)
    ordered = x if weight.columns is None else take_columns(x, weight.columns, device=device)
    _launch_without_spills(ordered, weight, y, bias, plan, device)
    return y


# Schedules in place of those whose kernels spilled registers when they were assembled.
_easier: dict[tuple[Any, ...], Schedule] = {}


def _launch_without_spills(
    x: Any, weight: QuantizedWeight, y: Any, bias: Any | None, plan: Schedule, device: str | None
) -> None:
    """`launch` with this schedule, or with the first easier one that the registers suffice for."""
    key = (weight.header, str(x.dtype), str(y.dtype), bias is None, plan)
    while True:
        chosen = _easier.get(key, plan)
        try:
            return launch(x, weight, y, bias, chosen, device)
        except SpillError:
            easier = chosen.easier()
            if easier is None:
                raise
            _easier[key] = easier


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
        wdtype=header.dtype, scale_dtype=DTYPES[header.scale_dtype],
        mins_dtype=None if header.mins_dtype is None else DTYPES[header.mins_dtype],
        span=header.span, tokens=plan.tokens, rows=plan.rows, warps=plan.warps, stages=plan.stages,
        blocks_per_sm=plan.blocks_per_sm,
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
