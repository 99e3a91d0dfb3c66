"""Laws of the operations on dimensions, of broadcasting and of the default layout, against enumerations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from math import gcd, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_oracle import Function, all_raw, build, function, function_of, layouts

from tilus.layout import (
    LayoutError,
    RegisterLayout,
    auto,
    broadcast_operand,
    column_local,
    column_spatial,
    concat,
    local,
    local_replicated,
    replicated,
    slot_map,
    spatial,
)


def ravel(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    flat = 0
    for x, extent in zip(index, shape):
        flat = flat * extent + x
    return flat


def renamed(f: Function, rule: object) -> Function:
    return {key: rule(index) for key, index in f.items()}  # type: ignore[operator]


def all_shapes(size: int, rank: int) -> list[tuple[int, ...]]:
    return [s for s in product(range(1, size + 1), repeat=rank) if prod(s) == size]


@given(st.data())
def test_constructors_enumerate_in_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    rows = list(product(*map(range, shape)))
    columns = [index[::-1] for index in product(*map(range, shape[::-1]))]
    assert function_of(spatial(*shape)) == {(t, 0): index for t, index in enumerate(rows)}
    assert function_of(local(*shape)) == {(0, i): index for i, index in enumerate(rows)}
    assert function_of(column_spatial(*shape)) == {(t, 0): index for t, index in enumerate(columns)}
    assert function_of(column_local(*shape)) == {(0, i): index for i, index in enumerate(columns)}
    count, origin = data.draw(st.integers(1, 7)), (0,) * len(shape)
    assert function_of(replicated(count, len(shape))) == {(t, 0): origin for t in range(count)}
    assert function_of(local_replicated(count, len(shape))) == {(0, i): origin for i in range(count)}


def test_a_chain_is_a_product() -> None:
    f = local(3, 2)
    assert f.spatial(8, 4) == f * spatial(8, 4)
    assert f.column_spatial(8, 4) == f * column_spatial(8, 4)
    assert f.local(8, 4) == f * local(8, 4)
    assert f.column_local(8, 4) == f * column_local(8, 4)
    assert f.replicated(5) == f * replicated(5, 2)
    assert f.local_replicated(5) == f * local_replicated(5, 2)


@given(st.data())
def test_permute(data: st.DataObject) -> None:
    f = data.draw(layouts())
    dims = data.draw(st.permutations(range(f.rank)))
    permuted = f.permute(dims)
    assert function_of(permuted) == renamed(function_of(f), lambda index: tuple(index[d] for d in dims))
    assert permuted.shape == tuple(f.shape[d] for d in dims)
    assert permuted.permute([dims.index(d) for d in range(f.rank)]) == f


@given(st.data())
def test_unsqueeze_and_squeeze(data: st.DataObject) -> None:
    f = data.draw(layouts())
    dim = data.draw(st.integers(0, f.rank))
    wider = f.unsqueeze(dim)
    assert function_of(wider) == renamed(function_of(f), lambda index: (*index[:dim], 0, *index[dim:]))
    assert wider.squeeze(dim) == f


@given(st.data())
def test_reshape_keeps_the_flat_index(data: st.DataObject) -> None:
    f = data.draw(layouts(max_size=48))
    flat = f.reshape((f.size,))
    assert function_of(flat) == renamed(function_of(f), lambda index: (ravel(index, f.shape),))
    assert flat.reshape(f.shape) == f


@pytest.mark.parametrize("size", [1, 4, 6, 12])
def test_reshape_exists_exactly_when_the_function_is_a_layout(size: int) -> None:
    """Every layout of `size` elements in one or two dimensions, to every shape of them."""
    shapes = all_shapes(size, 1) + all_shapes(size, 2)
    by_shape: dict[tuple[int, ...], dict[object, RegisterLayout]] = {}
    for shape in shapes:
        known: dict[object, RegisterLayout] = {}
        for total, threads in product((size, 2 * size), range(1, 2 * size + 1)):
            if total % threads == 0:
                for raw in all_raw(shape, threads, total // threads):
                    known[frozenset((key, ravel(index, shape)) for key, index in function(raw).items())] = build(raw)
        by_shape[shape] = known
    refused = 0
    for known, target in product(by_shape.values(), shapes):
        for flat, layout in known.items():
            expected = by_shape[target].get(flat)
            if expected is not None:
                assert layout.reshape(target) == expected
            else:
                refused += 1
                with pytest.raises(LayoutError, match="cannot be reshaped"):
                    layout.reshape(target)
    assert (refused > 0) == (size in (6, 12))


@given(st.data())
def test_reduce(data: st.DataObject) -> None:
    """Each thread keeps what it has of the reduced tile, once for every thread digit and without doubled slots."""
    f = data.draw(layouts())
    dims = data.draw(st.sets(st.integers(0, max(0, f.rank - 1)))) if f.rank else set()
    kept = f.reduce(sorted(dims))
    assert kept.shape == tuple(1 if k in dims else n for k, n in enumerate(f.shape))
    for thread in range(f.num_threads):
        masked = [tuple(0 if k in dims else x for k, x in enumerate(f(thread, i))) for i in range(f.num_locals)]
        got = [kept(thread, i) for i in range(kept.num_locals)]
        # First appearances keep their order; only replication of f itself repeats an element.
        assert list(dict.fromkeys(got)) == list(dict.fromkeys(masked))
        assert set(Counter(got).values()) == {f.num_local_replicas}
    dropped = f.reduce(sorted(dims), keepdims=False)
    assert function_of(dropped) == renamed(
        function_of(kept), lambda index: tuple(x for k, x in enumerate(index) if k not in dims)
    )
    assert f.reduce([-d - 1 for d in range(f.rank)]).shape == (1,) * f.rank


@given(st.data())
def test_reduce_of_a_product(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    f, g = (data.draw(layouts(rank, 32)) for _ in range(2))
    dims = sorted(data.draw(st.sets(st.integers(0, rank - 1))))
    assert (f * g).reduce(dims) == f.reduce(dims) * g.reduce(dims)


@given(st.data())
def test_expand(data: st.DataObject) -> None:
    f = data.draw(layouts(max_size=48))
    dim, size = data.draw(st.integers(0, f.rank)), data.draw(st.integers(1, 6))
    one = f.unsqueeze(dim)
    wide = one.expand(dim, size)
    assert function_of(wide) == {
        (t, copy * f.num_locals + i): (*index[:dim], copy, *index[dim:])
        for (t, i), index in function_of(f).items()
        for copy in range(size)
    }
    assert all(one(0, slot) == one(0, i % f.num_locals) for i, slot in enumerate(slot_map(wide, one)))


@given(layouts(max_size=24), layouts(max_size=24))
def test_concat(f: RegisterLayout, g: RegisterLayout) -> None:
    assert function_of(concat(f, g)) == {
        (t, i): f(t // g.num_threads, i // g.num_locals) + g(t % g.num_threads, i % g.num_locals)
        for t in range(f.num_threads * g.num_threads)
        for i in range(f.num_locals * g.num_locals)
    }


@given(st.data())
def test_a_broadcast_operand_serves_every_element(data: st.DataObject) -> None:
    f = data.draw(layouts())
    dims = sorted(data.draw(st.sets(st.integers(0, f.rank - 1)))) if f.rank else []
    operand = broadcast_operand(f, dims)
    assert operand.shape == tuple(1 if k in dims else n for k, n in enumerate(f.shape))
    assert operand.num_local_replicas == 1
    slots = slot_map(f, operand)
    for (t, i), index in function_of(f).items():
        assert operand(t, slots[i]) == tuple(0 if k in dims else x for k, x in enumerate(index))


def enumerated_slot_map(result: Function, operand: Function, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """For each slot of the result the first slot of the operand that fits for every thread."""
    threads, slots, operand_slots = (
        range(max(key[k] for key in f) + 1) for f, k in ((result, 0), (result, 1), (operand, 1))
    )
    found: list[int] = []
    for i in slots:
        need = {t: tuple(0 if n == 1 else x for x, n in zip(result[t, i], shape)) for t in threads}
        fits = [j for j in operand_slots if all(operand[t, j] == need[t] for t in threads)]
        if not fits:
            return None
        found.append(fits[0])
    return tuple(found)


def test_slot_map_exists_exactly_when_enumeration_finds_one() -> None:
    """All pairs of layouts of (2, 3), (4,) and so on with the same threads, and all their broadcast operands."""
    outcomes: Counter[bool] = Counter()
    for shape in [(4,), (6,), (2, 2), (2, 3)]:
        operand_shapes = list(product(*({1, n} for n in shape)))
        for threads in (1, 2, 3, 4, 6):
            known = {
                s: {build(r): function(r) for slots in (1, 2, 3, 4, 6) for r in all_raw(s, threads, slots)}
                for s in operand_shapes
            }
            for result, result_function in known[shape].items():
                for operand_shape, operand in ((s, o) for s in operand_shapes for o in known[s]):
                    expected = enumerated_slot_map(result_function, known[operand_shape][operand], operand_shape)
                    outcomes[expected is not None] += 1
                    if expected is not None:
                        assert slot_map(result, operand) == expected
                    else:
                        with pytest.raises(LayoutError, match="do not hold"):
                            slot_map(result, operand)
    assert min(outcomes[True], outcomes[False]) > 100


def test_slot_map_refuses_what_does_not_broadcast() -> None:
    with pytest.raises(LayoutError, match=r"shape \(3,\) does not broadcast to \(6,\)"):
        slot_map(local(6), local(3))
    with pytest.raises(LayoutError, match=r"shape \(6, 1\) does not broadcast"):
        slot_map(local(6), local(6, 1))
    with pytest.raises(LayoutError, match="2 threads hold the operand, 4 hold the result"):
        slot_map(spatial(4), spatial(2).local(2))
    with pytest.raises(LayoutError, match=r"hint: convert the operand to spatial\(4\)"):
        slot_map(spatial(4), column_spatial(2, 2).reshape((4,)))


@given(st.data())
def test_auto_fits_every_shape(data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 3))
    shape = tuple(data.draw(st.integers(1, 100)) if rank < 3 else data.draw(st.integers(1, 12)) for _ in range(rank))
    threads, vector = (
        data.draw(st.sampled_from([1, 32, 96, 128, 160, 256])),
        data.draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
    )
    order = data.draw(st.permutations(range(rank)))
    layout = auto(shape, threads, vector, order)
    assert (layout.shape, layout.num_threads, layout.num_local_replicas) == (shape, threads, 1)
    if rank:
        inner, width = order[0], gcd(vector, shape[order[0]])
        steps = [layout(0, i) for i in range(width)]
        assert steps == [tuple(i if k == inner else 0 for k in range(rank)) for i in range(width)]
        if threads > 1 and shape[inner] > width and gcd(threads, shape[inner] // width) > 1:
            assert layout(1, 0) == tuple(width if k == inner else 0 for k in range(rank))
    assert auto(shape, threads, vector) == auto(shape, threads, vector, range(rank)[::-1])


def test_auto_examples() -> None:
    assert auto((128, 64), 128, 8) == local(8, 1).spatial(16, 8).local(1, 8)
    assert auto((96,), 128) == replicated(4, 1).local(3).spatial(32)
    assert auto((64,), 128, 4) == replicated(8, 1).spatial(16).local(4)
    assert auto((64, 128), 128, 8, order=(0, 1)) == local(1, 8).column_spatial(8, 16).local(8, 1)
    with pytest.raises(LayoutError, match="positive sizes"):
        auto((0, 4), 32)
    with pytest.raises(LayoutError, match=r"each of 0\.\.1 once"):
        auto((4, 4), 32, order=(1, 1))


REFUSED: dict[str, tuple[Callable[[RegisterLayout], object], str]] = {
    "index": (
        lambda f: f.index(32, 0),
        """
