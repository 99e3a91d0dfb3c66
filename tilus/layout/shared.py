"""Shared-memory layouts: the address of every element of a tile, in elements from the start of the tile.

Each dimension is factored into mixed-radix digits as in register layouts; a digit adds `value * stride` to the address.
An XOR swizzle may then permute the address bits (Swizzle<bits, base, shift> of CuTe, here counted in elements).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from tilus.layout.digits import Term, row_major_strides
from tilus.layout.errors import LayoutError
from tilus.layout.printer import shared_expression


@dataclass(frozen=True, slots=True)
class AddressDigit:
    """A digit with values 0..size-1 of one dimension that adds `value * stride` elements to the address."""

    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Swizzle:
    """x -> x ^ ((x & mask) >> shift): `bits` address bits from bit base + shift on are XORed into those from `base` on.

    It permutes every aligned block of `period` elements.
    """

    base: int
    bits: int
    shift: int

    def __post_init__(self) -> None:
        if self.base < 0 or self.bits < 0 or self.shift < 1:
            raise LayoutError(f"{self}; expected base >= 0, bits >= 0 and shift >= 1")

    @property
    def mask(self) -> int:
        return ((1 << self.bits) - 1) << (self.base + self.shift)

    @property
    def period(self) -> int:
        return 1 << (self.base + self.bits + self.shift)

    def apply(self, x: int) -> int:
        return x ^ ((x & self.mask) >> self.shift)


@dataclass(frozen=True, repr=False)
class SharedLayout:
    """A function index -> address, in elements; `digits` holds those of each dimension, outermost first.

    Canonical at construction: no digits of size 1, neighbours that count on are one digit, and the swizzle has no end
    bits that are 0 for every element (None if no bit is left). Equal layouts are the same function. The converse holds
    without swizzle and for swizzles of compact tiles with power-of-two digits; elsewhere a swizzle may coincide with
    other strides. `str(layout)` is an expression that builds the layout again.
    """

    shape: tuple[int, ...]
    digits: tuple[tuple[AddressDigit, ...], ...]
    swizzle: Swizzle | None = None

    def __post_init__(self) -> None:
        if len(self.digits) != len(self.shape):
            raise LayoutError(f"digits for {len(self.digits)} dimensions of a shape of rank {len(self.shape)}")
        for dim, (extent, digits) in enumerate(zip(self.shape, self.digits)):
            if extent < 1 or prod(d.size for d in digits) != extent:
                raise LayoutError(
                    f"the digits of dimension {dim} have sizes {[d.size for d in digits]}; its extent is {extent}"
                )
            if any(d.stride < 1 for d in digits if d.size > 1):
                raise LayoutError(f"dimension {dim} has strides {[d.stride for d in digits]}; expected positive ones")
        object.__setattr__(self, "digits", tuple(map(_canonical, self.digits)))
        if self.swizzle is not None:
            object.__setattr__(self, "swizzle", _trimmed(self.swizzle, self._linear_table()))

    def __str__(self) -> str:
        swizzle = None if self.swizzle is None else (self.swizzle.base, self.swizzle.bits, self.swizzle.shift)
        return shared_expression(self.shape, [[(d.size, d.stride) for d in digits] for digits in self.digits], swizzle)

    __repr__ = __str__

    def _repr_svg_(self) -> str:
        """The drawing that notebooks show."""
        from tilus.layout.draw import svg

        return svg(self)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def size(self) -> int:
        """Elements of memory that the tile spans, padding included: whole periods of the swizzle, if there is one."""
        span = 1 + sum((d.size - 1) * d.stride for digits in self.digits for d in digits)
        period = 1 if self.swizzle is None else self.swizzle.period
        return -(-span // period) * period

    @cached_property
    def terms(self) -> tuple[tuple[Term, ...], ...]:
        """For each dimension its terms: `(index[dim] // weight) % size * stride` is added before the swizzle."""
        result: list[tuple[Term, ...]] = []
        for dim, digits in enumerate(self.digits):
            weights = row_major_strides([d.size for d in digits])
            result.append(tuple(Term(d.stride, d.size, dim, weight) for d, weight in zip(digits, weights)))
        return tuple(result)

    def offset(self, index: Sequence[int]) -> int:
        """The address of an element, in elements."""
        if len(index) != self.rank or not all(0 <= x < extent for x, extent in zip(index, self.shape)):
            raise LayoutError(f"index {tuple(index)} is not in a tile of shape {self.shape}")
        linear = sum(x // t.weight % t.size * t.stride for x, terms in zip(index, self.terms) for t in terms)
        return linear if self.swizzle is None else self.swizzle.apply(linear)

    __call__ = offset

    def table(self) -> npt.NDArray[np.int64]:
        """All addresses, in elements: int64 of the tile's shape."""
        linear = self._linear_table()
        if self.swizzle is None:
            return linear
        return linear ^ ((linear & self.swizzle.mask) >> self.swizzle.shift)

    def _linear_table(self) -> npt.NDArray[np.int64]:
        table = np.zeros((), dtype=np.int64)
        for digits in self.digits:
            for digit in digits:
                table = table[..., None] + np.arange(digit.size, dtype=np.int64) * digit.stride
        return table.reshape(self.shape)

    def is_injective(self) -> bool:
        """Whether no two elements share an address: True for every tile that is written."""
        return len(np.unique(self.table())) == prod(self.shape)

    def is_compact(self) -> bool:
        """Whether the elements fill 0..size-1 without padding: a bijection."""
        return self.is_injective() and self.size == prod(self.shape)

    def __mul__(self, inner: SharedLayout) -> SharedLayout:
        """Tiles one after another: `(f * g)(x) = f(x // S_g) * g.size + g(x % S_g)`, elementwise in the shapes S.

        Only the inner factor may have a swizzle; its size is a multiple of the period, so every tile is swizzled alike.
        """
        if self.rank != inner.rank:
            raise LayoutError(f"ranks differ: {self} has rank {self.rank}, {inner} has rank {inner.rank}")
        if self.swizzle is not None:
            raise LayoutError(
                f"{self} is the outer factor of a product and has a swizzle", hint="swizzle the inner tile"
            )
        digits = tuple(
            tuple(AddressDigit(d.size, d.stride * inner.size) for d in outer_digits) + inner_digits
            for outer_digits, inner_digits in zip(self.digits, inner.digits)
        )
        return SharedLayout(tuple(a * b for a, b in zip(self.shape, inner.shape)), digits, inner.swizzle)

    def stages(self, count: int) -> SharedLayout:
        """`count` copies one after another, as a new first dimension."""
        return row_major((count, *(1,) * self.rank)) * self.unsqueeze(0)

    def permute(self, dims: Sequence[int]) -> SharedLayout:
        """Reorder the dimensions: dimension k of the result is dimension dims[k] of this layout."""
        if sorted(dims) != list(range(self.rank)):
            raise LayoutError(f"permute got dims {tuple(dims)}; expected each of 0..{self.rank - 1} once")
        return SharedLayout(tuple(self.shape[d] for d in dims), tuple(self.digits[d] for d in dims), self.swizzle)

    def unsqueeze(self, dim: int) -> SharedLayout:
        """Insert a dimension of extent 1 before dimension `dim` (`dim == rank` appends)."""
        if not 0 <= dim <= self.rank:
            raise LayoutError(f"unsqueeze at {dim} of a layout of rank {self.rank}; expected 0..{self.rank}")
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        return SharedLayout(shape, (*self.digits[:dim], (), *self.digits[dim:]), self.swizzle)

    def swizzled(self, base: int, bits: int, shift: int) -> SharedLayout:
        """The same strides with this XOR swizzle (see Swizzle), in elements."""
        if self.swizzle is not None:
            raise LayoutError(f"{self} already has a swizzle; expected one at most")
        return SharedLayout(self.shape, self.digits, Swizzle(base, bits, shift))


