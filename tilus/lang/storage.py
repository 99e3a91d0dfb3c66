"""Mutable storage of variables: what a name that changes in a run-time loop or branch stands for.

A *slot* is a mutable scalar or tile. An expression that mentions a slot reads it when it is used, so a value that is
kept (bound to a name, put into an attribute) must first be copied: `snapshot`. Every write is counted, so that an
expression whose operand changes while the rest of it is evaluated can be refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import Const, Expr, Var, as_expr, substitute, walk
from tilus.ir.expr import cast as cast_expr
from tilus.ir.ranges import bounds, divisor
from tilus.ir.stmt import SetScalar
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedView
from tilus.lang.operators import as_number
from tilus.lang.values import RuntimeRange, Value, describe, is_scalar

Slot = Var | RegisterTensor


def is_storable(value: Value) -> bool:
    return is_scalar(value) or isinstance(value, RegisterTensor)


class Storage:
    """The slots of one kernel. `writes` counts assignments to each."""

    def __init__(self, builder: IRBuilder) -> None:
        self.builder = builder
        self.writes: dict[Slot, int] = {}

    def allocate(self, value: Value, name: str) -> Slot:
        """A slot of the value's type, not yet assigned; a tile whose layout is pinned keeps it."""
        if isinstance(value, RegisterTensor):
            slot: Slot = self.builder.tile(value.dtype, value.shape, value.layout, name, mutable=True)
        else:
            slot = Var(self.builder.fresh(name), as_expr(value).dtype, mutable=True)
        self.writes[slot] = 0
        return slot

    def freeze(self, slot: Slot) -> None:
        """The slot is not assigned any more: it needs no copies."""
        del self.writes[slot]

    def write(self, slot: Slot, value: Value, name: str) -> None:
        """Emit the assignment.

        Raises: TilusError when the type is not that of the slot.
        """
        if value is slot:
            return
        if isinstance(slot, RegisterTensor):
            self._check_tile(slot, value, name)
            self._assign_tile(slot, value)
        else:
            self.builder.append(SetScalar(slot, self._scalar(slot, value, name), self.builder.loc))
        self.writes[slot] += 1

    def snapshot(self, value: Value, name: str = "kept") -> Value:
        """The value as it is now, whatever is assigned later. Lists and dicts are changed in place, as they have identity."""
        match value:
            case Expr():
                return self._keep_scalar(value, name)
            case RegisterTensor() if value in self.writes:
                kept = self.builder.tile(value.dtype, value.shape, value.layout, name, mutable=True)
                self._assign_tile(kept, value)
                return kept
            case GlobalTensor() if self.slots(value):
                shape = tuple(self._keep_scalar(e, name) for e in value.shape)
                strides = tuple(self._keep_scalar(e, name) for e in value.strides)
                offset = self._keep_scalar(value.offset, name)
                return dataclasses.replace(value, shape=shape, strides=strides, offset=offset)
            case SharedView() if self.slots(value):
                return SharedView(value.tensor, tuple(self._keep_scalar(e, name) for e in value.prefix))
            case RuntimeRange():
                start, stop = (self.snapshot(e, name) for e in (value.start, value.stop))
                return dataclasses.replace(value, start=start, stop=stop)
            case tuple() if self.slots(cast("tuple[Value, ...]", value)):
                items = [self.snapshot(item, name) for item in cast("tuple[Value, ...]", value)]
                make: Any = getattr(type(cast("object", value)), "_make", tuple)
                return make(items)
            case list():
                items = cast("list[Value]", value)
                items[:] = [self.snapshot(item, name) for item in items]
            case dict():
                entries = cast("dict[Value, Value]", value)
                entries.update({key: self.snapshot(item, name) for key, item in entries.items()})
            case _:
                pass
        return value

    def slots(self, value: Value) -> frozenset[Slot]:
        """The slots that a value mentions."""
        return frozenset(self._mentioned(value)) if self.writes else frozenset()

    def _mentioned(self, value: Value) -> Iterator[Slot]:
        match value:
            case RegisterTensor() if value in self.writes:
                yield value
            case Expr():
                yield from (e for e in walk(value) if isinstance(e, Var) and e in self.writes)
            case GlobalTensor():
                yield from self._mentioned((*value.shape, *value.strides, value.offset))
            case SharedView():
                yield from self._mentioned(value.prefix)
            case RuntimeRange():
                yield from self._mentioned((value.start, value.stop))
            case tuple() | list():
                for item in cast("tuple[Value, ...]", value):
                    yield from self._mentioned(item)
            case dict():
                yield from self._mentioned(tuple(cast("dict[Value, Value]", value).values()))
            case _:
                pass

    def _keep_scalar(self, expr: Expr, name: str) -> Expr:
        """The expression over copies of its slots, so that everything else about it stays known."""
        slots = self.slots(expr)
        if not slots:
            return expr
        copies: dict[Expr, Expr] = {}
        for slot in sorted((s for s in slots if isinstance(s, Var)), key=lambda s: s.name):
            copy = dataclasses.replace(slot, name=self.builder.fresh(name))
            self.builder.append(SetScalar(copy, slot, self.builder.loc))
            copies[slot] = copy
        return substitute(expr, copies)

    def _check_tile(self, slot: RegisterTensor, value: Value, name: str) -> None:
        same = isinstance(value, RegisterTensor) and (value.dtype, value.shape) == (slot.dtype, slot.shape)
        if not same:
            raise TilusError(
                f"{name} is {describe(slot)} and is assigned {describe(value)} in a run-time loop or branch",
                hint="a variable keeps its dtype and shape there: cast the value, or use another name",
            )

    def _assign_tile(self, slot: RegisterTensor, value: RegisterTensor) -> None:
        from tilus.instructions.view import Assign

        self.builder.emit(Assign(slot, value))

    def _scalar(self, slot: Var, value: Value, name: str) -> Expr:
        if is_scalar(value):
            expr = as_number(as_expr(value)) if slot.dtype.is_integer else as_expr(value)
            if expr.dtype == slot.dtype or (isinstance(expr, Const) and _fits(expr.value, slot.dtype)):
                return cast_expr(expr, slot.dtype)
        raise TilusError(
            f"{name} is {describe(slot)} and is assigned {describe(value)} in a run-time loop or branch",
            hint=f"a variable keeps its type there: give it a value of the right type before, or write .to({slot.dtype})",
        )


def _fits(value: int | float | bool, dtype: DataType) -> bool:
    """Whether Python's number is exactly a number of this type (every float is taken for a float type)."""
    if isinstance(value, bool) or dtype.kind == "bool":
        return isinstance(value, bool) and dtype.kind == "bool"
    if dtype.is_float:
        return True
    return isinstance(value, int) and dtype.min_value <= value <= dtype.max_value


def loop_variable(name: str, start: Expr, stop: Expr, step: int) -> Var:
    """The variable of a run-time loop with what is known of its values."""
    import math

    low, high = bounds(start)[0], bounds(stop)[1]
    dtype = start.dtype if start.dtype.nbits >= stop.dtype.nbits else stop.dtype
    multiple = math.gcd(divisor(start), step) or 1
    return Var(name, dtype, low, None if high is None else high - 1, multiple)
