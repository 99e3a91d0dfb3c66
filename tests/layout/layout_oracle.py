"""What a layout means, written a second time: plain Python over raw digits, no code shared with tilus.layout.

A raw digit is (size, dim or None, weight); a raw layout is (shape, thread digits, local digits), outermost first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

from hypothesis import strategies as st

from tilus.layout import Digit, RegisterLayout

RawDigit = tuple[int, int | None, int]
Raw = tuple[tuple[int, ...], tuple[RawDigit, ...], tuple[RawDigit, ...]]
Function = dict[tuple[int, int], tuple[int, ...]]


def build(raw: Raw) -> RegisterLayout:
    shape, threads, slots = raw
    return RegisterLayout(shape, tuple(Digit(*d) for d in threads), tuple(Digit(*d) for d in slots))


def vectors(digits: tuple[RawDigit, ...], rank: int) -> list[tuple[int, ...]]:
    """The contribution of each integer: `product` counts in mixed radix with the last digit fastest."""
    result = []
    for values in product(*(range(size) for size, _, _ in digits)):
        index = [0] * rank
        for value, (_, dim, weight) in zip(values, digits):
            if dim is not None:
                index[dim] += value * weight
        result.append(tuple(index))
    return result


def function(raw: Raw) -> Function:
    """(thread, slot) -> index."""
    shape, threads, slots = raw
    return {
        (t, i): tuple(a + b for a, b in zip(u, v))
        for t, u in enumerate(vectors(threads, len(shape)))
        for i, v in enumerate(vectors(slots, len(shape)))
    }


def function_of(layout: RegisterLayout) -> Function:
    """The function of a library layout, by its table (which test_table_is_the_oracle checks)."""
    table = layout.table().tolist()
    return {(t, i): tuple(index) for t, row in enumerate(table) for i, index in enumerate(row)}


def product_function(f: Function, g: Function) -> Function:
    """(f * g)(t, i) = f(t // T_g, i // L_g) * S_g + g(t % T_g, i % L_g)."""
    (tf, lf), (tg, lg) = (tuple(max(key[k] for key in h) + 1 for k in (0, 1)) for h in (f, g))
    extents = [max(index) + 1 for index in zip(*g.values())]
    return {
        (t, i): tuple(a * s + b for a, s, b in zip(f[t // tg, i // lg], extents, g[t % tg, i % lg]))
        for t in range(tf * tg)
        for i in range(lf * lg)
    }


def ordered_factorisations(n: int) -> Iterator[tuple[int, ...]]:
    if n == 1:
        yield ()
    for first in range(2, n + 1):
        if n % first == 0:
            for rest in ordered_factorisations(n // first):
                yield (first, *rest)


def _lists(n: int, shape: tuple[int, ...]) -> Iterator[tuple[RawDigit, ...]]:
    """All digit lists that count to n and stay inside the shape."""
    for sizes in ordered_factorisations(n):
        places = [
            [(size, None, 0)]
            + [(size, k, w) for k, extent in enumerate(shape) for w in range(1, extent) if extent % (w * size) == 0]
            for size in sizes
        ]
        yield from product(*places)


def all_raw(shape: tuple[int, ...], threads: int, slots: int) -> Iterator[Raw]:
    """Every raw layout with this shape and these counts: those that hit every element equally often."""
    want = prod(shape)
    replicas = threads * slots // want
    for thread_list in _lists(threads, shape):
        for slot_list in _lists(slots, shape):
            feeding = prod(size for size, dim, _ in (*thread_list, *slot_list) if dim is not None)
            if feeding != want or threads * slots % want:
                continue
            raw = (shape, thread_list, slot_list)
            hits: dict[tuple[int, ...], int] = {}
            for index in function(raw).values():
                hits[index] = hits.get(index, 0) + 1
            if set(hits) == set(product(*map(range, shape))) and set(hits.values()) == {replicas}:
                yield raw


@st.composite
def raw_layouts(draw: Any, rank: int | None = None, max_size: int = 256) -> Raw:
    """Any layout: factors of every dimension in any order on either list, with replication anywhere."""
    if rank is None:
        rank = draw(st.integers(0, 3))
    room, shape, threads, slots = max_size, [], [], []
    for dim in range(rank):
        weight = 1
        for size in draw(st.lists(st.sampled_from([1, 2, 2, 2, 3, 4, 5, 6, 8, 12]), max_size=3)):
            if size <= room:
                draw(st.sampled_from([threads, slots])).append((size, dim, weight))
                weight *= size
                room //= size
        shape.append(weight)
    for size in draw(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=2)):
        if size <= room:
            draw(st.sampled_from([threads, slots])).append((size, None, 0))
            room //= size
    return tuple(shape), tuple(draw(st.permutations(threads))), tuple(draw(st.permutations(slots)))


def layouts(rank: int | None = None, max_size: int = 256) -> st.SearchStrategy[RegisterLayout]:
    return raw_layouts(rank, max_size).map(build)
