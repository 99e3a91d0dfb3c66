"""Layouts that a shared tensor may get: every order of its dims, and each of them swizzled, tiled or padded.

From simple to elaborate, which is also the order in which equal costs are decided (see `transforms.layout_shared`): row-major,
other orders, XOR swizzles, core matrices of 8 rows of 16 bytes, padded rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from math import lcm, prod
from typing import Literal

from tilus.layout.arrangements import row_major, strided
from tilus.layout.shared import SharedLayout

CHUNKS_NBYTES = (16, 8, 4)  # what a swizzle keeps together, and what rows are padded by
LINE_NBITS = 1024  # all banks once
MAX_PERMUTED_RANK = 3

Kind = Literal["row-major", "other order", "prescribed", "swizzled", "core matrices", "padded"]
PLAIN_KINDS: tuple[Kind, ...] = ("row-major", "other order")
ELABORATE_KINDS: tuple[Kind, ...] = ("swizzled", "core matrices", "padded")


def orders(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Orders of the dims with more than one index, outermost first: row-major, then others.

    Up to three such dims: all orders; for more, the row-major order with one dim moved to the end.
    """
    matter = tuple(d for d, extent in enumerate(shape) if extent > 1)
    if len(matter) <= MAX_PERMUTED_RANK:
        return list(permutations(matter))
    return [(*(d for d in matter if d != inner), inner) for inner in reversed(matter)]


def plain(shape: Sequence[int], order: Sequence[int]) -> SharedLayout:
    """Compact, with dims from the outermost to the contiguous one in this order."""
    return _of_shape(row_major([shape[d] for d in order]), shape, order)


def roomy(shape: Sequence[int], order: Sequence[int]) -> SharedLayout:
    """This order with every run of the contiguous dim so aligned that no access could be wider. Not a candidate."""
    if not order:
        return plain(shape, order)
    extents = [shape[d] for d in order]
    return _of_shape(_pitched(extents, -(-extents[-1] // LINE_NBITS) * LINE_NBITS), shape, order)


def variants(kind: Kind, shape: Sequence[int], nbits: int, order: Sequence[int]) -> Iterator[SharedLayout]:
    """The layouts of an elaborate kind in which elements of `nbits` bits have this order."""
    if not order:
        return
    make = {"swizzled": _swizzles, "core matrices": _core_matrices, "padded": _paddings}
    for layout in make[kind]([shape[d] for d in order], nbits):
        yield _of_shape(layout, shape, order)


def _of_shape(layout: SharedLayout, shape: Sequence[int], order: Sequence[int]) -> SharedLayout:
    """A layout of the dims `order` as one of all dims; those that are left out have one index."""
    layout = layout.permute([list(order).index(d) for d in sorted(order)])
    for d, extent in enumerate(shape):
        if extent == 1:
            layout = layout.unsqueeze(d)
    return layout


def _swizzles(extents: Sequence[int], nbits: int) -> Iterator[SharedLayout]:
    """Swizzles of chunks of 16, 8 and 4 bytes (for 3-, 5-, 6- and 7-bit elements: the nearest of whole bytes below).

    Bits of the place in a row are XORed with bits of the address beyond one line of all banks: bits inside of a line only
    rename banks. First those that permute the most chunks of a row by the lowest such bits: these are the modes of TMA.
    """
    layout = row_major(extents)
    row = (extents[-1] - 1).bit_length()
    line = (LINE_NBITS // nbits).bit_length() - 1
    top = (layout.size - 1).bit_length()
    for nbytes in CHUNKS_NBYTES:
        base = (8 * nbytes // nbits).bit_length() - 1
        if base < 0 or nbits << base & 7:
            continue
        for bits in range(min(line, row) - base, 0, -1):
            for source in range(max(line, base + bits), min(top, max(line, row) + 4)):
                swizzled = layout.swizzled(base, bits, source - base)
                if swizzled.swizzle is not None:
                    yield swizzled


def _core_matrices(extents: Sequence[int], nbits: int) -> Iterator[SharedLayout]:
    """Columns of 16 bytes one after another, so that eight rows of one are 128 consecutive bytes."""
    width = 128 // nbits
    *outer, inner = extents
    if 128 % nbits or width >= inner or inner % width or prod(outer) < 8:
        return
    *buffers, rows = outer
    strides = [inner * prod(outer[d + 1 :]) for d in range(len(buffers))]
    yield strided((*buffers, rows, (inner // width, width)), (*strides, width, (width * rows, 1)))


def _paddings(extents: Sequence[int], nbits: int) -> Iterator[SharedLayout]:
    """Rows padded to a multiple of 4, 8 or 16 bytes, and by that much more: the least padding first."""
    *outer, inner = extents
    if prod(outer) == 1:
        return
    pitches: set[int] = set()
    for nbytes in CHUNKS_NBYTES:
        unit = lcm(8 * nbytes, nbits) // nbits
        aligned = -(-inner // unit) * unit
        pitches |= {aligned, aligned + unit}
    for pitch in sorted(pitches - {inner}):
        yield _pitched(extents, pitch)


def _pitched(extents: Sequence[int], pitch: int) -> SharedLayout:
    """Rows that start `pitch` elements after one another."""
    *outer, _ = extents
    return strided(extents, (*(pitch * prod(outer[d + 1 :]) for d in range(len(outer))), 1))
