"""The layout that a tile gets when nothing else decides."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout, local, replicated, spatial


def auto(shape: Sequence[int], threads: int, vector: int = 1, order: Sequence[int] | None = None) -> RegisterLayout:
    """A layout of `threads` threads for loads and stores of a tile of any shape.

    order: the dimensions from the most to the least contiguous in memory; by default the last one first. Along the
    first of them each thread holds up to `vector` consecutive elements and consecutive threads hold consecutive
    vectors; what is left becomes outer slots. Factors are greatest common divisors, so that any shape works; threads
    that do not divide the tile replicate.
    """
    rank = len(shape)
    order = tuple(range(rank))[::-1] if order is None else tuple(order)
    if sorted(order) != list(range(rank)):
        raise LayoutError(f"order is {order}; expected each of 0..{rank - 1} once")
    if min((threads, vector, *shape)) < 1:
        raise LayoutError(
            f"auto got shape {tuple(shape)}, {threads} threads, vectors of {vector}; expected positive sizes"
        )
    slowest_first = order[::-1]
    rest = [shape[dim] for dim in slowest_first]
    vectors, spread = [1] * rank, [1] * rank
    if rank:
        vectors[-1] = gcd(vector, rest[-1])
        rest[-1] //= vectors[-1]
    for k in reversed(range(rank)):
        spread[k] = gcd(threads, rest[k])
        threads //= spread[k]
        rest[k] //= spread[k]
    layout = replicated(threads, rank) * local(*rest) * spatial(*spread) * local(*vectors)
    return layout.permute([slowest_first.index(dim) for dim in range(rank)])
