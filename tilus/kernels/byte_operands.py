"""Packed codes as left operands of 8-bit products, where 8 bits hold exactly what the codes stand for.

Symmetric int4, and uint4, need no conversion, four bytes of a word at once:

- int8: a word of packed codes has eight of them, and `word & 0xf0f0f0f0` are four bytes of 16 times a code. So are those of
  `word << 4`. Codes without a sign are bytes as they are, and zero points are subtracted from four of them at once.
- float8_e4m3: in its lowest four bits a byte counts 0 to 15 steps of 2^-9, subnormal numbers and the first normal ones alike.
  So a code's magnitude, with its sign on top, is the code times 2^-9.

Other codes become f16 as for `linear`, and that becomes 8 bits, which rounds nothing (`exponent_of`).

Four bytes of a word are one row's columns 2 t, 2 t + 8, 2 t + 1 and 2 t + 9 of 16, where products of 8-bit operands want four
neighbours. `quantize_tokens(paired=True)` writes activations in that order, so one packed weight serves all.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

import tilus
from tilus import f16, f32, int32, uint16, uint32
from tilus.dtypes import DataType, float8_e4m3, int4, int8, uint4
from tilus.errors import TilusError
from tilus.kernels.quantize.tiles import MMA, TILE
from tilus.kernels.warpgroup_operands import Unpacking, loaded_codes, narrowed
from tilus.layout import local, spatial
from tilus.layout.atoms import wgmma_a, wgmma_d

MOST_SUMMED = 256  # columns: so many products of -128 to 127 add up to at most 2^22 in magnitude (`as_f32`)
EXPONENTS = range(-9, 10)  # that are tried
NIBBLES = {(int4, int8): -4, (int4, float8_e4m3): 9, (uint4, int8): 0, (uint4, float8_e4m3): 9}


@lru_cache
def exponent_of(dtype: DataType, act: DataType, has_zeros: bool) -> int:
    """The e for which operands of type `act` times 2^e are what codes of `dtype`, less zero points, stand for.

    Raises: TilusError where there is none.
    """
    if not has_zeros and (dtype, act) in NIBBLES:
        return NIBBLES[dtype, act]
    values = np.float64(dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8)))
    values = values[np.isfinite(values)]
    if has_zeros:  # from the least code to one above the largest
        values = np.arange(dtype.min_value - dtype.max_value - 1, dtype.max_value - dtype.min_value + 1)
    exact = [e for e in EXPONENTS if (act.round(values / 2.0**e) == values / 2.0**e).all()]
    if not exact:
        raise TilusError(
            f"activations of {act} and a weight of {dtype}{' with zero points' * has_zeros}, expected numbers that {act} holds, "
            f"all times the same power of two",
            hint="`linear` takes every type, with 16-bit activations",
        )
    return max(exact)


class ByteUnpacking(Unpacking):
    """`Unpacking` to operands of a type of 8 bits; zero points come in f16."""

    def bytes_of(self, act: DataType, stage_codes, stage, piece: int, zeros):
        """What the codes [rows * 64, width] of a piece stand for, divided by 2^exponent, columns paired."""
        shape = self.shape
        assert shape.columns // shape.sets <= MOST_SUMMED, "sums of a group exceed what as_f32 takes"
        raw = loaded_codes(stage_codes, stage, piece, self.wdtype, shape)
        if self.wdtype == uint4 or (zeros is None and self.wdtype == int4):
            return narrowed(self.of_nibbles(act, raw, zeros), piece, shape)
        tiles = max(1, shape.width // TILE)
        extents, fragments = [TILE * shape.rows, TILE * tiles], MMA.warpgroup_fragments(shape.rows, 1, tiles)
        numbers = tilus.unpack_codes(raw, self.wdtype, f16, extents, fragments, packed_for=MMA.packed_for)
        numbers = narrowed(numbers, piece, shape)
        if zeros is not None:
            numbers = numbers - zeros
        if self.exponent != 0:
            numbers = numbers * 2.0**-self.exponent
        return paired(as_bytes(numbers, act, shape.rows))

    def of_nibbles(self, act: DataType, raw, zeros):
        """Of all codes of 4 bits in the bytes of tiles."""
        rows = self.shape.rows
        threads, count = 128 * rows, raw.shape[1] // 512  # words of a thread
        words = tilus.view(raw, uint32, [threads, count, 1], spatial(threads, 1, 1) * local(1, count, 1))
        which = tilus.reshape(tilus.arange(2), [1, 1, 2]).to(uint32)  # of a thread's two rows with codes in a word
        four = nibbles(words, which, self.wdtype, act)
        if zeros is not None:
            four = less(four, splat(zeros, rows), act)
        four = tilus.with_layout(four, spatial(threads, 1, 1) * local(1, count, 2))
        fragments = spatial(rows, 1) * local(1, count // 2) * wgmma_a(8)
        return tilus.view(four, act, [TILE * rows, 16 * count], fragments)


class Int8Unpacking(ByteUnpacking):
    def weights(self, stage_codes, stage, piece: int, zeros):
        return self.bytes_of(int8, stage_codes, stage, piece, zeros)


class Float8Unpacking(ByteUnpacking):
    def weights(self, stage_codes, stage, piece: int, zeros):
        return self.bytes_of(float8_e4m3, stage_codes, stage, piece, zeros)


UNPACKINGS = {int8: Int8Unpacking, float8_e4m3: Float8Unpacking}


def nibbles(words, which, dtype: DataType, act: DataType):
    """Of the eight codes in each word the four that `which`, 0 or 1, names, as bytes of a word."""
    if (dtype, act) == (int4, int8):
        return words << (4 - 4 * which) & 0xF0F0F0F0
    codes = words >> 4 * which & 0x0F0F0F0F
    if dtype == uint4:
        return codes
    negative = words >> 3 + 4 * which & 0x01010101
    return (codes ^ 15 * negative) + 129 * negative


def less(codes, zeros, act: DataType):
    """Four codes of 0 to 15 in a word, less four zero points of 0 to 16 in another: as int8, or counts of 2^-9 in float8_e4m3,
    which go on to 16. The top bits keep bytes from borrowing of each other."""
    differences = ((codes | 0x80808080) - zeros) ^ 0x80808080
    if act == int8:
        return differences
    negative = differences >> 7 & 0x01010101
    return (differences ^ 255 * negative) + 129 * negative


def splat(zeros, rows: int):
    """Zero points [rows * 64, 1] of f16 as four bytes of a word, [threads, 1, 2] for a thread's two rows."""
    layout = spatial(4 * rows, 1).local(2, 1).spatial(8, 1).replicated(4)
    bits = tilus.view(
        tilus.with_layout(zeros + 1024.0, layout), uint16, zeros.shape, layout
    )  # the low byte counts ones
    four = tilus.with_layout((bits.to(uint32) & 0xFF) * 0x01010101, layout)
    return tilus.view(four, uint32, [128 * rows, 1, 2], spatial(128 * rows, 1, 1) * local(1, 1, 2))


