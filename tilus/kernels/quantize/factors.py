"""Scales, minimums and zero points as packed weights store them: sets of 64, one for each row of a tile (see tiles)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DTYPES, f16
from tilus.errors import TilusError
from tilus.kernels.quantize.tiles import TILE, WHOLE, TileOrder, span_of

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


def exact_codes(values: Array, dtype: str, name: str) -> Array:
    """The codes of factors [N, G].

    Raises: TilusError, with `name` and the place, for infinities, NaN, and numbers that the type does not hold.
    """
    finite = np.isfinite(values)
    if not finite.all():
        row, group = (int(i) for i in np.argwhere(~finite)[0])
        raise TilusError(f"{name} of row {row}, group {group} is {values[row, group]}, expected a finite number")
    codes = DTYPES[dtype].encode(values)
    found = np.asarray(DTYPES[dtype].decode(codes), np.float32)
    if not np.array_equal(found, values):
        row, group = (int(i) for i in np.argwhere(found != values)[0])
        raise TilusError(
            f"{name} {values[row, group]:.9g} of row {row}, group {group} is no number of {dtype}; "
            f"the nearest is {found[row, group]:.9g}",
            hint=f"round the factors to {dtype} before the codes are chosen, or store them as f32",
        )
    return codes


def exact_in_f16(numbers: Array, codes: Bytes, scales: Array) -> bool:
    """Whether float16 holds scales, and weights exactly, that are powers of two times numbers which it holds.

    numbers: of each code. codes: [N, K]. scales: float32 [N, G]. Codes are looked at only in groups whose scale takes the type's
    least or largest number out of range, as that of a group of zeros usually does.
    """
    sizes = np.abs(numbers[np.isfinite(numbers) & (numbers != 0)])
    outside = (scales < f16.smallest_subnormal / sizes.min()) | (scales > f16.max_value / sizes.max())
    grouped, rest = codes.reshape(*scales.shape, -1)[outside], scales[outside][:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.float16(rest) * np.float16(numbers)[grouped]
    return bool(np.array_equal(found, np.float64(rest) * numbers[grouped]))


def arrange(codes: Array, k: int, group: int, order: TileOrder) -> Bytes:
    """Codes [N, G] as bytes [ceil(N / 64), sets, 8, 8 * nbytes]; rows beyond N are zero."""
    n = codes.shape[0]
    tiles_n = -(-n // TILE)
    groups = _group_of_set(k, group)
    padded = np.zeros((tiles_n * TILE, groups.size), codes.dtype)
    padded[:n] = codes[:, groups]
    sets = padded.reshape(tiles_n, 8, 8, groups.size).transpose(0, 3, *(1 + axis for axis in order.factor_axes))
    return np.ascontiguousarray(sets).view(np.uint8)


def collect(packed: Bytes, n: int, k: int, group: int, storage: np.dtype[Any], order: TileOrder) -> Array:
    """Codes [N, G] from what `arrange` made."""
    sets = np.ascontiguousarray(packed).view(storage)
    # The order of two axes is its own inverse.
    rows = sets.transpose(0, *(2 + axis for axis in order.factor_axes), 1).reshape(sets.shape[0] * TILE, sets.shape[1])
    _, first = np.unique(_group_of_set(k, group), return_index=True)
    return np.ascontiguousarray(rows[:n, first])


def _group_of_set(k: int, group: int) -> npt.NDArray[np.intp]:
    span = span_of(group, k)
    return np.zeros(1, np.intp) if span == WHOLE else np.arange(k // span) * span // group
