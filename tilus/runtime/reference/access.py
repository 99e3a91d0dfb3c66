"""Tiles of strided views: where they lie, whether they fit, and how to read, write and update them in all blocks.

Blocks count in the order of the axes x, y, z with z fastest: where several blocks write an element the last one wins,
and atomic updates happen in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.runtime.reference.affine import Affine, Array, BoolArray, Extents, Scalar, to_array
from tilus.runtime.reference.buffer import Buffer, IndexArray, distinct
from tilus.runtime.reference.mask import Mask


@dataclass(frozen=True, slots=True)
class View:
    """Element (i0, i1, ...) is element base + sum(i * stride) of `buffer`. Scalars may differ from block to block."""

    name: str
    buffer: Buffer
    base: Scalar
    shape: tuple[Scalar, ...]
    strides: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of a view, in each block: it starts at `offsets` (one per dimension) and extends along `dims`.

    mask: the blocks that access it. first: the place of block (0, 0, 0) in the grid, for messages.
    """

    offsets: Sequence[Scalar]
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    checked: bool
    mask: Mask
    first: Extents


@dataclass(slots=True)
class Window:
    """The part of a tile inside of its view, when that is one box in all active blocks.

    start: index in the buffer of the box's first element. box: the box in the tile, None when it is all of it.
    """

    start: Scalar
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[slice, ...] | None = None


def find_window(view: View, tile: Tile) -> Window | None:
    """The window of a tile; None when there is none, or it is easier to treat its elements one by one."""
    shape = tile.shape
    spans = [0] * len(tile.offsets)
    for axis, dim in enumerate(tile.dims):
        spans[dim] += shape[axis] - 1
    start, box = view.base, None
    for dim, offset in enumerate(tile.offsets):
        bound, stride = view.shape[dim], view.strides[dim]
        if type(bound) is not int or type(stride) is not int:
            return None
        low, high, offset = _range(offset, tile.mask)
        if low < 0 or high + spans[dim] >= bound:
            if not tile.checked or low != high or tile.dims.count(dim) != 1:
                return None
            axis = tile.dims.index(dim)
            box = box or [slice(0, size) for size in shape]
            first = min(max(0, -low), shape[axis])
            box[axis] = slice(first, max(first, min(shape[axis], bound - low)))
            offset = low + first
        start = start + (offset * stride if stride != 1 else offset)
    strides = tuple(view.strides[dim] for dim in tile.dims)
    sizes = shape if box is None else tuple(part.stop - part.start for part in box)
    if 0 in sizes:
        return Window(0, sizes, strides, tuple(box) if box else None)
    low, high, start = _range(start, tile.mask)
    for size, stride in zip(sizes, strides, strict=True):
        if stride >= 0:
            high += (size - 1) * stride
        else:
            low += (size - 1) * stride
    if low < 0 or high >= view.buffer.size:
        return None
    return Window(start, sizes, strides, tuple(box) if box else None)


def _range(value: Scalar, mask: Mask) -> tuple[int, int, Scalar]:
    """The least and the greatest value in active blocks, and the values with some active one's in inactive blocks."""
    if type(value) is int:
        return value, value, value
    if mask is True and isinstance(value, Affine):
        return *value.bounds(), value
    array = to_array(value)
    if not isinstance(mask, bool):
        array, active = np.broadcast_arrays(array, mask)
        array = np.where(active, array, array[active][0])
    return int(array.min()), int(array.max()), array


@dataclass(frozen=True, slots=True)
class Cut:
    """A tile in parts of the blocks along one block axis: the blocks inside of the view, and single ones at its edges.

    parts: (first, count, view, tile) of consecutive blocks. separate: whether no two parts share an element.
    """

    axis: int
    parts: list[tuple[int, int, View, Tile]]
    separate: bool


MAX_EDGE_BLOCKS = 4


def _cut(view: View, tile: Tile) -> Cut | None:
    """Cut a checked tile that leaves its view in a few blocks at the ends of a block axis; None where that is not so."""
    places = (view.base, *tile.offsets)
    if not tile.checked or tile.mask is not True or any(isinstance(place, np.ndarray) for place in places):
        return None
    for dim, offset in enumerate(tile.offsets):
        bound = view.shape[dim]
        span = sum(size - 1 for size, d in zip(tile.shape, tile.dims, strict=True) if d == dim)
        if not isinstance(offset, Affine) or type(bound) is not int or sum(map(bool, offset.steps)) != 1:
            continue
        axis = next(a for a in range(3) if offset.steps[a])
        step, extent = offset.steps[axis], offset.extents[axis]
        inside = [i for i in range(extent) if 0 <= offset.base + step * i < bound - span]
        if not extent - MAX_EDGE_BLOCKS <= len(inside) < extent:
            continue
        ranges = [(i, 1) for i in range(extent) if i not in inside] + ([(inside[0], len(inside))] if inside else [])
        parts = [(first, count, *_part(view, tile, axis, first, count)) for first, count in sorted(ranges)]
        return Cut(axis, parts, abs(step) > span and distinct(view.shape, view.strides))
    return None


