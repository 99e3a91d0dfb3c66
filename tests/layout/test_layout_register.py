"""Laws of register layouts: the function, canonical equality, text, product and quotients."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_oracle import Raw, all_raw, build, function, function_of, layouts, product_function, raw_layouts

from tilus.layout import (
    Digit,
    LayoutError,
    RegisterLayout,
    column_local,
    column_spatial,
    identity,
    local,
    parse_layout,
    replicated,
    spatial,
)

SHAPES = [(), (1,), (2,), (3,), (4,), (6,), (8,), (12,), (2, 2), (2, 3), (4, 2), (3, 4), (2, 6), (2, 2, 2)]


def universe(shapes: list[tuple[int, ...]], replicas: tuple[int, ...] = (1, 2)) -> list[Raw]:
    return [
        raw
        for shape in shapes
        for replica in replicas
        for threads in range(1, prod(shape) * replica + 1)
        if prod(shape) * replica % threads == 0
        for raw in all_raw(shape, threads, prod(shape) * replica // threads)
    ]


@given(raw_layouts())
def test_table_is_the_oracle(raw: Raw) -> None:
    layout, expected = build(raw), function(raw)
    assert layout.table().shape == (layout.num_threads, layout.num_locals, layout.rank)
    assert function_of(layout) == expected
    assert {(t, i): layout.index(t, i) for t, i in expected} == expected


@given(raw_layouts())
def test_terms_are_the_function(raw: Raw) -> None:
    layout = build(raw)
    for (t, i), expected in function(raw).items():
        index = [0] * layout.rank
        for n, terms in ((t, layout.thread_terms), (i, layout.local_terms)):
            for term in terms:
                if term.dim is not None:
                    index[term.dim] += (n // term.stride) % term.size * term.weight
        assert tuple(index) == expected


@given(raw_layouts())
def test_counts(raw: Raw) -> None:
    layout, expected = build(raw), function(raw)
    owners = defaultdict(set)
    for (t, i), index in expected.items():
        owners[index].add((t, i))
    assert layout.num_threads * layout.num_locals == len(expected)
    assert layout.size == len(owners) == prod(layout.shape)
    for index, want in owners.items():
        assert layout.owner(index) == sorted(want)
        assert layout.num_replicas == len({t for t, _ in want})
        assert layout.num_replicas * layout.num_local_replicas == len(want)
        assert layout.inverse()(index) == min(want)
    assert layout.is_replicated_thread == (layout.num_replicas > 1)


def test_equal_exactly_when_the_same_function() -> None:
    by_function: dict[object, set[RegisterLayout]] = defaultdict(set)
    by_layout: dict[RegisterLayout, set[object]] = defaultdict(set)
    raws = universe(SHAPES)
    for raw in raws:
        key = (raw[0], tuple(function(raw).items()))
        by_function[key].add(build(raw))
        by_layout[build(raw)].add(key)
    assert len(raws) > len(by_function) > 1000
    assert all(len(found) == 1 for found in (*by_function.values(), *by_layout.values()))


@given(raw_layouts(rank=1, max_size=72), raw_layouts(rank=1, max_size=72))
def test_equality_of_random_pairs(a: Raw, b: Raw) -> None:
    assert (build(a) == build(b)) == (function(a) == function(b))


@given(layouts())
def test_text_round_trip(layout: RegisterLayout) -> None:
    assert parse_layout(str(layout)) == layout
    assert str(parse_layout(str(layout))) == str(layout)


@given(st.data())
def test_product_law(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    f, g = (data.draw(raw_layouts(rank, 32)) for _ in range(2))
    assert function_of(build(f) * build(g)) == product_function(function(f), function(g))


@given(st.data())
def test_product_is_a_monoid(data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 3))
    f, g, h = (data.draw(layouts(rank, 16)) for _ in range(3))
    assert (f * g) * h == f * (g * h)
    assert identity(rank) * f == f == f * identity(rank)


@given(st.data())
def test_quotients_of_a_product(data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 3))
    f, g = (data.draw(layouts(rank, 48)) for _ in range(2))
    assert (f * g) / g == f
    assert (f * g).left_divide(f) == g


@given(st.data())
def test_a_quotient_recomposes(data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 2))
    h, g = (data.draw(layouts(rank, 24)) for _ in range(2))
    q = h.try_divide(g)
    assert q is None or q * g == h
    q = h.try_left_divide(g)
    assert q is None or g * q == h


@pytest.mark.sampled(6)
@pytest.mark.parametrize("shape", [(4,), (6,), (8,), (12,), (2, 2), (4, 2), (2, 3)])
def test_a_quotient_is_found_exactly_when_brute_force_finds_one(shape: tuple[int, ...]) -> None:
    """The oracle forms all products of small layouts; every pair (h, part) must agree with them."""
    divisors = list(product(*([d for d in range(1, extent + 1) if extent % d == 0] for extent in shape)))
    parts = {build(raw): function(raw) for raw in universe(divisors)}
    wholes = {tuple(function(raw).items()): build(raw) for raw in universe([shape])}
    right: dict[tuple[RegisterLayout, RegisterLayout], RegisterLayout] = {}
    left: dict[tuple[RegisterLayout, RegisterLayout], RegisterLayout] = {}
    for f, f_function in parts.items():
        for g, g_function in parts.items():
            if tuple(a * b for a, b in zip(f.shape, g.shape)) != shape:
                continue
            whole = wholes.get(tuple(product_function(f_function, g_function).items()))
            if whole is not None:
                right[whole, g], left[whole, f] = f, g
    assert len(wholes) < len(right) < len(wholes) * len(parts)
    for h in wholes.values():
        for part in parts:
            assert h.try_divide(part) == right.get((h, part)), (h, part)
            assert h.try_left_divide(part) == left.get((h, part)), (h, part)


def random_raw(rng: random.Random, rank: int) -> Raw:
    """Any layout of up to some 200 elements, with replication on both sides and digits of 2, 3, 4, 5, 6 and 12."""
    shape, threads, slots = [], [], []
    for dim in range(rank):
        weight = 1
        for _ in range(rng.randint(0, 2)):
            size = rng.choice([2, 2, 3, 4, 5, 6, 12])
            rng.choice([threads, slots]).append((size, dim, weight))
            weight *= size
        shape.append(weight)
    for _ in range(rng.randint(0, 2)):
        rng.choice([threads, slots]).append((rng.choice([2, 3, 4]), None, 0))
    rng.shuffle(threads)
    rng.shuffle(slots)
    return tuple(shape), tuple(threads), tuple(slots)


def test_no_quotient_of_ten_thousand_products_is_refused() -> None:
    rng = random.Random(0)
    replicated_both = odd = 0
    for _ in range(10_000):
        rank = rng.randint(1, 3)
        f, g = build(random_raw(rng, rank)), build(random_raw(rng, rank))
        h = f * g
        assert h.try_divide(g) == f, (f, g)
        assert h.try_left_divide(f) == g, (f, g)
        replicated_both += h.num_replicas > 1 and h.num_local_replicas > 1
        odd += any(d.size & (d.size - 1) for d in (*h.thread_digits, *h.local_digits))
    assert min(replicated_both, odd) > 2000


def refused(call: object, text: str) -> None:
    with pytest.raises(LayoutError) as error:
        call()  # type: ignore[operator]
    assert str(error.value) == text


def test_refused_quotients_name_the_digit() -> None:
    hint = "\n  hint: convert to a layout that is built as such a product"
    refused(
        lambda: local(2, 1).spatial(8, 4) / column_spatial(8, 4),
        "local(2, 1).spatial(8, 4) is no product with column_spatial(8, 4) as its inner factor: "
        f"its first 32 threads and 1 slots are spatial(8, 4){hint}",
    )
    refused(
        lambda: spatial(8, 4).left_divide(spatial(1, 2)),
        "spatial(8, 4) is no product with spatial(1, 2) as its outer factor: its thread digit of size 4 "
        f"(dimension 1, weight 1) is among the first 16 threads, but leaves a tile of shape (8, 2){hint}",
    )
    refused(
        lambda: local(2, 2).spatial(4, 1).left_divide(column_local(2, 2)),
        "local(2, 2).spatial(4, 1) is no product with column_local(2, 2) as its outer factor: "
        f"its tiles of shape (4, 1), 4 threads and 1 slots are at local(2, 2){hint}",
    )
    refused(
        lambda: spatial(8) / spatial(3),
        f"spatial(8) is no product with spatial(3) as its inner factor: it has 8 threads, not a multiple of 3{hint}",
    )
    refused(
        lambda: spatial(4).replicated(3) / spatial(3),
        "spatial(4).replicated(3) is no product with spatial(3) as its inner factor: "
        f"it has 4 elements in dimension 0, not a multiple of 3{hint}",
    )
    refused(
        lambda: spatial(2, 6) / spatial(2, 2),
        "spatial(2, 6) is no product with spatial(2, 2) as its inner factor: "
        f"its thread digit of size 6 (dimension 1, weight 1) does not split at 4 threads{hint}",
    )
    refused(
        lambda: spatial(4).replicated(6) / replicated(4, 1),
        "spatial(4).replicated(6) is no product with replicated(4, 1) as its inner factor: "
        f"its thread replication digit of size 6 does not split at 4 threads{hint}",
    )
    refused(
        lambda: local(1, 2).spatial(4, 2) / spatial(4, 1).local(1, 2),
        "local(1, 2).spatial(4, 2) is no product with spatial(4, 1).local(1, 2) as its inner factor: its thread digit of "
        f"size 2 (dimension 0, weight 2) is beyond the first 4 threads, but cuts tiles of shape (4, 2){hint}",
    )
    refused(
        lambda: spatial(8) / spatial(8, 1),
        "ranks differ: spatial(8) has rank 1, spatial(8, 1) has rank 2\n"
        "  hint: insert dimensions of extent 1 with unsqueeze",
    )
    refused(
        lambda: spatial(8) * spatial(8, 1),
        "ranks differ: spatial(8) has rank 1, spatial(8, 1) has rank 2\n"
        "  hint: insert dimensions of extent 1 with unsqueeze",
    )


def test_what_is_not_a_layout_is_refused() -> None:
    bad = [
        ((4,), (Digit(2, 0, 1),), "count to 2; its extent is 4"),
        ((4,), (Digit(2, 0, 1), Digit(2, 0, 1)), "has weight 1; the digits below it need 2"),
        ((4,), (Digit(4, 1, 1),), "feeds dimension 1 of a layout of rank 1"),
        ((1,), (Digit(4, None, 1),), "weight 1; expected 0"),
        ((0,), (Digit(0, 0, 1),), "size 0"),
    ]
    for shape, digits, message in bad:
        with pytest.raises(LayoutError, match=message):
            RegisterLayout(shape, digits, ())
    with pytest.raises(LayoutError, match="expected positive extents"):
        spatial(4, 0)
    with pytest.raises(LayoutError, match="thread 4, slot 0"):
        spatial(4).index(4, 0)
    with pytest.raises(LayoutError, match="not in a tile"):
        spatial(4).owner((4,))
    with pytest.raises(LayoutError, match="size 0"):
        replicated(0, 1)
