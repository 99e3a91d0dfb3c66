"""Shared memory of the blocks that run: an array per tensor, and which of its elements were ever written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tilus.dtypes import DTYPES, DataType, boolean, f32
from tilus.errors import TilusError
from tilus.ir.tensor import SharedTensor
from tilus.runtime.reference.access import Tile, View, block_of, elements, read, update, write
from tilus.runtime.reference.affine import Affine, Array, Extents, Scalar, to_array
from tilus.runtime.reference.buffer import Buffer


class SharedMemory:
    """A shared tensor in all blocks. An element that was never written holds nothing, and reading it is an error."""

    def __init__(self, tensor: SharedTensor, extents: Extents) -> None:
        self._tensor = tensor
        self._extents = extents
        self._data = _Blocks(tensor, _value_dtype(tensor.dtype), extents)
        self._written = _Blocks(tensor, boolean, extents)
        self._complete = False

    def load(self, tile: Tile) -> Array:
        self._require_written(tile)
        return read(self._data.view, tile)

    def store(self, tile: Tile, values: Array) -> None:
        self._data.separate(_varying([values, *tile.offsets, tile.mask]))
        write(self._data.view, tile, values)
        if not self._complete:
            self._written.separate(_varying([*tile.offsets, tile.mask]))
            write(self._written.view, tile, np.ones((1, 1, 1, *tile.shape), np.bool_))
            self._complete = bool(self._written.view.buffer.flat.all())

    def update(self, tile: Tile, values: Array, op: str) -> Array:
        self._require_written(tile)
        self._data.separate((True, True, True))
        return update(self._data.view, tile, values, op, self._extents, self._tensor.dtype)

    def _require_written(self, tile: Tile) -> None:
        """Raise unless all elements of a tile inside of the tensor were written in the blocks that read them."""
        if self._complete:
            return
        written = read(self._written.view, tile)
        if written.all():
            return
        _, wanted = elements(self._written.view, tile, "load")
        unknown = wanted & ~written
        if unknown.any():
            at = np.unravel_index(int(unknown.argmax()), unknown.shape)
            raise TilusError(
                f"load of shared tensor {self._tensor.name} in block {block_of(tile, at)}: tile element "
                f"{list(map(int, at[3:]))} was never written, expected a store before",
                hint="store the whole tile first, or wait for the copy that fills it",
            )


class _Blocks:
    """An array [gx, gy, gz, *shape]; block axes have size 1 as long as all blocks along them hold the same."""

    def __init__(self, tensor: SharedTensor, dtype: DataType, extents: Extents) -> None:
        self._tensor, self._extents = tensor, extents
        self._axes: Extents = (1, 1, 1)
        self._fill(dtype, np.zeros((1, 1, 1, *tensor.shape), dtype.compute))

    def separate(self, varying: tuple[bool, bool, bool]) -> None:
        """Give each block along the varying axes an array of its own."""
        x, y, z = (max(n, e if v else 1) for n, e, v in zip(self._axes, self._extents, varying, strict=True))
        if (x, y, z) != self._axes:
            buffer = self.view.buffer
            old = buffer.flat.reshape(*self._axes, *self._tensor.shape)
            self._axes = (x, y, z)
            self._fill(buffer.dtype, np.broadcast_to(old, (x, y, z, *self._tensor.shape)).copy())

    def _fill(self, dtype: DataType, array: Array) -> None:
        buffer = Buffer(dtype, array.reshape(-1), array.size, frozen=False)
        shape = self._tensor.shape
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        _, y, z = self._axes
        size = math.prod(shape)
        steps = (size * y * z, size * z, size)
        own = tuple(step if n > 1 else 0 for step, n in zip(steps, self._axes, strict=True))
        base = Affine(0, own, self._extents) if any(own) else 0  # pyright: ignore[reportArgumentType]
        self.view = View(self._tensor.name, buffer, base, shape, strides)


def _value_dtype(dtype: DataType) -> DataType:
    """The type of a buffer that holds values of `dtype` as they are computed with."""
    if dtype == boolean:
        return boolean
    return f32 if dtype.is_float else DTYPES[dtype.compute.name]


def _varying(scalars: Sequence[Scalar]) -> tuple[bool, bool, bool]:
    """Along which block axes some of the values (or arrays of values) differ."""
    x = y = z = False
    for scalar in scalars:
        if isinstance(scalar, (Affine, np.ndarray)):
            sizes = to_array(scalar).shape
            x, y, z = x or sizes[0] > 1, y or sizes[1] > 1, z or sizes[2] > 1
    return x, y, z