def _part(view: View, tile: Tile, axis: int, first: int, count: int) -> tuple[View, Tile]:
    """The tile in blocks `first` to `first + count` along a block axis."""

    def part(place: int | Affine) -> int | Affine:
        return place.part(axis, first, count) if isinstance(place, Affine) else place

    offsets = tuple(part(offset) for offset in tile.offsets)
    return replace(view, base=part(view.base)), replace(tile, offsets=offsets)


def _read_parts(view: View, tile: Tile, cut: Cut) -> Array:
    values = [(first, count, read(place, part)) for first, count, place, part in cut.parts]
    sizes = [max(value.shape[axis] for _, _, value in values) for axis in range(3)]
    sizes[cut.axis] = sum(count for _, count, _ in values)
    whole = np.empty((*sizes, *tile.shape), view.buffer.dtype.compute)
    for first, count, value in values:
        whole[_blocks(cut.axis, first, count)] = value
    return whole


def _blocks(axis: int, first: int, count: int) -> tuple[slice, ...]:
    """The index of `count` blocks along a block axis."""
    return (slice(None),) * axis + (slice(first, first + count),)


def read(view: View, tile: Tile) -> Array:
    """Values [gx, gy, gz, *shape] (block axes of size 1 where uniform).

    Elements outside of the view are zero; those of inactive blocks are anything.
    """
    window = find_window(view, tile)
    if window is not None:
        values = _read_window(view, tile, window)
        return _read_elements(view, tile) if values is None else values
    cut = _cut(view, tile)
    return _read_elements(view, tile) if cut is None else _read_parts(view, tile, cut)


def _read_window(view: View, tile: Tile, window: Window) -> Array | None:
    buffer, start = view.buffer, window.start
    if 0 in window.sizes:
        return np.zeros((1, 1, 1, *tile.shape), buffer.dtype.compute)
    if isinstance(start, np.ndarray):
        values = buffer.read_windows(start, window.sizes, window.strides)
    else:
        base, sizes, strides = _block_axes(start)
        values = buffer.read_window(base, sizes + window.sizes, strides + window.strides)
    if values is None or window.box is None:
        return values
    whole = np.zeros(values.shape[:3] + tile.shape, values.dtype)
    whole[:, :, :, *window.box] = values
    return whole


def _block_axes(start: int | Affine) -> tuple[int, Extents, Extents]:
    """Where block (0, 0, 0) starts, and sizes and strides of the block axes; size 1 where uniform."""
    if isinstance(start, int):
        return start, (1, 1, 1), (0, 0, 0)
    a, b, c = start.steps
    x, y, z = start.extents
    return start.base, (x if a else 1, y if b else 1, z if c else 1), (a, b, c)


def _read_elements(view: View, tile: Tile) -> Array:
    buffer = view.buffer
    indices, wanted = elements(view, tile, "load")
    if not buffer.size:
        return np.zeros(wanted.shape, buffer.dtype.compute)
    values = buffer.read(np.where(wanted, indices, 0))
    return np.where(wanted, values, values.dtype.type(0))


def elements(view: View, tile: Tile, what: str) -> tuple[IndexArray, BoolArray]:
    """The index of each element in the buffer, and which are inside of the view in an active block.

    Raises: TilusError for an access outside of an unchecked view, or of the buffer.
    """
    ones = (1,) * len(tile.shape)
    indices = _widen(view.base, ones)
    active = _widen(tile.mask, ones)
    wanted = np.broadcast_to(active, (*active.shape[:3], *tile.shape))
    for dim, offset in enumerate(tile.offsets):
        position = _widen(offset, ones)
        for axis, size in enumerate(tile.shape):
            if tile.dims[axis] == dim:
                position = position + np.arange(size).reshape((-1, *ones[axis + 1 :]))
        bound = _widen(view.shape[dim], ones)
        inside = (position >= 0) & (position < bound)
        if not tile.checked and not inside.all():
            _refuse(view, tile, what, dim, position, bound, wanted & ~inside)
        wanted = wanted & inside
        indices = indices + position * _widen(view.strides[dim], ones)
    outside = wanted & ((indices < 0) | (indices >= view.buffer.size))
    if outside.any():
        _refuse(view, tile, what, None, indices, np.asarray(view.buffer.size), outside)
    return indices, wanted


