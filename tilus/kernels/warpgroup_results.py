"""Results of a block of a quantised linear layer on Hopper on their way to memory, some tokens at a time."""

from __future__ import annotations

import math

import tilus
from tilus.kernels.linear_results import finished, offsets_of
from tilus.kernels.quantize.tiles import TILE
from tilus.kernels.warpgroup_plan import STORED_TOKENS, WarpgroupPlan
from tilus.layout import local

VECTOR = 4  # neighbours of the residual stream that a thread moves: 16 bytes


class Rows:
    """Results that are rounded, and stored in runs along the rows of the weight.

    begin: in front of the last sums, says where those of a tile go, a token and a row; store: the index-th [rows, tokens].
    """

    def __init__(self, y, plan: WarpgroupPlan, activation, threads: int):
        halves = 1 if activation is None else 2
        self.y, self.activation = y, activation
        self.tokens, self.rows = math.gcd(plan.tokens, STORED_TOKENS * halves), TILE * plan.rows // halves
        self.layout = runs(self.tokens, self.rows, threads, min(8, self.tokens * self.rows // threads))

    def begin(self, start):
        self.start = start

    def store(self, index: int, results):
        rounded = tilus.transpose(tilus.cast(results, self.y.dtype))
        start = [self.start[0] + index * self.tokens, self.start[1]]
        tilus.store(self.y, start, tilus.with_layout(rounded, self.layout))


class StreamRows:
    """Results that are added to a block's part of the residual stream, whose norm is stored, as `Rows` are used.

    addend: the fields of `Addend`. The stream is asked for while the last sums come, and while the results in front are stored:
    before, it would take registers that products need, and blocks of the next kernel beside this one.
    """

    def __init__(self, y, addend, plan: WarpgroupPlan, threads: int):
        self.y, self.activation, self.plan = y, None, plan
        self.stream, self.weight, self.squares, self.scale = addend
        self.tokens, self.rows = math.gcd(plan.tokens, STORED_TOKENS), TILE * plan.rows
        self.layout = runs(self.tokens, self.rows, threads, VECTOR)

    def begin(self, start):
        self.start = start
        if self.plan.overlaps:
            self.first = tilus.cdiv(start[0], self.plan.tokens) * self.plan.tokens
        self.following = self.load(0)
        self.factors = tilus.reshape(tilus.load(self.weight, [start[1]], [self.rows]), [1, self.rows])

    def own(self, tensor, index: int):
        """Of a tensor those tokens that no tile in front has, and where the index-th tokens begin in it: before it, perhaps."""
        token = self.start[0] + index * self.tokens
        if self.plan.overlaps:
            return tilus.narrow(tensor, 0, self.first, tensor.shape[0] - self.first), token - self.first
        return tensor, token

    def load(self, index: int):
        stream, token = self.own(self.stream, index)
        return tilus.load(stream, [token, self.start[1]], [self.tokens, self.rows], layout=self.layout)

    def store(self, index: int, results):
        tokens, rows, row = self.tokens, self.rows, self.start[1]
        before = self.following
        if (index + 1) * tokens < self.plan.tokens:
            self.following = self.load(index + 1)
        total = before + tilus.with_layout(tilus.transpose(results), self.layout)
        stream, token = self.own(self.stream, index)
        tilus.store(stream, [token, row], total)
        scaled = total * self.scale
        y, token = self.own(self.y, index)
        tilus.store(y, [token, row], tilus.cast(scaled * self.factors, y.dtype))
        sums = tilus.sum(tilus.reshape(scaled * scaled, [tokens, rows // TILE, TILE]), 2)
        squares, token = self.own(self.squares, index)
        tilus.store(squares, [token, row // TILE], sums)


def runs(tokens: int, rows: int, threads: int, size: int):
    """The layout [tokens, rows] in which a thread has `size` neighbours along the rows."""
    lanes = rows // size
    return local(tokens * lanes // threads, 1).spatial(threads // lanes, lanes).local(1, size)


def store_rows(stored, sums, offset):
    """Store what becomes of sums [rows, tokens] of wgmma, as `Rows` or `StreamRows`."""
    rows, tokens = sums.shape
    part = stored.tokens
    for index in range(tokens // part):
        some = tilus.select(tilus.reshape(sums, [rows, tokens // part, part]), 1, index)
        stored.store(index, finished(some, offset, stored.activation))


class Results:
    """What becomes of the sums of a block's tiles: factors and a bias, then rows.

    addend: as of `StreamRows`; without, results are `Rows`. factors: of all sums, and a tensor of those of tokens or None.
    roots: `RootMeanSquares` of the activations.
    """

    def __init__(self, y, addend, plan: WarpgroupPlan, activation, factors, bias, roots):
        self.plan, self.bias, self.roots = plan, bias, roots
        self.factor, self.token_factors = factors
        self.threads, self.is_gated = 128 * plan.rows, activation is not None
        self.rows = Rows(y, plan, activation, self.threads)
        if addend is not None:
            self.rows = StreamRows(y, addend, plan, self.threads)

    def begin(self, token, row_tile):
        """In front of the last sums of the tile of a token and a tile of rows."""
        self.rows.begin([token, row_tile * (TILE // 2 if self.is_gated else TILE)])

    def store(self, total, token, row_tile):
        total = total * self.factor
        if self.token_factors is not None:
            total = total * tilus.load(self.token_factors, [token], [self.plan.tokens])
        total = self.roots.divided(total)
        offset = offsets_of(self.bias, row_tile * TILE, self.plan.rows * TILE, self.is_gated)
        store_rows(self.rows, total, offset)
