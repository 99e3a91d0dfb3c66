"""Flat memory of elements of one type, read and written as arrays of values through windows or element indices.

A *window* is a strided view: where a tile lies regularly in memory no index array is made, and where the memory holds
values in their compute type nothing is copied either.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, pack_bits, unpack_bits
from tilus.runtime.reference.affine import Array

IndexArray = npt.NDArray[np.intp]


class Buffer:
    """size elements of `dtype`.

    flat: one-dimensional memory, in `storage_dtype(dtype)`; bytes of a little-endian bit stream for types below 8 bits.
    frozen: nobody writes it during this launch, so that values may share its memory.
    """

    __slots__ = ("_native", "dtype", "flat", "frozen", "itemsize", "size")

    def __init__(self, dtype: DataType, flat: Array, size: int, *, frozen: bool) -> None:
        self.dtype = dtype
        self.flat = flat
        self.size = size
        self.frozen = frozen
        self.itemsize = flat.itemsize
        self._native = dtype.numpy == dtype.compute

    def read_window(self, start: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Array | None:
        """Values of the elements start + sum(index * stride); strides in elements. All must lie inside the buffer.

        Returns: shape `sizes`, not to be modified; None where packed elements do not begin and end at bytes.
        """
        if self.dtype.nbits < 8:
            return self._read_packed(start, sizes, strides)
        itemsize = self.itemsize
        view = np.ndarray(sizes, self.flat.dtype, self.flat, start * itemsize, tuple(n * itemsize for n in strides))
        if self._native:
            return view if self.frozen else view.copy()
        return decode(self.dtype, view)

    def read_windows(self, starts: IndexArray, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Array | None:
        """One window per start. Returns: shape [*starts.shape, *sizes]; None for packed elements."""
        if self.dtype.nbits < 8 or any(n < 0 for n in strides):
            return None
        span = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        itemsize = self.itemsize
        windows = np.ndarray(
            (self.size - span, *sizes), self.flat.dtype, self.flat, 0, (itemsize, *(n * itemsize for n in strides))
        )
        return decode(self.dtype, windows[starts])

    def read(self, indices: IndexArray) -> Array:
        """Values of elements by index. Returns: the shape of `indices`."""
        if self.dtype.nbits >= 8:
            return decode(self.dtype, self.flat.take(indices))
        nbits = self.dtype.nbits
        byte, shift = indices * nbits >> 3, (indices * nbits & 7).astype(np.uint16)
        high = self.flat.take(np.minimum(byte + 1, self.flat.size - 1)).astype(np.uint16) << 8
        codes = (self.flat.take(byte) | high) >> shift & (self.dtype.num_codes - 1)
        return decode(self.dtype, codes.astype(np.uint8))

    def write_window(self, start: int, sizes: tuple[int, ...], strides: tuple[int, ...], values: Array) -> bool:
        """Write values (broadcastable to `sizes`) to distinct elements. Returns: False, undone, for packed ones."""
        if self.dtype.nbits < 8:
            return False
        itemsize = self.itemsize
        view = np.ndarray(sizes, self.flat.dtype, self.flat, start * itemsize, tuple(n * itemsize for n in strides))
        view[...] = encode(self.dtype, values)
        return True

    def write(self, indices: IndexArray, values: Array) -> None:
        """Write values[i] to element indices[i], both one-dimensional; of equal indices the last one counts."""
        codes = encode(self.dtype, values)
        if self.dtype.nbits >= 8:
            self.flat[indices] = codes
        elif indices.size:  # eight elements are whole bytes: unpack the groups of eight that are touched
            nbits, first = self.dtype.nbits, int(indices.min()) // 8
            span = self.flat[first * nbits : (int(indices.max()) // 8 + 1) * nbits]
            unpacked = unpack_bits(span, self.dtype, span.size * 8 // nbits)
            unpacked[indices - first * 8] = codes
            span[...] = pack_bits(unpacked, self.dtype)[: span.size]

    def _read_packed(self, start: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Array | None:
        nbits = self.dtype.nbits
        *outer, last = (n * nbits for n in strides)
        nbytes, rest = divmod(sizes[-1] * nbits, 8)
        if last != nbits or rest or start * nbits % 8 or any(n % 8 for n in outer):
            return None
        view = np.ndarray((*sizes[:-1], nbytes), np.uint8, self.flat, start * nbits // 8, (*(n // 8 for n in outer), 1))
        if 8 % nbits:
            return decode(self.dtype, unpack_bits(view, self.dtype, sizes[-1]))
        return _byte_table(self.dtype).take(view).view(self.dtype.compute)


def storage_dtype(dtype: DataType) -> np.dtype[Any]:
    """The numpy dtype of a buffer's memory."""
    return dtype.numpy or dtype.storage


def decode(dtype: DataType, stored: Array) -> Array:
    """Values of what memory holds; `stored` has `storage_dtype(dtype)`, or codes of a packed type."""
    if dtype.numpy is not None:
        return stored.astype(dtype.compute, copy=False)
    return _value_table(dtype).take(stored) if dtype.is_small else dtype.decode(stored)


def encode(dtype: DataType, values: Array) -> Array:
    """What memory holds for values of `dtype` (exact, so nothing is rounded)."""
    if dtype.numpy is not None:
        return values.astype(dtype.numpy, copy=False)
    return dtype.encode(values)


def distinct(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the indices of a window are all different elements, as is certain when strides exceed smaller spans."""
    span = 0
    for stride, size in sorted((abs(stride), size) for size, stride in zip(sizes, strides, strict=True) if size > 1):
        if stride <= span:
            return False
        span += stride * (size - 1)
    return True


@functools.cache
def _value_table(dtype: DataType) -> Array:
    return dtype.decode(np.arange(dtype.num_codes, dtype=np.uint16).astype(np.uint8))


@functools.cache
def _byte_table(dtype: DataType) -> Array:
    """For each byte the values of its 8 / nbits elements, as one wide integer so that one `take` moves them all."""
    values = _value_table(dtype)[unpack_bits(np.arange(256, dtype=np.uint8)[:, None], dtype, 8 // dtype.nbits)]
    return values.view(np.dtype(f"u{values.shape[1] * values.itemsize}")).reshape(256)


def strided_buffer(dtype: DataType, array: Array, *, frozen: bool) -> tuple[Buffer, int]:
    """The memory that an array of any strides spans, and the index of its first element in it."""
    if array.flags.c_contiguous:
        flat, origin = array.reshape(-1), 0
    else:
        steps = [(size - 1) * (stride // array.itemsize) for size, stride in zip(array.shape, array.strides)]
        origin = -sum(step for step in steps if step < 0)
        lowest = array[tuple(slice(-1, None) if step < 0 else slice(0, 1) for step in steps)] if array.size else array
        span = 1 + sum(map(abs, steps)) if array.size else 0
        flat = np.lib.stride_tricks.as_strided(lowest, (span,), (array.itemsize,))
    if frozen and flat.flags.writeable:
        flat = flat.view()
        flat.flags.writeable = False
    size = flat.size * 8 // dtype.nbits if dtype.nbits < 8 else flat.size
    return Buffer(dtype, flat, size, frozen=frozen), origin


def packed_nbytes(dtype: DataType, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * dtype.nbits // 8)