def _widen(value: Scalar, ones: tuple[int, ...]) -> Array:
    array = to_array(value)
    return array.reshape(array.shape + ones)


def _refuse(view: View, tile: Tile, what: str, dim: int | None, position: Array, bound: Array, bad: BoolArray) -> None:
    """Raise for the first of the accesses in `bad`, if there is one."""
    if not bad.any():
        return
    bad, position, bound = np.broadcast_arrays(bad, position, bound)
    at = np.unravel_index(int(bad.argmax()), bad.shape)
    where = f"{what} of {view.name} in block {block_of(tile, at)}, tile element {list(map(int, at[3:]))}"
    if dim is None:
        raise TilusError(
            f"{where}: element {position[at]} of the memory behind it, expected 0 <= element < {bound[at]}",
            hint="the view's shape and strides reach outside of the array that was passed",
        )
    raise TilusError(
        f"{where}: index {position[at]} along dimension {dim}, expected 0 <= index < {bound[at]}",
        hint="use a checked access, or do not start a tile where it does not fit",
    )


def block_of(tile: Tile, at: Sequence[Any]) -> Extents:
    """The block of the grid that an index [x, y, z, ...] belongs to."""
    x, y, z = (int(i) + first for i, first in zip(at[:3], tile.first, strict=True))
    return x, y, z


def write(view: View, tile: Tile, values: Array) -> None:
    """Write values [gx, gy, gz, *shape] (block axes of size 1 where uniform); nothing outside or in inactive blocks."""
    if tile.mask is True:
        window = find_window(view, tile)
        if window is not None and _write_window(view, window, values):
            return
        cut = _cut(view, tile) if window is None else None
        if cut is not None and cut.separate:
            for first, count, place, part in cut.parts:
                write(place, part, values[_blocks(cut.axis, first, count)] if values.shape[cut.axis] > 1 else values)
            return
    indices, wanted = elements(view, tile, "store")
    indices, wanted, values = np.broadcast_arrays(indices, wanted, values)
    view.buffer.write(indices[wanted], values[wanted])


def _write_window(view: View, window: Window, values: Array) -> bool:
    if 0 in window.sizes:
        return True
    if isinstance(window.start, np.ndarray):
        return False
    start, sizes, strides = _block_axes(window.start)
    sizes, strides = sizes + window.sizes, strides + window.strides
    if not distinct(sizes, strides):
        return False
    # Along a block axis where all write the same place, the last block's values stay.
    last = tuple(slice(-1, None) if size == 1 else slice(None) for size in sizes[:3])
    values = values[last] if window.box is None else values[(*last, *window.box)]
    return view.buffer.write_window(start, sizes, strides, values)


def update(view: View, tile: Tile, values: Array, op: str, extents: Extents, dtype: DataType) -> Array:
    """Atomic read-modify-write, block after block. Results are rounded to `dtype`.

    Returns: the old values, shape [*extents, *shape]; 0 where nothing was done.
    """
    indices, wanted = elements(view, tile, "atomic update")
    buffer, full = view.buffer, (*extents, *tile.shape)
    done = np.broadcast_to(wanted, full).reshape(-1)
    targets = np.broadcast_to(indices, full).reshape(-1)[done]
    operands = np.broadcast_to(values, full).reshape(-1)[done]
    found = np.zeros(targets.shape, buffer.dtype.compute)
    apply = _atomic(op, dtype)
    for turn in _turns(targets):
        old = buffer.read(targets[turn])
        buffer.write(targets[turn], apply(old, operands[turn]))
        found[turn] = old
    result = np.zeros(done.shape, buffer.dtype.compute)
    result[done] = found
    return result.reshape(full)


def _turns(targets: IndexArray) -> list[IndexArray]:
    """Positions in `targets`, split so that no turn has a target twice and equal targets keep their order."""
    if not targets.size:
        return []
    order = np.argsort(targets, kind="stable")
    ordered = targets[order]
    position = np.arange(ordered.size)
    is_first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    turn = position - np.maximum.accumulate(np.where(is_first, position, 0))
    by_turn = np.argsort(turn, kind="stable")
    return np.split(order[by_turn], np.cumsum(np.bincount(turn))[:-1])


_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}  # fmt: skip


def _atomic(op: str, dtype: DataType) -> Callable[[Any, Any], Any]:
    if op not in _ATOMICS:
        raise TilusError(f"atomic operation {op!r}, expected one of {', '.join(_ATOMICS)}")
    function = _ATOMICS[op]
    return (lambda old, new: dtype.round(function(old, new))) if dtype.is_float else function
