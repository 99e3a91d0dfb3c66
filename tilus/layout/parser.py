"""Read a layout from its expression: the inverse of `str`, without evaluating Python."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

from tilus.layout import register
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout

_CONSTRUCTORS: dict[str, Callable[..., RegisterLayout]] = {
    f.__name__: f
    for f in (
        register.spatial,
        register.column_spatial,
        register.local,
        register.column_local,
        register.replicated,
        register.local_replicated,
        register.identity,
    )
}
_CHAINED = frozenset(_CONSTRUCTORS) - {"identity"}
_METHODS = _CHAINED | {"permute", "reshape", "squeeze", "unsqueeze", "reduce", "expand", "divide", "left_divide"}


def parse_layout(text: str, names: Mapping[str, RegisterLayout] | None = None) -> RegisterLayout:
    """The layout that an expression builds: constructors, chained methods, `*`, `/` and the given names.

    Raises LayoutError, with the part of the text that is at fault.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise LayoutError(f"cannot read the layout {text!r}: {error.msg}") from error
    return _evaluate(tree.body, names or {})


def _evaluate(node: ast.expr, names: Mapping[str, RegisterLayout]) -> RegisterLayout:
    match node:
        case ast.Name(name) if name in names:
            return names[name]
        case ast.BinOp(left, ast.Mult(), right):
            return _evaluate(left, names) * _evaluate(right, names)
        case ast.BinOp(left, ast.Div(), right):
            return _evaluate(left, names) / _evaluate(right, names)
        case ast.Call(ast.Name(name), args, keywords) if name in _CONSTRUCTORS:
            return _call(node, _CONSTRUCTORS[name], args, keywords, names)
        case ast.Call(ast.Attribute(value, name), args, keywords) if name in _METHODS:
            return _call(node, getattr(_evaluate(value, names), name), args, keywords, names)
        case _:
            known = ", ".join(sorted({*_CONSTRUCTORS, *_METHODS, *names}))
            raise LayoutError(f"{ast.unparse(node)!r} is not part of a layout expression; expected one of {known}")


def _call(
    node: ast.expr,
    function: Callable[..., RegisterLayout],
    args: list[ast.expr],
    keywords: list[ast.keyword],
    names: Mapping[str, RegisterLayout],
) -> RegisterLayout:
    values = [_argument(arg, names) for arg in args]
    named = {keyword.arg: _argument(keyword.value, names) for keyword in keywords if keyword.arg is not None}
    try:
        return function(*values, **named)
    except TypeError as error:
        raise LayoutError(f"{ast.unparse(node)!r}: {error}") from error


def _argument(node: ast.expr, names: Mapping[str, RegisterLayout]) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _evaluate(node, names)
