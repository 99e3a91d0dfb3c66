"""Scalars that depend on the block's place in the grid by a linear formula.

Most offsets in kernels are such scalars. Kept as a formula they need no arrays: arithmetic, bounds and the strides of a
block's window into memory are a few Python integers.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]
Extents = tuple[int, int, int]

# The value of a scalar: a Python int or bool, or a float32, where it is the same in all blocks; otherwise one value for
# each block: a formula, or an array [gx, gy, gz] of int64, bool or float32 (axes of size 1 where uniform).
Scalar = Any


class Affine:
    """The integer base + steps[0] * x + steps[1] * y + steps[2] * z of block (x, y, z); immutable.

    extents: how many blocks there are along each axis. A step is 0 where the extent is 1; some step is not 0.
    """

    __slots__ = ("base", "extents", "steps")
    __array_ufunc__ = None  # numpy arrays leave arithmetic with an Affine to the methods below

    def __init__(self, base: int, steps: Extents, extents: Extents) -> None:
        self.base = base
        self.steps = steps
        self.extents = extents

    def __repr__(self) -> str:
        return f"Affine({self.base}, {self.steps}, {self.extents})"

    def array(self) -> Array:
        """The values, int64, shape [gx, gy, gz] with size 1 along axes of step 0."""
        value = np.full((1, 1, 1), self.base, np.int64)
        for step, index in zip(self.steps, block_indices(self.extents), strict=True):
            if step:
                value = value + step * index
        return value

    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest value."""
        low = high = self.base
        for step, extent in zip(self.steps, self.extents, strict=True):
            if step > 0:
                high += step * (extent - 1)
            elif step < 0:
                low += step * (extent - 1)
        return low, high

    def part(self, axis: int, first: int, extent: int) -> int | Affine:
        """The values in blocks `first` to `first + extent` along an axis."""
        steps, extents = list(self.steps), list(self.extents)
        base = self.base + steps[axis] * first
        extents[axis] = extent
        steps[axis] = steps[axis] if extent > 1 else 0
        return _affine(base, (steps[0], steps[1], steps[2]), (extents[0], extents[1], extents[2]))

    def __add__(self, other: Scalar) -> Scalar:
        if isinstance(other, int):
            return Affine(self.base + other, self.steps, self.extents)
        if isinstance(other, Affine):
            a, b = self.steps, other.steps
            return _affine(self.base + other.base, (a[0] + b[0], a[1] + b[1], a[2] + b[2]), self.extents)
        return self.array() + other

    __radd__ = __add__

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Scalar) -> Scalar:
        return self + -other

    def __rsub__(self, other: Scalar) -> Scalar:
        return self * -1 + other

    def __mul__(self, other: Scalar) -> Scalar:
        if isinstance(other, int):
            a = self.steps
            return _affine(self.base * other, (a[0] * other, a[1] * other, a[2] * other), self.extents)
        return self.array() * (other.array() if isinstance(other, Affine) else other)

    __rmul__ = __mul__


def _affine(base: int, steps: Extents, extents: Extents) -> int | Affine:
    return Affine(base, steps, extents) if any(steps) else base


@functools.lru_cache(maxsize=256)
def block_indices(extents: Extents) -> tuple[Array, Array, Array]:
    """The x, y and z index of every block: shapes [gx, 1, 1], [1, gy, 1], [1, 1, gz], int64."""
    x, y, z = (np.arange(extent, dtype=np.int64) for extent in extents)
    return x.reshape(-1, 1, 1), y.reshape(1, -1, 1), z.reshape(1, 1, -1)


def block_index(axis: int, first: int, extents: Extents) -> int | Affine:
    """first + index of the block along `axis`."""
    if extents[axis] == 1:
        return first
    return Affine(first, tuple(int(a == axis) for a in range(3)), extents)  # pyright: ignore[reportArgumentType]


def to_array(value: Scalar) -> Array:
    """The value as an array [gx, gy, gz] with axes of size 1 where uniform."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Affine):
        return value.array()
    return np.asarray(value).reshape(1, 1, 1)


def settle(array: Array, extents: Extents) -> Scalar:
    """The simplest scalar with the values of `array`: uniform if all are equal, a formula if they follow one."""
    if array.size == 1:
        item = array.item()
        return np.float32(item) if array.dtype.kind == "f" else item
    if array.dtype.kind == "b":
        return settle_mask(array)
    if array.dtype.kind == "f":
        return array
    array = array.astype(np.int64, copy=False)
    base = int(array[0, 0, 0])
    steps = tuple(
        0 if size == 1 else int(array[tuple(int(a == axis) for a in range(3))]) - base
        for axis, size in enumerate(array.shape)
    )
    formula = _affine(base, steps, extents)  # pyright: ignore[reportArgumentType]
    return formula if bool((array == to_array(formula)).all()) else array


def settle_mask(mask: BoolArray) -> bool | BoolArray:
    """True or False where a mask is the same for all blocks."""
    if mask.all():
        return True
    return mask if mask.any() else False
