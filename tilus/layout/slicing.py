"""Which slots of a register layout are left in a part of the tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tilus.layout import digits as _digits
from tilus.layout.digits import Digit
from tilus.layout.errors import LayoutError


def sliced_slots(
    thread_digits: Sequence[Digit], local_digits: Sequence[Digit], rank: int, dim: int, part: range, what: str
) -> tuple[Digit, ...]:
    """The digits of the slots whose index along `dim` is in a range, in ascending order. what: the slice, for messages.

    Raises LayoutError where a slot is inside for some threads only, or where the slots that are left do not count as those of
    a layout.
    """
    slots = _digits.index_table(local_digits, rank)
    positions = _digits.index_table(thread_digits, rank)[:, None, dim] + slots[:, dim]
    inside = (positions >= part.start) & (positions < part.stop)
    kept = np.flatnonzero(inside[0])
    if np.any(inside != inside[0]):
        slot = int(np.flatnonzero(np.any(inside != inside[0], axis=0))[0])
        held = sorted({int(position) for position in positions[:, slot]})
        raise LayoutError(
            f"{what} is no layout: threads hold indices {held[0]}..{held[-1]} in slot {slot}, some inside and some not",
            hint="slice where no thread digit is cut, or convert to a layout with this dimension in slots",
        )
    values = slots[kept]
    values[:, dim] -= part.start
    digits = _digits.fitted(values) if not np.any(values[0]) else None
    if digits is None:
        raise LayoutError(
            f"{what} is no layout: slots {kept.tolist()} are left, whose order is not that of digits",
            hint="slice at multiples of the digits' sizes, or reorder the slots first",
        )
    return digits
