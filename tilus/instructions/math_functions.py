"""Math functions of each element: exponentials, logarithms, roots, rounding, the larger and the smaller of two."""

from __future__ import annotations

from tilus.instructions.elementwise import Value, binary_op, unary_op
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.expr import Expr
from tilus.ir.tensor import RegisterTensor


@builtin
def exp(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """e to the power of each element."""
    return unary_op(b, "exp", x)


@builtin
def exp2(b: IRBuilder, x: Value, *, ftz: bool = False) -> RegisterTensor | Expr:
    """2 to the power of each element.

    ftz: of tiles, powers below the least normal number of f32, 2^-126, become zero, which saves a GPU three of four instructions.
    """
    return unary_op(b, "exp2_ftz" if ftz else "exp2", x)


@builtin
def log(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Natural logarithm."""
    return unary_op(b, "log", x)


@builtin
def log2(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Logarithm to base 2."""
    return unary_op(b, "log2", x)


@builtin
def sqrt(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Square root."""
    return unary_op(b, "sqrt", x)


@builtin
def rsqrt(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """1 / square root."""
    return unary_op(b, "rsqrt", x)


@builtin
def rcp(b: IRBuilder, x: Value, *, approx: bool = False) -> RegisterTensor | Expr:
    """1 / x.

    approx: of tiles, an error of one unit in the last place is allowed, which saves a GPU a branch for each element.
    """
    return unary_op(b, "rcp_approx" if approx else "rcp", x)


@builtin
def sin(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Sine."""
    return unary_op(b, "sin", x)


@builtin
def cos(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Cosine."""
    return unary_op(b, "cos", x)


@builtin
def tanh(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Hyperbolic tangent."""
    return unary_op(b, "tanh", x)


@builtin
def floor(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Largest integer not above."""
    return unary_op(b, "floor", x)


@builtin
def ceil(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Smallest integer not below."""
    return unary_op(b, "ceil", x)


@builtin
def round(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """Nearest integer, ties to even."""
    return unary_op(b, "round", x)


@builtin
def maximum(b: IRBuilder, x: Value, y: Value) -> RegisterTensor | Expr:
    """The larger of two values, elementwise; of a number and NaN the number."""
    return binary_op(b, "max", x, y)


@builtin
def minimum(b: IRBuilder, x: Value, y: Value) -> RegisterTensor | Expr:
    """The smaller of two values, elementwise; of a number and NaN the number."""
    return binary_op(b, "min", x, y)


@builtin
def absolute(b: IRBuilder, x: Value) -> RegisterTensor | Expr:
    """The absolute value."""
    return unary_op(b, "abs", x)
