"""The XOR swizzle of shared memory: a permutation of address bits' values (Swizzle<bits, base, shift> of CuTe)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tilus.layout.errors import LayoutError

Addresses = TypeVar("Addresses", int, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class Swizzle:
    """x -> x ^ ((x & mask) >> shift): `bits` address bits from bit base + shift on are XORed into those from `base` on.

    It permutes every aligned block of `period` elements. Raises LayoutError for a negative base or number of bits, and
    for a shift below 1.
    """

    base: int
    bits: int
    shift: int

    def __post_init__(self) -> None:
        if self.base < 0 or self.bits < 0 or self.shift < 1:
            raise LayoutError(
                f"{self}; expected base >= 0, bits >= 0 and shift >= 1",
                hint="bits base + shift .. base + shift + bits - 1 are XORed into bits base .. base + bits - 1",
            )

    @property
    def mask(self) -> int:
        return ((1 << self.bits) - 1) << (self.base + self.shift)

    @property
    def period(self) -> int:
        return 1 << (self.base + self.bits + self.shift)

    def apply(self, x: Addresses) -> Addresses:
        return x ^ ((x & self.mask) >> self.shift)

    def invert(self, y: Addresses) -> Addresses:
        """The x with `apply(x) == y`. Where bits > shift, a bit is both source and target, and the bits above it are
        needed first: each round makes the next `shift` bits right."""
        x = y
        for _ in range(-(-self.bits // self.shift)):
            x = y ^ ((x & self.mask) >> self.shift)
        return x
