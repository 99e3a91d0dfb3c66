"""What is known of an integer expression: an interval that holds all its values, and a divisor of all of them.

These facts decide which masks can be dropped, how wide an access may be and when a division needs no correction.
"""

from __future__ import annotations

import math

from tilus.ir.expr import Binary, BlockId, CastExpr, Const, Expr, GridDim, Select, Unary, Var

Bound = int | None
Interval = tuple[Bound, Bound]

MAX_GRID = 2**31 - 1


def bounds(expr: Expr) -> Interval:
    """(lower, upper), both inclusive; None where nothing is known."""
    match expr:
        case Const(value, _):
            return (int(value), int(value)) if isinstance(value, int) else (None, None)
        case Var():
            return expr.lower, expr.upper
        case BlockId():
            return 0, MAX_GRID - 1
        case GridDim():
            return 1, MAX_GRID
        case Unary("neg", operand):
            lo, hi = bounds(operand)
            return (None if hi is None else -hi), (None if lo is None else -lo)
        case CastExpr(operand, dtype) if not dtype.is_float and not operand.dtype.is_float:
            return bounds(operand)
        case Select(_, on_true, on_false):
            return _union(bounds(on_true), bounds(on_false))
        case Binary(op, lhs, rhs):
            return _binary_bounds(op, bounds(lhs), bounds(rhs))
        case _:
            return None, None


def _union(a: Interval, b: Interval) -> Interval:
    lo = None if a[0] is None or b[0] is None else min(a[0], b[0])
    hi = None if a[1] is None or b[1] is None else max(a[1], b[1])
    return lo, hi


def _add(a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else a + b


def _binary_bounds(op: str, a: Interval, b: Interval) -> Interval:
    match op:
        case "+":
            return _add(a[0], b[0]), _add(a[1], b[1])
        case "-":
            return _add(a[0], None if b[1] is None else -b[1]), _add(a[1], None if b[0] is None else -b[0])
        case "*":
            return _product(a, b)
        case "//" if b[0] is not None and b[0] == b[1] and b[0] > 0:
            return (None if a[0] is None else a[0] // b[0]), (None if a[1] is None else a[1] // b[0])
        case "//" if _nonnegative(a) and b[0] is not None and b[0] > 0:
            return 0, a[1]
        case "%" if b[0] is not None and b[0] > 0:
            upper = None if b[1] is None else b[1] - 1
            if _nonnegative(a) and a[1] is not None:
                upper = a[1] if upper is None else min(a[1], upper)
            return 0, upper
        case "min":
            his = [x for x in (a[1], b[1]) if x is not None]
            return (None if a[0] is None or b[0] is None else min(a[0], b[0])), (min(his) if his else None)
        case "max":
            los = [x for x in (a[0], b[0]) if x is not None]
            return (max(los) if los else None), (None if a[1] is None or b[1] is None else max(a[1], b[1]))
        case "&" if _nonnegative(a) or _nonnegative(b):
            his = [x[1] for x in (a, b) if _nonnegative(x) and x[1] is not None]
            return 0, (min(his) if his else None)
        case "<<" if _nonnegative(a) and b[0] is not None and b[0] == b[1]:
            return _product(a, (1 << b[0], 1 << b[0]))
        case ">>" if _nonnegative(a):
            return 0, a[1]
        case _:
            return None, None


def _nonnegative(a: Interval) -> bool:
    return a[0] is not None and a[0] >= 0


def _product(a: Interval, b: Interval) -> Interval:
    if a[0] is not None and a[1] is not None and b[0] is not None and b[1] is not None:
        corners = [x * y for x in (a[0], a[1]) for y in (b[0], b[1])]
        return min(corners), max(corners)
    if _nonnegative(a) and _nonnegative(b):
        return (a[0] or 0) * (b[0] or 0), None
    return None, None


def divisor(expr: Expr) -> int:
    """The largest known d >= 1 that divides every value (0 for the constant zero, which everything divides)."""
    match expr:
        case Const(value, _):
            return abs(int(value)) if isinstance(value, int) else 1
        case Var():
            return expr.multiple_of
        case Unary("neg", operand) | CastExpr(operand, _):
            return divisor(operand)
        case Select(_, on_true, on_false):
            return math.gcd(divisor(on_true), divisor(on_false))
        case Binary("+" | "-" | "min" | "max", lhs, rhs):
            return math.gcd(divisor(lhs), divisor(rhs))
        case Binary("*", lhs, rhs):
            return divisor(lhs) * divisor(rhs)
        case Binary("%", lhs, rhs):
            return math.gcd(divisor(lhs), divisor(rhs))
        case Binary("//", lhs, Const(value, _)) if value and divisor(lhs) % int(value) == 0:
            return divisor(lhs) // int(value)
        case Binary("<<", lhs, Const(value, _)):
            return divisor(lhs) << int(value)
        case _:
            return 1
