"""How a code becomes a number: the places of its bits in a 16-bit lane, and the arithmetic that follows.

An `Image` is found, not written down. Put the bits of a code somewhere into a lane and XOR a pattern onto it; the lane is then an
f16 or bf16. If one fma (or two, where the factor is no 16-bit number) maps those numbers to the values of all codes, exactly,
then that is an image. `0x6400`, 1024 + code in f16, is the one that large mantissas have; a single bit has one everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from tilus.dtypes import DataType, float8_e4m3


@dataclass(frozen=True)
class Image:
    """`value = (lane ^ pattern as a number) * factors[0] * ... + addend`, the lane zero but for the code's bits.

    places: for each bit of the code, from the lowest, its place in the lane. pattern: 16 bits. factors: none, or one for each
    fma; the addend belongs to the last. scale_exponent: r where the value has to be multiplied by 2^r to be that of the code.
    keeps_nan: whether the NaN codes of the source come out as NaN; otherwise they need a step of their own.
    """

    places: tuple[int, ...]
    pattern: int
    factors: tuple[float, ...] = ()
    addend: float = 0.0
    scale_exponent: int = 0
    keeps_nan: bool = True

    @property
    def mask(self) -> int:
        """The lane's bits that hold the code."""
        return sum(1 << place for place in self.places)

    @property
    def num_steps(self) -> int:
        """Instructions after the bits are in place, for two codes at once."""
        return len(self.factors) + (0 if self.keeps_nan else 2)


@cache
def images(src: DataType, dst: DataType, scaled: bool = False) -> tuple[Image, ...]:
    """All images of a code type in f16 or bf16 that need the fewest instructions, those with high places first.

    scaled: a power of two may be left to the caller.
    """
    if src.is_float:
        return (_float_image(src, dst, scaled),)
    found = [image for low in range(16 - src.nbits, -1, -1) if (image := _integer_image(src, dst, low)) is not None]
    least = min(image.num_steps for image in found)
    return tuple(image for image in found if image.num_steps == least)


def _float_image(src: DataType, dst: DataType, scaled: bool) -> Image:
    """Sign to sign, exponent to exponent: the value divided by 2 to the difference of the biases, subnormals included."""
    low = dst.mantissa_nbits - src.mantissa_nbits
    places = (*range(low, low + src.nbits - 1), 15)
    exponent = dst.bias - src.bias
    if src.exponent_nbits == dst.exponent_nbits:
        return Image(places, 0)
    if scaled and src.specials == "none":
        return Image(places, 0, scale_exponent=exponent)
    return Image(places, 0, (2.0**exponent,), keeps_nan=src != float8_e4m3)


def _integer_image(src: DataType, dst: DataType, low: int) -> Image | None:
    """The image of contiguous bits from `low`, by trial of the patterns that place a code into a mantissa or exponent."""
    codes = np.arange(src.num_codes, dtype=np.uint8)
    values = src.decode(codes).astype(np.float64)
    flip = 1 << low + src.nbits - 1 if src.is_signed else 0
    for base in (int(dst.encode(2.0**dst.mantissa_nbits)), int(dst.encode(1.0)), 0):
        lanes = codes.astype(np.uint16) << np.uint16(low) ^ np.uint16(base ^ flip)
        with np.errstate(invalid="ignore"):  # some patterns are NaN
            numbers = dst.decode(lanes).astype(np.float64)
        if not np.isfinite(numbers).all() or numbers[0] == numbers[-1]:
            continue
        factor = float((values[-1] - values[0]) / (numbers[-1] - numbers[0]))
        addend = float(values[0] - numbers[0] * factor)
        if np.array_equal(numbers * factor + addend, values) and float(dst.round(addend)) == addend:
            factors = _factors(dst, factor)
            if factors:
                return Image(tuple(range(low, low + src.nbits)), base ^ flip, factors, addend)
    return None


def _factors(dst: DataType, factor: float) -> tuple[float, ...]:
    """The factor as one or two numbers of `dst`, a large power of two first; none when it is no such product."""
    if float(dst.round(factor)) == factor:
        return (factor,)
    first = 2.0 ** (dst.bias // 2 if abs(factor) > 1 else -(dst.bias // 2))
    if not math.isfinite(factor) or float(dst.round(factor / first)) != factor / first:
        return ()
    return (first, factor / first)
