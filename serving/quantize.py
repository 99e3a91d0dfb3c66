"""How weights that a model stores as floats are quantised while it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, f16, f32, int8
from tilus.dtypes import dtype as dtype_named
from tilus.errors import TilusError
from tilus.kernels.quantize import PRESETS, RECIPE_NAMES, DenseMatrix, Matrix, QuantizedMatrix, quantize

GROUPS = (32, 64, 128)
GROUP = GROUPS[0]
# int1 holds only 0 and -1, which no positive scale makes useful.
WEIGHT_DTYPES = tuple(name for name in RECIPE_NAMES if name not in PRESETS and name != "int1")
# Embeddings and routers, which lose more by fewer bits than they weigh.
ALWAYS_INT8 = ("token_embd", "ffn_gate_inp")
DENSE = "fp16"  # the name of weights that are not quantised
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """What is known of a matrix before it is read. is_float: whether it is stored as floats, and quantised on the way. first_row:
    or one that is quantised like it, which says how much memory it needs; None, and num_rows is 0, when only reading all of it
    would tell. nbytes: in its file."""

    is_float: bool
    first_row: Matrix | None
    num_rows: int
    nbytes: int


def weight_type(name: str) -> DataType:
    """What --weight-dtype names."""
    return f16 if name == DENSE else dtype_named(name)


@dataclass(frozen=True)
class Rounding:
    """What floats become on the way: float16 values where dtype is f16, else numbers of that type in groups along K. Plain
    rounding: a model should start in seconds. `tilus quantize` searches for better scales."""

    dtype: DataType
    group: int = GROUP

    def of(self, name: str) -> Rounding:
        """Of a matrix, by its GGUF name."""
        return Rounding(int8) if name.rpartition(".")[2] in ALWAYS_INT8 else self

    def __call__(self, weight: _Floats, name: str) -> Matrix:
        """weight: float32 [N, K]. Raises TilusError, with the tensor's `name`, when K is no multiple of the group or float16
        overflows."""
        if self.dtype == f16:
            return DenseMatrix(fit_float16(weight, name).astype(np.float16))
        return quantize(weight, self.dtype, self.group, search=False, name=name)


def fit_float16(values: _Floats, name: str) -> _Floats:
    """Values rounded to float16, in which they are packed; raises TilusError when they are too large."""
    limit, largest = float(np.finfo(np.float16).max), float(np.abs(values).max(initial=0.0))
    if not largest <= limit:
        raise TilusError(f"{name} needs a value or scale of {largest:g}, but float16 holds at most {limit:g}")
    return values.astype(np.float16).astype(np.float32)


def with_short_scales(matrix: QuantizedMatrix, name: str) -> QuantizedMatrix:
    """The matrix as it is packed: scales and minimums of 32 bits are rounded to float16, which saves a fifth of the time of a
    4-bit weight, unless they are so small that float16 would lose more of them than half a unit in its last place.

    Raises TilusError, with the tensor's `name`, when they are too large for float16.
    """
    if matrix.scale_dtype not in (f16, f32):
        return matrix
    parts = {"scales": matrix.scales} if matrix.mins is None else {"scales": matrix.scales, "mins": matrix.mins}
    rounded = {part: fit_float16(values, name) for part, values in parts.items()}
    kept = all(_rounds_well(values, rounded[part]) for part, values in parts.items())
    return replace(matrix, **rounded, scale_dtype=f16) if kept else matrix


def _rounds_well(values: _Floats, rounded: _Floats) -> bool:
    return bool(np.linalg.norm(rounded - values) <= 2.0**-11 * np.linalg.norm(values))
