"""The inverse of a register layout: from an index of the tile to the thread and slot that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilus.layout.digits import Term
from tilus.layout.errors import LayoutError


@dataclass(frozen=True)
class Inverse:
    """index -> (thread, slot). Each term adds `((index[dim] // weight) % size) * stride` to the thread or the slot.

    It is a right inverse: `layout(*inverse(index)) == index`. With a layout without replication it is also a left one.
    """

    shape: tuple[int, ...]
    thread_terms: tuple[Term, ...]
    local_terms: tuple[Term, ...]

    def __call__(self, index: Sequence[int]) -> tuple[int, int]:
        return self.thread(index), self.local(index)

    def thread(self, index: Sequence[int]) -> int:
        """The (first) thread that holds the element."""
        return self._read(index, self.thread_terms)

    def local(self, index: Sequence[int]) -> int:
        """The (first) slot that holds the element."""
        return self._read(index, self.local_terms)

    def _read(self, index: Sequence[int], terms: tuple[Term, ...]) -> int:
        if len(index) != len(self.shape) or not all(0 <= x < extent for x, extent in zip(index, self.shape)):
            raise LayoutError(f"index {tuple(index)} is not in a tile of shape {self.shape}")
        return sum(index[t.dim] // t.weight % t.size * t.stride for t in terms if t.dim is not None)
