"""Laws of memory layouts (shared tiles and static global views) against enumeration."""

from __future__ import annotations

from collections import defaultdict
from itertools import permutations, product
from math import prod

import numpy as np
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
    swizzled_address,
    table_of,
)

from tilus.layout import (
    Digit,
    LayoutError,
    RegisterLayout,
    SharedLayout,
    Swizzle,
    column_major,
    complement,
    compose,
    concat,
    parse_shared_layout,
    row_major,
    spatial,
    strided,
    swizzled,
)

ANY = raw_memory() | raw_bits()


@given(ANY)
def test_addresses_are_the_oracle(raw: RawMemory) -> None:
    layout, expected = build(raw), addresses(raw)
    assert layout.shape == shape_of(raw)
    assert table_of(layout) == expected
    assert {index: layout.offset(index) for index in expected} == expected
    assert layout.size > max(expected.values())
    assert layout.is_injective() == (len(set(expected.values())) == len(expected))
    assert layout.is_compact() == (sorted(expected.values()) == list(range(layout.size)))


@given(ANY)
def test_terms_are_the_addresses(raw: RawMemory) -> None:
    layout = build(raw)
    for index, expected in addresses(raw).items():
        linear = sum(index[t.dim] // t.weight % t.size * t.stride for dim in layout.terms for t in dim)  # type: ignore[index]
        triple = layout.swizzle and (layout.swizzle.base, layout.swizzle.bits, layout.swizzle.shift)
        assert swizzled_address(linear + layout.origin, triple) == expected


@given(st.integers(0, 5), st.integers(0, 6), st.integers(1, 5), st.integers(0, 2**17 - 1))
def test_a_swizzle_and_its_inverse(base: int, bits: int, shift: int, address: int) -> None:
    swizzle = Swizzle(base, bits, shift)
    assert swizzle.apply(address) == swizzled_address(address, (base, bits, shift))
    assert swizzle.invert(swizzle.apply(address)) == swizzle.apply(swizzle.invert(address)) == address
    assert swizzle.apply(address + swizzle.period) == swizzle.apply(address) + swizzle.period


# ---- equality


def one_layout_for_each_function(raws: list[RawMemory]) -> int:
    """Equality is equality of functions, in both directions; the number of different ones."""
    by_function: dict[object, set[SharedLayout]] = defaultdict(set)
    by_layout: dict[SharedLayout, set[object]] = defaultdict(set)
    for raw in raws:
        function = (shape_of(raw), tuple(addresses(raw).values()))
        by_function[function].add(build(raw))
        by_layout[build(raw)].add(function)
    assert all(len(found) == 1 for found in (*by_function.values(), *by_layout.values()))
    return len(by_function)


SWIZZLES = [None, *product(range(3), range(1, 4), range(1, 4))]


def test_equal_exactly_when_the_same_function_on_all_vectors() -> None:
    """One dimension of up to two digits, without swizzle."""
    digits = [[], *([d] for d in product((2, 3, 4), (0, 1, 2, 3, 4, 6)))]
    digits += [[a, b] for a in product((2, 3), (0, 1, 2, 3, 4, 6)) for b in product((2, 3), (0, 1, 2, 3))]
    raws: list[RawMemory] = [([dim], None, origin) for dim in digits for origin in (0, 1)]
    assert one_layout_for_each_function(raws) < len(raws)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (3, 2), (2, 2, 2)])
def test_equal_exactly_when_the_same_function_on_all_swizzles(sizes: tuple[int, ...]) -> None:
    """Strides that overlap, carry into each other and leave gaps, under every swizzle of up to three bits."""
    strides = (0, 1, 2, 3, 4, 6) if len(sizes) == 2 else (0, 1, 2, 5)
    raws: list[RawMemory] = [
        ([[(size, stride)] for size, stride in zip(sizes, chosen)], swizzle, origin)
        for chosen in product(strides, repeat=len(sizes))
        for swizzle in SWIZZLES
        for origin in ((0, 2, 5) if len(sizes) == 2 else (0,))
    ]
    assert one_layout_for_each_function(raws) < len(raws) / 2


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_equal_exactly_when_the_same_function_on_all_compact_tiles(order: tuple[int, ...]) -> None:
    """Each of five address bits is one index bit: all swizzles, in rows and columns of any bit order."""
    triples = [None, *product(range(5), range(5), range(1, 6))]
    raws: list[RawMemory] = []
    for cut, triple in product((0, 2, 3), triples):
        bits = [(2, 1 << bit) for bit in order]
        raws.append(([bits[:cut], bits[cut:]], triple, 0))
    assert one_layout_for_each_function(raws) < len(raws)


