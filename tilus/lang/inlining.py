"""What is needed to inline a helper: its source, its own names, and its arguments by parameter."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType

from tilus.errors import TilusError
from tilus.lang.calls import free_names
from tilus.lang.frame import Scope
from tilus.lang.source import Source, assigned_names, parameter_names, source_of
from tilus.lang.values import LocalFunction, Value


def resolve(function: FunctionType | LocalFunction) -> tuple[Source, Scope, inspect.Signature, object]:
    """Source, empty scope and signature of a helper, and what tells it from others."""
    if isinstance(function, LocalFunction):
        source, signature = function.source, function.signature
        scope = Scope(_local_names(source), {}, enclosing=function.frame.scope)
        return source, scope, signature, source.node
    source = source_of(function)
    return source, Scope(_local_names(source), free_names(function)), inspect.signature(function), function.__code__


def _local_names(source: Source) -> frozenset[str]:
    node = source.node
    assigned = assigned_names(node.body) if isinstance(node, ast.FunctionDef) else frozenset[str]()
    return assigned | frozenset(parameter_names(node))


def bind_arguments(
    name: str, signature: inspect.Signature, args: Sequence[Value], kwargs: Mapping[str, Value]
) -> dict[str, Value]:
    """The arguments of a call by parameter, defaults included.

    Raises: TilusError when they do not match the signature.
    """
    for parameter in signature.parameters.values():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise TilusError(
                f"helper {name} takes any number of arguments ({parameter}), which is not supported in a kernel",
                hint="pass a tuple",
            )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TilusError(f"{name}: {error}", hint=f"its signature is {name}{signature}") from None
    bound.apply_defaults()
    return dict(bound.arguments)
