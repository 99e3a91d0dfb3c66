"""Operators on the values of a kernel: Python computes compile-time values, scalars become expressions, tiles elementwise
instructions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import COMPARISONS, Binary, Const, Expr, as_expr, binary, select, unary, walk
from tilus.ir.tensor import RegisterTensor
from tilus.lang.values import Value, describe, is_number, is_runtime, is_scalar, simplified

_PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "&": operator.and_, "|": operator.or_, "^": operator.xor, "<<": operator.lshift,
    ">>": operator.rshift, "**": operator.pow, "@": operator.matmul, "min": min, "max": max, **COMPARISONS,
}  # fmt: skip

_PYTHON_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg, "pos": operator.pos, "invert": operator.invert, "not": operator.not_, "abs": abs,
}  # fmt: skip

_INTEGER_ONLY = frozenset({"&", "|", "^", "<<", ">>"})

_INSTEAD = {
    "**": "write the products: x * x",
    "@": "use tilus.dot(a, b, acc)",
    "in": "compare with each value, joined by `or`",
    "not in": "compare with each value, joined by `and`",
    "is": "use == to compare run-time values",
    "is not": "use != to compare run-time values",
}


def python_value(compute: Callable[[], Any]) -> Any:
    """What Python computes, with its exceptions as errors at the current position."""
    try:
        return compute()
    except TilusError:
        raise
    except Exception as error:
        raise TilusError(f"{type(error).__name__} while computing a compile-time value: {error}") from error


def apply_binary(b: IRBuilder, op: str, lhs: Value, rhs: Value) -> Value:
    """`lhs op rhs`; op is Python's symbol (comparisons included), `min` or `max`.

    Raises: TilusError when the operands have no such operation, naming both.
    """
    if op in ("is", "is not") and (lhs is None or rhs is None):
        return (lhs is rhs) == (op == "is")
    if not is_runtime(lhs) and not is_runtime(rhs):
        return python_value(lambda: _PYTHON[op](lhs, rhs) if op in _PYTHON else _membership(op, lhs, rhs))
    if op in _INSTEAD:
        raise TilusError(
            f"operator {op} on {describe(lhs)} and {describe(rhs)} exists only for compile-time values",
            hint=_INSTEAD[op],
        )
    operands = (lhs, rhs)
    if all(is_scalar(v) or isinstance(v, RegisterTensor) for v in operands):
        if any(isinstance(v, RegisterTensor) for v in operands):
            from tilus.instructions.elementwise import binary_op

            return binary_op(b, op, lhs, rhs)
        return _scalar(op, lhs, rhs)
    if (op == "+" and isinstance(lhs, (tuple, list)) and type(lhs) is type(rhs)) or (
        op == "*" and isinstance(lhs, (tuple, list)) and isinstance(rhs, int)
    ):
        return python_value(lambda: _PYTHON[op](lhs, rhs))
    hint = None
    if not all(is_scalar(v) or isinstance(v, RegisterTensor) for v in operands):
        hint = "operators work on scalars and register tiles: load memory with tilus.load first"
    raise TilusError(f"operator {op} between {describe(lhs)} and {describe(rhs)} is not defined", hint=hint)


def _membership(op: str, lhs: Value, rhs: Value) -> bool:
    match op:
        case "in":
            return lhs in rhs
        case "not in":
            return lhs not in rhs
        case "is":
            return lhs is rhs
        case _:
            return lhs is not rhs


def _scalar(op: str, lhs: Expr | int | float, rhs: Expr | int | float) -> Value:
    a, b = as_expr(lhs), as_expr(rhs)
    if op in _INTEGER_ONLY and (a.dtype.is_float or b.dtype.is_float):
        raise TilusError(f"operator {op} between {a.dtype} and {b.dtype} scalars, expected integers")
    if op in ("+", "-", "*", "/", "//", "%", "<<", ">>"):
        a, b = as_number(a), as_number(b)
    for one, other in ((a, b), (b, a)):
        _check_fits(op, one, other)
    if op in ("&", "|", "^") and a.dtype.kind == b.dtype.kind == "bool":
        return simplified(_boolean(op, a, b))
    return simplified(python_value(lambda: binary(op, a, b)))


def _boolean(op: str, a: Expr, b: Expr) -> Expr:
    match op:
        case "&":
            return binary("and", a, b)
        case "|":
            return binary("or", a, b)
        case _:
            return binary("!=", a, b)


def as_number(expr: Expr) -> Expr:
    """A boolean as the int that Python takes it for."""
    return select(expr, 1, 0) if expr.dtype.kind == "bool" else expr


def _check_fits(op: str, constant: Expr, other: Expr) -> None:
    """A constant takes the type of the other side; it must be a number of that type."""
    if not isinstance(constant, Const) or isinstance(other, Const) or op in ("<<", ">>"):
        return
    dtype, value = other.dtype, constant.value
    if dtype.is_integer and isinstance(value, int) and not dtype.min_value <= value <= dtype.max_value:
        raise TilusError(
            f"{value} does not fit {dtype} ({dtype.min_value} to {dtype.max_value}), the type of the other side of {op}",
            hint="convert the other side to a wider type with .to(tilus.int64)",
        )


def apply_unary(b: IRBuilder, op: str, value: Value) -> Value:
    """`neg`, `pos`, `invert` or `abs`; `not` is `truth` and its opposite."""
    if not is_runtime(value):
        return python_value(lambda: _PYTHON_UNARY[op](value))
    if op == "pos" and (isinstance(value, (Expr, RegisterTensor))):
        return value
    if isinstance(value, RegisterTensor) and op in ("neg", "abs", "not"):
        from tilus.instructions.elementwise import unary_op

        return unary_op(b, op, value)
    if isinstance(value, Expr):
        if op == "invert" and value.dtype.kind == "int":
            return simplified(binary("-", unary("neg", value), 1))
        if op in ("neg", "abs"):
            return simplified(unary(op, as_number(value)))
    names = {"neg": "-", "pos": "+", "invert": "~", "not": "not"}
    raise TilusError(
        f"operator {names.get(op, op)} on {describe(value)} is not defined",
        hint="invert the bits with x ^ mask" if op == "invert" else None,
    )


def truth(value: Value, what: str) -> bool | Expr:
    """`bool(value)`: known now, or a boolean expression.

    Raises: TilusError for tensors, which have no truth value.
    """
    if isinstance(value, Const):
        return bool(value.value)
    if isinstance(value, Expr):
        if value.dtype.kind == "bool":
            return value
        result = binary("!=", value, 0)
        return bool(result.value) if isinstance(result, Const) else result
    if isinstance(value, (tuple, list, dict)):
        return len(value) > 0
    if is_runtime(value):
        raise TilusError(
            f"{what} is {describe(value)}, expected a scalar",
            hint="for conditions of elements write & and | (each side in parentheses) and tilus.where; "
            "tilus.item makes a scalar of one element",
        )
    return python_value(lambda: bool(value))


def choice(cond: Expr, on_true: Value, on_false: Value) -> Expr:
    """`on_true if cond else on_false` of two scalars; when only one is boolean, it counts as an int."""
    a, b = as_expr(on_true), as_expr(on_false)
    if a.dtype.kind != b.dtype.kind:
        a, b = as_number(a), as_number(b)
    return select(cond, a, b)


def negated(value: bool | Expr) -> bool | Expr:
    return unary("not", value) if isinstance(value, Expr) else not value


def may_trap(value: Value) -> bool:
    """Whether computing a scalar can go wrong (a division), so that it must not be computed when Python would not."""
    return isinstance(value, Expr) and any(
        isinstance(e, Binary) and e.op in ("/", "//", "%") and not isinstance(e.rhs, Const) for e in walk(value)
    )


def chain(parts: list[Value], b: IRBuilder) -> Value:
    """The conjunction of the comparisons of a chain: `a < b < c` is `a < b and b < c`."""
    result = parts[0]
    for part in parts[1:]:
        if is_number(result):
            result = part if result else result
        elif isinstance(result, Expr) and isinstance(part, (Expr, bool)):
            result = simplified(binary("and", result, part))
        else:
            result = apply_binary(b, "&", result, part)
    return result
