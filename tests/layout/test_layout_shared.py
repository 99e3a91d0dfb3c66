"""Laws of shared layouts, and bank conflicts against a wavefront-by-wavefront count."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus.layout import (
    AddressDigit,
    LayoutError,
    SharedLayout,
    Swizzle,
    bank_conflicts,
    column_major,
    padded,
    parse_shared_layout,
    row_major,
    strided,
    swizzled,
)

RawShared = tuple[list[list[tuple[int, int]]], tuple[int, int, int] | None]


@st.composite
def raw_shared(draw: Any, rank: int | None = None, with_swizzle: bool = True) -> RawShared:
    """Digits of (size, stride) for each dimension, outermost first, and a swizzle."""
    if rank is None:
        rank = draw(st.integers(0, 3))
    digit = st.tuples(st.sampled_from([1, 2, 2, 3, 4, 8]), st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24, 32, 64]))
    dims: list[list[tuple[int, int]]] = [[] for _ in range(rank)]
    room = 256
    for size, stride in draw(st.lists(digit, max_size=2 * rank)) if rank else []:
        if size <= room:
            room //= size
            draw(st.sampled_from(dims)).append((size, stride))
    triples = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
    return dims, draw(st.none() | triples) if with_swizzle else None


def build(raw: RawShared) -> SharedLayout:
    dims, swizzle = raw
    layout = SharedLayout(
        tuple(prod(size for size, _ in dim) for dim in dims),
        tuple(tuple(AddressDigit(*d) for d in dim) for dim in dims),
    )
    return layout if swizzle is None else layout.swizzled(*swizzle)


def addresses(raw: RawShared) -> dict[tuple[int, ...], int]:
    """The meaning, bit by bit."""
    dims, swizzle = raw
    result = {}
    for index in product(*(range(prod(size for size, _ in dim)) for dim in dims)):
        address = 0
        for x, dim in zip(index, dims):
            for size, stride in reversed(dim):
                address += x % size * stride
                x //= size
        bits = [address >> k & 1 for k in range(40)]
        if swizzle is not None:
            base, count, shift = swizzle
            for k in range(base, base + count):
                bits[k] ^= address >> (k + shift) & 1
        result[index] = sum(bit << k for k, bit in enumerate(bits))
    return result


def table_of(layout: SharedLayout) -> dict[tuple[int, ...], int]:
    return dict(zip(product(*map(range, layout.shape)), layout.table().reshape(-1).tolist()))


@given(raw_shared())
def test_addresses_are_the_oracle(raw: RawShared) -> None:
    layout, expected = build(raw), addresses(raw)
    assert table_of(layout) == expected
    assert {index: layout.offset(index) for index in expected} == expected
    assert layout.size > max(expected.values())
    assert layout.is_injective() == (len(set(expected.values())) == len(expected))
    assert layout.is_compact() == (sorted(expected.values()) == list(range(layout.size)))


@given(raw_shared())
def test_terms_are_the_addresses(raw: RawShared) -> None:
    layout = build(raw)
    for index, expected in addresses(raw).items():
        linear = sum(index[t.dim] // t.weight % t.size * t.stride for dim in layout.terms for t in dim)  # type: ignore[index]
        assert (linear if layout.swizzle is None else layout.swizzle.apply(linear)) == expected


@given(raw_shared(rank=1, with_swizzle=False), raw_shared(rank=1, with_swizzle=False))
def test_without_swizzle_equal_means_same_function(a: RawShared, b: RawShared) -> None:
    assert (build(a) == build(b)) == (addresses(a) == addresses(b))


def test_equal_means_same_function_on_all_small_layouts() -> None:
    """All strides of at most two digits a dimension without swizzle; all swizzles of compact power-of-two tiles."""
    digits = [[], *([d] for d in product((2, 3, 4), (1, 2, 3, 4, 6)))]
    digits += [[a, b] for a in product((2, 3), (1, 2, 3, 4, 6)) for b in product((2, 3), (1, 2, 3))]
    raws: list[RawShared] = [([dim], None) for dim in digits]
    triples = [None, *product(range(3), range(3), range(1, 4))]
    for sizes, outer_first in product([(2, 4), (4, 4), (8, 2)], (True, False)):
        strides = (sizes[1], 1) if outer_first else (1, sizes[0])
        raws += [([[(n, s)] for n, s in zip(sizes, strides)], swizzle) for swizzle in triples]
    for swizzled_only in (False, True):
        chosen = [raw for raw in raws if len(raw[0]) == 1 + swizzled_only]
        layouts = {build(raw) for raw in chosen}
        functions = {tuple(addresses(raw).items()) for raw in chosen}
        both = {(build(raw), tuple(addresses(raw).items())) for raw in chosen}
        assert len(layouts) == len(functions) == len(both) < len(chosen)


@given(raw_shared())
def test_text_round_trip(raw: RawShared) -> None:
    layout = build(raw)
    assert parse_shared_layout(str(layout)) == layout


@given(st.data())
def test_product_law(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    f = build(data.draw(raw_shared(rank, with_swizzle=False)))
    g = build(data.draw(raw_shared(rank)))
    tiles, inner = table_of(f), table_of(g)
    assert table_of(f * g) == {
        tuple(a * n + b for a, n, b in zip(tile, g.shape, index)): address * g.size + offset
        for tile, address in tiles.items()
        for index, offset in inner.items()
    }


@given(raw_shared(), st.integers(1, 4))
def test_stages_follow_each_other(raw: RawShared, count: int) -> None:
    layout = build(raw)
    staged = layout.stages(count)
    assert table_of(staged) == {
        (stage, *index): stage * layout.size + offset
        for stage in range(count)
        for index, offset in table_of(layout).items()
    }
    assert staged.size <= count * layout.size


@given(st.data())
def test_permute_and_unsqueeze(data: st.DataObject) -> None:
    layout = build(data.draw(raw_shared()))
    dims = data.draw(st.permutations(range(layout.rank)))
    permuted = {tuple(index[d] for d in dims): offset for index, offset in table_of(layout).items()}
    assert table_of(layout.permute(dims)) == permuted
    dim = data.draw(st.integers(0, layout.rank))
    wider = {(*index[:dim], 0, *index[dim:]): offset for index, offset in table_of(layout).items()}
    assert table_of(layout.unsqueeze(dim)) == wider


def test_constructors() -> None:
    assert row_major((2, 3, 4)).table().reshape(-1).tolist() == list(range(24))
    assert column_major((2, 3)).table().tolist() == [[0, 2, 4], [1, 3, 5]]
    assert padded((3, 4), 2).table().tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [12, 13, 14, 15]]
    assert padded((2, 3, 4), 1).offset((1, 2, 3)) == 1 * 15 + 2 * 5 + 3
    assert strided(((2, 4), 8), ((512, 8), 1)).offset((5, 3)) == 512 + 8 + 3
    assert row_major((64, 32)) == strided((64, 32), (32, 1)) == strided(((8, 8), 32), ((256, 32), 1))
    assert str(row_major((64, 32)).swizzled(3, 2, 3)) == "row_major((64, 32)).swizzled(3, 2, 3)"
    assert str(padded((64, 32), 8)) == "strided((64, 32), (40, 1))"
    assert Swizzle(3, 3, 3).period == 512


def test_a_swizzle_keeps_only_the_bits_that_some_address_has() -> None:
    gap = strided((2,), (8,))
    assert gap.swizzled(0, 2, 2) == gap.swizzled(1, 1, 2) == gap.swizzled(0, 4, 2)
    assert gap.swizzled(0, 2, 2).swizzle == Swizzle(1, 1, 2)
    assert gap.swizzled(0, 1, 1) == gap


@pytest.mark.parametrize(("row_nbytes", "bits"), [(128, 3), (64, 2), (32, 1), (16, 0)])
@pytest.mark.parametrize("nbytes", [1, 2, 4])
def test_swizzled_rows_are_those_of_the_hardware(row_nbytes: int, bits: int, nbytes: int) -> None:
    """The 128, 64 and 32 byte modes of TMA XOR the 16-byte chunk with bits 7.. of the byte address."""
    layout = swizzled((64, row_nbytes // nbytes), nbytes)
    for row, column in product(range(64), range(row_nbytes // nbytes)):
        address = row * row_nbytes + column * nbytes
        expected = address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)
        assert layout.offset((row, column)) * nbytes == expected


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 24, 64, 96])
@pytest.mark.parametrize("row_nbytes", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024])
def test_swizzled_tiles_have_no_conflicts(rows: int, row_nbytes: int) -> None:
    """Neither ldmatrix (eight rows of one chunk) nor eight lanes on consecutive chunks wait for a bank."""
    layout = swizzled((rows, row_nbytes // 2), 2)
    assert layout.is_injective()
    chunks = layout.table()[:, ::8] * 2
    down = [chunks[first : first + 8, c] for first in range(0, rows, 8) for c in range(chunks.shape[1])]
    along = [chunks.reshape(-1)[first : first + 8] for first in range(0, chunks.size, 8)]
    assert [bank_conflicts(lanes, 16) for lanes in down + along] == [0] * len(down + along)


def wavefronts(lane_addresses: list[int], access_nbytes: int) -> int:
    """Serve words one wavefront at a time: each bank delivers one word, to all lanes of the group that want it."""
    group = 32 * 4 // max(4, access_nbytes)
    total = 0
    for start in range(0, len(lane_addresses), group):
        waiting = {(a + byte) // 4 for a in lane_addresses[start : start + group] for byte in range(access_nbytes)}
        while waiting:
            total += 1
            served: dict[int, int] = {}
            for word in sorted(waiting):
                served.setdefault(word % 32, word)
            waiting -= set(served.values())
    return total


@given(st.data())
def test_bank_conflicts_are_wavefronts_beyond_the_groups(data: st.DataObject) -> None:
    access = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    lanes = data.draw(st.lists(st.integers(0, 300), max_size=32))
    lane_addresses = [lane * access for lane in lanes]
    groups = -(-len(lanes) * max(4, access) // 128)
    assert bank_conflicts(lane_addresses, access) == wavefronts(lane_addresses, access) - groups


def test_bank_conflict_examples() -> None:
    lanes = np.arange(32)
    assert [bank_conflicts(lanes * 4 * step, 4) for step in (0, 1, 2, 3, 4, 8, 32)] == [0, 0, 1, 0, 3, 7, 31]
    assert bank_conflicts(lanes * 8, 8) == 0
    assert bank_conflicts(lanes * 16, 16) == 0
    assert bank_conflicts(np.arange(8) * 128, 16) == 7
    assert bank_conflicts([], 4) == 0
    with pytest.raises(LayoutError, match="12 bytes a lane; expected 1, 2, 4, 8 or 16"):
        bank_conflicts([0], 12)
    with pytest.raises(LayoutError, match="not a multiple of 8"):
        bank_conflicts([4], 8)
    with pytest.raises(LayoutError, match="33 addresses"):
        bank_conflicts(range(33), 1)


def test_wrong_shared_layouts_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"sizes \[3\]; its extent is 4"):
        SharedLayout((4,), ((AddressDigit(3, 1),),))
    with pytest.raises(LayoutError, match=r"strides \[0\]; expected positive"):
        strided((4,), (0,))
    with pytest.raises(LayoutError, match="differ in rank"):
        strided((4, 4), (1,))
    with pytest.raises(LayoutError, match="as many of each"):
        strided(((2, 2),), (1,))
    with pytest.raises(LayoutError, match="shift >= 1"):
        row_major((8, 8)).swizzled(0, 1, 0)
    with pytest.raises(LayoutError, match="already has a swizzle"):
        swizzled((64, 64), 2).swizzled(0, 1, 1)
    with pytest.raises(LayoutError, match="swizzle the inner tile"):
        _ = swizzled((64, 64), 2) * row_major((1, 1))
    with pytest.raises(LayoutError, match="multiple of 16 bytes"):
        swizzled((8, 9), 2)
    with pytest.raises(LayoutError, match="not in a tile"):
        row_major((4, 4)).offset((4, 0))
