"""Packed weights on Hopper: from global to shared memory by bulk copies, from there into registers as left operands of wgmma."""

from __future__ import annotations

from dataclasses import dataclass

import tilus
from tilus import f16, f32, uint4
from tilus.dtypes import DataType
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE
from tilus.layout import local, replicated


@dataclass(frozen=True)
class Shape:
    """Compile-time numbers of a step. A step has `sets` sets of factors, and `pieces` parts that end with a set or the step."""

    span: int
    rows: int
    depth: int
    tokens: int
    widest: int

    @property
    def columns(self) -> int:
        return self.depth * TILE

    @property
    def sets(self) -> int:
        return 1 if self.span == WHOLE else max(1, self.columns // self.span)

    @property
    def pieces(self) -> int:
        """Parts of a step that are unpacked and multiplied one after the other: those of the sets, cut to `widest` columns."""
        return max(self.sets, self.columns // self.widest)

    @property
    def width(self) -> int:
        return self.columns // self.pieces


def tile_nbytes(dtype: DataType) -> int:
    """Of the codes of a tile."""
    return TILE * TILE // 8 * dtype.nbits


def copy_weights(codes, factors, stage_codes, stage_factors, full, stage, row_tile, step, shape: Shape):
    """Ask for the codes and factors of a step. Behind the last row of tiles they are those of the last row again."""
    for row in range(shape.rows):
        source = min(row_tile + row, codes.shape[0] - 1)
        first = step * stage_codes.shape[2]
        tilus.copy_bulk(stage_codes[stage, row], codes, [source, first], barrier=full[stage], evict="first")
        for buffer, factor in zip(stage_factors, factors):
            if buffer is not None:
                array, dtype = factor
                first = step * shape.columns // shape.span * (TILE * dtype.nbytes)
                tilus.copy_bulk(buffer[stage, row], array, [source, first], barrier=full[stage])


def table_entries(table, act: DataType, threads: int):
    """All of a lookup table, in each thread; None without one."""
    if table is None:
        return None
    return tilus.cast(tilus.load(table, [0], [16], layout=replicated(threads, 1) * local(16)), act)


def loaded_codes(stage_codes, stage, piece: int, wdtype: DataType, shape: Shape):
    """The bytes of the tiles that a piece is of, each thread's in the order of its codes."""
    tiles = max(1, shape.width // TILE)
    first, nbytes = piece * shape.width // TILE * tile_nbytes(wdtype), tiles * tile_nbytes(wdtype)
    layout = MMA.warpgroup_bytes(wdtype, shape.rows, 1, tiles).reshape((shape.rows, nbytes))
    return tilus.load_shared(stage_codes[stage], [0, first], [shape.rows, nbytes], layout=layout)


def narrowed(numbers, piece: int, shape: Shape):
    """Of the numbers of whole tiles those of a piece, [rows * 64, width]."""
    if shape.width >= TILE:
        return numbers
    parts = TILE // shape.width
    return tilus.select(tilus.reshape(numbers, [TILE * shape.rows, parts, shape.width]), 1, piece % parts)


class Unpacking:
    """From packed bytes in shared memory to operands in registers."""

    def __init__(self, wdtype, factor_dtypes, act, table, exponent: int, shape: Shape):
        self.wdtype = wdtype
        self.factor_dtypes = factor_dtypes
        self.act = act
        self.table = table
        self.exponent = exponent
        self.shape = shape

    def weights(self, stage_codes, stage, piece: int, zeros):
        """The bare numbers [rows * 64, width] of a piece, zero points subtracted."""
        shape = self.shape
        tiles = max(1, shape.width // TILE)
        raw = loaded_codes(stage_codes, stage, piece, self.wdtype, shape)
        extents, fragments = [TILE * shape.rows, TILE * tiles], MMA.warpgroup_fragments(shape.rows, 1, tiles)
        if self.table is not None:
            numbers = tilus.lookup(self.table, tilus.view(raw, uint4, extents, fragments))
        else:
            packed_for, scaled = MMA.packed_for, self.exponent != 0
            numbers = tilus.unpack_codes(
                raw, self.wdtype, self.act, extents, fragments, packed_for=packed_for, scaled=scaled
            )
        numbers = narrowed(numbers, piece, shape)
        return numbers if zeros is None else numbers - zeros

    def piece(self, stage_codes, stage_factors, stage, piece: int, once):
        """`weights` with the zero points that belong to them."""
        zeros = self.factors(stage_factors, stage, piece)[2] if once is None else once[2]
        return self.weights(stage_codes, stage, piece, zeros)

    def scale(self, stage_factors, stage, piece: int, once):
        """[rows * 64, 1] of a piece in f32."""
        return self.factors(stage_factors, stage, piece)[0] if once is None else once[0]

    def factors(self, stage_factors, stage, piece: int):
        """Of a piece, as `numbers` gives them."""
        set_index = piece * self.shape.sets // self.shape.pieces
        raw = [
            None if buffer is None else self.load(buffer, stage, set_index, dtype)
            for buffer, dtype in zip(stage_factors, (*self.factor_dtypes, f16))
        ]
        return self.numbers(raw)

    def load(self, buffer, stage, set_index: int, dtype: DataType):
        nbytes = TILE * dtype.nbytes
        layout = MMA.warpgroup_factors(self.shape.rows, 1, 1, dtype.nbytes).reshape((self.shape.rows, nbytes))
        return tilus.load_shared(buffer[stage], [0, set_index * nbytes], [self.shape.rows, nbytes], layout=layout)

    def whole(self, factors, row_tile):
        """Factors that serve all of K, from global memory."""
        raw = [None if array is None else self.load_whole(array, row_tile, dtype) for array, dtype in factors]
        return self.numbers(raw)

    def load_whole(self, array, row_tile, dtype: DataType):
        nbytes = TILE * dtype.nbytes
        layout = MMA.warpgroup_factors(self.shape.rows, 1, 1, dtype.nbytes).reshape((self.shape.rows, nbytes))
        return tilus.load(array, [row_tile, 0], [self.shape.rows, nbytes], layout=layout)

    def numbers(self, raw):
        """Scales and minimums [rows * 64, 1] in f32, zero points in the activations' type; None for what is not there."""
        scales, mins, zeros = raw
        return (
            self.values(scales, self.factor_dtypes[0], f32),
            None if mins is None else self.values(mins, self.factor_dtypes[1], f32) * 2.0**-self.exponent,
            None if zeros is None else self.values(zeros, f16, self.act),
        )

    def values(self, raw, dtype: DataType, compute: DataType):
        """[rows * 64, 1] in the order of rows."""
        rows = self.shape.rows
        layout = MMA.warpgroup_factors(rows, 1, 1, 1)
        values = tilus.cast(tilus.view(raw, dtype, [rows, 1, 8, 8], layout), compute)
        return tilus.reshape(tilus.transpose(values, [0, 1, 3, 2]), [rows * TILE, 1])