thread 32, slot 0 of a layout with 32 threads and 1 slots
  hint: both count from 0; table() has the indices of all of them
""",
    ),
    "permute": (
        lambda f: f.permute([0, 0]),
        """
permute got dims (0, 0); expected each of 0..1 once
  hint: list all of them: permute([1, 0]) reverses their order
""",
    ),
    "squeeze": (
        lambda f: f.squeeze(0),
        """
squeeze of dimension 0 with extent 8; expected extent 1
  hint: reduce([0], keepdims=False) drops it after a reduction, reshape joins it with its neighbour
""",
    ),
    "unsqueeze": (
        lambda f: f.unsqueeze(3),
        """
unsqueeze at 3 of a layout of rank 2; expected 0..2
  hint: unsqueeze(2) appends a dimension
""",
    ),
    "reduce": (
        lambda f: f.reduce([2]),
        """
dimension 2 of a layout of rank 2 and shape (8, 4)
  hint: dimensions are -2..1; unsqueeze inserts further ones
""",
    ),
    "expand": (
        lambda f: f.expand(1, 8),
        """
expand of dimension 1 with extent 4; expected extent 1
  hint: repeat the tile with a product: local(...) * layout
""",
    ),
    "reshape to negative extents": (
        lambda f: f.reshape((-4, -8)),
        """
reshape of (8, 4) (32 elements) to (-4, -8) (32 elements)
  hint: give positive extents for as many elements; expand and products with local(...) make larger layouts
""",
    ),
    "reshape to another size": (
        lambda f: f.reshape((5, 7)),
        """
reshape of (8, 4) (32 elements) to (5, 7) (35 elements)
  hint: give positive extents for as many elements; expand and products with local(...) make larger layouts
""",
    ),
    "extent 0": (
        lambda _: spatial(8, 0),
        """
a layout got shape (8, 0); expected positive extents
  hint: a dim that is not there has extent 1
""",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_dimensions_are_refused(case: str) -> None:
    refused, message = REFUSED[case]
    with pytest.raises(LayoutError) as error:
        refused(spatial(8, 4))
    assert str(error.value) == message.strip()
