"""Elementwise operations in C, with the meaning that numpy gives them: floats in f32, integers wrap."""

from __future__ import annotations

from tilus.codegen.c.numbers import value_type
from tilus.dtypes import DataType, boolean

_FLOAT_FUNCTIONS = {
    "exp": "tl_exp", "exp2": "tl_exp2", "exp2_ftz": "tl_exp2_ftz", "log": "logf", "log2": "tl_log2", "sqrt": "sqrtf",
    "rsqrt": "tl_rsqrt", "rcp": "tl_rcp", "rcp_approx": "tl_rcp",
    "sin": "sinf", "cos": "cosf", "tanh": "tanhf", "floor": "floorf", "ceil": "ceilf", "round": "rintf", "abs": "fabsf",
}  # fmt: skip
_INTEGER_CALLS = {
    "min": "tl_min",
    "max": "tl_max",
    "//": "tl_floordiv",
    "%": "tl_floormod",
    "<<": "tl_shl",
    ">>": "tl_shr",
}


def binary_text(op: str, dtype: DataType, a: str, b: str) -> str:
    """`a op b` before rounding; the operands are of the result's type."""
    if dtype.is_float:
        return _float_binary(op, a, b)
    if op in ("+", "-", "*") and dtype.nbits >= 32:  # signed overflow has no meaning in C
        wide = f"uint{dtype.nbits}_t"
        return f"({value_type(dtype)})(({wide}){a} {op} ({wide}){b})"
    if op in ("//", "%") and dtype.kind == "uint":
        return f"({value_type(dtype)})({b} ? {a} {'/' if op == '//' else '%'} {b} : 0)"
    if op in ("min", "max"):
        return f"({a} {'<' if op == 'min' else '>'} {b} ? {a} : {b})"
    if op == ">>" and dtype.kind == "uint":
        return f"({value_type(dtype)})({b} < {dtype.nbits} ? {a} >> ({b} & {dtype.nbits - 1}) : 0)"
    value = f"{_INTEGER_CALLS[op]}({a}, {b})" if op in _INTEGER_CALLS else f"{a} {op} {b}"
    return f"({value_type(dtype)})({value})"


def _float_binary(op: str, a: str, b: str) -> str:
    match op:
        case "min" | "max":
            return f"tl_f{op}({a}, {b})"
        case "//":
            return f"floorf({a} / {b})"
        case "%":
            return f"({a} - floorf({a} / {b}) * {b})"
        case _:
            return f"({a} {op} {b})"


def compare_text(op: str, a: str, b: str) -> str:
    """Whether `a op b`."""
    return f"(uint8_t)({a} {op} {b})"


def unary_text(op: str, dtype: DataType, a: str) -> str:
    """`op(a)` before rounding."""
    if dtype == boolean:
        return f"(uint8_t)(!{a})"
    if op == "neg":
        return (
            f"({value_type(dtype)})(-{a})"
            if dtype.nbits < 32 or dtype.is_float
            else f"({value_type(dtype)})(0u - (uint{dtype.nbits}_t){a})"
        )
    if dtype.is_float:
        return f"{_FLOAT_FUNCTIONS[op]}({a})"
    return f"({value_type(dtype)})tl_abs({a})"
