"""The one form of a memory layout: from its addresses to a swizzle, an origin and digits.

A memory layout is `swizzle(origin + sum of digits)`. A function may have several such forms, since a swizzle and a set of
strides can coincide. Its normal form has the *first* swizzle that fits, in the order none, then by (bits, shift, base).
A swizzle is a bijection, so it determines what is under it, and the digits of a sum are unique (see
`digits.canonical`): the normal form depends on nothing but the function.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from math import gcd, prod

import numpy as np
import numpy.typing as npt

from tilus.layout.digits import Digit, fitted
from tilus.layout.swizzle import Swizzle

Table = npt.NDArray[np.int64]
Digits = tuple[tuple[Digit, ...], ...]
Form = tuple[Digits, int, Swizzle | None]


def linear_table(shape: Sequence[int], digits: Digits, origin: int) -> Table:
    """`origin + sum of digits` for every index: of this shape."""
    table = np.full((), origin, dtype=np.int64)
    for digit in (digit for dim in digits for digit in dim):
        table = table[..., None] + np.arange(digit.size, dtype=np.int64) * digit.weight
    return table.reshape(tuple(shape))


def form_of_table(table: Table) -> Form | None:
    """The normal form of the function with these addresses; None where no layout has them."""
    return None if table.min() < 0 else _first_form(table, before=None)


@lru_cache(maxsize=4096)
def normal_form(shape: tuple[int, ...], digits: Digits, origin: int, swizzle: Swizzle) -> Form:
    """The normal form of a layout with canonical digits."""
    low_bits, is_everything = _compact_bits(digits, origin)
    if is_everything:  # no address has the bits above
        swizzle = Swizzle(
            swizzle.base, max(0, min(swizzle.bits, low_bits - swizzle.base - swizzle.shift)), swizzle.shift
        )
    if swizzle.bits == 0:
        return digits, origin, None
    if swizzle.period <= 1 << low_bits:
        # The low bits of the addresses take all values independently of each other. If another swizzle fits too, its
        # inverse after this one maps bit j to a set of bits that holds j, and these sets must be disjoint for the
        # result to be a sum: it is the identity there. So the other one is the same, or has more bits.
        return digits, origin, swizzle
    table = swizzle.apply(linear_table(shape, digits, origin))
    return _first_form(table, before=swizzle) or (digits, origin, swizzle)


def _compact_bits(digits: Digits, origin: int) -> tuple[int, bool]:
    """The largest n such that powers of two count through the addresses 0..2^n - 1 and all other digits and the origin
    are multiples of 2^n; and whether there are no others."""
    rest = sorted((d for dim in digits for d in dim if d.weight), key=lambda d: d.weight)
    low = 1
    while rest and rest[0].weight == low:
        digit = rest.pop(0)
        power = digit.size & -digit.size
        low *= power
        if power < digit.size:
            rest.append(Digit(digit.size // power, 0, low))
            break
    step = gcd(low, origin, *(digit.weight for digit in rest))
    return step.bit_length() - 1, not rest and origin == 0


def _first_form(table: Table, before: Swizzle | None) -> Form | None:
    """The form with the first swizzle that fits, among those before `before`, or all."""
    linear = _linear_form(table)
    if linear is not None:
        return *linear, None
    for swizzle in _candidates(table, before):
        linear = _linear_form(swizzle.invert(table))
        if linear is not None:
            return *linear, swizzle
    return None


def _linear_form(table: Table) -> tuple[Digits, int] | None:
    corner = (0,) * table.ndim
    origin = int(table[corner])
    digits: list[tuple[Digit, ...]] = []
    for dim in range(table.ndim):
        found = fitted((table[(*corner[:dim], slice(None), *corner[dim + 1 :])] - origin)[:, None])
        if found is None:
            return None
        digits.append(found)
    result = tuple(digits)
    return (result, origin) if np.array_equal(linear_table(table.shape, result, origin), table) else None


def _candidates(table: Table, before: Swizzle | None) -> Iterator[Swizzle]:
    """The swizzles that may fit, in order: a few sums that every form must respect rule out nearly all others at once.

    A swizzle leaves the highest bit of an address alone, so its sources are bits of the largest address.
    """
    top = int(table.max()).bit_length()
    at, units, pairs = _probes(table.shape)
    values = table.reshape(-1)[at]
    first, second = pairs[:, 0], pairs[:, 1]
    last_bits = top - 1 if before is None else min(top - 1, before.bits)
    for bits in range(1, last_bits + 1):
        options, shifts, masks = _swizzles(top, bits)
        if before is not None and bits == before.bits:  # options rise
            count = bisect_left(options, (before.shift, before.base))
            options, shifts, masks = options[:count], shifts[:count], masks[:count]
        under = np.broadcast_to(values, (len(options), len(values)))
        for _ in range(bits):  # as Swizzle.invert; more rounds than needed change nothing
            under = values ^ ((under & masks) >> shifts)
        under = under - under[:, :1]
        single, joint = under[:, 1 : 1 + units], under[:, 1 + units :]
        fits = np.all(single >= 0, axis=1) & np.all(joint == single[:, first] + single[:, second], axis=1)
        yield from (Swizzle(base, bits, shift) for (shift, base), fit in zip(options, fits.tolist()) if fit)


@lru_cache(maxsize=1024)
def _swizzles(top: int, bits: int) -> tuple[list[tuple[int, int]], Table, Table]:
    """(shift, base), shift and mask of the swizzles of so many bits whose sources are below bit `top`; each [swizzles, 1]."""
    options = [(shift, base) for shift in range(1, top - bits + 1) for base in range(top - bits - shift + 1)]
    shifts, bases = np.array(options, dtype=np.int64).T[:, :, None]
    return options, shifts, ((1 << bits) - 1) << (bases + shifts)


@lru_cache(maxsize=1024)
def _probes(shape: tuple[int, ...]) -> tuple[Table, int, Table]:
    """Flat indices: the origin, then `units`, then sums of two units; and which two.

    The addresses (less the origin's) of such a sum add up in every form: the units are in different dimensions, or
    different powers of two in a dimension whose digits all have powers of two as sizes.
    """
    units: list[tuple[int, int, bool]] = []  # (dimension, flat index, its extent is a power of two)
    for dim, extent in enumerate(shape):
        stride = prod(shape[dim + 1 :])
        is_power = extent & (extent - 1) == 0
        steps = [1 << k for k in range((extent - 1).bit_length())] if is_power else sorted({1, 2 % extent, extent - 1})
        units += [(dim, step * stride, is_power) for step in steps if step]
    pairs = [(a, b) for a, b in combinations(range(len(units)), 2) if units[a][0] != units[b][0] or units[a][2]]
    at = [0, *(flat for _, flat, _ in units), *(units[a][1] + units[b][1] for a, b in pairs)]
    return np.array(at), len(units), np.array(pairs, dtype=np.int64).reshape(-1, 2)
