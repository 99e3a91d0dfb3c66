"""Laws of memory layouts (shared tiles and static global views) against enumeration."""

from __future__ import annotations

from collections import defaultdict
from itertools import permutations, product
from math import prod

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from memory_oracle import (
    RawMemory,
    addresses,
    build,
    has_layout,
    raw_bits,
    raw_memory,
    shape_of,
    swizzled_address,
    table_of,
)

from tilus.layout import (
    Digit,
    LayoutError,
    SharedLayout,
    Swizzle,
    column_major,
    parse_shared_layout,
    row_major,
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
