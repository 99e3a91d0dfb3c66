"""Read a layout from its expression: the inverse of `str`, without evaluating Python."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from tilus.layout import arrangements, register
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout
from tilus.layout.shared import SharedLayout

L = TypeVar("L", RegisterLayout, SharedLayout)


def parse_layout(text: str, names: Mapping[str, RegisterLayout] | None = None) -> RegisterLayout:
    """The register layout of an expression: constructors, chained methods, `*`, `/` and the given names.

    Raises LayoutError, with the part of the text that is at fault.
    """
    constructors = _named(
        register.spatial,
        register.column_spatial,
        register.local,
        register.column_local,
        register.replicated,
        register.local_replicated,
        register.identity,
    )
    algebra = {"permute", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "reduce", "slice", "expand"}
    methods = frozenset(constructors) - {"identity"} | algebra | {"divide", "left_divide"}
    return _Grammar(
        constructors, methods, names or {}, {ast.Mult: RegisterLayout.__mul__, ast.Div: RegisterLayout.divide}
    ).read(text)


def parse_shared_layout(text: str, names: Mapping[str, SharedLayout] | None = None) -> SharedLayout:
    """The shared layout of an expression, as `parse_layout`."""
    constructors = _named(
        arrangements.row_major,
        arrangements.column_major,
        arrangements.padded,
        arrangements.strided,
        arrangements.swizzled,
    )
    algebra = {"permute", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "slice", "expand"}
    methods = frozenset({"stages", "swizzled", "at", "divide", "left_divide"} | algebra)
    return _Grammar(
        constructors, methods, names or {}, {ast.Mult: SharedLayout.__mul__, ast.Div: SharedLayout.divide}
    ).read(text)


def _named(*functions: Callable[..., L]) -> dict[str, Callable[..., L]]:
    return {function.__name__: function for function in functions}


@dataclass(frozen=True)
class _Grammar(Generic[L]):
    """Which names, calls and operators an expression may use, and what they build."""

    constructors: Mapping[str, Callable[..., L]]
    methods: frozenset[str]
    names: Mapping[str, L]
    operators: dict[type[ast.operator], Callable[[L, L], L]]

    def read(self, text: str) -> L:
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError) as error:
            raise LayoutError(f"cannot read the layout {text!r}: {error}") from error
        return self.evaluate(tree.body)

    def evaluate(self, node: ast.expr) -> L:
        match node:
            case ast.Name(name) if name in self.names:
                return self.names[name]
            case ast.BinOp(left, sign, right) if type(sign) in self.operators:
                return self.operators[type(sign)](self.evaluate(left), self.evaluate(right))
            case ast.Call(ast.Name(name)) if name in self.constructors:
                return self.call(node, self.constructors[name])
            case ast.Call(ast.Attribute(value, name)) if name in self.methods:
                return self.call(node, getattr(self.evaluate(value), name))
            case _:
                known = ", ".join(sorted({*self.constructors, *self.methods, *self.names}))
                raise LayoutError(f"{ast.unparse(node)!r} is not part of a layout expression; expected one of {known}")

    def call(self, node: ast.Call, function: Callable[..., L]) -> L:
        values = [self.argument(arg) for arg in node.args]
        named = {keyword.arg or "**": self.argument(keyword.value) for keyword in node.keywords}
        try:
            return function(*values, **named)
        except TypeError as error:
            raise LayoutError(f"{ast.unparse(node)!r}: {error}") from error

    def argument(self, node: ast.expr) -> object:
        match node:
            case ast.Constant(int()):
                return node.value
            case ast.UnaryOp(ast.USub(), ast.Constant(int(value))):
                return -value
            case ast.Tuple(elements) | ast.List(elements):
                return tuple(self.argument(element) for element in elements)
            case _:
                return self.evaluate(node)
