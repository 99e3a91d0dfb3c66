"""Conversions between register layouts against enumeration."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import reduce
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_oracle import all_raw, build, function_of

from tilus.layout import (
    LayoutError,
    RegisterLayout,
    atoms,
    column_spatial,
    conversion_scope,
    local,
    route,
    slot_map,
    spatial,
)


@st.composite
def tilings(draw: Any, threads: tuple[int, ...] = (3, 4), slots: tuple[int, ...] = (2, 2)) -> RegisterLayout:
    """A one-dimensional tile over the product of `threads`, its digits in any order."""
    pieces = [spatial(n) for n in threads] + [local(n) for n in slots]
    return reduce(RegisterLayout.__mul__, draw(st.permutations(pieces)))


def same_tile_pairs() -> list[tuple[RegisterLayout, RegisterLayout]]:
    pairs = []
    for shape, threads, slots in product([(4,), (6,), (2, 2), (2, 3)], (1, 2, 3, 4, 6), (1, 2, 3, 4, 6)):
        layouts = sorted({build(raw) for raw in all_raw(shape, threads, slots)}, key=str)
        pairs += list(product(layouts, layouts))
    return pairs


def check_route(src: RegisterLayout, dst: RegisterLayout) -> bool:
    found = route(src, dst)
    if found is None:
        return False
    for (t, i), index in function_of(dst).items():
        assert src(found.thread(t, i), found.slot(t, i)) == index
    return True


def test_routes_of_all_small_pairs_lead_to_the_value() -> None:
    outcomes = Counter(check_route(src, dst) for src, dst in same_tile_pairs())
    assert outcomes[True] > 1000 and outcomes[False] > 0


@given(tilings(), tilings())
def test_routes_lead_to_the_value(src: RegisterLayout, dst: RegisterLayout) -> None:
    check_route(src, dst)
    assert check_route(src, src)


@given(tilings((2, 2, 4), (2, 4)), tilings((8, 2), (2, 2, 2)), st.sampled_from([(128,), (8, 16), (2, 4, 16)]))
def test_layouts_of_powers_of_two_always_have_a_route(
    src: RegisterLayout, dst: RegisterLayout, shape: tuple[int, ...]
) -> None:
    assert check_route(src.reshape(shape), dst.reshape(shape))


def enumerated_scope(src: RegisterLayout, dst: RegisterLayout, warp_size: int) -> str:
    warps = defaultdict(set)
    for (t, _), index in function_of(src).items():
        warps[t // warp_size].add(index)
    if any(index not in warps[t // warp_size] for (t, _), index in function_of(dst).items()):
        return "block"
    threads, slots = range(dst.num_threads), range(src.num_locals)
    renames = all(any(all(src(t, j) == dst(t, i) for t in threads) for j in slots) for i in range(dst.num_locals))
    return "thread" if renames else "warp"


def test_the_scope_is_the_smallest_that_holds_the_values() -> None:
    scopes = Counter()
    for src, dst in same_tile_pairs():
        for warp_size in (2, 3):
            expected = enumerated_scope(src, dst, warp_size)
            assert conversion_scope(src, dst, warp_size) == expected
            scopes[expected] += 1
    assert min(scopes[kind] for kind in ("thread", "warp", "block")) > 100


def test_conversions_of_real_tiles() -> None:
    a, _, c = atoms.mma_layouts(64, 32, 32, (4, 1))
    # The accumulator of one product is the A operand of the next without moving (FlashAttention's P).
    assert conversion_scope(c, a) == "thread"
    assert sorted(slot_map(a, c)) == list(range(16))
    assert conversion_scope(spatial(4, 8), column_spatial(4, 8)) == "warp"
    assert conversion_scope(local(4, 1) * spatial(1, 64), local(1, 4).spatial(4, 16)) == "block"
    assert conversion_scope(spatial(), spatial()) == "thread"
    with pytest.raises(LayoutError, match=r"shape \(8,\) over 8 threads to shape \(8,\) over 4 threads"):
        route(spatial(8), spatial(4).local(2))
    with pytest.raises(LayoutError, match="expected the same shape and threads"):
        conversion_scope(spatial(8), spatial(2, 4))


@given(tilings())
def test_a_replicated_source_is_read_close_by(layout: RegisterLayout) -> None:
    """Every thread reads from the replica with its own replica digits: here, from its own half of the threads."""
    src = spatial(1).replicated(2) * layout
    found = route(src, src)
    assert found is not None
    for t in range(src.num_threads):
        for i in range(src.num_locals):
            assert (found.thread(t, i), found.slot(t, i)) == (t, i)
