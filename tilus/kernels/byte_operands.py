"""Packed int4 codes as left operands of 8-bit products: four bytes of a word at once, without a conversion.

- int8: a word of packed codes has eight of them, and `word & 0xf0f0f0f0` are four bytes of 16 times a code. So are those of
  `word << 4`.
- float8_e4m3: in its lowest four bits a byte counts 0 to 15 steps of 2^-9, subnormal numbers and the first normal ones alike.
  So a code's magnitude, with its sign on top, is the code times 2^-9.

Four bytes of a word are one row's columns 2 t, 2 t + 8, 2 t + 1 and 2 t + 9 of 16, where products of 8-bit operands want four
neighbours. `quantize_tokens(paired=True)` writes activations in that order, so one packed weight serves all.
"""

from __future__ import annotations

import tilus
from tilus import f32, int32, uint32
from tilus.dtypes import float8_e4m3, int4, int8
from tilus.kernels.quantize.tiles import MMA, TILE
from tilus.kernels.warpgroup_operands import Unpacking, tile_nbytes
from tilus.layout import local, spatial
from tilus.layout.atoms import wgmma_a, wgmma_d

EXPONENTS = {int8: -4, float8_e4m3: 9}  # of the factor that what codes become lacks
MOST_SUMMED = 256  # columns: sums of so many products of 16 * code and int8 are below 2^22 in magnitude, or that


class ByteUnpacking(Unpacking):
    """`Unpacking` of symmetric int4 for activations of 8 bits, whose exponents are `EXPONENTS`."""

    def weights(self, stage_codes, stage, piece: int, zeros):
        """The codes [rows * 64, width] of a piece, divided by 2^exponent."""
        shape = self.shape
        tiles, threads = max(1, shape.width // TILE), 128 * shape.rows
        first, nbytes = piece * shape.width // TILE * tile_nbytes(int4), tiles * tile_nbytes(int4)
        layout = MMA.warpgroup_bytes(int4, shape.rows, 1, tiles).reshape((shape.rows, nbytes))
        raw = tilus.load_shared(stage_codes[stage], [0, first], [shape.rows, nbytes], layout=layout)
        words = tilus.view(raw, uint32, [threads, 4 * tiles, 1], spatial(threads, 1, 1) * local(1, 4 * tiles, 1))
        which = tilus.reshape(tilus.arange(2), [1, 1, 2]).to(uint32)  # of a thread's two rows with codes in a word
        if self.act == int8:
            four = words << (4 - 4 * which) & 0xF0F0F0F0
        else:
            codes = words >> 4 * which & 0x0F0F0F0F
            negative = codes >> 3 & 0x01010101
            four = (codes ^ 15 * negative) + negative | negative << 7
        fragments = spatial(shape.rows, 1) * local(1, 2 * tiles) * wgmma_a(8)
        four = tilus.with_layout(four, spatial(threads, 1, 1) * local(1, 4 * tiles, 2))
        numbers = tilus.view(four, self.act, [TILE * shape.rows, TILE * tiles], fragments)
        if shape.width < TILE:
            parts = TILE // shape.width
            numbers = tilus.select(tilus.reshape(numbers, [TILE * shape.rows, parts, shape.width]), 1, piece % parts)
        return numbers


def as_f32(sums):
    """Sums of products, those of integers exactly up to 2^22 in magnitude: added to the bits of 1.5 * 2^23 they are those of a
    float, by instructions of which a multiprocessor issues eight times as many as conversions."""
    if sums.dtype != int32:
        return sums
    layout = spatial(sums.shape[0] // TILE, 1) * wgmma_d(sums.shape[1])
    return tilus.view(tilus.with_layout(sums + 0x4B400000, layout), f32, sums.shape, layout) - 12582912.0
