"""Scalar expressions in C: integers are int64_t with Python's division, floats are float."""

from __future__ import annotations

from collections.abc import Mapping

from tilus.codegen.c.numbers import converted, literal, rounded
from tilus.dtypes import boolean, f32, int64
from tilus.errors import TilusError
from tilus.ir.expr import COMPARISONS, Binary, BlockId, CastExpr, Const, Expr, GridDim, Select, Unary, Var
from tilus.ir.ranges import bounds

BLOCK_IDS = ("block_x", "block_y", "block_z")

_CALLS = {"min": "tl_min", "max": "tl_max", "<<": "tl_shl", ">>": "tl_shr"}
_FLOAT_CALLS = {"min": "tl_fmin", "max": "tl_fmax"}
_FUNCTIONS = {
    "exp": "tl_exp",
    "exp2": "tl_exp2",
    "log2": "tl_log2",
    "sqrt": "sqrtf",
    "rsqrt": "tl_rsqrt",
    "abs": "fabsf",
}


def scalar_type(expr: Expr) -> str:
    """The C type of a scalar."""
    return "float" if expr.dtype.is_float else "int64_t"


def scalar(expr: Expr, names: Mapping[Var, str]) -> str:
    """A scalar expression in C. Raises: KeyError for a variable without a name."""
    match expr:
        case Const(value, dtype):
            return literal(f32 if dtype.is_float else int64, value)
        case Var():
            return names[expr]
        case BlockId(axis):
            return BLOCK_IDS[axis]
        case GridDim(axis):
            return f"(int64_t)grid[{axis}]"
        case Unary(op, operand):
            return _unary(op, operand, names)
        case Select(cond, on_true, on_false):
            return f"({scalar(cond, names)} ? {scalar(on_true, names)} : {scalar(on_false, names)})"
        case CastExpr(operand, dtype):
            src = operand.dtype if operand.dtype.is_float or operand.dtype == boolean else int64
            value, unrounded = converted(src, dtype, scalar(operand, names))
            return rounded(dtype, f"({value})") if unrounded else f"({scalar_type(expr)})({value})"
        case Binary(op, lhs, rhs):
            return _binary(op, lhs, rhs, names)
        case _:
            raise TilusError(f"scalar {expr} has no meaning on a CPU")


def _unary(op: str, operand: Expr, names: Mapping[Var, str]) -> str:
    value = scalar(operand, names)
    if op in ("neg", "not"):
        return f"({'-' if op == 'neg' else '!'}{value})"
    return f"tl_abs({value})" if op == "abs" and not operand.dtype.is_float else f"{_FUNCTIONS[op]}({value})"


def _binary(op: str, lhs: Expr, rhs: Expr, names: Mapping[Var, str]) -> str:
    a, b = scalar(lhs, names), scalar(rhs, names)
    is_float = lhs.dtype.is_float
    if op in COMPARISONS or op in ("and", "or"):
        return f"({a} {({'and': '&&', 'or': '||'}).get(op, op)} {b})"
    if op in ("//", "%") and not is_float:
        lowest = bounds(lhs)[0]
        if isinstance(rhs, Const) and rhs.value > 0 and lowest is not None and lowest >= 0:
            return f"({a} {'/' if op == '//' else '%'} {b})"
        return f"{'tl_floordiv' if op == '//' else 'tl_floormod'}({a}, {b})"
    if op in ("//", "%"):
        return f"floorf({a} / {b})" if op == "//" else f"({a} - floorf({a} / {b}) * {b})"
    calls = _FLOAT_CALLS if is_float else _CALLS
    value = f"{calls[op]}({a}, {b})" if op in calls else f"({a} {op} {b})"
    return rounded(lhs.dtype, value) if is_float else value
