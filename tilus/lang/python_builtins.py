"""Python's builtin functions on run-time values. On compile-time values they are what they are in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from tilus.dtypes import f32, int32
from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import Expr, as_expr, binary
from tilus.ir.expr import cast as cast_expr
from tilus.ir.tensor import RegisterTensor
from tilus.lang.operators import apply_binary, apply_unary, truth
from tilus.lang.values import RuntimeRange, Value, describe, is_scalar, simplified

# These look at containers only, never at the values inside, so Python's own are right for run-time values too.
STRUCTURAL: tuple[Callable[..., Any], ...] = (
    zip,
    enumerate,
    len,
    tuple,
    list,
    dict,
    reversed,
    isinstance,
    type,
    hasattr,
)

_LIST_MUTATORS = ("append", "extend", "insert", "pop", "remove", "clear", "reverse", "sort")
MUTATORS = frozenset((*_LIST_MUTATORS, "update", "setdefault", "popitem", "add", "discard"))


def runtime_range(b: IRBuilder, args: Sequence[Value]) -> RuntimeRange:
    """`range` with at least one bound that is known only at run time."""
    if not 1 <= len(args) <= 3:
        raise TilusError(f"range expected 1 to 3 arguments, got {len(args)}")
    for arg in args:
        ok = (isinstance(arg, int) and not isinstance(arg, bool)) or (isinstance(arg, Expr) and arg.dtype.is_integer)
        if not ok:
            raise TilusError(f"range over {describe(arg)}, expected integers")
    start, stop = (0, args[0]) if len(args) == 1 else (args[0], args[1])
    step = args[2] if len(args) == 3 else 1
    if not isinstance(step, int) or step < 1:
        raise TilusError(
            f"a run-time range has step {step if isinstance(step, int) else describe(step)}, expected a positive constant",
            hint="count upwards and compute the index from the loop variable: stop - 1 - i",
        )
    return RuntimeRange(start, stop, step)


def _fold(op: str) -> Callable[..., Value]:
    def apply(b: IRBuilder, args: Sequence[Value]) -> Value:
        values = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        if len(values) < (1 if values is not args else 2):
            raise TilusError(f"{op} of {len(values)} values, expected at least 2")
        return reduce(lambda x, y: apply_binary(b, op, x, y), values)

    return apply


def _sum(b: IRBuilder, args: Sequence[Value]) -> Value:
    if not args or not isinstance(args[0], (tuple, list)):
        raise TilusError(
            f"sum of {describe(args[0]) if args else 'nothing'}, expected a tuple or list",
            hint="use tilus.sum for tiles",
        )
    values = list(args[0])
    if not values:
        return args[1] if len(args) > 1 else 0
    start: Value = args[1] if len(args) > 1 else values.pop(0)  # Python starts with 0, which changes nothing
    for value in values:
        start = apply_binary(b, "+", start, value)
    return start


def _abs(b: IRBuilder, args: Sequence[Value]) -> Value:
    return apply_unary(b, "abs", _only("abs", args))


def _int(_b: IRBuilder, args: Sequence[Value]) -> Value:
    return _convert("int", args, lambda e: e if e.dtype.is_integer else cast_expr(e, int32))


def _float(_b: IRBuilder, args: Sequence[Value]) -> Value:
    return _convert("float", args, lambda e: e if e.dtype.is_float else cast_expr(e, f32))


def _bool(_b: IRBuilder, args: Sequence[Value]) -> Value:
    return truth(_only("bool", args), "the argument of bool")


def _convert(name: str, args: Sequence[Value], convert: Callable[[Expr], Expr]) -> Value:
    value = _only(name, args)
    if not is_scalar(value):
        raise TilusError(f"{name} of {describe(value)}, expected a scalar", hint="cast tiles with .to(dtype)")
    return simplified(convert(as_expr(value)))


def _only(name: str, args: Sequence[Value]) -> Value:
    if len(args) != 1:
        raise TilusError(f"{name} expected 1 argument, got {len(args)}")
    return args[0]


def _divmod(b: IRBuilder, args: Sequence[Value]) -> Value:
    if len(args) != 2:
        raise TilusError(f"divmod expected 2 arguments, got {len(args)}")
    return apply_binary(b, "//", *args), apply_binary(b, "%", *args)


def _all(_b: IRBuilder, args: Sequence[Value]) -> Value:
    return _junction("all", "and", args)


def _any(_b: IRBuilder, args: Sequence[Value]) -> Value:
    return _junction("any", "or", args)


def _junction(name: str, op: str, args: Sequence[Value]) -> Value:
    values = _only(name, args)
    if isinstance(values, RegisterTensor):
        raise TilusError(f"{name} of {describe(values)}", hint=f"use tilus.{name} for tiles")
    result = as_expr(op == "and")
    for value in values:
        result = binary(op, result, truth(value, f"an item of {name}"))
    return simplified(result)


RUNTIME: dict[Any, Callable[[IRBuilder, Sequence[Value]], Value]] = {
    range: runtime_range, min: _fold("min"), max: _fold("max"), sum: _sum, abs: _abs, int: _int, float: _float, bool: _bool,
    divmod: _divmod, all: _all, any: _any,
}  # fmt: skip