def as_bytes(numbers, act: DataType, groups: int):
    """Numbers of f16 that `act` holds, in its bits."""
    if act == float8_e4m3:
        return numbers.to(act)
    rows, width = numbers.shape
    layout = spatial(groups, 1) * local(1, width // 16) * wgmma_a()
    biased = tilus.with_layout(numbers + 1536.0, layout)  # from 1024 to 2048 floats count ones: the low byte is an int8
    low = tilus.view(biased, act, [rows, width, 2], layout.reshape((rows, width, 1)) * local(1, 1, 2))
    return tilus.select(low, 2, 0)


def paired(numbers):
    """The columns of each 16 in the order of `quantize_tokens(paired=True)`."""
    rows, width = numbers.shape
    parts = tilus.reshape(numbers, [rows, width // 16, 2, 4, 2])
    return tilus.reshape(tilus.transpose(parts, [0, 1, 3, 4, 2]), [rows, width])


def as_f32(sums):
    """Sums of products in f32, exactly; those of integers up to 2^22 in magnitude without a conversion, of which fewer are issued
    in a cycle: added to the bits of 1.5 * 2^23 they are those of a float."""
    if sums.dtype != int32:
        return sums
    layout = spatial(sums.shape[0] // TILE, 1) * wgmma_d(sums.shape[1])
    return tilus.view(tilus.with_layout(sums + 0x4B400000, layout), f32, sums.shape, layout) - 12582912.0
