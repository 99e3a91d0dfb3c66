"""Laws of products, quotients, inverses, complements and compositions of memory layouts, against enumeration."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from layout_oracle import layouts
from memory_oracle import (
    Addresses,
    RawMemory,
    addresses,
    build,
    has_layout,
    is_sum,
    raw_bits,
    raw_memory,
    shape_of,
    table_of,
)

from tilus.layout import (
    LayoutError,
    RegisterLayout,
    SharedLayout,
    column_major,
    complement,
    compose,
    concat,
    row_major,
    spatial,
    strided,
    swizzled,
)

ANY = raw_memory() | raw_bits()


# ---- product and quotients


def product_table(f: Addresses, f_shape: tuple[int, ...], g: SharedLayout) -> Addresses:
    """(f * g)(x) = f(x // S_g) * g.size + g(x % S_g)."""
    inner = table_of(g)
    return {
        tuple(a * n + b for a, n, b in zip(tile, g.shape, index)): f[tile] * g.size + inner[index]
        for tile in product(*map(range, f_shape))
        for index in product(*map(range, g.shape))
    }


def tiles(rank: int, room: int) -> st.SearchStrategy[SharedLayout]:
    return (raw_memory(rank, with_origin=False, room=room) | raw_bits(rank, room.bit_length() - 1)).map(build)


@given(st.data())
def test_product_law(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    f, g = (data.draw(tiles(rank, 16)) for _ in range(2))
    expected = product_table(table_of(f), f.shape, g)
    if f.swizzle is None or (g.swizzle is None and g.size & (g.size - 1) == 0):
        assert table_of(f * g) == expected
    else:
        with pytest.raises(LayoutError, match=r"is no layout: (both factors have|the outer factor has) a swizzle"):
            _ = f * g


@given(st.data())
def test_product_is_a_monoid(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    unit = row_major((1,) * rank)
    f, g, h = (data.draw(raw_bits(rank, 3).map(build)) for _ in range(3))
    assert unit * f == f == f * unit
    if sum(x.swizzle is not None for x in (f, g, h)) <= 1:
        # With padding, (f * g).size is less than f.size * g.size; both are the same where tiles fill their memory.
        assert (f * g) * h == f * (g * h)


@given(st.data())
def test_quotients_of_a_product(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    f, g = (data.draw(tiles(rank, 16)) for _ in range(2))
    if f.swizzle is None or (g.swizzle is None and g.size & (g.size - 1) == 0):
        assert (f * g) / g == f
        assert (f * g).left_divide(f) == g


@given(st.data())
def test_a_quotient_recomposes(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    h, g = data.draw(tiles(rank, 32)), data.draw(tiles(rank, 4))
    q = h.try_divide(g)
    assert q is None or q * g == h
    q = h.try_left_divide(g)
    assert q is None or g * q == h


def is_a_product(whole: SharedLayout, f: Addresses, f_shape: tuple[int, ...], g: SharedLayout) -> bool:
    """Whether the layout has the addresses of f * g, and this is a product: the swizzle of at most one factor, where it
    acts on tiles of a power of two elements."""
    may_swizzle = is_sum(table_of(g), None) and g.size & (g.size - 1) == 0
    return (is_sum(f, None) or (may_swizzle and has_layout(f))) and product_table(f, f_shape, g) == table_of(whole)


def test_a_quotient_is_found_exactly_when_enumeration_finds_one() -> None:
    """Products of small tiles, with and without swizzles, and other layouts, against all small parts."""
    digits = [(2, 1), (2, 2), (2, 3), (2, 4), (4, 1)]
    raws: list[RawMemory] = [
        ([list(dim)], swizzle, 0)
        for rank in (0, 1, 2)
        for dim in product(digits, repeat=rank)
        for swizzle in (None, (0, 1, 1), (0, 1, 2))
    ]
    parts = sorted({build(raw) for raw in raws if shape_of(raw)[0] <= 4}, key=str)
    products = {f * g for f, g in product(parts, repeat=2) if not (f.swizzle and (g.swizzle or g.size & (g.size - 1)))}
    found = {"right": 0, "left": 0, "swizzled": 0, "refused": 0}
    for whole in sorted({*parts, *products}, key=str)[::8]:
        for part in parts:
            count = whole.shape[0] // part.shape[0]
            if count * part.shape[0] != whole.shape[0]:
                continue
            firsts = {(x,): whole((x * part.shape[0],)) / part.size for x in range(count)}
            exists = all(first == int(first) for first in firsts.values())
            exists = exists and is_a_product(whole, {x: int(a) for x, a in firsts.items()}, (count,), part)
            right = whole.try_divide(part)
            assert (right is not None) == exists, (whole, part)
            assert right is None or table_of(right) == firsts
            inner = whole.try_from_table(whole.table()[:count])
            exists = inner is not None and is_a_product(whole, table_of(part), part.shape, inner)
            left = whole.try_left_divide(part)
            assert left == (inner if exists else None), (whole, part)
            found["right"] += right is not None
            found["left"] += left is not None
            found["swizzled"] += right is not None and right.swizzle is not None
            found["refused"] += right is None
    assert min(found.values()) > 50


@given(st.data())
def test_concat(data: st.DataObject) -> None:
    f = build(data.draw(raw_memory(with_swizzle=False, with_origin=False, room=16)))
    g = build(data.draw(raw_memory(with_origin=False, room=16) | raw_bits(1, 4)))
    assert table_of(concat(f, g)) == {
        (*x, *y): a * g.size + b for x, a in table_of(f).items() for y, b in table_of(g).items()
    }


@given(raw_memory(with_origin=False) | raw_bits(), st.integers(1, 4))
def test_stages_follow_each_other(raw: RawMemory, count: int) -> None:
    layout = build(raw)
    staged = layout.stages(count)
    assert table_of(staged) == {
        (stage, *index): stage * layout.size + offset
        for stage in range(count)
        for index, offset in table_of(layout).items()
    }
    assert staged.size <= count * layout.size


# ---- inverse, complement, composition


@given(ANY)
@example(([[(2, 3)], [(3, 2)]], None, 1))
def test_inverse(raw: RawMemory) -> None:
    layout, function = build(raw), addresses(raw)
    if len(set(function.values())) < len(function):
        with pytest.raises(LayoutError, match="two elements share an address"):
            layout.inverse()
        return
    inverse = layout.inverse()
    assert {index: inverse(address) for index, address in function.items()} == {index: index for index in function}
    hit = set(function.values())
    for address in (a for a in range(-1, layout.size + 1) if a not in hit):
        with pytest.raises(LayoutError, match=f"is at address {address}"):
            inverse(address)


@given(raw_memory(with_origin=False, room=32) | raw_bits(2, 4), st.integers(1, 48))
@example(([[(2, 1), (2, 8)]], (0, 1, 3), 0), 32)  # the swizzle permutes the addresses that are taken
@example(([[(2, 2), (2, 8)]], (0, 1, 3), 0), 16)  # and here it moves one
def test_complement_exists_exactly_when_enumeration_finds_one(raw: RawMemory, size: int) -> None:
    layout, function = build(raw), addresses(raw)
    rest = interval_complement(sorted(function.values()), size)
    try:
        found = complement(layout, size)
    except LayoutError:
        assert rest is None
        return
    assert rest is not None and table_of(found) == {(k,): address for k, address in enumerate(rest)}


def interval_complement(taken: list[int], size: int) -> list[int] | None:
    """The only set that, added to `taken` (which holds 0), hits each of 0..size-1 once: greedily from below."""
    free: list[int] = []
    hit: set[int] = set()
    if len(set(taken)) < len(taken):
        return None
    while (first := next((a for a in range(size) if a not in hit), None)) is not None:
        free.append(first)
        shifted = {first + a for a in taken}
        if shifted & hit or max(shifted) >= size:
            return None
        hit |= shifted
    return free


@given(st.data())
def test_composition_with_a_register_tile(data: st.DataObject) -> None:
    """Exact: the addresses of (thread, slot), or a refusal where they are not those of a layout."""
    tile = data.draw(layouts(max_size=32))
    memory = data.draw(memory_of(tile.shape))
    expected = {(t, i): table_of(memory)[tile(t, i)] for t in range(tile.num_threads) for i in range(tile.num_locals)}
    try:
        assert table_of(compose(memory, tile)) == expected
    except LayoutError:
        assert not has_layout(expected)


@st.composite
def memory_of(draw: st.DrawFn, shape: tuple[int, ...]) -> SharedLayout:
    """A memory layout of this shape: its extents factored anyhow."""
    dims: list[list[tuple[int, int]]] = []
    for extent in shape:
        sizes: list[int] = []
        while extent > 1:
            size = draw(st.sampled_from([n for n in range(2, extent + 1) if extent % n == 0]))
            sizes.append(size)
            extent //= size
        dims.append([(size, draw(st.sampled_from([1, 2, 4, 6, 8, 12, 16, 32]))) for size in sizes])
    return build((dims, draw(st.none() | st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 3))), 0))


def test_composition_examples() -> None:
    memory = swizzled((64, 64), 2)
    tile = spatial(8, 4).local(1, 2)
    part = memory.slice(0, 8, 16).slice(1, 32, 40)
    assert compose(part, tile)((9, 1)) == memory((8 + 2, 32 + 3))
    assert compose(row_major((8, 8)), tile) == strided((32, 2), (2, 1))
    with pytest.raises(LayoutError) as error:
        compose(memory, tile)
    assert str(error.value) == (
        "row_major((64, 64)).swizzled(3, 3, 3) after spatial(8, 4).local(1, 2): the inner layout has shape (8, 8), "
        "the outer one shape (64, 64); expected them to be equal\n  hint: reshape or slice one of them"
    )
    with pytest.raises(LayoutError) as error:
        compose(strided(((3, 2),), ((10, 1),)), spatial(2).local(3))
    assert str(error.value) == (
        "strided(((3, 2),), ((10, 1),)) after spatial(2).local(3) is no layout: a digit of one cuts a digit of the other\n"
        "  hint: index the table() of one with that of the other"
    )


# ---- errors


def refused(call: object, text: str) -> None:
    with pytest.raises(LayoutError) as error:
        call()  # type: ignore[operator]
    assert str(error.value) == text


def test_refused_products_and_quotients_say_why() -> None:
    tile, rows = swizzled((64, 64), 2), row_major((8, 8))
    refused(
        lambda: tile * tile,
        f"{tile} * {tile} is no layout: both factors have a swizzle; one swizzle holds for all addresses\n"
        "  hint: swizzle the inner tile, or call swizzled on the product",
    )
    refused(
        lambda: tile * row_major((1, 3)),
        f"{tile} * row_major((1, 3)) is no layout: the outer factor has a swizzle, which acts on bits, and a tile has 3 "
        "elements\n  hint: swizzle the inner tile, or call swizzled on the product",
    )
    refused(
        lambda: rows * row_major((8,)),
        "ranks differ: row_major((8, 8)) has rank 2, row_major((8,)) has rank 1\n"
        "  hint: insert dimensions of extent 1 with unsqueeze",
    )
    refused(
        lambda: rows * rows.at(4),
        "a factor starts at address 4: row_major((8, 8)), row_major((8, 8)).at(4); expected tiles that start at 0\n"
        "  hint: form the product first, then slice it or call at",
    )
    hint = "\n  hint: convert to a layout that is built as such a product"
    refused(
        lambda: rows / row_major((3, 8)),
        "row_major((8, 8)) is no product with row_major((3, 8)) as its inner factor: "
        f"it has 8 elements in dimension 0, not a multiple of 3{hint}",
    )
    refused(
        lambda: rows / row_major((8, 4)),
        "row_major((8, 8)) is no product with row_major((8, 4)) as its inner factor: "
        f"its digit of size 2 has stride 4, no multiple of the 32 of a tile{hint}",
    )
    refused(
        lambda: rows / column_major((2, 8)),
        "row_major((8, 8)) is no product with column_major((2, 8)) as its inner factor: "
        f"its first tile is row_major((2, 8)){hint}",
    )
    refused(
        lambda: rows.left_divide(row_major((1, 2))),
        "row_major((8, 8)) is no product with row_major((1, 2)) as its outer factor: "
        f"row_major((1, 2)) * strided((8, 4), (8, 1)) is strided((8, (2, 4)), (8, (60, 1))){hint}",
    )
    refused(
        lambda: tile / swizzled((8, 32), 2),
        f"{tile} is no product with {swizzled((8, 32), 2)} as its inner factor: its swizzle is "
        f"Swizzle(base=3, bits=3, shift=3), that of the factor is Swizzle(base=3, bits=2, shift=3){hint}",
    )
    refused(
        lambda: strided(((2, 6),), ((16, 1),)) / row_major((4,)),
        "strided(((2, 6),), ((16, 1),)) is no product with row_major((4,)) as its inner factor: "
        f"its digit of size 6 (dimension 0, stride 1) does not split at 4 elements{hint}",
    )
    refused(
        lambda: tile / row_major((1, 16)),
        f"{tile} is no product with row_major((1, 16)) as its inner factor: "
        f"the first addresses of its tiles, over their size 16, are not those of a layout{hint}",
    )


def test_refused_complements_say_why() -> None:
    refused(
        lambda: complement(strided((2, 2), (1, 3)), 12),
        "strided((2, 2), (1, 3)) has no complement in 12 elements: stride 3 of its digit of size 2 is no multiple of the 2 "
        "that the digits below it count\n  hint: choose a size and strides that are multiples of each other",
    )
    refused(
        lambda: complement(row_major((4,)), 6),
        "row_major((4,)) has no complement in 6 elements: size 6 is no multiple of the 4 that the digits below it count\n"
        "  hint: choose a size and strides that are multiples of each other",
    )
    refused(
        lambda: complement(row_major((4,)).at(1), 8),
        "row_major((4,)).at(1) has no complement: its addresses do not start at 0 or have gaps of different sizes\n"
        "  hint: use a tile that starts at 0, with strides that are multiples of each other",
    )
    assert complement(swizzled((64, 64), 2), 8192) == strided((2,), (4096,))
    assert complement(strided((4,), (2,)), 24) == strided(((3, 2),), ((8, 1),))
    assert isinstance(complement(row_major(()), 5), SharedLayout) and complement(row_major(()), 5) == row_major((5,))


@given(layouts(max_size=16))
def test_a_register_layout_as_memory(tile: RegisterLayout) -> None:
    """Row-major addresses of (thread, slot) composed with the inverse are the flat index."""
    addresses_of = compose(row_major(tile.shape), tile)
    assert addresses_of.shape == (tile.num_threads, tile.num_locals)
    for index in product(*map(range, tile.shape)):
        assert addresses_of(tile.inverse()(index)) == row_major(tile.shape)(index)
