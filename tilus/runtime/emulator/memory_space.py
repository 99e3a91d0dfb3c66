"""Emulated address spaces: buffers with red zones between them, so that every access outside of a buffer is seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

POISON = 0xFF  # every byte: NaN as f16, bf16, f32 and f64, -1 as an integer


@dataclass(frozen=True)
class Buffer:
    """One allocation: `start` and `nbytes` in the address space, and what to call it in a message."""

    name: str
    start: int
    nbytes: int


class MemorySpace:
    """A range of addresses with buffers in it; `copies` instances of it, one a block, for shared memory.

    base: the address of the first byte. page_nbytes: granularity at which a buffer owns addresses; buffers start at
    page boundaries, and at least one unowned page lies between two of them.
    """

    def __init__(self, base: int, page_nbytes: int, sizes: Sequence[tuple[str, int, int]], copies: int = 1) -> None:
        """sizes: (name, nbytes, alignment) of each buffer, in order."""
        self.base = base
        self.page_shift = page_nbytes.bit_length() - 1
        self.buffers: list[Buffer] = []
        cursor = page_nbytes
        for name, nbytes, align in sizes:
            align = max(align, page_nbytes)
            start = -(-(base + cursor) // align) * align - base
            self.buffers.append(Buffer(name, start, nbytes))
            cursor = -(-(start + nbytes) // page_nbytes) * page_nbytes + page_nbytes
        self.nbytes = cursor + page_nbytes
        self.copies = copies
        self.data = np.full(self.nbytes * copies, POISON, np.uint8)
        self.end_of_page = np.zeros(self.nbytes >> self.page_shift, np.int64)
        for buffer in self.buffers:
            last = -(-(buffer.start + buffer.nbytes) // page_nbytes)
            self.end_of_page[buffer.start >> self.page_shift : last] = buffer.start + buffer.nbytes
        self.views = {size: self.data.view(f"u{size}") for size in (1, 2, 4, 8)}

    def address_of(self, index: int) -> int:
        return self.base + self.buffers[index].start

    def bytes_of(self, index: int, copy: int = 0) -> npt.NDArray[np.uint8]:
        """The content of a buffer, writable."""
        buffer = self.buffers[index]
        start = copy * self.nbytes + buffer.start
        return self.data[start : start + buffer.nbytes]

    def outside(self, offsets: npt.NDArray[np.int64], nbytes: int) -> npt.NDArray[np.bool_]:
        """Which accesses of `nbytes` at these offsets (address minus base) leave their buffer."""
        ends = self.end_of_page.take(offsets >> self.page_shift, mode="clip")
        return (offsets + nbytes > ends) | (offsets < 0)

    def describe(self, address: int) -> str:
        """Where an address lies relative to the nearest buffer."""
        offset = address - self.base
        if not self.buffers:
            return "there is no buffer"
        nearest = min(self.buffers, key=lambda b: max(b.start - offset, offset - (b.start + b.nbytes), 0))
        relative = offset - nearest.start
        return f"nearest buffer: {nearest.name}, {nearest.nbytes} bytes, at byte {relative} of it"
