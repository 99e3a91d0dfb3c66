"""Broadcasting between register tiles: which slot of an operand has the value that a slot of the result needs."""

from __future__ import annotations

from collections.abc import Sequence

from tilus.layout import digits as _digits
from tilus.layout.digits import Digit
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout


def broadcast_operand(layout: RegisterLayout, dims: Sequence[int]) -> RegisterLayout:
    """The layout of an operand with extent 1 in `dims` whose threads hold what the threads of `layout` need.

    Then `slot_map(layout, broadcast_operand(layout, dims))` exists. No value is held twice by one thread.
    """
    reduced = layout.reduce(dims, keepdims=True)
    slots = tuple(d for d in reduced.local_digits if d.dim is not None)
    return RegisterLayout(reduced.shape, reduced.thread_digits, slots)


def slot_map(result: RegisterLayout, operand: RegisterLayout) -> tuple[int, ...]:
    """For each slot of `result`, the slot of `operand` with the same element (broadcast where an extent is 1).

    One map serves all threads: registers have no run-time index. Raises LayoutError where shapes or threads do not
    fit, or where some thread does not own a value that it needs at such a slot.
    """
    if result.rank != operand.rank or any(b not in (1, a) for a, b in zip(result.shape, operand.shape)):
        raise LayoutError(f"an operand of shape {operand.shape} does not broadcast to {result.shape}")
    if result.num_threads != operand.num_threads:
        raise LayoutError(f"{operand.num_threads} threads hold the operand, {result.num_threads} hold the result")
    broadcast = {dim for dim, extent in enumerate(operand.shape) if extent == 1}
    # index(t, i) is a sum A(t) + B(i). With A_operand == A_result the threads cancel; without it, some thread differs
    # from thread 0, for which i alone decides.
    if _masked(result.thread_digits, broadcast) != operand.thread_digits:
        raise _not_owned(result, operand)
    slots: dict[tuple[int, ...], int] = {}
    for slot, index in enumerate(_digits.index_table(operand.local_digits, operand.rank).tolist()):
        slots.setdefault(tuple(index), slot)
    needed = _digits.index_table(_masked(result.local_digits, broadcast), result.rank).tolist()
    found = [slots.get(tuple(index)) for index in needed]
    if None in found:
        raise _not_owned(result, operand)
    return tuple(slot for slot in found if slot is not None)


def _masked(digits: Sequence[Digit], dims: set[int]) -> tuple[Digit, ...]:
    return _digits.canonical(Digit(d.size, None, 0) if d.dim in dims else d for d in digits)


def _not_owned(result: RegisterLayout, operand: RegisterLayout) -> LayoutError:
    return LayoutError(
        f"threads with layout {operand} do not hold, in one slot for all threads, the values that {result} needs",
        hint=f"convert the operand to {broadcast_operand(result, [d for d, n in enumerate(operand.shape) if n == 1])}",
    )
