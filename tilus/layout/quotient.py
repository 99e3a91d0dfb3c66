"""Exact quotients of layouts: the other factor of a product, or the reason why there is none.

The values of a quotient are forced by the product's law: the inner factor is the layout on its first tile, the outer one is
the layout on the tiles' first elements. So there is at most one, and what is left to decide is whether it is a layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tilus.layout.digits import Digit, split
from tilus.layout.errors import LayoutError
from tilus.layout.normal_form import Digits

if TYPE_CHECKING:
    from tilus.layout.register import RegisterLayout
    from tilus.layout.shared import SharedLayout

Layout = TypeVar("Layout", "RegisterLayout", "SharedLayout")


def quotient_or_raise(quotient: Layout | str, whole: Layout, part: Layout, side: str) -> Layout:
    if isinstance(quotient, str):
        raise LayoutError(
            f"{whole} is no product with {part} as its {side} factor: {quotient}",
            hint="convert to a layout that is built as such a product",
        )
    return quotient


# ---- register layouts


def register_right(whole: RegisterLayout, inner: RegisterLayout) -> RegisterLayout | str:
    """The q with `q * inner == whole`, or why there is none."""
    reason = _indivisible_count(whole, inner)
    if reason is not None:
        return reason
    factors = _register_factors(whole, inner.num_threads, inner.num_locals, inner.shape)
    if isinstance(factors, str):
        return factors
    if factors[1] != inner:
        return f"its first {inner.num_threads} threads and {inner.num_locals} slots are {factors[1]}"
    return factors[0]


def register_left(whole: RegisterLayout, outer: RegisterLayout) -> RegisterLayout | str:
    """The q with `outer * q == whole`, or why there is none."""
    reason = _indivisible_count(whole, outer)
    if reason is not None:
        return reason
    shape = tuple(a // b for a, b in zip(whole.shape, outer.shape))
    threads, slots = whole.num_threads // outer.num_threads, whole.num_locals // outer.num_locals
    factors = _register_factors(whole, threads, slots, shape)
    if isinstance(factors, str):
        return factors
    if factors[0] != outer:
        return f"its tiles of shape {shape}, {threads} threads and {slots} slots are at {factors[0]}"
    return factors[1]


def _indivisible_count(whole: RegisterLayout, part: RegisterLayout) -> str | None:
    """Which count of `part` does not divide that of `whole`, in words."""
    counts = [("threads", whole.num_threads, part.num_threads), ("slots", whole.num_locals, part.num_locals)]
    counts += [(f"elements in dimension {k}", a, b) for k, (a, b) in enumerate(zip(whole.shape, part.shape))]
    return next((f"it has {a} {what}, not a multiple of {b}" for what, a, b in counts if a % b), None)


def _register_factors(
    whole: RegisterLayout, num_threads: int, num_locals: int, shape: tuple[int, ...]
) -> tuple[RegisterLayout, RegisterLayout] | str:
    """The only (outer, inner) with `outer * inner == whole` where inner has these counts and this shape, or which digit
    prevents it."""
    outer: list[tuple[Digit, ...]] = []
    inner: list[tuple[Digit, ...]] = []
    for what, digits, count in (
        ("thread", whole.thread_digits, num_threads),
        ("slot", whole.local_digits, num_locals),
    ):
        cut = split(digits, count)
        if cut is None:
            return f"its {what} {_described(_at(digits, count))} does not split at {count} {what}s"
        for digit in cut[1]:
            if digit.dim is not None and digit.weight * digit.size > shape[digit.dim]:
                return f"its {what} {_described(digit)} is among the first {count} {what}s, but leaves a tile of shape {shape}"
        for digit in cut[0]:
            if digit.dim is not None and digit.weight % shape[digit.dim]:
                return f"its {what} {_described(digit)} is beyond the first {count} {what}s, but cuts tiles of shape {shape}"
        inner.append(tuple(cut[1]))
        outer.append(
            tuple(Digit(d.size, d.dim, d.weight if d.dim is None else d.weight // shape[d.dim]) for d in cut[0])
        )
    outer_shape = tuple(a // b for a, b in zip(whole.shape, shape))
    return (
        replace(whole, shape=outer_shape, thread_digits=outer[0], local_digits=outer[1]),
        replace(whole, shape=shape, thread_digits=inner[0], local_digits=inner[1]),
    )


def _at(digits: Sequence[Digit], count: int) -> Digit:
    """The digit in which the number `count` falls."""
    stride = 1
    for digit in reversed(digits):
        stride *= digit.size
        if stride > count:
            return digit
    return digits[0]


def _described(digit: Digit) -> str:
    if digit.dim is None:
        return f"replication digit of size {digit.size}"
    return f"digit of size {digit.size} (dimension {digit.dim}, weight {digit.weight})"


# ---- memory layouts


def no_memory_product(outer: SharedLayout, inner: SharedLayout) -> str | None:
    """Why `outer * inner` does not exist, if it does not."""
    if outer.swizzle is not None and inner.swizzle is not None:
        return "both factors have a swizzle; one swizzle holds for all addresses"
    if outer.swizzle is not None and inner.size & (inner.size - 1):
        return f"the outer factor has a swizzle, which acts on bits, and a tile has {inner.size} elements"
    return None


def memory_right(whole: SharedLayout, inner: SharedLayout) -> SharedLayout | str:
    """The q with `q * inner == whole`, or why there is none.

    If q has no swizzle, the swizzle of `inner` is that of `whole`: it is the first that fits the whole because it is the
    first that fits the inner tile. So the two must be equal, and digits are unique below them.
    """
    shape = _quotient_shape(whole, inner)
    if isinstance(shape, str):
        return shape
    if inner.swizzle is None and whole.swizzle is not None:
        return _memory_right_by_table(whole, inner)
    if inner.swizzle != whole.swizzle:
        return f"its swizzle is {whole.swizzle}, that of the factor is {inner.swizzle}"
    cut = _memory_cut(whole, inner.shape)
    if isinstance(cut, str):
        return cut
    outer, tile = cut
    for digit in (digit for digits in outer for digit in digits):
        if digit.weight % inner.size:
            return (
                f"its digit of size {digit.size} has stride {digit.weight}, no multiple of the {inner.size} of a tile"
            )
    if tile != inner.digits:
        return f"its first tile is {replace(whole, shape=inner.shape, digits=tile)}"
    digits = tuple(tuple(Digit(d.size, d.dim, d.weight // inner.size) for d in part) for part in outer)
    return replace(whole, shape=shape, digits=digits, swizzle=None)


def _memory_right_by_table(whole: SharedLayout, inner: SharedLayout) -> SharedLayout | str:
    """The right quotient with a swizzle of its own, from its addresses."""
    firsts = whole.table()[tuple(slice(None, None, n) for n in inner.shape)]
    outer = None if np.any(firsts % inner.size) else whole.try_from_table(firsts // inner.size)
    if outer is None:
        return f"the first addresses of its tiles, over their size {inner.size}, are not those of a layout"
    return _no_memory_factors(whole, outer, inner) or outer


def memory_left(whole: SharedLayout, outer: SharedLayout) -> SharedLayout | str:
    """The q with `outer * q == whole`, or why there is none."""
    shape = _quotient_shape(whole, outer)
    if isinstance(shape, str):
        return shape
    if outer.swizzle is not None:
        inner = whole.try_from_table(whole.table()[tuple(slice(0, n) for n in shape)])
        if inner is None:
            return f"the addresses of its first tile, of shape {shape}, are not those of a layout"
        return _no_memory_factors(whole, outer, inner) or inner
    cut = _memory_cut(whole, shape)  # as in memory_right, q has the swizzle of the whole
    if isinstance(cut, str):
        return cut
    inner = replace(whole, shape=shape, digits=cut[1])
    if inner.swizzle != whole.swizzle or cut[0] != _scaled(outer.digits, inner.size):
        return f"{outer} * {inner} is {outer * inner}"
    return inner


def _scaled(digits: Digits, factor: int) -> Digits:
    return tuple(tuple(Digit(d.size, d.dim, d.weight * factor) for d in part) for part in digits)


def _no_memory_factors(whole: SharedLayout, outer: SharedLayout, inner: SharedLayout) -> str | None:
    """Why `whole` is not the product of its only candidates, if it is not."""
    reason = no_memory_product(outer, inner)
    if reason is None and outer * inner != whole:
        reason = f"{outer} * {inner} is {outer * inner}"
    return reason


def _quotient_shape(whole: SharedLayout, part: SharedLayout) -> tuple[int, ...] | str:
    for dim, (extent, piece) in enumerate(zip(whole.shape, part.shape)):
        if extent % piece:
            return f"it has {extent} elements in dimension {dim}, not a multiple of {piece}"
    return tuple(extent // piece for extent, piece in zip(whole.shape, part.shape))


def _memory_cut(whole: SharedLayout, shape: Sequence[int]) -> tuple[Digits, Digits] | str:
    """The digits of tiles of this shape and those within a tile, or which digit is of both."""
    outer: list[tuple[Digit, ...]] = []
    inner: list[tuple[Digit, ...]] = []
    for dim, (digits, extent) in enumerate(zip(whole.digits, shape)):
        cut = split(digits, extent)
        if cut is None:
            digit = _at(digits, extent)
            return (
                f"its digit of size {digit.size} (dimension {dim}, stride {digit.weight}) does not split "
                f"at {extent} elements"
            )
        outer.append(tuple(cut[0]))
        inner.append(tuple(cut[1]))
    return tuple(outer), tuple(inner)