@given(raw_memory(rank=1, room=16), raw_memory(rank=1, room=16))
def test_equality_of_random_pairs(a: RawMemory, b: RawMemory) -> None:
    assert (build(a) == build(b)) == (addresses(a) == addresses(b))


@given(ANY, st.data())
def test_near_misses_and_other_forms(raw: RawMemory, data: st.DataObject) -> None:
    """One stride, the origin or the swizzle is another; the function may still be the same."""
    dims, swizzle, origin = raw
    other = [list(dim) for dim in dims]
    change = data.draw(st.sampled_from(["stride", "origin", "swizzle", "split"]))
    digits = [(d, k) for d, dim in enumerate(dims) for k in range(len(dim))]
    if change == "stride" and digits:
        d, k = data.draw(st.sampled_from(digits))
        other[d][k] = (other[d][k][0], data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 10, 16, 24])))
    elif change == "split" and digits:
        d, k = data.draw(st.sampled_from(digits))
        size, stride = other[d][k]
        part = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        other[d][k : k + 1] = [(size // part, stride * part), (part, stride)]
    elif change == "origin":
        origin = data.draw(st.integers(0, 9))
    else:
        swizzle = data.draw(st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4)))
    changed = (other, swizzle, origin)
    assert (build(raw) == build(changed)) == (addresses(raw) == addresses(changed))
    if build(raw) == build(changed):
        assert hash(build(raw)) == hash(build(changed)) and str(build(raw)) == str(build(changed))


@given(raw_memory(room=24))
def test_a_layout_is_found_from_its_table(raw: RawMemory) -> None:
    layout = build(raw)
    assert SharedLayout.try_from_table(layout.table()) == layout


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=6))
@example([0, 1, 3, 2])
@example([0, 1, 5, 4, 2, 3])
def test_a_layout_is_found_exactly_when_there_is_one(values: list[int]) -> None:
    found = SharedLayout.try_from_table(np.array(values))
    function = {(x,): value for x, value in enumerate(values)}
    assert (found is not None) == (min(values) >= 0 and has_layout(function))
    assert found is None or table_of(found) == function


@pytest.mark.parametrize("shape", [(4,), (2, 2), (6,), (2, 3)])
def test_layouts_of_all_permutations(shape: tuple[int, ...]) -> None:
    """Every order of 0..n-1 (and some of its images) is a layout or is not one; some swizzles are among them."""
    kinds: set[str] = set()
    for order in permutations(range(prod(shape))):
        for step in (1, 3) if prod(shape) == 4 else (1,):
            table = np.array(order, dtype=np.int64).reshape(shape) * step
            found = SharedLayout.try_from_table(table)
            function = dict(zip(product(*map(range, shape)), table.reshape(-1).tolist()))
            assert (found is not None) == has_layout(function)
            kinds.add("none" if found is None else "swizzled" if found.swizzle else "strided")
    assert kinds == {"none", "strided", "swizzled"}


@given(ANY)
def test_text_round_trip(raw: RawMemory) -> None:
    layout = build(raw)
    assert parse_shared_layout(str(layout)) == layout
    assert str(parse_shared_layout(str(layout))) == str(layout)


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


# ---- dimensions


@given(st.data())
def test_permute_squeeze_and_unsqueeze(data: st.DataObject) -> None:
    layout = build(data.draw(ANY))
    dims = data.draw(st.permutations(range(layout.rank)))
    permuted = {tuple(index[d] for d in dims): offset for index, offset in table_of(layout).items()}
    assert table_of(layout.permute(dims)) == permuted
    assert layout.permute(dims).permute([dims.index(d) for d in range(layout.rank)]) == layout
    dim = data.draw(st.integers(0, layout.rank))
    wider = {(*index[:dim], 0, *index[dim:]): offset for index, offset in table_of(layout).items()}
    assert table_of(layout.unsqueeze(dim)) == wider
    assert layout.unsqueeze(dim).squeeze(dim) == layout


