"""Mixed-radix digits: what every layout is made of.

A list of digits, outermost first, reads an integer (a thread, a local slot) in mixed radix: the last digit varies
fastest. Each digit adds `value * weight` to one dimension of a logical index, or to none (a replication digit). In a
memory layout it is an index that is read, and the address that is added to, as the only dimension 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from tilus.layout.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Digit:
    """A digit with values 0..size-1 that adds `value * weight` to index[dim]; without a dim it replicates, weight 0."""

    size: int
    dim: int | None
    weight: int


@dataclass(frozen=True, slots=True)
class Term:
    """A digit and its place: `(n // stride) % size` of an integer n belongs to `weight` of dimension `dim`.

    Read from left to right it adds `((n // stride) % size) * weight` to index[dim]; read backwards it adds
    `((index[dim] // weight) % size) * stride` to n. dim None (weight 0) is a replication digit.
    """

    stride: int
    size: int
    dim: int | None
    weight: int


def canonical(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """The shortest list with the same function: no digits of size 1, neighbours that count on are one digit.

    The result is unique. Let f be the function of the list. Its last digit has the weight f(1), and its size is the
    first n with f(n) != n * f(1), since otherwise the digit before it would have been merged; so f determines the last
    digit, and by induction the others.
    """
    merged: list[Digit] = []
    for digit in digits:
        if digit.size == 1:
            continue
        previous = merged[-1] if merged else None
        if previous and previous.dim == digit.dim and previous.weight == digit.weight * digit.size:
            merged[-1] = Digit(previous.size * digit.size, digit.dim, digit.weight)
        else:
            merged.append(digit)
    return tuple(merged)


def terms(digits: Sequence[Digit]) -> tuple[Term, ...]:
    """The digits with their strides, in the same order."""
    result: list[Term] = []
    stride = 1
    for digit in reversed(digits):
        result.append(Term(stride, digit.size, digit.dim, digit.weight))
        stride *= digit.size
    return tuple(reversed(result))


def split(digits: Sequence[Digit], inner_size: int) -> tuple[list[Digit], list[Digit]] | None:
    """Cut a list into (outer, inner) such that the inner list counts to `inner_size`; None where no cut exists.

    On a canonical list None means that no refinement has such a cut.
    """
    outer, inner = list(digits), list[Digit]()
    while inner_size > 1:
        if not outer:
            return None
        digit = outer.pop()
        if inner_size % digit.size == 0:
            inner.append(digit)
            inner_size //= digit.size
        elif digit.size % inner_size == 0:
            inner.append(Digit(inner_size, digit.dim, digit.weight))
            outer.append(Digit(digit.size // inner_size, digit.dim, digit.weight * inner_size))
            inner_size = 1
        else:
            return None
    return outer, inner[::-1]


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The stride of each dimension of a compact row-major array, in elements."""
    return tuple(prod(shape[k + 1 :]) for k in range(len(shape)))


def unravel(digit: Digit, shape: Sequence[int]) -> list[Digit] | None:
    """A digit of the flat row-major index as digits of the dimensions of `shape`, outermost first.

    None where it would straddle two dimensions. Replication stays as it is.
    """
    if digit.dim is None:
        return [digit]
    pieces: list[Digit] = []
    weight, size = digit.weight, digit.size
    for dim, stride in reversed(list(enumerate(row_major_strides(shape)))):
        room = stride * shape[dim]
        if size == 1 or weight >= room:
            continue
        inner = size if weight * size <= room else room // weight
        if weight % stride or size % inner:
            return None
        pieces.append(Digit(inner, dim, weight // stride))
        weight, size = weight * inner, size // inner
    return pieces[::-1]


def index_table(digits: Sequence[Digit], rank: int) -> npt.NDArray[np.int64]:
    """The logical index that each integer contributes: shape [product of the sizes, rank]."""
    counter = np.arange(prod(digit.size for digit in digits), dtype=np.int64)
    table = np.zeros((len(counter), rank), dtype=np.int64)
    for term in terms(digits):
        if term.dim is not None:
            table[:, term.dim] += counter // term.stride % term.size * term.weight
    return table


def fitted(values: npt.NDArray[np.int64]) -> tuple[Digit, ...] | None:
    """The canonical digits with `index_table(digits, rank) == values`; None where there are none.

    values: [n, rank], the first one 0. Each digit is forced, from the innermost on: its weight is the next value, and it
    ends where the values no longer count on.
    """
    count, rank = values.shape
    found: list[Digit] = []
    inner = 1
    while inner < count:
        steps = values[::inner]
        feeds = np.flatnonzero(steps[1])
        size = _counts_on(steps)
        if len(feeds) > 1 or len(steps) % size or np.any(steps[1] < 0):
            return None
        found.append(Digit(size, int(feeds[0]), int(steps[1].sum())) if len(feeds) else Digit(size, None, 0))
        inner *= size
    digits = tuple(reversed(found))
    return digits if np.array_equal(index_table(digits, rank), values) else None


def _counts_on(steps: npt.NDArray[np.int64]) -> int:
    """The first n with steps[n] != n * steps[1]."""
    broken = np.any(steps != np.arange(len(steps))[:, None] * steps[1], axis=1)
    return int(np.argmax(broken)) if np.any(broken) else len(steps)


def check_complete(digits: Iterable[Digit], shape: Sequence[int]) -> None:
    """Raise LayoutError unless the digits of every dimension count each of its indices exactly once."""
    by_dim: list[list[Digit]] = [[] for _ in shape]
    for digit in digits:
        if digit.size < 1:
            raise LayoutError(f"a digit has size {digit.size}; digits have at least one value")
        if digit.dim is None:
            if digit.weight != 0:
                raise LayoutError(f"a replication digit has weight {digit.weight}; expected 0")
        elif not 0 <= digit.dim < len(shape):
            raise LayoutError(f"a digit feeds dimension {digit.dim} of a layout of rank {len(shape)}")
        elif digit.size > 1:
            by_dim[digit.dim].append(digit)
    for dim, (extent, feeding) in enumerate(zip(shape, by_dim)):
        counted = 1
        for digit in sorted(feeding, key=lambda digit: digit.weight):
            if digit.weight != counted:
                raise LayoutError(
                    f"a digit of dimension {dim} has weight {digit.weight}; the digits below it need {counted}"
                )
            counted *= digit.size
        if counted != extent:
            raise LayoutError(f"the digits of dimension {dim} count to {counted}; its extent is {extent}")
