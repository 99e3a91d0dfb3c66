"""One step of the quantised linear layer along K: tiles of weights and activations from memory to sums (see `linear`)."""

from __future__ import annotations

from dataclasses import dataclass

import tilus
from tilus import f16, f32, uint4
from tilus.codegen.cast_plan import scale_exponent
from tilus.dtypes import DataType
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE, TileOrder

# Codes that a cast leaves divided by 2^r must not make products that f32 loses: bf16 has floats with r up to 126.
LARGEST_RESIDUAL = 16


@dataclass(frozen=True)
class Step:
    """What a block does in one step along K, as compile-time numbers.

    It works on `rows` rows of tiles, each by `warps` warps that multiply a tile of 64 columns. A tile has `pieces` sets of
    factors; or `sharing` warps have the same. order: of the tiles.
    """

    order: TileOrder
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
    """The bytes of a step's tiles, each thread's in the order of its codes."""
    shape = [step.rows, step.warps, TILE * TILE // 8 * wdtype.nbits]
    layout = step.order.byte_layout(wdtype, step.rows, step.warps)
    raw = tilus.load(codes, [row_tile, tile, 0], shape=shape, layout=layout)
    return tilus.with_layout(raw, step.order.string_layout(wdtype, step.rows, step.warps))


def factor_values(raw, dtype: DataType, compute: DataType, step: Step):
    """[rows * sets, 64] in the order of rows, as numbers of type `compute`."""
    shape, layout = [step.rows, step.sets, 8, 8], step.order.factor_layout(step.rows, step.sets, step.warps, 1)
    values = tilus.cast(tilus.view(raw, dtype, shape, layout), compute)
    by_row = tilus.transpose(values, [0, 1, *(2 + axis for axis in step.order.factor_axes)])
    return tilus.reshape(by_row, [step.rows * step.sets, TILE])


def piece_of_factors(values, piece: int, step: Step):
    """The factors of each warp's piece, to broadcast over accumulators [batch / sharing, sharing, 4, 16, tokens]."""
    if step.pieces > 1:
        values = tilus.select(tilus.reshape(values, [step.batch, step.pieces, TILE]), 1, piece)
    return tilus.reshape(values, [step.batch // step.sharing, 1, 4, 16, 1])


def weight_tile(raw, zeros, table, wdtype: DataType, act: DataType, step: Step):
    """The bare numbers [batch, 64, 64] of `act` that a step's codes stand for, zero points subtracted.

    Without zero points they are divided by 2^`residual(...)`, so that most casts need no multiplication.
    """
    layout, shape = step.order.fragment_layout(step.batch), [step.batch, TILE, TILE]
    if table is not None:
        return tilus.lookup(table, tilus.view(raw, uint4, shape, layout))
    scaled, packed_for = residual(wdtype, act, table, zeros, step.order) != 0, step.order.packed_for
    numbers = tilus.unpack_codes(raw, wdtype, act, shape, layout, packed_for=packed_for, scaled=scaled)
    if zeros is None:
        return numbers
    split = tilus.reshape(numbers, [step.batch // step.sharing, step.sharing, TILE, step.pieces, -1])
    points = tilus.reshape(zeros, [step.batch // step.sharing, step.pieces, TILE])
    by_row = tilus.reshape(tilus.transpose(points, [0, 2, 1]), [step.batch // step.sharing, 1, TILE, step.pieces, 1])
    return tilus.reshape(split - by_row, shape)


def residual(wdtype: DataType, act: DataType, table, zeros, order: TileOrder) -> int:
    """The r for which `weight_tile` gives numbers divided by 2^r; CPUs save nothing by that."""
    if table is not None or zeros is not None or order != MMA:
        return 0
    exponent = scale_exponent(wdtype, act)
    return exponent if exponent <= LARGEST_RESIDUAL else 0


def activation_tile(x, tokens: int, step: Step):
    """[tokens, warps * 64] as the right operand [batch, 64, tokens]."""
    ordered = tilus.transpose(tilus.reshape(x, [1, tokens, step.warps, TILE]), [0, 2, 3, 1])
    shared = tilus.broadcast(ordered, [step.rows, step.warps, TILE, tokens]) if step.rows > 1 else ordered
    return tilus.reshape(shared, [step.batch, TILE, tokens])


def piece_of_operands(w, x, piece: int, step: Step):
    """The columns of one piece: [batch, 64, 64 / pieces] and [batch, 64 / pieces, tokens]."""
    if step.pieces == 1:
        return w, x
    tokens, width = x.shape[2], TILE // step.pieces
    left = tilus.select(tilus.reshape(w, [step.batch, TILE, step.pieces, width]), 2, piece)
    return left, tilus.select(tilus.reshape(x, [step.batch, step.pieces, width, tokens]), 1, piece)


def sum_rows(step: Step) -> int:
    """How often `sums_of_activations` has each sum."""
    return 16 if step.order == MMA else 1


def sums_of_activations(x, step: Step, acc=None):
    """For each token the sum of [batch, columns, tokens] over the columns, plus acc: [batch, sum_rows(step), tokens].

    Tensor cores add up by a product with ones, which gives the same in 16 rows.
    """
    if step.order != MMA:
        sums = tilus.reshape(tilus.sum(tilus.cast(x, f32), axis=1), [step.batch, 1, x.shape[2]])
        return sums if acc is None else acc + sums
    ones = tilus.full([step.batch, 16, x.shape[1]], 1.0, x.dtype)
    return tilus.dot(ones, x, acc)


def scaled_sum(total, part, sums, scales, mins, piece: int, step: Step):
    """total + scales * part + mins * sums, with the factors of one piece."""
    tokens = part.shape[2]
    shape = [step.batch // step.sharing, step.sharing, 4, 16, tokens]
    result = tilus.fma(tilus.reshape(part, shape), piece_of_factors(scales, piece, step), tilus.reshape(total, shape))
    if mins is not None:
        by_row = tilus.broadcast(piece_of_factors(mins, piece, step), shape)
        result = tilus.fma(by_row, tilus.reshape(sums, [shape[0], shape[1], 1, sum_rows(step), tokens]), result)
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
        shape = [step.rows, step.sets, 8, 8 * dtype.nbytes]
        layout = step.order.factor_layout(step.rows, step.sets, step.warps, dtype.nbytes)
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
