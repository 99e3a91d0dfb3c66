"""Scalar expressions: immutable, folded at construction, compared by value.

Every scalar is uniform: all threads of a block hold the same value. Integer arithmetic is that of Python (floor division, no
wrapping); the program promises that every value fits its type. Variables name things, so they compare by identity.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tilus.dtypes import DataType, boolean, f32, int32, int64

Number = int | float | bool


class Expr:
    """Base of all scalar expressions; `dtype` is the type of the value."""

    __slots__ = ()

    @property
    def dtype(self) -> DataType:
        raise TypeError(f"{type(self).__name__} has no dtype")


@dataclass(frozen=True)
class Const(Expr):
    value: Number
    type: DataType

    @property
    def dtype(self) -> DataType:
        return self.type

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, eq=False)
class Var(Expr):
    """A scalar variable. `lower`, `upper` (inclusive) and `multiple_of` are facts that hold for every value it takes."""

    name: str
    type: DataType
    lower: int | None = None
    upper: int | None = None
    multiple_of: int = 1
    mutable: bool = False

    @property
    def dtype(self) -> DataType:
        return self.type

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class BlockId(Expr):
    """Index of the block along grid axis `axis`."""

    axis: int

    @property
    def dtype(self) -> DataType:
        return int32

    def __str__(self) -> str:
        return f"block_id({self.axis})"


@dataclass(frozen=True)
class GridDim(Expr):
    """Number of blocks along grid axis `axis`."""

    axis: int

    @property
    def dtype(self) -> DataType:
        return int32

    def __str__(self) -> str:
        return f"grid_dim({self.axis})"


@dataclass(frozen=True)
class Unary(Expr):
    """op: `neg`, `not`, `abs`, or a float function (`exp`, `exp2`, `log2`, `sqrt`, `rsqrt`)."""

    op: str
    operand: Expr

    @property
    def dtype(self) -> DataType:
        return self.operand.dtype

    def __str__(self) -> str:
        return f"{self.op}({self.operand})"


@dataclass(frozen=True)
class Binary(Expr):
    op: str
    lhs: Expr
    rhs: Expr

    @property
    def dtype(self) -> DataType:
        return boolean if self.op in COMPARISONS or self.op in ("and", "or") else self.lhs.dtype

    def __str__(self) -> str:
        if self.op in ("min", "max"):
            return f"{self.op}({self.lhs}, {self.rhs})"
        return f"({self.lhs} {self.op} {self.rhs})"


@dataclass(frozen=True)
class Select(Expr):
    """`on_true if cond else on_false`; both sides are evaluated."""

    cond: Expr
    on_true: Expr
    on_false: Expr

    @property
    def dtype(self) -> DataType:
        return self.on_true.dtype

    def __str__(self) -> str:
        return f"select({self.cond}, {self.on_true}, {self.on_false})"


@dataclass(frozen=True)
class CastExpr(Expr):
    operand: Expr
    type: DataType

    @property
    def dtype(self) -> DataType:
        return self.type

    def __str__(self) -> str:
        return f"{self.type.name}({self.operand})"


COMPARISONS: dict[str, Callable[[Number, Number], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip

_FOLD: dict[str, Callable[[Number, Number], Number]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "min": min, "max": max,
    "&": lambda a, b: int(a) & int(b), "|": lambda a, b: int(a) | int(b), "^": lambda a, b: int(a) ^ int(b),
    "<<": lambda a, b: int(a) << int(b), ">>": lambda a, b: int(a) >> int(b),
    "and": lambda a, b: bool(a) and bool(b), "or": lambda a, b: bool(a) or bool(b),
    **COMPARISONS,
}  # fmt: skip

_FOLD_UNARY: dict[str, Callable[[Number], Number]] = {
    "neg": operator.neg, "not": operator.not_, "abs": abs, "exp": math.exp, "exp2": lambda a: 2.0 ** float(a),
    "log2": math.log2, "sqrt": math.sqrt, "rsqrt": lambda a: 1.0 / math.sqrt(a),
}  # fmt: skip

BINARY_OPS = frozenset(_FOLD)
UNARY_OPS = frozenset(_FOLD_UNARY)


def const(value: Number, dtype: DataType | None = None) -> Const:
    """A constant; without a dtype a Python bool is boolean, an int is int32 (int64 when it does not fit), a float f32."""
    if dtype is None:
        if isinstance(value, bool):
            dtype = boolean
        elif isinstance(value, int):
            dtype = int32 if -(2**31) <= value < 2**31 else int64
        else:
            dtype = f32
    if dtype.is_float:
        return Const(float(value), dtype)
    return Const(bool(value) if dtype == boolean else int(value), dtype)


def as_expr(value: Expr | Number) -> Expr:
    return value if isinstance(value, Expr) else const(value)


def common_dtype(a: Expr, b: Expr) -> DataType:
    """The type two operands meet in: float over integer, wide over narrow; constants adapt to the other side."""
    if a.dtype == b.dtype:
        return a.dtype
    if a.dtype.is_float != b.dtype.is_float:
        return a.dtype if a.dtype.is_float else b.dtype
    if isinstance(a, Const) != isinstance(b, Const):
        return b.dtype if isinstance(a, Const) else a.dtype
    return a.dtype if a.dtype.nbits >= b.dtype.nbits else b.dtype


def cast(value: Expr, dtype: DataType) -> Expr:
    if value.dtype == dtype:
        return value
    return const(value.value, dtype) if isinstance(value, Const) else CastExpr(value, dtype)


def unary(op: str, operand: Expr | Number) -> Expr:
    operand = as_expr(operand)
    if isinstance(operand, Const):
        return const(_FOLD_UNARY[op](operand.value), operand.dtype)
    return Unary(op, operand)


def binary(op: str, lhs: Expr | Number, rhs: Expr | Number) -> Expr:
    """`lhs op rhs` with constants folded and neutral elements dropped.

    Raises: ZeroDivisionError for a division by the constant zero.
    """
    a, b = as_expr(lhs), as_expr(rhs)
    if op not in ("and", "or", "<<", ">>"):
        dtype = common_dtype(a, b)
        if op == "/" and not dtype.is_float:
            dtype = f32
        a, b = cast(a, dtype), cast(b, dtype)
    if isinstance(a, Const) and isinstance(b, Const):
        value = _FOLD[op](a.value, b.value)
        return const(value, boolean if op in COMPARISONS or op in ("and", "or") else a.dtype)
    return _identity(op, a, b) or Binary(op, a, b)


def _identity(op: str, a: Expr, b: Expr) -> Expr | None:
    """The simpler expression when one side is neutral or absorbing; only rules that hold for every value."""
    left = a.value if isinstance(a, Const) else None
    right = b.value if isinstance(b, Const) else None
    exact = not a.dtype.is_float
    match op:
        case "+" if exact and right == 0:
            return a
        case "+" if exact and left == 0:
            return b
        case "-" if exact and right == 0:
            return a
        case "*" if right == 1:
            return a
        case "*" if left == 1:
            return b
        case "*" if exact and (left == 0 or right == 0):
            return const(0, a.dtype)
        case "//" if exact and right == 1:
            return a
        case "%" if exact and right == 1:
            return const(0, a.dtype)
        case "and" if left is not None:
            return b if left else const(False)
        case "and" if right is not None:
            return a if right else const(False)
        case "or" if left is not None:
            return const(True) if left else b
        case "or" if right is not None:
            return const(True) if right else a
        case "min" | "max" if a == b:
            return a
        case _:
            return None


def select(cond: Expr | Number, on_true: Expr | Number, on_false: Expr | Number) -> Expr:
    cond, a, b = as_expr(cond), as_expr(on_true), as_expr(on_false)
    dtype = common_dtype(a, b)
    a, b = cast(a, dtype), cast(b, dtype)
    if isinstance(cond, Const):
        return a if cond.value else b
    return Select(cond, a, b)


def children(expr: Expr) -> tuple[Expr, ...]:
    match expr:
        case Unary(_, operand) | CastExpr(operand, _):
            return (operand,)
        case Binary(_, lhs, rhs):
            return (lhs, rhs)
        case Select(cond, on_true, on_false):
            return (cond, on_true, on_false)
        case _:
            return ()


def walk(expr: Expr) -> Iterator[Expr]:
    yield expr
    for child in children(expr):
        yield from walk(child)


def substitute(expr: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """The expression with variables (or block ids) replaced, folded again."""
    if expr in values:
        return values[expr]
    match expr:
        case Unary(op, operand):
            return unary(op, substitute(operand, values))
        case CastExpr(operand, dtype):
            return cast(substitute(operand, values), dtype)
        case Binary(op, lhs, rhs):
            return binary(op, substitute(lhs, values), substitute(rhs, values))
        case Select(cond, on_true, on_false):
            return select(substitute(cond, values), substitute(on_true, values), substitute(on_false, values))
        case _:
            return expr


def evaluate(expr: Expr, values: Mapping[Expr, Number]) -> Number:
    """The value of an expression on the host.

    Raises: KeyError for a variable without a value.
    """
    match expr:
        case Const(value, _):
            return value
        case Unary(op, operand):
            return _FOLD_UNARY[op](evaluate(operand, values))
        case Binary(op, lhs, rhs):
            return _FOLD[op](evaluate(lhs, values), evaluate(rhs, values))
        case Select(cond, on_true, on_false):
            return evaluate(on_true if evaluate(cond, values) else on_false, values)
        case CastExpr(operand, dtype):
            value = evaluate(operand, values)
            return float(value) if dtype.is_float else int(value)
        case _:
            return values[expr]
