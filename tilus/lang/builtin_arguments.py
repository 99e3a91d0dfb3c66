"""Arguments of the language's functions that are of another kind than their annotations say, in the words of users."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.ir.expr import Expr
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor, SharedView
from tilus.lang.values import Value, describe


@dataclass(frozen=True)
class Kind:
    """What an annotation means: whether a value is of it, how that is called, and a way out."""

    has: Callable[[Value], bool]
    expected: str
    hint: str


def _is_constant(value: Value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_integer(value: Value) -> bool:
    return _is_constant(value) or (isinstance(value, Expr) and value.dtype.is_integer)


def _each(has: Callable[[Value], bool]) -> Callable[[Value], bool]:
    return lambda value: isinstance(value, (tuple, list)) and all(has(item) for item in value)


_CONSTANT = "it has to be known while compiling: a Const parameter, say, but no extent of a tensor"
_INDEX = "a tile starts at one index for each dim: [i, j]"
KINDS = {
    "int": Kind(_is_constant, "a compile-time integer", _CONSTANT),
    "Sequence[int]": Kind(_each(_is_constant), "a list of compile-time integers", _CONSTANT),
    "int | Sequence[int]": Kind(
        lambda v: _is_constant(v) or _each(_is_constant)(v), "compile-time integers", "axes are counted from 0"
    ),
    "Sequence[Expr | int]": Kind(_each(_is_integer), "a list of integers", _INDEX),
    "DataType": Kind(lambda v: isinstance(v, DataType), "a dtype", "dtypes are values: tilus.f16"),
}
# Only to explain what failed: functions say more about those that are of the wrong kind themselves.
TENSORS = {
    "RegisterTensor": Kind(lambda v: isinstance(v, RegisterTensor), "a tile", "tilus.load gives tiles"),
    "GlobalTensor": Kind(lambda v: isinstance(v, GlobalTensor), "a tensor in global memory", "pass it to the kernel"),
    "SharedOperand": Kind(
        lambda v: isinstance(v, (SharedTensor, SharedView)), "a tensor in shared memory", "tilus.shared makes them"
    ),
}


def check_kinds(name: str, bound: inspect.BoundArguments, kinds: Mapping[str, Kind] = KINDS) -> None:
    """Raise a TilusError at the first argument of tilus.`name` that is not of the kind that its annotation names."""
    for parameter, value in bound.arguments.items():
        annotation = str(bound.signature.parameters[parameter].annotation)
        optional = annotation.endswith(" | None")
        kind = kinds.get(annotation.removesuffix(" | None"))
        if kind is not None and not kind.has(value) and not (optional and value is None):
            raise TilusError(
                f"tilus.{name}: {parameter} is {_shown(value)}, expected {kind.expected}{' or None' * optional}",
                hint=f"{kind.hint}; {usage(name, bound.signature)}",
            )


def usage(name: str, signature: inspect.Signature) -> str:
    """A hint that shows a function's parameters."""
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return f"its signature is {name}{signature.replace(parameters=plain, return_annotation=signature.empty)}"


def _shown(value: Value) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return describe(value)
