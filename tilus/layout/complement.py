"""Complements: the layout of what a layout leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tilus.layout.digits import Digit
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout
from tilus.layout.shared import SharedLayout


def replicas(layout: RegisterLayout) -> RegisterLayout:
    """The complement of a register layout: which of the copies of its element a thread holds in a slot.

    Its index is (copy among threads, copy among slots), of shape (num_replicas, num_local_replicas), with the threads and
    slots of `layout`. The pair (layout(t, i), replicas(layout)(t, i)) is different for every (t, i): what the layout does
    not tell about a thread and slot, its complement does. Of a layout without replication it is constant.
    """
    thread_digits, threads = _counted(layout.thread_digits, 0)
    local_digits, slots = _counted(layout.local_digits, 1)
    return RegisterLayout((threads, slots), thread_digits, local_digits)


def _counted(digits: Sequence[Digit], dim: int) -> tuple[tuple[Digit, ...], int]:
    """Replication digits as digits of `dim`, and the other way round; and how far they count."""
    result: list[Digit] = []
    count = 1
    for digit in reversed(digits):
        result.append(Digit(digit.size, dim, count) if digit.dim is None else Digit(digit.size, None, 0))
        count *= digit.size if digit.dim is None else 1
    return tuple(reversed(result)), count


def complement(layout: SharedLayout, size: int) -> SharedLayout:
    """The rank-1 layout c of the addresses that are left: `layout(x) + c(y)` is each of 0..size-1 exactly once.

    An interval is a sum of two sets only where they are alternate digits of one mixed-radix number (C. T. Long, "Addition
    theorems for sets of integers", 1967), so each stride must be a multiple of what is counted below it.
    Raises LayoutError, with the digit, where there is no such layout.
    """
    if layout.origin:
        raise LayoutError(
            f"{layout} has no complement: it starts at address {layout.origin}; expected 0",
            hint="take the complement of the tile before you move it",
        )
    free: list[Digit] = []
    counted = 1
    ordered = sorted((d for digits in layout.digits for d in digits), key=lambda d: d.weight)
    for digit in [*ordered, Digit(1, 0, size)]:
        if digit.weight < counted or digit.weight % counted:
            what = f"size {size}" if digit.size == 1 else f"stride {digit.weight} of its digit of size {digit.size}"
            raise LayoutError(
                f"{layout} has no complement in {size} elements: {what} is no multiple of the {counted} "
                "that the digits below it count",
                hint=f"choose a size and strides that are multiples, such as {layout.size}",
            )
        free.append(Digit(digit.weight // counted, 0, counted))
        counted = digit.weight * digit.size
    result = SharedLayout((prod(d.size for d in free),), (tuple(reversed(free)),))
    period = 1 if layout.swizzle is None else layout.swizzle.period
    if any(digit.weight % period for digit in result.digits[0]):
        raise LayoutError(
            f"{layout} has no complement: what it leaves out, {result}, is within a period of its swizzle",
            hint="take the complement before the swizzle",
        )
    return result