@given(st.data())
def test_reshape_exists_exactly_when_the_addresses_are_a_layout(data: st.DataObject) -> None:
    layout = build(data.draw(raw_memory(room=24) | raw_bits(2, 5)))
    count = prod(layout.shape)
    first = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    shape = (first, count // first)
    expected = dict(zip(product(*map(range, shape)), layout.table().reshape(-1).tolist()))
    try:
        reshaped = layout.reshape(shape)
    except LayoutError as error:
        assert "a digit would straddle" in str(error) and not has_layout(expected)
        return
    assert table_of(reshaped) == expected
    assert reshaped.reshape(layout.shape) == layout


@given(ANY)
def test_flatten_and_unflatten(raw: RawMemory) -> None:
    layout = build(raw)
    flat = layout.flatten()
    assert [offset for _, offset in sorted(table_of(flat).items())] == list(addresses(raw).values())
    assert flat.unflatten(0, layout.shape) == layout
    assert flat.unflatten(-1, (1, prod(layout.shape), 1)).flatten() == flat


@given(st.data())
def test_slice_exists_exactly_when_the_addresses_are_a_layout(data: st.DataObject) -> None:
    layout = build(data.draw(raw_memory(room=24) | raw_bits(2, 5)))
    if not layout.rank:
        return
    dim = data.draw(st.integers(0, layout.rank - 1))
    start = data.draw(st.integers(0, layout.shape[dim] - 1))
    stop = data.draw(st.integers(start + 1, layout.shape[dim]))
    expected = {
        tuple(x - start if k == dim else x for k, x in enumerate(index)): offset
        for index, offset in table_of(layout).items()
        if start <= index[dim] < stop
    }
    try:
        assert table_of(layout.slice(dim, start, stop)) == expected
    except LayoutError as error:
        assert "the ends cut its digits" in str(error) and not has_layout(expected)


@given(st.data())
def test_expand(data: st.DataObject) -> None:
    layout = build(data.draw(ANY))
    dim, size = data.draw(st.integers(0, layout.rank)), data.draw(st.integers(1, 5))
    wide = layout.unsqueeze(dim).expand(dim, size)
    assert table_of(wide) == {
        (*index[:dim], copy, *index[dim:]): offset for index, offset in table_of(layout).items() for copy in range(size)
    }
    assert wide.slice(dim, size - 1, size).squeeze(dim) == layout


@given(ANY, st.integers(0, 70))
def test_at_moves_every_address(raw: RawMemory, distance: int) -> None:
    layout = build(raw)
    try:
        moved = layout.at(distance)
    except LayoutError as error:
        assert layout.swizzle is not None and f"a period of {layout.swizzle.period}" in str(error)
        return
    assert table_of(moved) == {index: offset + distance for index, offset in addresses(raw).items()}


def test_global_views() -> None:
    """A view of a matrix with pitch 100, from row 2 and column 8 on; its rows broadcast; its transpose."""
    matrix = strided((10, 64), (100, 1))
    view = matrix.slice(0, 2, 6).slice(1, 8, 24)
    assert view == strided((4, 16), (100, 1)).at(208) and str(view) == "strided((4, 16), (100, 1)).at(208)"
    assert view.permute([1, 0]) == strided((16, 4), (1, 100)).at(208)
    row = matrix.slice(0, 3, 4)
    assert row.expand(0, 4) == strided((4, 64), (0, 1)).at(300) and not row.expand(0, 4).is_injective()
    assert column_major((4, 6)).slice(1, 2, 4) == column_major((4, 2)).at(8)


def test_a_swizzle_that_coincides_with_strides_is_none() -> None:
    gap = strided((2,), (8,))
    assert gap.swizzled(0, 2, 2) == gap.swizzled(1, 1, 2) == gap.swizzled(0, 4, 2) == strided((2,), (10,))
    assert gap.swizzled(0, 1, 1) == gap
    assert strided((2, 2), (1, 6)).swizzled(0, 1, 2) == strided((2, 2), (1, 6)).swizzled(0, 1, 1)
    # Rows 8..15 and columns 32..63 of a swizzled tile: two of the three bits are left, the third is in the strides.
    part = swizzled((64, 64), 2).slice(0, 8, 16).slice(1, 32, 64)
    assert part.origin == 512 + 32 and part.swizzle == Swizzle(3, 2, 3)
    # Twelve chunks a row: two bits spread what three would, but with other addresses.
    assert swizzled((64, 96), 2).swizzle == Swizzle(3, 2, 3)
    assert row_major((64, 96)).swizzled(3, 3, 3) != swizzled((64, 96), 2)


# ---- errors


def refused(call: object, text: str) -> None:
    with pytest.raises(LayoutError) as error:
        call()  # type: ignore[operator]
    assert str(error.value) == text


def test_wrong_memory_layouts_are_refused() -> None:
    tile = swizzled((64, 64), 2)
    refused(
        lambda: SharedLayout((4,), ((Digit(3, 0, 1),),)), "the digits of dimension 0 have sizes [3]; its extent is 4"
    )
    refused(lambda: SharedLayout((4,), ()), "digits for 0 dimensions of a shape of rank 1")
    refused(
        lambda: strided((4,), (-1,)),
        "dimension 0 has strides [-1]; expected 0 or more\n  hint: reverse the index instead",
    )
    refused(lambda: row_major((4,)).at(-1), "a layout starts at address -1; expected 0 or more")
    refused(lambda: strided((4, 4), (1,)), "shape (4, 4) and strides (1,) differ in rank")
    refused(lambda: strided(((2, 2),), (1,)), "a dimension has sizes (2, 2) and strides (1,); expected as many of each")
    refused(
        lambda: row_major((8, 8)).swizzled(0, 1, 0),
        "Swizzle(base=0, bits=1, shift=0); expected base >= 0, bits >= 0 and shift >= 1\n"
        "  hint: bits base + shift .. base + shift + bits - 1 are XORed into bits base .. base + bits - 1",
    )
    refused(
        lambda: tile.swizzled(0, 1, 1),
        f"{tile} already has a swizzle; expected one at most\n  hint: swizzle a layout of the same strides once",
    )
    refused(lambda: tile.offset((64, 0)), "index (64, 0) is not in a tile of shape (64, 64)")
    refused(lambda: tile.permute([0, 0]), "permute got dims (0, 0); expected each of 0..1 once")
    refused(lambda: tile.squeeze(0), "squeeze of dimension 0 with extent 64; expected extent 1")
    refused(lambda: tile.squeeze(2), "dimension 2 of a layout of rank 2 and shape (64, 64)")
    refused(lambda: tile.unsqueeze(3), "unsqueeze at 3 of a layout of rank 2; expected 0..2")
    refused(lambda: tile.expand(0, 2), "expand of dimension 0 with extent 64 to 2; expected extent 1, to 1 or more")
    refused(lambda: tile.reshape((5, 7)), "reshape of (64, 64) (4096 elements) to (5, 7) (35 elements)")
    refused(
        lambda: strided((2, 3), (4, 1)).reshape((3, 2)),
        "strided((2, 3), (4, 1)) cannot be reshaped to (3, 2): a digit would straddle two dimensions\n"
        "  hint: choose extents at which its digits split",
    )
    refused(
        lambda: strided(((2, 4),), ((32, 1),)).slice(0, 2, 8),
        "slice 2:8 of dimension 0 of strided(((2, 4),), ((32, 1),)) is no layout: the ends cut its digits of 2 x 4\n"
        "  hint: slice at multiples of the digits' sizes",
    )
    refused(
        lambda: tile.at(8),
        f"{tile} moved by 8 elements is no layout: its swizzle has a period of 512\n"
        "  hint: move it by a multiple of 512 elements",
    )
    refused(
        lambda: row_major((4, 1)).expand(1, 2).inverse(),
        "strided((4, 2), (1, 0)) has no inverse: two elements share an address\n  hint: slice one copy of what is broadcast",
    )


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