def _canonical(digits: Sequence[AddressDigit]) -> tuple[AddressDigit, ...]:
    """Unique by the argument of `digits.canonical`."""
    merged: list[AddressDigit] = []
    for digit in digits:
        if digit.size == 1:
            continue
        if merged and merged[-1].stride == digit.size * digit.stride:
            merged[-1] = AddressDigit(merged[-1].size * digit.size, digit.stride)
        else:
            merged.append(digit)
    return tuple(merged)


def _trimmed(swizzle: Swizzle, linear: npt.NDArray[np.int64]) -> Swizzle | None:
    """The swizzle without end bits that are 0 in every address."""
    used = int(np.bitwise_or.reduce(linear, axis=None)) & swizzle.mask
    if used == 0:
        return None
    low, high = (used & -used).bit_length() - 1, used.bit_length()
    return Swizzle(low - swizzle.shift, high - low, swizzle.shift)


# ---- constructors


def strided(shape: Sequence[int | Sequence[int]], strides: Sequence[int | Sequence[int]]) -> SharedLayout:
    """Explicit strides, in elements; a dimension with several digits has a tuple of sizes and one of strides."""
    dims: list[tuple[AddressDigit, ...]] = []
    for extent, stride in zip(shape, strides, strict=False):
        sizes = (extent,) if isinstance(extent, int) else tuple(extent)
        steps = (stride,) if isinstance(stride, int) else tuple(stride)
        if len(sizes) != len(steps):
            raise LayoutError(f"a dimension has sizes {sizes} and strides {steps}; expected as many of each")
        dims.append(tuple(map(AddressDigit, sizes, steps)))
    if len(shape) != len(strides):
        raise LayoutError(f"shape {tuple(shape)} and strides {tuple(strides)} differ in rank")
    return SharedLayout(tuple(prod(d.size for d in digits) for digits in dims), tuple(dims))


