"""How numbers of each type look in C: as values in tiles, as codes in memory, and on the way from one to the other.

Values are `float` for every float type, so that arithmetic on them vectorises alike; a type of fewer bits is a float that the
type holds. Integers have their own width, at least 8 bits; booleans are 0 and 1.
"""

from __future__ import annotations

import math

import numpy as np

from tilus.dtypes import DataType, bf16, boolean, f16, f32, tf32
from tilus.errors import TilusError

_NAMED = (f16, bf16, tf32)
NARROW = 24  # integers of up to this many bits are numbers of f32


def value_type(dtype: DataType) -> str:
    """The C type of a tile's elements."""
    if dtype.is_float:
        return "float"
    return "uint8_t" if dtype == boolean else f"{dtype.kind}{max(8, dtype.nbits)}_t"


def code_type(dtype: DataType) -> str:
    """The C type of an element in memory; sub-byte types are strings of bytes."""
    if dtype == f32:
        return "float"
    return f"uint{max(8, dtype.nbits)}_t" if dtype.is_float else value_type(dtype)


def is_plain(dtype: DataType) -> bool:
    """Whether memory holds values as tiles do."""
    return dtype == f32 or (not dtype.is_float and dtype.nbits >= 8)


def value_nbytes(dtype: DataType) -> int:
    """Bytes of a value in a tile."""
    return 4 if dtype.is_float else max(8, dtype.nbits) // 8


def literal(dtype: DataType, value: float) -> str:
    """A number of a tile in C."""
    if not dtype.is_float:
        return f"({value_type(dtype)}){_wide(int(value))}"
    if math.isnan(value):
        return "TL_NAN"
    if math.isinf(value):
        return "TL_INF" if value > 0 else "-TL_INF"
    return f"{float(np.float32(value)).hex()}f"


def value_table(dtype: DataType) -> str:
    """The name of the table of a small float type's values."""
    return f"values_of_{dtype.name}"


def table_definition(dtype: DataType) -> str:
    """That table, [codes]."""
    values = dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8))
    entries = ", ".join(literal(f32, float(v)) for v in values)
    return f"static const float {value_table(dtype)}[{dtype.num_codes}] = {{{entries}}};"


def value_of_code(dtype: DataType, code: str) -> str:
    """The value that a code stands for. A small float type's table must be defined."""
    if dtype in _NAMED:
        return f"tl_{dtype.name}_value({code})"
    if dtype == f32:
        return f"tl_float({code})"
    if dtype.is_float:
        return f"{value_table(dtype)}[{code}]"
    if dtype == boolean:
        return f"(uint8_t)(({code}) != 0)"
    if dtype.kind == "int" and dtype.nbits < 8:
        return f"(int8_t)((int8_t)(({code}) << {8 - dtype.nbits}) >> {8 - dtype.nbits})"
    return f"({value_type(dtype)})({code})"


def code_of_value(dtype: DataType, value: str) -> str:
    """The code of a value; of a float, the one nearest to it."""
    if dtype in _NAMED:
        return f"tl_{dtype.name}_code({value})"
    if dtype == f32:
        return f"tl_bits({value})"
    if dtype.is_float:
        return _small_code(dtype, value)
    if dtype == boolean:
        return f"(uint8_t)(({value}) != 0)"
    if dtype.nbits < 8:
        return f"(uint8_t)(({value}) & {dtype.num_codes - 1})"
    return f"(uint{dtype.nbits}_t)({value})"


def _small_code(dtype: DataType, value: str) -> str:
    if not dtype.is_signed:
        return f"tl_e8m0_code({value})"
    largest = dtype.max_code
    has_nan = dtype.specials == "nan" or (dtype.specials == "ieee" and dtype.mantissa_nbits > 0)
    nan = dtype.num_codes // 2 - 1 if has_nan else largest
    return f"tl_small_code({value}, {dtype.exponent_nbits}, {dtype.mantissa_nbits}, {largest}, {nan}, {largest})"


def rounded(dtype: DataType, value: str) -> str:
    """A float as the nearest number of a float type."""
    if dtype == f32:
        return value
    if dtype in _NAMED:
        return f"tl_round_{dtype.name}({value})"
    return value_of_code(dtype, code_of_value(dtype, value))


def holds(src: DataType, dst: DataType) -> bool:
    """Whether every value of `src` is known to be one of the float type `dst`."""
    if dst.nbits < 16:
        return False
    if not src.is_float:
        return src == boolean or src.nbits <= dst.mantissa_nbits + 1 + (src.kind == "int")
    return src.exponent_nbits <= dst.exponent_nbits and src.mantissa_nbits <= dst.mantissa_nbits


def converted(src: DataType, dst: DataType, value: str) -> tuple[str, bool]:
    """A value as one of another type, as `DataType.encode` says; and whether it still has to be rounded to a float type."""
    if src == dst:
        return value, False
    if dst == boolean:
        raise TilusError(f"cast of a tile of {src.name} to boolean", hint="compare it: x != 0")
    if dst.is_float:
        if src.is_float or src == boolean or src.nbits <= NARROW:
            return f"(float)({value})" if not src.is_float else value, not holds(src, dst)
        wide = f"(double)({value})" if src.nbits == 32 else f"(long double)({value})"
        return (f"(float)({value})", False) if dst == f32 else (f"tl_odd_f32({wide})", True)
    low, high = int(dst.min_value), int(dst.max_value)
    if src.is_float:
        if dst.nbits <= 16:
            return f"({value_type(dst)})tl_round_narrow({value}, {low}, {high})", False
        bounds = f"{_wide(low)}, {_wide(high)}"
        return f"({value_type(dst)})tl_round_int({value}, {bounds})", False
    return _saturated(src, dst, value), False


def _saturated(src: DataType, dst: DataType, value: str) -> str:
    low, high = max(int(dst.min_value), int(src.min_value)), min(int(dst.max_value), int(src.max_value))
    kind = value_type(dst)
    if (low, high) == (int(src.min_value), int(src.max_value)):
        return f"({kind})({value})"
    if src.nbits == 64 and src.kind == "uint":
        return f"({kind})(({value}) > {_wide(high)} ? {_wide(high)} : ({value}))"
    return f"({kind})tl_clamp({value}, {_wide(low)}, {_wide(high)})"


def _wide(value: int) -> str:
    return "INT64_MIN" if value == -(2**63) else f"{value}ull" if value >= 2**63 else f"{value}ll"
