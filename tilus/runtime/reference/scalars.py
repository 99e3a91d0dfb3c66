"""Scalar expressions compiled to Python closures over the state of the blocks that run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tilus.dtypes import DataType, boolean, f32
from tilus.errors import TilusError
from tilus.ir.expr import COMPARISONS, Binary, BlockId, CastExpr, Const, Expr, GridDim, Select, Unary, Var
from tilus.runtime.reference.affine import Affine, Scalar, settle, settle_mask, to_array
from tilus.runtime.reference.mask import Mask, invert, meet

if TYPE_CHECKING:
    from tilus.runtime.reference.state import BlockState

Compiled = Callable[["BlockState"], Scalar]

_UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": abs, "exp": np.exp, "exp2": np.exp2, "log2": np.log2, "sqrt": np.sqrt,
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a), "neg": operator.neg,
}  # fmt: skip

# Operators that keep formulas formulas; the others work on numbers and arrays.
_LINEAR: dict[str, Callable[[Any, Any], Any]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}

_BITWISE: dict[str, Callable[[Any, Any], Any]] = {
    "&": operator.and_, "|": operator.or_, "^": operator.xor, "<<": operator.lshift, ">>": operator.rshift,
}  # fmt: skip


def compile_scalar(expr: Expr) -> Compiled:
    """A closure that gives the value of `expr` in the blocks of a state, in the simplest form."""
    match expr:
        case Const():
            value = _constant(expr)
            return lambda s: value
        case Var():
            return _variable(expr)
        case BlockId(axis):
            return lambda s: s.block_ids[axis]
        case GridDim(axis):
            return lambda s: s.grid[axis]
        case Unary(op, operand):
            return _unary(op, operand)
        case CastExpr(operand, dtype):
            return _cast(compile_scalar(operand), operand.dtype, dtype)
        case Select(cond, on_true, on_false):
            return _select(compile_condition(cond), compile_scalar(on_true), compile_scalar(on_false))
        case Binary("and" | "or" as op, lhs, rhs):
            return _logical(op, compile_condition(lhs), compile_condition(rhs))
        case Binary(op, lhs, rhs):
            return _binary(op, lhs, rhs)
        case _:
            raise TypeError(f"{type(expr).__name__} is not a scalar expression")


def compile_condition(expr: Expr) -> Compiled:
    """Like `compile_scalar`, for a truth value: True, False, or an array of bool that holds both."""
    value = compile_scalar(expr)
    return value if expr.dtype == boolean else _cast(value, expr.dtype, boolean)


def _constant(expr: Const) -> Scalar:
    return _round_float(expr.dtype, np.float32(expr.value)) if expr.dtype.is_float else expr.value


def _round_float(dtype: DataType, value: Any) -> Scalar:
    """A float32 or an array of them, rounded to `dtype`."""
    if dtype == f32:
        return value
    rounded = dtype.round(np.atleast_1d(value))
    return rounded if isinstance(value, np.ndarray) else rounded[0]


def _variable(var: Var) -> Compiled:
    def read(s: BlockState) -> Scalar:
        try:
            return s.scalars[var]
        except KeyError:
            raise TilusError(
                f"the scalar {var} is read before it has a value", hint="assign it before the branch or loop"
            ) from None

    return read


def _unary(op: str, operand: Expr) -> Compiled:
    dtype = operand.dtype
    if op == "not":
        cond = compile_condition(operand)
        return lambda s: invert(cond(s))
    value, function = compile_scalar(operand), _UNARY[op]
    if dtype.is_float:
        return lambda s: _round_float(dtype, function(value(s)))
    if op == "abs":
        return lambda s: settle(np.abs(to_array(value(s))), s.extents)
    return lambda s: function(value(s))


def _cast(value: Compiled, source: DataType, dtype: DataType) -> Compiled:
    if dtype == boolean:
        return lambda s: settle_mask(to_array(value(s)) != 0)
    if dtype.is_float:
        return lambda s: _round_float(dtype, _to_float(value(s)))
    if source.is_float:  # PTX cvt.rzi: towards zero, saturating, NaN is 0
        return lambda s: settle(dtype.round(np.trunc(to_array(value(s)))), s.extents)
    if source == boolean:
        return lambda s: settle(to_array(value(s)).astype(np.int64), s.extents)
    return value


def _to_float(value: Scalar) -> Any:
    return to_array(value).astype(np.float32) if isinstance(value, (Affine, np.ndarray)) else np.float32(value)


def _within(s: BlockState, mask: Mask, value: Compiled) -> Scalar:
    """The value in the blocks of `mask`; elsewhere it is not asked whether it is defined (a division by zero)."""
    outer = s.mask
    s.mask = meet(outer, mask)
    try:
        return value(s)
    finally:
        s.mask = outer


def _select(cond: Compiled, on_true: Compiled, on_false: Compiled) -> Compiled:
    def choose(s: BlockState) -> Scalar:
        chosen = cond(s)
        if isinstance(chosen, bool):
            return on_true(s) if chosen else on_false(s)
        a, b = _within(s, chosen, on_true), _within(s, invert(chosen), on_false)
        return settle(np.where(chosen, to_array(a), to_array(b)), s.extents)

    return choose


def _logical(op: str, lhs: Compiled, rhs: Compiled) -> Compiled:
    def both(s: BlockState) -> Scalar:
        a = lhs(s)
        if isinstance(a, bool):
            return rhs(s) if a else False
        return settle_mask(a & _within(s, a, rhs))

    def either(s: BlockState) -> Scalar:
        a = lhs(s)
        if isinstance(a, bool):
            return True if a else rhs(s)
        return settle_mask(a | _within(s, invert(a), rhs))

    return both if op == "and" else either


def _binary(op: str, lhs: Expr, rhs: Expr) -> Compiled:
    a, b, dtype = compile_scalar(lhs), compile_scalar(rhs), lhs.dtype
    if op in COMPARISONS:
        relation = COMPARISONS[op]
        return lambda s: compare(relation, a(s), b(s))
    if op in _LINEAR:
        linear = _LINEAR[op]
        if dtype.is_float:
            return lambda s: _round_float(dtype, linear(a(s), b(s)))
        return lambda s: linear(a(s), b(s))
    if op in ("min", "max"):
        return _extremum(op, a, b, dtype)
    if op == "/":
        return lambda s: _round_float(dtype, a(s) / b(s))
    if op in ("//", "%"):
        return _division(op, a, b, dtype)
    bitwise = _BITWISE[op]
    return lambda s: _on_arrays(s, bitwise, a(s), b(s))


def _on_arrays(s: BlockState, function: Callable[[Any, Any], Any], a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, int) and isinstance(b, int):
        return function(a, b)
    return settle(function(to_array(a), to_array(b)), s.extents)


def compare(relation: Callable[[Any, Any], Any], a: Scalar, b: Scalar) -> Mask:
    """`relation` (such as operator.lt) of two scalars, block by block."""
    if not isinstance(a, (Affine, np.ndarray)) and not isinstance(b, (Affine, np.ndarray)):
        return bool(relation(a, b))
    return settle_mask(relation(to_array(a), to_array(b)))


def _extremum(op: str, a: Compiled, b: Compiled, dtype: DataType) -> Compiled:
    if dtype.is_float:  # PTX min and max: the other operand where one is NaN
        function = np.fmin if op == "min" else np.fmax
        return lambda s: function(a(s), b(s))
    python, vector = (min, np.minimum) if op == "min" else (max, np.maximum)

    def extremum(s: BlockState) -> Scalar:
        x, y = a(s), b(s)
        if isinstance(x, int) and isinstance(y, int):
            return python(x, y)
        return settle(vector(to_array(x), to_array(y)), s.extents)

    return extremum


def _division(op: str, a: Compiled, b: Compiled, dtype: DataType) -> Compiled:
    if dtype.is_float:
        vector = np.floor_divide if op == "//" else np.mod
        return lambda s: _round_float(dtype, vector(a(s), b(s)))
    function: Callable[[Any, Any], Any] = operator.floordiv if op == "//" else operator.mod

    def divide(s: BlockState) -> Scalar:
        x, y = a(s), b(s)
        if meet(s.mask, compare(operator.eq, y, 0)) is not False:
            raise TilusError(f"the divisor of {op} is 0", hint="guard the division by a condition")
        return _on_arrays(s, function, x, y)

    return divide
