"""Data types: integers and floats of 1 to 8 bits, the usual wider ones, and the exact meaning of every code.

A *code* is the unsigned integer formed by the bits of one element; a *value* is the number that it stands for.

- Integers are two's complement (`int1` is {-1, 0}) or unsigned.
- Floats are sign, exponent, mantissa from the top bit down, with bias 2^(exponent bits - 1) - 1 and subnormals.
  Types of at most 8 bits have no inf or NaN, with two exceptions. 5-bit exponents: those types are the upper bits of
  an f16, so the top exponent stays inf (and NaN where there is a mantissa) and every value fits f16.
  And `float8_e4m3`, which is OCP E4M3 (one NaN per sign, no inf, max 448). `float8_e5m2` is OCP E5M2.
- `float8_e8m0` is the OCP scale format: no sign, no zero; code c is 2^(c - 127), 255 is NaN.
  Source: OCP 8-bit Floating Point Specification 1.0, OCP Microscaling Formats 1.0.
- `tf32`, the operand of f32-like tensor-core products, has the sign, the exponent and the upper 10 mantissa bits of an f32, in
  their places; the 13 bits below are not part of the value. Source: PTX ISA, "Alternate Floating-Point Data Formats".
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tilus.errors import TilusError
from tilus.rounding import TF32_BITS, round_f16, to_float64, wide_codes

Kind = Literal["int", "uint", "float", "bool"]
Specials = Literal["none", "nan", "ieee"]


@dataclass(frozen=True, repr=False)
class DataType:
    """An element type, compared by value.

    nbits: bits of one element (packed in memory when fewer than 8; a boolean takes a byte).
    exponent_nbits, mantissa_nbits: 0 unless `kind` is "float".
    specials: which float codes are not finite. "none"; "nan": only the all-ones magnitude, a NaN; "ieee": the top
    exponent, inf with mantissa 0 and NaN otherwise.
    """

    name: str
    kind: Kind
    nbits: int
    exponent_nbits: int = 0
    mantissa_nbits: int = 0
    specials: Specials = "none"

    def __repr__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        """Types are part of every launch's key."""
        return hash(self.name)

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def is_signed(self) -> bool:
        return self.kind == "int" or (self.is_float and self.nbits > self.exponent_nbits + self.mantissa_nbits)

    @property
    def is_small(self) -> bool:
        """Whether it is an integer or a float with a sign of at most 8 bits: the types of weights."""
        return self.nbits <= 8 and (self.is_integer or (self.is_float and self.is_signed))

    @property
    def nbytes(self) -> int:
        """Bytes of one element.

        Raises: TilusError for types that are not whole bytes.
        """
        if self.nbits % 8:
            raise TilusError(
                f"{self} has {self.nbits} bits, expected a multiple of 8",
                hint="count bits with nbits, and round up once for a whole array",
            )
        return self.nbits // 8

    @property
    def num_codes(self) -> int:
        """How many different codes there are."""
        return 2 if self.kind == "bool" else 1 << self.nbits

    @property
    def bias(self) -> int:
        """The exponent bias of a float type."""
        self._require_float("bias")
        return (1 << (self.exponent_nbits - 1)) - 1

    @property
    def ignored_nbits(self) -> int:
        """Lowest bits of a code that do not belong to the value: 13 in tf32, which stands in a word of 32 bits."""
        return self.nbits - self.is_signed - self.exponent_nbits - self.mantissa_nbits if self.is_float else 0

    @property
    def max_code(self) -> int:
        """The code of `max_value`."""
        match self.kind, self.specials:
            case "bool", _:
                return 1
            case "uint", _:
                return (1 << self.nbits) - 1
            case _, "none":
                return (1 << (self.nbits - 1)) - 1
            case _, "nan":
                return (1 << (self.exponent_nbits + self.mantissa_nbits)) - 2
            case _, "ieee":
                return ((((1 << self.exponent_nbits) - 1) << self.mantissa_nbits) - 1) << self.ignored_nbits

    @property
    def max_value(self) -> int | float:
        """The largest finite value."""
        if not self.is_float:
            return self.max_code
        exponent, mantissa = divmod(self.max_code >> self.ignored_nbits, 1 << self.mantissa_nbits)
        significand = mantissa + (1 << self.mantissa_nbits if exponent else 0)
        return significand * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_nbits)

    @property
    def min_value(self) -> int | float:
        """The smallest (most negative) finite value."""
        match self.kind:
            case "int":
                return -(1 << (self.nbits - 1))
            case "float":
                return -self.max_value if self.is_signed else self.smallest_subnormal
            case "uint" | "bool":
                return 0

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value of a float type."""
        return 2.0 ** (int(self.is_signed) - self.bias - self.mantissa_nbits)

    @property
    def eps(self) -> float:
        """The distance from 1 to the next larger value of a float type."""
        return max(2.0**-self.mantissa_nbits, self.smallest_subnormal)

    @property
    def storage(self) -> np.dtype[Any]:
        """The numpy dtype that holds one unpacked code."""
        return np.dtype(f"uint{max(8, self.nbits)}")

    @property
    def numpy(self) -> np.dtype[Any] | None:
        """The numpy dtype of arrays in memory; None where numpy has no such type (bf16, tf32, small floats, sub-byte)."""
        if self.kind == "bool":
            return np.dtype(np.bool_)
        if self.nbits < 8 or (self.is_float and self not in (f16, f32)):
            return None
        return np.dtype(f"{self.kind}{self.nbits}")

    @property
    def compute(self) -> np.dtype[Any]:
        """The numpy dtype that holds values: float32 for every float, at least 8 bits for integers."""
        if self.kind == "bool":
            return np.dtype(np.bool_)
        return np.dtype(np.float32) if self.is_float else np.dtype(f"{self.kind}{max(8, self.nbits)}")

    def decode(self, codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The values of codes, exactly.

        codes: any shape, dtype `storage`. Returns: the same shape, dtype `compute`.
        Raises: TilusError for another dtype, or a code that does not fit `nbits`.
        """
        _check_codes(self, codes)
        if self.kind == "bool":
            return codes != 0
        if self.nbits <= 8:
            return np.asarray(_value_table(self)[codes])
        match self.name:
            case "f16":
                with np.errstate(invalid="ignore"):  # signalling NaNs
                    return codes.view(np.float16).astype(np.float32)
            case "bf16":
                return (codes.astype(np.uint32) << 16).view(np.float32)
            case "tf32":
                return (codes & TF32_BITS).view(np.float32)
            case _:
                return codes.view(self.compute)

    def encode(self, values: npt.ArrayLike) -> npt.NDArray[Any]:
        """The codes nearest to values: one rounding to nearest, ties to the even code (tf32: away from zero, `cvt.rna`).

        Out of range: integers and floats of at most 8 bits saturate to their largest finite value, inf included
        (PTX `cvt.satfinite`); f16, bf16, tf32 and f32 overflow to inf (PTX `cvt.rn`). NaN becomes a NaN (which of the NaN
        codes is not promised), the largest value in floats without NaN (as `cvt.satfinite` does), and 0 in integers.
        A boolean is `value != 0`. In `float8_e8m0` ties go up (the implicit one is the last bit of a number, and odd), and what
        is below 2^-127, negative or zero becomes 2^-127.

        values: any shape, any numeric or boolean dtype. Returns: the same shape, dtype `storage`.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(self._encode(np.asarray(values)))

    def _encode(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.kind == "bool":
            return (array != 0).astype(self.storage)
        if self.is_integer:
            return _encode_integer(self, array)
        if array.dtype != np.float32:
            array = to_float64(array)
        return _encode_small_float(self, array) if self.nbits <= 8 else wide_codes(self.name, array)

    def round(self, values: npt.ArrayLike) -> npt.NDArray[Any]:
        """The values of this type nearest to `values`: `decode(encode(values))`; dtype `compute`."""
        if self is f16 and isinstance(values, np.ndarray) and values.dtype == np.float32:
            return round_f16(values)
        return self.decode(self.encode(values))

    def _require_float(self, what: str) -> None:
        if not self.is_float:
            raise TilusError(f"{what} of {self}, expected a float type", hint="check is_float first")


def _check_codes(dtype: DataType, codes: npt.NDArray[Any]) -> None:
    if codes.dtype != dtype.storage:
        raise TilusError(
            f"codes of {dtype} have dtype {codes.dtype}, expected {dtype.storage}",
            hint=f"values become codes with {dtype}.encode(values)",
        )
    if dtype.nbits < 8 and codes.size and int(codes.max()) >= dtype.num_codes:
        raise TilusError(
            f"code {int(codes.max())} does not fit {dtype}, expected less than {dtype.num_codes}",
            hint="unpack packed bytes with unpack_bits first",
        )


@functools.cache
def _value_table(dtype: DataType) -> npt.NDArray[Any]:
    """The value of every code of a type of at most 8 bits, dtype `compute`; read-only."""
    codes = np.arange(dtype.num_codes, dtype=np.int64)
    wrapped = codes - dtype.num_codes * (codes > dtype.max_code)
    table = (_float_values(dtype, codes) if dtype.is_float else wrapped).astype(dtype.compute)
    table.flags.writeable = False
    return table


def _float_values(dtype: DataType, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    if not dtype.is_signed:
        return np.where(codes > dtype.max_code, np.nan, np.ldexp(1.0, codes - dtype.bias))
    magnitude = codes & (dtype.num_codes // 2 - 1)
    exponent, mantissa = np.divmod(magnitude, 1 << dtype.mantissa_nbits)
    significand = mantissa + np.where(exponent > 0, 1 << dtype.mantissa_nbits, 0)
    values = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - dtype.bias - dtype.mantissa_nbits)
    if dtype.specials == "ieee":
        values[(magnitude > dtype.max_code) & (mantissa == 0)] = np.inf
        values[(magnitude > dtype.max_code) & (mantissa != 0)] = np.nan
    elif dtype.specials == "nan":
        values[magnitude > dtype.max_code] = np.nan
    return np.where(codes == magnitude, values, -values)


def _encode_integer(dtype: DataType, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    low, high = int(dtype.min_value), int(dtype.max_value)
    if array.dtype.kind == "f":
        rounded = np.rint(array.astype(np.float64))
        above, below = rounded >= float(high), rounded <= float(low)
        inside = np.where(above | below | np.isnan(rounded), 0.0, rounded).astype(dtype.compute)
        values = np.where(above, dtype.compute.type(high), np.where(below, dtype.compute.type(low), inside))
    else:
        array = array.astype(np.uint8) if array.dtype.kind == "b" else array
        limits = np.iinfo(array.dtype)
        values = np.clip(array, max(low, int(limits.min)), min(high, int(limits.max))).astype(dtype.compute)
    codes = values.view(dtype.storage)
    return codes & dtype.storage.type(dtype.num_codes - 1)


@functools.cache
def _midpoints(dtype: DataType) -> npt.NDArray[np.float64]:
    """The values half-way between neighbouring finite magnitudes: entry i lies between codes i and i + 1."""
    magnitudes = _float_values(dtype, np.arange(dtype.max_code + 1, dtype=np.int64))
    return (magnitudes[:-1] + magnitudes[1:]) / 2


def _encode_small_float(dtype: DataType, array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    midpoints = _midpoints(dtype)
    if not dtype.is_signed:
        codes = np.searchsorted(midpoints, array.astype(np.float64), side="right")
        return np.where(np.isnan(array), dtype.num_codes - 1, codes).astype(np.uint8)
    magnitude = np.abs(array.astype(np.float64))
    codes = np.searchsorted(midpoints, magnitude, side="left")
    tie = midpoints[np.minimum(codes, midpoints.size - 1)] == magnitude
    codes = codes + (tie & (codes % 2 == 1))
    codes = codes + np.where(np.signbit(array), dtype.num_codes // 2, 0)
    has_nan = dtype.specials == "nan" or (dtype.specials == "ieee" and dtype.mantissa_nbits > 0)
    codes = np.where(np.isnan(array), dtype.num_codes // 2 - 1 if has_nan else dtype.max_code, codes)
    return codes.astype(np.uint8)


def pack_bits(codes: npt.NDArray[Any], dtype: DataType) -> npt.NDArray[np.uint8]:
    """Pack the last axis as a little-endian bit stream: element i has bits [i * nbits, (i + 1) * nbits).

    codes: [..., count], dtype `dtype.storage`. Returns: [..., ceil(count * nbits / 8)] bytes; unused bits are 0.
    """
    _check_codes(dtype, codes)
    if dtype.nbits > 8:
        return np.ascontiguousarray(codes).view(np.uint8)
    *lead, count = codes.shape
    groups = -(-count // 8)  # eight elements are nbits bytes, for every nbits
    padded = np.zeros((*lead, groups * 8), np.uint8)
    padded[..., :count] = codes
    words = np.zeros((*lead, groups), np.dtype("<u8"))
    for i in range(8):
        words |= padded[..., i::8].astype(np.uint64) << np.uint64(i * dtype.nbits)
    data = words.view(np.uint8).reshape(*lead, groups, 8)[..., : dtype.nbits]
    return data.reshape(*lead, groups * dtype.nbits)[..., : -(-count * dtype.nbits // 8)]


def unpack_bits(data: npt.NDArray[np.uint8], dtype: DataType, count: int) -> npt.NDArray[Any]:
    """The inverse of `pack_bits`.

    data: [..., nbytes] bytes. Returns: [..., count] codes, dtype `dtype.storage`.
    Raises: TilusError when the bytes hold fewer than `count` elements.
    """
    *lead, nbytes = data.shape
    needed = -(-count * dtype.nbits // 8)
    if data.dtype != np.uint8 or nbytes < needed:
        raise TilusError(
            f"{count} elements of {dtype} from {nbytes} x {data.dtype}, expected at least {needed} x uint8",
            hint="the last axis holds the packed bytes",
        )
    if dtype.nbits > 8:
        return np.ascontiguousarray(data[..., :needed]).view(dtype.storage)
    groups = -(-count // 8)
    words = np.zeros((*lead, groups, 8), np.uint8)
    padded = np.zeros((*lead, groups * dtype.nbits), np.uint8)
    padded[..., :needed] = data[..., :needed]
    words[..., : dtype.nbits] = padded.reshape(*lead, groups, dtype.nbits)
    stream = words.view(np.dtype("<u8"))
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(dtype.nbits)
    codes = (stream >> shifts) & np.uint64((1 << dtype.nbits) - 1)
    return codes.astype(np.uint8).reshape(*lead, groups * 8)[..., :count]


def _integer(kind: Literal["int", "uint"], nbits: int) -> DataType:
    return DataType(f"{kind}{nbits}", kind, nbits)


def _small_float(exponent_nbits: int, mantissa_nbits: int, specials: Specials = "none") -> DataType:
    nbits = 1 + exponent_nbits + mantissa_nbits
    name = f"float{nbits}_e{exponent_nbits}m{mantissa_nbits}"
    return DataType(name, "float", nbits, exponent_nbits, mantissa_nbits, specials)


boolean = DataType("boolean", "bool", 8)
int1, int2, int3, int4 = (_integer("int", nbits) for nbits in (1, 2, 3, 4))
int5, int6, int7, int8 = (_integer("int", nbits) for nbits in (5, 6, 7, 8))
int16, int32, int64 = (_integer("int", nbits) for nbits in (16, 32, 64))
uint1, uint2, uint3, uint4 = (_integer("uint", nbits) for nbits in (1, 2, 3, 4))
uint5, uint6, uint7, uint8 = (_integer("uint", nbits) for nbits in (5, 6, 7, 8))
uint16, uint32, uint64 = (_integer("uint", nbits) for nbits in (16, 32, 64))
float3_e1m1, float3_e2m0 = _small_float(1, 1), _small_float(2, 0)
float4_e1m2, float4_e2m1, float4_e3m0 = _small_float(1, 2), _small_float(2, 1), _small_float(3, 0)
float5_e1m3, float5_e2m2 = _small_float(1, 3), _small_float(2, 2)
float5_e3m1, float5_e4m0 = _small_float(3, 1), _small_float(4, 0)
float6_e1m4, float6_e2m3, float6_e3m2 = _small_float(1, 4), _small_float(2, 3), _small_float(3, 2)
float6_e4m1, float6_e5m0 = _small_float(4, 1), _small_float(5, 0, "ieee")
float7_e1m5, float7_e2m4, float7_e3m3 = _small_float(1, 5), _small_float(2, 4), _small_float(3, 3)
float7_e4m2, float7_e5m1 = _small_float(4, 2), _small_float(5, 1, "ieee")
float8_e1m6, float8_e2m5, float8_e3m4 = _small_float(1, 6), _small_float(2, 5), _small_float(3, 4)
float8_e4m3, float8_e5m2 = _small_float(4, 3, "nan"), _small_float(5, 2, "ieee")
float8_e8m0 = DataType("float8_e8m0", "float", 8, 8, 0, "nan")
f16 = DataType("f16", "float", 16, 5, 10, "ieee")
bf16 = DataType("bf16", "float", 16, 8, 7, "ieee")
f32 = DataType("f32", "float", 32, 8, 23, "ieee")
tf32 = DataType("tf32", "float", 32, 8, 10, "ieee")

DTYPES: dict[str, DataType] = {value.name: value for value in list(globals().values()) if isinstance(value, DataType)}


def dtype(name: str) -> DataType:
    """The data type of that name.

    Raises: TilusError listing similar names.
    """
    if name not in DTYPES:
        close = ", ".join(difflib.get_close_matches(name, DTYPES, n=4, cutoff=0.5)) or "int4, float8_e4m3"
        raise TilusError(
            f"unknown data type {name!r}, expected one of {len(DTYPES)}",
            hint=f"names like it: {close}; the usual floats are f16, bf16 and f32",
        )
    return DTYPES[name]
