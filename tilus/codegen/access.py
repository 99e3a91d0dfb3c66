"""How a register tile meets memory: the widest vector in which every thread can move its slots.

A vector is `size` consecutive slots, a power of two, that for every thread and every multiple of `size` lie at consecutive
elements of memory, start at a multiple of `size` elements, and are all inside of the tensor or all outside. Its bits move in
units of a power of two, 128 bits at most: a vector of f16 is one unit, one of 32 3-bit elements three units of 32 bits.
The answer is exact for layouts, strides and swizzles; of run-time values only a divisor and bounds are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType
from tilus.ir.expr import Const, Expr, as_expr
from tilus.ir.ranges import bounds, divisor
from tilus.ir.tensor import GlobalTensor, SharedTensor
from tilus.layout import Digit, RegisterLayout, SharedLayout
from tilus.layout import digits as _digits

MAX_VECTOR_NBITS = 128

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vector:
    """One access per thread: local slots `slot .. slot + size` at consecutive elements of memory."""

    slot: int
    size: int


def vectors(layout: RegisterLayout, size: int) -> list[Vector]:
    return [Vector(slot, size) for slot in range(0, layout.num_locals, size)]


def unit_nbits(dtype: DataType, size: int) -> int:
    """The bits that one instruction moves of a vector of `size` elements."""
    nbits = size * dtype.nbits
    return min(nbits & -nbits, MAX_VECTOR_NBITS)


def _sizes(dtype: DataType, num_locals: int, alignment_nbytes: int) -> Iterator[int]:
    """The sizes to try, ascending from 2: what divides the slots and has units no wider than 16 bytes and the alignment."""
    unit = dtype.nbits & -dtype.nbits
    size = 2
    # A boolean becomes a predicate, so each byte moves by itself.
    while (
        dtype.kind != "bool" and num_locals % size == 0 and size * unit <= min(MAX_VECTOR_NBITS, 8 * alignment_nbytes)
    ):
        yield size
        size *= 2


def may_leave(offset: Expr, size: int, bound: Expr) -> tuple[bool, bool]:
    """Whether indices offset .. offset + size may be negative, and whether they may reach `bound`."""
    lower, upper = bounds(offset)
    limit = bounds(bound)[0]
    return not (lower is not None and lower >= 0), not (
        upper is not None and limit is not None and upper + size <= limit
    )


def global_vector_size(
    tensor: GlobalTensor, layout: RegisterLayout, offsets: Sequence[Expr], dims: Sequence[int], checked: bool
) -> int:
    """Elements of the widest vector for a tile of a global tensor whose axis a runs along dim `dims[a]` from `offsets` on.

    checked: whether elements outside of the tensor are masked.
    """
    strides = [int(s.value) if isinstance(s, Const) else None for s in tensor.strides]
    fixed = [divisor(tensor.offset), *(divisor(o) * divisor(s) for o, s in zip(offsets, tensor.strides, strict=True))]

    def in_memory(digits: Sequence[Digit]) -> tuple[Digit, ...]:
        """Digits that count elements of memory (dim 0), or, where a stride is not known, indices of tensor dim d (dim d + 1)."""
        places: list[Digit] = []
        for digit in digits:
            stride = None if digit.dim is None else strides[dims[digit.dim]]
            if digit.dim is None:
                places.append(digit)
            elif stride is None:
                places.append(Digit(digit.size, dims[digit.dim] + 1, digit.weight))
            else:
                places.append(Digit(digit.size, 0, digit.weight * stride))
        return _digits.canonical(places)

    def step(digit: Digit) -> int:
        """What divides the element offsets that a digit contributes."""
        return digit.weight * (divisor(tensor.strides[digit.dim - 1]) if digit.dim else 1)

    threads, slots = in_memory(layout.thread_digits), in_memory(layout.local_digits)
    widest = 1
    for size in _sizes(tensor.dtype, layout.num_locals, tensor.alignment):
        parts = _digits.split(slots, size)
        if parts is None or _digits.canonical(parts[1]) != (Digit(size, 0, 1),):
            break
        if math.gcd(*fixed, *map(step, threads), *map(step, parts[0])) % size:
            break
        if checked and not _masked_alike(tensor, layout, offsets, dims, size):
            break
        widest = size
    return widest


def _masked_alike(
    tensor: GlobalTensor, layout: RegisterLayout, offsets: Sequence[Expr], dims: Sequence[int], size: int
) -> bool:
    """Whether each vector lies inside of the tensor as a whole, or outside as a whole."""
    threads = _digits.index_table(layout.thread_digits, layout.rank)
    slots = _digits.index_table(layout.local_digits, layout.rank).reshape(-1, size, layout.rank)
    for axis, d in enumerate(dims):
        first, last = slots[:, :, axis].min(axis=1), slots[:, :, axis].max(axis=1)
        if (first == last).all():
            continue
        below, above = may_leave(offsets[d], layout.shape[axis], tensor.shape[d])
        starts = threads[:, axis, None] + first
        for may, edge in ((below, as_expr(0)), (above, tensor.shape[d])):
            if may and not _never_split(starts, last - first + 1, offsets[d], edge):
                return False
    return True


def _never_split(starts: Ints, extents: Ints, offset: Expr, edge: Expr) -> bool:
    """Whether no run of indices offset + start .. + extent has `edge` in its middle, whatever the run-time values are."""
    known = sum(sign * int(e.value) for sign, e in ((1, edge), (-1, offset)) if isinstance(e, Const))
    period = math.gcd(*(divisor(e) for e in (edge, offset) if not isinstance(e, Const)))
    before = known - starts  # indices in front of the edge, up to multiples of the period
    if period == 0:
        return bool(((before <= 0) | (before >= extents)).all())
    return bool(((before - 1) % period + 1 >= extents).all())


def shared_vector_size(
    tensor: SharedTensor, layout: RegisterLayout, offsets: Sequence[Expr], dims: Sequence[int]
) -> int:
    """Elements of the widest vector for a tile of a shared tensor, from its strides and swizzle; the tile lies inside."""
    memory = tensor.layout
    if memory is None:
        raise ValueError(f"shared tensor {tensor.name} has no layout")
    extents = [layout.shape[dims.index(d)] if d in dims else 1 for d in range(tensor.rank)]
    starts = [_starts(*known) for known in zip(offsets, memory.shape, extents, strict=True)]
    return vector_size_at(memory, tensor.dtype, layout, starts, dims)


def vector_size_at(
    memory: SharedLayout, dtype: DataType, layout: RegisterLayout, starts: Sequence[Ints], dims: Sequence[int]
) -> int:
    """The same for a tile that may start at any combination of `starts`, the indices of each dim of the memory."""
    widest = 1
    if not all(len(start) for start in starts):
        return widest
    places = _shared_places(memory, layout, starts, dims)
    for size in _sizes(dtype, layout.num_locals, MAX_VECTOR_NBITS // 8):
        groups = [place.reshape(len(place), -1, size) for place in places]
        if not (_consecutive(groups, size) and _unswizzled(memory, groups, size)):
            break
        widest = size
    return widest


def _shared_places(
    memory: SharedLayout, layout: RegisterLayout, starts: Sequence[Ints], dims: Sequence[int]
) -> list[Ints]:
    """For each dim of a shared tensor, what its index adds to the address before the swizzle: [first, slot].

    A first index is where the tile starts plus the part that the thread decides; those of different dims are independent.
    """
    by_thread = _digits.index_table(layout.thread_digits, layout.rank)
    by_slot = _digits.index_table(layout.local_digits, layout.rank)
    result: list[Ints] = []
    for d, (extent, terms) in enumerate(zip(memory.shape, memory.terms, strict=True)):
        x = np.arange(extent, dtype=np.int64)
        address = np.sum([x // t.weight % t.size * t.stride for t in terms], axis=0, dtype=np.int64) + 0 * x
        axis = dims.index(d) if d in dims else None
        threads = np.zeros(1, np.int64) if axis is None else np.unique(by_thread[:, axis])
        slots = np.zeros(layout.num_locals, np.int64) if axis is None else by_slot[:, axis]
        first = np.unique(np.add.outer(starts[d], threads))
        result.append(address[first[:, None] + slots])
    return result


def _starts(offset: Expr, extent: int, tile_extent: int) -> Ints:
    """The values of an offset, as far as they are known, that keep the tile inside."""
    last = extent - tile_extent
    lower, upper = bounds(offset)
    values = np.arange(0, last + 1, divisor(offset) or last + 1, dtype=np.int64)
    if isinstance(offset, Const):
        values = np.array([offset.value], np.int64)
    return values[(values >= max(0, lower or 0)) & (values <= (last if upper is None else min(upper, last)))]


def _consecutive(groups: Sequence[Ints], size: int) -> bool:
    """Whether vectors, [first, vector, element] of each dim, are runs of elements from multiples of `size` on.

    The sum over dims must be the same for all combinations, so each dim's part is the same for all of its first indices.
    """
    runs = [group - group[:, :, :1] for group in groups]
    begins = [group[:, :, 0] for group in groups]
    if any((run != run[:1]).any() for run in runs) or any(((b - b[:1]) % size).any() for b in begins):
        return False
    total: Ints = np.sum([run[0] for run in runs], axis=0)
    return bool((total == np.arange(size)).all()) and not (np.sum([b[0] for b in begins], axis=0) % size).any()


def _unswizzled(memory: SharedLayout, groups: Sequence[Ints], size: int) -> bool:
    """Whether the swizzle moves vectors as a whole: it permutes blocks of 2^base elements, and some of larger ones."""
    swizzle = memory.swizzle
    if swizzle is None or size <= 1 << swizzle.base:
        return True
    if size > 1 << (swizzle.base + swizzle.shift):
        return False
    for vector in range(groups[0].shape[1]):
        addresses = np.zeros(1, np.int64)
        for group in groups:
            addresses = np.unique(np.add.outer(addresses, group[:, vector, 0]))
        if ((addresses & swizzle.mask) >> swizzle.shift & (size - 1)).any():
            return False
    return True
