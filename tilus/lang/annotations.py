"""Types of kernel parameters, and what a kernel's signature says."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

from tilus.dtypes import DataType, boolean, f32, int32
from tilus.errors import Loc, TilusError
from tilus.lang.source import Source, source_of

Dim = str | int


@dataclass(frozen=True)
class TensorType:
    """`Tensor[dtype, dims...]`: dtype is a DataType or the name of one; a dim is an extent or the name of one."""

    dtype: DataType | str
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"Tensor[{', '.join(str(part) for part in (self.dtype, *self.dims))}]"


class Tensor:
    """The type of a tensor parameter: `x: Tensor[f16, "m", "k"]`, `w: Tensor["wt", "n", 128]`.

    A name that is used twice must be bound to the same extent (or dtype); a name of a `Const` parameter means its value.
    """

    if TYPE_CHECKING:  # what a kernel's body sees
        shape: tuple[Any, ...]
        strides: tuple[Any, ...]
        rank: int
        dtype: Any

        def __getitem__(self, index: Any) -> Any: ...

    def __class_getitem__(cls, item: object) -> TensorType:
        dtype, *dims = item if isinstance(item, tuple) else (item,)
        if not isinstance(dtype, (DataType, str)):
            raise TilusError(
                f"Tensor[{dtype!r}, ...]: the first item is a {type(dtype).__name__}, expected a dtype or a name",
                hint='for example Tensor[f16, "m", "k"]',
            )
        for dim in dims:
            if isinstance(dim, bool) or not isinstance(dim, (str, int)) or (isinstance(dim, int) and dim < 1):
                raise TilusError(
                    f"dimension {dim!r} of a Tensor annotation, expected a name or a positive int",
                    hint='for example Tensor[f16, "m", 128]',
                )
        return TensorType(dtype, tuple(dims))


if TYPE_CHECKING:
    Const: TypeAlias = Any
else:

    class Const:
        """The type of a compile-time parameter: any hashable Python value; a new value is a new specialisation."""


@dataclass(frozen=True)
class TensorParameter:
    name: str
    type: TensorType
    optional: bool = False


@dataclass(frozen=True)
class ScalarParameter:
    """A number that is passed at run time. default: None when there is none."""

    name: str
    dtype: DataType
    default: int | float | bool | None = None


@dataclass(frozen=True)
class ConstParameter:
    name: str
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


Parameter = TensorParameter | ScalarParameter | ConstParameter

_PYTHON_TYPES: dict[object, DataType] = {int: int32, float: f32, bool: boolean}


@dataclass(frozen=True)
class Signature:
    """The parameters of a kernel in the user's order; `python` is the Python signature, used to match arguments. varying: the
    named dims of whose extents a specialisation knows nothing."""

    name: str
    parameters: tuple[Parameter, ...]
    python: inspect.Signature = field(repr=False)
    loc: Loc
    varying: frozenset[str] = frozenset()

    @functools.cached_property
    def tensors(self) -> tuple[TensorParameter, ...]:
        return tuple(p for p in self.parameters if isinstance(p, TensorParameter))

    @functools.cached_property
    def scalars(self) -> tuple[ScalarParameter, ...]:
        return tuple(p for p in self.parameters if isinstance(p, ScalarParameter))

    @functools.cached_property
    def consts(self) -> tuple[ConstParameter, ...]:
        return tuple(p for p in self.parameters if isinstance(p, ConstParameter))


def signature_of(function: FunctionType, names: Mapping[str, object], varying: Sequence[str] = ()) -> Signature:
    """Read a kernel's parameters; annotations that are strings are evaluated in `names`, then in the globals.

    Raises: TilusError naming the parameter and its annotation, or a varying dim that is none.
    """
    source = source_of(function)
    places = {arg.arg: source.loc(arg) for arg in _arguments(source.node.args)}
    parameters: list[Parameter] = []
    python = inspect.signature(function)
    for parameter in python.parameters.values():
        try:
            parameters.append(_parameter(parameter, function, names))
        except TilusError as error:
            raise error.at(places.get(parameter.name)) from None
    signature = Signature(function.__name__, tuple(parameters), python, _definition(source), frozenset(varying))
    _check_names(signature, places)
    _check_varying(signature)
    return signature


def _check_varying(signature: Signature) -> None:
    """Only dims that are named, and no Const parameters, which are known."""
    dims = {dim for tensor in signature.tensors for dim in tensor.type.dims if isinstance(dim, str)}
    known = sorted(dims - {const.name for const in signature.consts})
    for name in sorted(signature.varying.difference(known)):
        raise TilusError(
            f"{signature.name}: varying={name!r}, expected names of dims: {', '.join(known)}", loc=signature.loc
        )


def _definition(source: Source) -> Loc:
    """`def` and the name of a kernel."""
    loc = source.loc(source.node)
    name = source.node.name if isinstance(source.node, ast.FunctionDef) else ""
    return replace(loc, end_column=loc.column + len("def ") + len(name))


def _arguments(args: Any) -> list[Any]:
    extra = [a for a in (args.vararg, args.kwarg) if a is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *extra]


def _parameter(parameter: inspect.Parameter, function: FunctionType, names: Mapping[str, object]) -> Parameter:
    name, default = parameter.name, parameter.default
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
        raise TilusError(
            f"kernel parameter {stars}{name} takes any number of arguments, which is not supported",
            hint="give each parameter a name and a type; a tuple can be passed as a Const",
        )
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = _resolve(annotation, name, function, names)
    has_default = default is not inspect.Parameter.empty
    match annotation:
        case TensorType():
            if has_default and default is not None:
                raise TilusError(f"tensor parameter {name} has default {default!r}, expected None or no default")
            return TensorParameter(name, annotation, optional=has_default)
        case DataType():
            return _scalar(name, annotation, default if has_default else None)
        case _ if annotation is Const:
            return ConstParameter(name, default)
        case _ if annotation in _PYTHON_TYPES:
            return _scalar(name, _PYTHON_TYPES[annotation], default if has_default else None)
        case _:
            found = "no type" if annotation is inspect.Parameter.empty else f"type {annotation!r}"
            raise TilusError(
                f"kernel parameter {name} has {found}, expected Tensor[...], a dtype, int, float, bool or Const",
                hint=f'for example `{name}: Tensor[f32, "n"]`, `{name}: f32`, or `{name}: Const` when it is compile-time',
            )


def _scalar(name: str, dtype: DataType, default: Any) -> ScalarParameter:
    if default is not None and not isinstance(default, (int, float)):
        raise TilusError(f"scalar parameter {name} has default {default!r}, expected a number")
    return ScalarParameter(name, dtype, default)


def _resolve(text: str, name: str, function: FunctionType, names: Mapping[str, object]) -> object:
    try:
        return eval(text, {**function.__globals__}, dict(names))
    except Exception as error:
        raise TilusError(f"the annotation {text!r} of parameter {name} cannot be evaluated: {error}") from error


def _check_names(signature: Signature, places: Mapping[str, Loc]) -> None:
    """A dimension may share its name with a Const (then it has that value), but not with another parameter."""
    taken = {p.name: "tensor" for p in signature.tensors} | {p.name: "scalar" for p in signature.scalars}
    for tensor in signature.tensors:
        for part in (tensor.type.dtype, *tensor.type.dims):
            if isinstance(part, str) and part in taken:
                raise TilusError(
                    f"{tensor.type} of parameter {tensor.name}: {part!r} is also the name of a {taken[part]} parameter",
                    loc=places.get(tensor.name),
                    hint="rename one of them; sizes need no parameter of their own: use x.shape",
                )
