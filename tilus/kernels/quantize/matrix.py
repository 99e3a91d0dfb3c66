"""Quantised matrices as plain arrays: what readers of checkpoints make and what packing takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, f16
from tilus.errors import TilusError

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A weight [N, K] as codes with one scale for each group along K, in the order in which they are stored:

        value[n, columns[j]] = global_scale * scales[n, g] * (number(codes[n, j]) - zeros[n, g]) + mins[n, g]

    with g = j // group, and number = decode of `dtype`, or an entry of `table`.

    codes: uint8 [N, K], raw codes of `dtype`. scales: float32 [N, K / group], each a number of `scale_dtype`.
    mins: float32 [N, K / group], or None for 0. zeros: int16 [N, K / group], or None for 0. table: float32 [2^nbits] that
    replaces the meaning of the codes (nf4, codebooks), or None. columns: int32 [K], a permutation (activation order),
    or None for 0..K-1. Raises TilusError where shapes do not fit.
    """

    codes: Codes
    scales: Floats
    mins: Floats | None
    dtype: DataType
    zeros: npt.NDArray[np.int16] | None = None
    table: Floats | None = None
    columns: npt.NDArray[np.int32] | None = None
    global_scale: float = 1.0
    scale_dtype: DataType = f16

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if self.scales.ndim != 2 or self.scales.shape[0] != n or not self.scales.shape[1] or k % self.scales.shape[1]:
            raise TilusError(
                f"scales of shape {list(self.scales.shape)} for codes of {[n, k]}, expected [N, K / group]"
            )
        expected = {"mins": self.scales.shape, "zeros": self.scales.shape}
        expected |= {"table": (self.dtype.num_codes,), "columns": (k,)}
        for name, shape in expected.items():
            part = getattr(self, name)
            if part is not None and part.shape != shape:
                raise TilusError(f"{name} of shape {list(part.shape)}, expected {list(shape)} for codes of {[n, k]}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def take_rows(self, rows: npt.NDArray[np.int64]) -> QuantizedMatrix:
        """The matrix of the given rows, in that order."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            mins=None if self.mins is None else self.mins[rows],
            zeros=None if self.zeros is None else self.zeros[rows],
        )

    def take_columns(self, start: int, stop: int) -> QuantizedMatrix:
        """The matrix of the columns `start` to `stop` - 1. Where these cut a group, all groups become shorter, of equal scales.

        Raises: TilusError where columns are stored in another order.
        """
        if self.columns is not None:
            raise TilusError(
                f"columns {start} to {stop} of a matrix of {list(self.shape)} with columns in another order"
            )
        whole = self.group == self.shape[1]  # one scale a row, which serves any part of it
        group = self.group if whole else math.gcd(self.group, start, stop)

        def groups(part: npt.NDArray[Any] | None) -> Any:
            if part is None or whole:
                return part
            return np.repeat(part, self.group // group, axis=1)[:, start // group : stop // group]

        codes, scales = self.codes[:, start:stop], groups(self.scales)
        return replace(self, codes=codes, scales=scales, mins=groups(self.mins), zeros=groups(self.zeros))

    def stacks_with(self, other: Matrix) -> bool:
        """Whether the rows of both can be those of one matrix."""
        if isinstance(other, DenseMatrix):
            return False
        mine, theirs = self._kind(), other._kind()
        shared = [(self.table, other.table), (self.columns, other.columns)]
        return mine == theirs and all(
            (a is None and b is None) or np.array_equal(a, b) for a, b in shared if a is not b
        )

    def _kind(self) -> tuple[object, ...]:
        parts = (self.mins, self.zeros, self.table, self.columns)
        return (
            self.dtype, self.group, self.shape[1], self.global_scale, self.scale_dtype, *(part is None for part in parts)
        )  # fmt: skip

    def stack(self, *others: QuantizedMatrix) -> QuantizedMatrix:
        """The rows of self, then those of the others, which must stack."""
        for other in others:
            if not self.stacks_with(other):
                raise TilusError(f"matrices of {self._kind()} and {other._kind()} do not stack")
        whole = (self, *others)
        mins, zeros = [m.mins for m in whole if m.mins is not None], [m.zeros for m in whole if m.zeros is not None]
        return replace(
            self,
            codes=np.concatenate([m.codes for m in whole]),
            scales=np.concatenate([m.scales for m in whole]),
            mins=np.concatenate(mins) if mins else None,
            zeros=np.concatenate(zeros) if zeros else None,
        )

    def dequantize(self) -> Floats:
        """The values, float32 [N, K], columns in the order of the model."""
        numbers = self.dtype.decode(self.codes) if self.table is None else self.table[self.codes]
        groups = np.asarray(numbers, np.float32).reshape(*self.scales.shape, self.group)
        if self.zeros is not None:
            groups = np.subtract(groups, self.zeros[..., None], dtype=np.float32)
        factors = np.multiply(self.scales, np.float32(self.global_scale), dtype=np.float32)
        values = np.multiply(groups, factors[..., None], dtype=np.float32)
        if self.mins is not None:
            values = np.add(values, self.mins[..., None], dtype=np.float32)
        values = values.reshape(self.shape)
        if self.columns is None:
            return values
        ordered = np.empty_like(values)
        ordered[:, self.columns] = values
        return ordered


@dataclass(frozen=True, eq=False)
class DenseMatrix:
    """A weight that nobody quantised: float16 [N, K], finite. It has what readers of a `QuantizedMatrix` ask for."""

    values: npt.NDArray[np.float16]

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def group(self) -> int:
        return self.shape[1]

    def stacks_with(self, other: Matrix) -> bool:
        """Whether the rows of both can be those of one matrix."""
        return isinstance(other, DenseMatrix) and self.group == other.group

    def stack(self, *others: DenseMatrix) -> DenseMatrix:
        """The rows of self, then those of the others, which must stack."""
        return DenseMatrix(np.concatenate([self.values, *(other.values for other in others)]))

    def take_rows(self, rows: npt.NDArray[np.int64]) -> DenseMatrix:
        """The matrix of the given rows, in that order."""
        return DenseMatrix(self.values[rows])

    def take_columns(self, start: int, stop: int) -> DenseMatrix:
        """The matrix of the columns `start` to `stop` - 1."""
        return DenseMatrix(self.values[:, start:stop])

    def dequantize(self) -> Floats:
        """float32 [N, K]."""
        return self.values.astype(np.float32)


Matrix = QuantizedMatrix | DenseMatrix
