"""The usual memory layouts: row- and column-major, padded, swizzled, or with any strides."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from tilus.layout.digits import Digit, row_major_strides
from tilus.layout.errors import LayoutError
from tilus.layout.shared import SharedLayout
from tilus.layout.swizzle import Swizzle


def strided(shape: Sequence[int | Sequence[int]], strides: Sequence[int | Sequence[int]]) -> SharedLayout:
    """Explicit strides, in elements; a dimension with several digits has a tuple of sizes and one of strides."""
    dims: list[tuple[Digit, ...]] = []
    for extent, stride in zip(shape, strides, strict=False):
        sizes = (extent,) if isinstance(extent, int) else tuple(extent)
        steps = (stride,) if isinstance(stride, int) else tuple(stride)
        if len(sizes) != len(steps):
            raise LayoutError(f"a dimension has sizes {sizes} and strides {steps}; expected as many of each")
        dims.append(tuple(Digit(size, 0, step) for size, step in zip(sizes, steps)))
    if len(shape) != len(strides):
        raise LayoutError(f"shape {tuple(shape)} and strides {tuple(strides)} differ in rank")
    return SharedLayout(tuple(prod(d.size for d in digits) for digits in dims), tuple(dims))


def row_major(shape: Sequence[int]) -> SharedLayout:
    """Compact, the last dimension contiguous."""
    return strided(shape, row_major_strides(shape))


def column_major(shape: Sequence[int]) -> SharedLayout:
    """Compact, the first dimension contiguous."""
    return strided(shape, row_major_strides(shape[::-1])[::-1])


def padded(shape: Sequence[int], pad: int) -> SharedLayout:
    """Row-major with `pad` unused elements after every row (every run of the last dimension) but the last one."""
    if not shape or pad < 0:
        raise LayoutError(f"padded got shape {tuple(shape)} and pad {pad}; expected rank 1 or more and pad 0 or more")
    return strided(shape, row_major_strides((*shape[:-1], shape[-1] + pad)))


def swizzled(shape: Sequence[int], nbytes_per_element: int) -> SharedLayout:
    """Row-major with the XOR swizzle under which neither rows nor columns of 16-byte chunks have bank conflicts.

    A row is a run of the last dimension, of a multiple of 16 bytes. Rows of 128, 64 and 32 bytes get the 3, 2 and 1 bit
    swizzles of TMA and wgmma (shift 3 in chunks of 16 bytes). For other rows it is the first swizzle, by shift and then
    by bits, with the fewest conflicts.
    """
    if not shape or nbytes_per_element not in (1, 2, 4, 8, 16) or shape[-1] * nbytes_per_element % 16:
        raise LayoutError(
            f"swizzled got shape {tuple(shape)} of {nbytes_per_element}-byte elements; "
            f"expected elements of 1, 2, 4, 8 or 16 bytes and rows of a multiple of 16 bytes",
            hint="use padded(shape, pad), or make the last dimension longer",
        )
    chunks = shape[-1] * nbytes_per_element // 16
    rows = min(64, prod(shape[:-1]))
    table = np.arange(rows * chunks, dtype=np.int64).reshape(rows, chunks)
    candidates = [Swizzle(0, bits, shift) for shift in range(3, 4 + chunks.bit_length()) for bits in range(4)]
    best = min(candidates, key=lambda swizzle: _chunk_conflicts(table ^ ((table & swizzle.mask) >> swizzle.shift)))
    return row_major(shape).swizzled((16 // nbytes_per_element).bit_length() - 1, best.bits, best.shift)


def _chunk_conflicts(chunks: npt.NDArray[np.int64]) -> int:
    """Bank conflicts of eight lanes that read 16-byte chunks down a column (as ldmatrix does) or in row-major order."""
    conflicts = 0
    for lines in (chunks.T, chunks.reshape(1, -1)):
        for start in range(0, lines.shape[1], 8):
            banks = np.sort(lines[:, start : start + 8] % 8, axis=1)
            conflicts += int(np.count_nonzero(banks[:, 1:] == banks[:, :-1]))
    return conflicts
