"""Composition: a layout of what a register tile holds, `result(t, i) == outer(inner(t, i))`."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout
from tilus.layout.shared import SharedLayout

Layout = TypeVar("Layout", RegisterLayout, SharedLayout)


def compose(outer: Layout, inner: RegisterLayout) -> Layout:
    """`outer . inner`, the only layout with `result(t, i) == outer(inner(t, i))`.

    A memory layout after a register layout of the same shape is the address of what thread t holds in slot i, of shape
    (threads, slots). A register layout after one of shape (threads, slots) of the former renumbers threads and slots:
    `inner(t, i)` is the pair that the outer layout is asked for, so `spatial(T, 1) * local(1, L)` is the unit.
    Raises LayoutError where the shape of `inner` is another, or where the composition is not a layout.
    """
    threads_and_slots = isinstance(outer, RegisterLayout)
    domain = (outer.num_threads, outer.num_locals) if isinstance(outer, RegisterLayout) else outer.shape
    if inner.shape != domain:
        what = "(threads, slots)" if threads_and_slots else "shape"
        raise LayoutError(
            f"{outer} after {inner}: the inner layout has shape {inner.shape}, the outer one {what} {domain}; "
            "expected them to be equal",
            hint="reshape or slice one of them",
        )
    values = outer.table()[tuple(np.moveaxis(inner.table(), -1, 0))]
    if not inner.rank:
        values = np.broadcast_to(values, (inner.num_threads, inner.num_locals))
    result = outer.try_from_table(values)
    if result is None:
        raise LayoutError(
            f"{outer} after {inner} is no layout: a digit of one cuts a digit of the other",
            hint="index the table() of one with that of the other",
        )
    return result
