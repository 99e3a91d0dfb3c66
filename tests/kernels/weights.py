"""Random quantised matrices of every scheme, and what they stand for, in float64, from the formula and the codes' decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DTYPES, DataType, bf16, f16, f32, float4_e2m1, float8_e4m3
from tilus.kernels.quantize import QuantizedMatrix

CODE_TYPES = [t for t in DTYPES.values() if t.nbits <= 8 and (t.is_integer or t.is_float)]
INTEGERS = [t for t in CODE_TYPES if t.is_integer]
FLOATS = [t for t in CODE_TYPES if t.is_float]
E8M0 = DataType("float8_e8m0", "float", 8, 8, 0, "nan")
Array = npt.NDArray[Any]

# The 16 levels of NF4, from Dettmers et al., "QLoRA" (2023), to the digits of bitsandbytes.
NF4 = np.array(
    [-1, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0, 0.07958030, 0.16093020, 0.24611230,
     0.33791524, 0.44070983, 0.56261700, 0.72295684, 1], np.float32,
)  # fmt: skip


def finite_codes(dtype: DataType) -> npt.NDArray[np.uint8]:
    """All codes but those of infinities and NaN."""
    codes = np.arange(dtype.num_codes, dtype=np.uint8)
    return codes[np.isfinite(np.float64(dtype.decode(codes)))]


def largest(dtype: DataType) -> float:
    return max(1.0, float(dtype.max_value))


@dataclass(frozen=True, eq=False)
class Exact:
    """Float64 [N, K] in the model's order of columns: the weights, and the sizes of the numbers that are added up to them.

    from_table: the size of what is multiplied by a table's entry.
    """

    values: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.float64]
    from_table: npt.NDArray[np.float64]


def exact(matrix: QuantizedMatrix) -> Exact:
    """value[n, columns[j]] = global_scale * scale[n, g] * (number - zero[n, g]) + min[n, g], g = j // group."""
    n, k = matrix.codes.shape
    group = np.arange(k) // (k // matrix.scales.shape[1])
    numbers = np.float64(matrix.dtype.decode(matrix.codes)) if matrix.table is None else np.float64(matrix.table)[matrix.codes]
    if matrix.zeros is not None:
        numbers = numbers - matrix.zeros[:, group]
    scale = np.float64(np.float32(matrix.global_scale)) * np.float64(matrix.scales)[:, group]
    products = scale * numbers
    mins = np.zeros((n, k)) if matrix.mins is None else np.float64(matrix.mins)[:, group]
    columns = np.arange(k) if matrix.columns is None else matrix.columns
    values, sizes, from_table = np.empty((n, k)), np.empty((n, k)), np.zeros((n, k))
    values[:, columns] = products + mins
    sizes[:, columns] = np.abs(products) + np.abs(mins)
    if matrix.table is not None:
        from_table[:, columns] = np.abs(scale)
    return Exact(values, sizes, from_table)


def random_matrix(dtype: DataType, n: int, k: int, group: int, *, mins: bool = False, seed: int = 0) -> QuantizedMatrix:
    """Uniform finite codes; f16 scales of both signs, about 1 / (largest value); f16 minimums if wanted."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(finite_codes(dtype), (n, k))
    shape = (n, k // group)
    scales = f16.round(rng.standard_normal(shape) / largest(dtype))
    return QuantizedMatrix(codes, scales, f16.round(rng.standard_normal(shape)) if mins else None, dtype)


def with_zeros(matrix: QuantizedMatrix, rng: np.random.Generator) -> QuantizedMatrix:
    """Zero points from the least code to one above the largest."""
    low, high = int(matrix.dtype.min_value), int(matrix.dtype.max_value) + 1
    return replace(matrix, zeros=rng.integers(low, high, matrix.scales.shape, np.int16, endpoint=True))


def with_columns(matrix: QuantizedMatrix, rng: np.random.Generator) -> QuantizedMatrix:
    return replace(matrix, columns=rng.permutation(matrix.shape[1]).astype(np.int32))


def with_table(matrix: QuantizedMatrix, rng: np.random.Generator) -> QuantizedMatrix:
    """NF4, or any other table."""
    table = NF4 if rng.random() < 0.5 else np.float32(rng.standard_normal(16))
    return replace(matrix, table=table, codes=rng.integers(0, 16, matrix.shape, np.uint8))


def with_wide_factors(matrix: QuantizedMatrix, rng: np.random.Generator) -> QuantizedMatrix:
    """Scales and minimums that only f32 holds."""
    shape = matrix.scales.shape
    scales, mins = (np.float32(rng.standard_normal(shape) / divisor) for divisor in (largest(matrix.dtype), 1))
    return replace(matrix, scales=scales, mins=mins, scale_dtype=f32)


def with_bfloat16_scales(matrix: QuantizedMatrix, rng: np.random.Generator) -> QuantizedMatrix:
    return replace(matrix, scales=bf16.round(matrix.scales), scale_dtype=bf16)


def with_powers_of_two(matrix: QuantizedMatrix, rng: np.random.Generator) -> QuantizedMatrix:
    """Block scales of MX formats."""
    exponents = rng.integers(-30, 4, matrix.scales.shape)
    return replace(matrix, scales=np.float32(2.0**exponents / 2 ** np.ceil(np.log2(largest(matrix.dtype)))), scale_dtype=E8M0)


def with_two_levels(matrix: QuantizedMatrix, rng: np.random.Generator) -> QuantizedMatrix:
    """Block scales of NVFP4: e4m3 times a number for the whole weight."""
    scales = float8_e4m3.round(rng.uniform(0, 448, matrix.scales.shape))
    return replace(matrix, scales=scales, scale_dtype=float8_e4m3, global_scale=float(np.float32(1 / 448 / largest(matrix.dtype))))


Change = Callable[[QuantizedMatrix, np.random.Generator], QuantizedMatrix]
# Schemes: a way from a symmetric matrix to one of the scheme, and the types that have it.
SCHEMES: dict[str, tuple[Change, list[DataType]]] = {
    "symmetric": (lambda matrix, rng: matrix, CODE_TYPES),
    "zero points": (with_zeros, INTEGERS),
    "minimums": (lambda matrix, rng: replace(matrix, mins=f16.round(rng.standard_normal(matrix.scales.shape))), CODE_TYPES),
    "wide factors": (with_wide_factors, CODE_TYPES),
    "bfloat16 scales": (with_bfloat16_scales, CODE_TYPES),
    "powers of two": (with_powers_of_two, FLOATS),
    "two levels": (with_two_levels, [float4_e2m1]),
    "table": (with_table, [DTYPES["uint4"]]),
    "activation order": (lambda matrix, rng: with_columns(with_zeros(matrix, rng), rng), INTEGERS),
    "everything": (lambda matrix, rng: with_columns(with_zeros(with_wide_factors(matrix, rng), rng), rng), INTEGERS),
    "table and minimums": (lambda matrix, rng: with_table(with_wide_factors(matrix, rng), rng), [DTYPES["uint4"]]),
}


def matrix_of(scheme: str, dtype: DataType, n: int, k: int, group: int, seed: int = 0) -> QuantizedMatrix:
    """A random matrix of a scheme."""
    return SCHEMES[scheme][0](random_matrix(dtype, n, k, group, seed=seed), np.random.default_rng(seed + 1))
