"""Another order of a thread's local slots: the same elements in the same thread, in other places."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tilus.layout import digits as _digits
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout


def reorder_locals(layout: RegisterLayout, radices: Sequence[int], order: Sequence[int]) -> RegisterLayout:
    """Read the slot as a mixed-radix number with `radices` (outermost first) and put its digits in another order.

    Slot (x0, x1, ...) of the result, with radices `radices[order[0]], radices[order[1]], ...`, holds what slot (y0, y1, ...) of
    `layout` holds for `y[order[k]] = x[k]`. Raises LayoutError where the layout's digits do not split at the radices.
    """
    if prod(radices) != layout.num_locals or sorted(order) != list(range(len(radices))):
        raise LayoutError(
            f"radices {list(radices)} in order {list(order)} for a layout of {layout.num_locals} slots; "
            "expected their product to be the number of slots, and each position once"
        )
    pieces: list[Sequence[_digits.Digit]] = []
    rest: Sequence[_digits.Digit] = layout.local_digits
    for radix in reversed(radices):
        cut = _digits.split(rest, radix)
        if cut is None:
            raise LayoutError(f"the slots of {layout} do not split by radices {list(radices)}")
        rest, piece = cut
        pieces.append(piece)
    pieces.reverse()
    return RegisterLayout(layout.shape, layout.thread_digits, tuple(d for k in order for d in pieces[k]))
