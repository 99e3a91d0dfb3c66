"""Scales, minimums and zero points as packed weights store them: sets of 64 in the order of the kernel's threads (see tiles)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DTYPES, DataType
from tilus.errors import TilusError
from tilus.kernels.quantize.tiles import TILE, WHOLE, span_of

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
# A byte e that stands for 2^(e - 127), 255 for NaN: OCP Microscaling Formats 1.0. Its codes are read and written here only.
E8M0 = DataType("float8_e8m0", "float", 8, 8, 0, "nan")


def factor_dtype(name: str) -> DataType:
    """The type of factors of that name."""
    return E8M0 if name == E8M0.name else DTYPES[name]


def encode(values: Array, dtype: str) -> Array:
    """Numbers as codes of a type of factors. What is no number of the type gets a code that decodes to something else."""
    if dtype != E8M0.name:
        return DTYPES[dtype].encode(values)
    exponents = np.frexp(np.where(values > 0, values, np.float32(1)))[1] - 1
    return (np.clip(exponents, -127, 127) + 127).astype(np.uint8)


def decode(codes: Array, dtype: str) -> Array:
    """What codes stand for, float32."""
    if dtype != E8M0.name:
        return np.asarray(DTYPES[dtype].decode(codes), np.float32)
    powers = np.ldexp(np.float32(1), codes.astype(np.int32) - 127).astype(np.float32)
    return np.where(codes == 255, np.float32(np.nan), powers)


def exact_codes(values: Array, dtype: str, name: str) -> Array:
    """The codes of factors [N, G].

    Raises: TilusError, with `name` and the place, for infinities, NaN, and numbers that the type does not hold.
    """
    finite = np.isfinite(values)
    if not finite.all():
        row, group = (int(i) for i in np.argwhere(~finite)[0])
        raise TilusError(f"{name} of row {row}, group {group} is {values[row, group]}, expected a finite number")
    codes = encode(values, dtype)
    found = decode(codes, dtype)
    if not np.array_equal(found, values):
        row, group = (int(i) for i in np.argwhere(found != values)[0])
        raise TilusError(
            f"{name} {values[row, group]:.9g} of row {row}, group {group} is no number of {dtype}; "
            f"the nearest is {found[row, group]:.9g}",
            hint=f"round the factors to {dtype} before the codes are chosen, or store them as f32",
        )
    return codes


def arrange(codes: Array, k: int, group: int) -> Bytes:
    """Codes [N, G] as bytes [ceil(N / 64), sets, 8, 8 * nbytes]; rows beyond N are zero."""
    n = codes.shape[0]
    tiles_n = -(-n // TILE)
    groups = _group_of_set(k, group)
    padded = np.zeros((tiles_n * TILE, groups.size), codes.dtype)
    padded[:n] = codes[:, groups]
    sets = padded.reshape(tiles_n, 8, 8, groups.size).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(sets).view(np.uint8)


def collect(packed: Bytes, n: int, k: int, group: int, storage: np.dtype[Any]) -> Array:
    """Codes [N, G] from what `arrange` made."""
    sets = np.ascontiguousarray(packed).view(storage)
    rows = sets.transpose(0, 3, 2, 1).reshape(sets.shape[0] * TILE, sets.shape[1])
    _, first = np.unique(_group_of_set(k, group), return_index=True)
    return np.ascontiguousarray(rows[:n, first])


def _group_of_set(k: int, group: int) -> npt.NDArray[np.intp]:
    span = span_of(group, k)
    return np.zeros(1, np.intp) if span == WHOLE else np.arange(k // span) * span // group