def row_major(shape: Sequence[int]) -> SharedLayout:
    """Compact, the last dimension contiguous."""
    return strided(shape, row_major_strides(shape))


def column_major(shape: Sequence[int]) -> SharedLayout:
    """Compact, the first dimension contiguous."""
    return strided(shape, row_major_strides(shape[::-1])[::-1])


def padded(shape: Sequence[int], pad: int) -> SharedLayout:
    """Row-major with `pad` unused elements after every row (every run of the last dimension) but the last one."""
    if not shape or pad < 0:
        raise LayoutError(f"padded got shape {tuple(shape)} and pad {pad}; expected rank 1 or more and pad 0 or more")
    return strided(shape, row_major_strides((*shape[:-1], shape[-1] + pad)))


def swizzled(shape: Sequence[int], nbytes_per_element: int) -> SharedLayout:
    """Row-major with the XOR swizzle under which neither rows nor columns of 16-byte chunks have bank conflicts.

    A row is a run of the last dimension, of a multiple of 16 bytes. Rows of 128, 64 and 32 bytes get the 3, 2 and 1 bit
    swizzles of TMA and wgmma (shift 3 in chunks of 16 bytes). For other rows it is the first swizzle, by shift and then
    by bits, with the fewest conflicts.
    """
    if not shape or nbytes_per_element not in (1, 2, 4, 8, 16) or shape[-1] * nbytes_per_element % 16:
        raise LayoutError(
            f"swizzled got shape {tuple(shape)} of {nbytes_per_element}-byte elements; "
            f"expected elements of 1, 2, 4, 8 or 16 bytes and rows of a multiple of 16 bytes",
            hint="use padded(shape, pad), or make the last dimension longer",
        )
    chunks = shape[-1] * nbytes_per_element // 16
    rows = min(64, prod(shape[:-1]))
    table = np.arange(rows * chunks, dtype=np.int64).reshape(rows, chunks)
    candidates = [Swizzle(0, bits, shift) for shift in range(3, 4 + chunks.bit_length()) for bits in range(4)]
    best = min(candidates, key=lambda swizzle: _chunk_conflicts(table ^ ((table & swizzle.mask) >> swizzle.shift)))
    return row_major(shape).swizzled((16 // nbytes_per_element).bit_length() - 1, best.bits, best.shift)


def _chunk_conflicts(chunks: npt.NDArray[np.int64]) -> int:
    """Bank conflicts of eight lanes that read 16-byte chunks down a column (as ldmatrix does) or in row-major order."""
    conflicts = 0
    for lines in (chunks.T, chunks.reshape(1, -1)):
        for start in range(0, lines.shape[1], 8):
            banks = np.sort(lines[:, start : start + 8] % 8, axis=1)
            conflicts += int(np.count_nonzero(banks[:, 1:] == banks[:, :-1]))
    return conflicts
