"""Inverses: from an index of the tile to the thread and slot that hold it; from an address to the index stored there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilus.layout.digits import Term
from tilus.layout.errors import LayoutError
from tilus.layout.swizzle import Swizzle


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


@dataclass(frozen=True)
class AddressInverse:
    """address -> index, for a layout that gives no two elements one address.

    It is a left inverse: `inverse(layout(index)) == index`. With a compact layout it is also a right one; otherwise it refuses
    addresses where no element is. terms: for each dimension, as `SharedLayout.terms`.
    """

    shape: tuple[int, ...]
    terms: tuple[tuple[Term, ...], ...]
    origin: int
    swizzle: Swizzle | None

    def __call__(self, address: int) -> tuple[int, ...]:
        linear = (address if self.swizzle is None else self.swizzle.invert(address)) - self.origin
        ordered = sorted((t for dim in self.terms for t in dim), key=lambda t: -t.stride)
        values = _decoded(linear, ordered)
        if values is None:
            raise LayoutError(f"no element of the tile of shape {self.shape} is at address {address}")
        index = [0] * len(self.shape)
        for value, term in zip(values, ordered):
            index[term.dim or 0] += value * term.weight
        return tuple(index)


def _decoded(rest: int, terms: Sequence[Term]) -> list[int] | None:
    """Digit values with `sum(value * stride) == rest`, strides falling; more than one value of a digit is tried only
    where smaller strides reach across a larger one."""
    if not terms:
        return [] if rest == 0 else None
    first, others = terms[0], terms[1:]
    reach = sum((term.size - 1) * term.stride for term in others)
    lowest = max(0, -((reach - rest) // first.stride))
    for value in range(lowest, min(first.size - 1, rest // first.stride) + 1):
        values = _decoded(rest - value * first.stride, others)
        if values is not None:
            return [value, *values]
    return None
