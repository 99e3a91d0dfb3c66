"""Complements: the layout of what a layout leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from tilus.layout.digits import Digit, fitted
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

    Only the set of addresses matters. An interval is a sum of two sets only where they are alternate digits of one mixed-radix
    number (C. T. Long, "Addition theorems for sets of integers", 1967), so the addresses, in rising order, are a sum of
    digits, and each stride is a multiple of what is counted below it.
    Raises LayoutError, with the digit, where there is no such layout.
    """
    taken = np.sort(layout.table(), axis=None)
    digits = fitted(taken[:, None]) if taken[0] == 0 else None
    if digits is None:
        raise LayoutError(
            f"{layout} has no complement: its addresses do not start at 0 or have gaps of different sizes",
            hint="use a tile that starts at 0, with strides that are multiples of each other",
        )
    free: list[Digit] = []
    counted = 1
    for digit in [*reversed(digits), Digit(1, 0, size)]:
        if digit.weight < counted or digit.weight % counted:
            what = f"size {size}" if digit.size == 1 else f"stride {digit.weight} of its digit of size {digit.size}"
            raise LayoutError(
                f"{layout} has no complement in {size} elements: {what} is no multiple of the {counted} "
                "that the digits below it count",
                hint="choose a size and strides that are multiples of each other",
            )
        free.append(Digit(digit.weight // counted, 0, counted))
        counted = digit.weight * digit.size
    return SharedLayout((prod(d.size for d in free),), (tuple(reversed(free)),))
