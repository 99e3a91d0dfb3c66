"""Values of the text form as fields of instructions: the annotations of the dataclasses decide."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

from tilus.dtypes import boolean
from tilus.ir.expr import Const
from tilus.ir.instruction import Instruction
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.layout import LayoutError, RegisterLayout, SharedLayout, parse_layout, parse_shared_layout


class Unfit(Exception):
    """A value is not of the type of its field."""


@functools.cache
def field_types(cls: type[Instruction]) -> dict[str, Any]:
    """The fields of an instruction class and their types."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def converted(value: Any, hint: Any) -> Any:
    """A value of the text as one of the field's type: constants become Python numbers, strings layouts."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return converted(value, option)
            except Unfit:
                continue
        raise Unfit
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(args) != len(value)):
            raise Unfit
        elements = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(converted(v, t) for v, t in zip(value, elements, strict=True))
    if hint in (bool, int, float) and isinstance(value, Const):
        return _number(value, hint)
    if hint in (RegisterLayout, SharedLayout) and isinstance(value, str):
        try:
            return (parse_layout if hint is RegisterLayout else parse_shared_layout)(value)
        except LayoutError:
            raise Unfit from None
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise Unfit


def _number(value: Const, hint: type[bool | int | float]) -> bool | int | float:
    kind = bool if value.type == boolean else float if value.type.is_float else int
    if kind is not hint:
        raise Unfit
    return hint(value.value)


def described(value: Any) -> str:
    if isinstance(value, (RegisterTensor, SharedTensor, GlobalTensor)):
        return f"the tensor %{value.name}"
    return (
        f"[{', '.join(map(described, value))}]"
        if isinstance(value, list)
        else repr(value)
        if value is None
        else str(value)
    )


def type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
