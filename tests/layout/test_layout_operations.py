"""Laws of inverses, complements, composition and slices of register layouts, against enumerations."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_oracle import Function, Raw, all_raw, build, function, function_of, layouts

from tilus.layout import (
    LayoutError,
    RegisterLayout,
    column_spatial,
    compose,
    local,
    local_replicated,
    reorder_locals,
    replicas,
    replicated,
    spatial,
)


def universe(shapes: list[tuple[int, ...]], replicas: tuple[int, ...] = (1, 2)) -> list[Raw]:
    return [
        raw
        for shape in shapes
        for replica in replicas
        for threads in range(1, prod(shape) * replica + 1)
        if prod(shape) * replica % threads == 0
        for raw in all_raw(shape, threads, prod(shape) * replica // threads)
    ]


def table_of(f: Function) -> np.ndarray:
    threads, slots = (max(key[k] for key in f) + 1 for k in (0, 1))
    rank = len(f[0, 0])
    return np.array([[f[t, i] for i in range(slots)] for t in range(threads)], dtype=np.int64).reshape(
        threads, slots, rank
    )


@given(layouts())
def test_a_layout_is_found_from_its_table(layout: RegisterLayout) -> None:
    assert RegisterLayout.try_from_table(layout.table()) == layout


def test_a_layout_is_found_exactly_when_there_is_one() -> None:
    """All functions from a few threads and slots to indices 0..3 that start at 0."""
    known = {
        tuple(function(raw).items()): build(raw)
        for raw in universe([(1,), (2,), (3,), (4,), (6,)], replicas=(1, 2, 3, 4, 6))
    }
    found = 0
    for threads, slots in ((1, 3), (2, 1), (2, 2), (2, 3), (4, 1)):
        places = list(product(range(threads), range(slots)))
        for values in product(range(4), repeat=len(places) - 1):
            f: Function = {place: (value,) for place, value in zip(places, (0, *values))}
            expected = known.get(tuple(f.items()))
            assert RegisterLayout.try_from_table(table_of(f)) == expected
            found += expected is not None
    assert found == 17


@given(layouts())
def test_inverses(layout: RegisterLayout) -> None:
    """One on the right always; on both sides exactly without replication."""
    inverse = layout.inverse()
    for index in product(*map(range, layout.shape)):
        assert layout(*inverse(index)) == index
    if layout.num_replicas * layout.num_local_replicas == 1:
        left = layout.left_inverse()
        assert all(left(index) == place for place, index in function_of(layout).items())
    else:
        assert any(inverse(index) != place for place, index in function_of(layout).items())
        with pytest.raises(LayoutError, match="has no left inverse"):
            layout.left_inverse()


@given(layouts())
def test_replicas_are_the_complement(layout: RegisterLayout) -> None:
    """(index, copy) determines (thread, slot); all combinations occur."""
    copies = replicas(layout)
    assert copies.shape == (layout.num_replicas, layout.num_local_replicas)
    assert (copies.num_threads, copies.num_locals) == (layout.num_threads, layout.num_locals)
    pairs = {(index, copies(t, i)) for (t, i), index in function_of(layout).items()}
    assert len(pairs) == layout.num_threads * layout.num_locals == layout.size * copies.size
    assert {(t, i) for (t, i) in function_of(layout) if copies(t, i) == (0, 0)} == {
        layout.inverse()(index) for index in product(*map(range, layout.shape))
    }
    again = replicas(copies)
    assert again.size == layout.size and replicas(again) == copies


@given(st.data())
def test_composition_law(data: st.DataObject) -> None:
    """Exact: `compose(f, g)(t, i) == f(*g(t, i))`, or a refusal where this function is not a layout."""
    f = data.draw(layouts(max_size=24))
    g = data.draw(layouts_of((f.num_threads, f.num_locals)))
    expected = {place: f(*pair) for place, pair in function_of(g).items()}
    try:
        assert function_of(compose(f, g)) == expected
    except LayoutError:
        assert not is_layout(expected)


def is_layout(f: Function) -> bool:
    """Whether f(t, i) - f(0, 0) is a sum of mixed-radix digits of t and of i, each in one dimension (all are complete)."""
    threads, slots = (max(key[k] for key in f) + 1 for k in (0, 1))
    rows, columns = [f[t, 0] for t in range(threads)], [f[0, i] for i in range(slots)]
    sums = all(
        f[t, i] == tuple(a + b for a, b in zip(rows[t], columns[i])) for t in range(threads) for i in range(slots)
    )
    return sums and is_mixed_radix(rows) and is_mixed_radix(columns)


def is_mixed_radix(line: list[tuple[int, ...]]) -> bool:
    count = len(line)
    if count == 1:
        return not any(line[0])
    step = line[1]
    return (sum(x != 0 for x in step) <= 1) and any(
        count % n == 0
        and all(line[x] == tuple(a + x % n * b for a, b in zip(line[x // n * n], step)) for x in range(count))
        and is_mixed_radix(line[::n])
        for n in range(2, count + 1)
    )


@st.composite
def layouts_of(draw: st.DrawFn, shape: tuple[int, ...]) -> RegisterLayout:
    """A layout of this shape: its extents factored anyhow, digits on both sides in any order, with replication."""
    threads, slots = [], []
    for dim, extent in enumerate(shape):
        weight = 1
        while weight < extent:
            rest = extent // weight
            size = draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0]))
            draw(st.sampled_from([threads, slots])).append((size, dim, weight))
            weight *= size
    if draw(st.booleans()):
        draw(st.sampled_from([threads, slots])).append((2, None, 0))
    return build((shape, tuple(draw(st.permutations(threads))), tuple(draw(st.permutations(slots)))))


@given(st.data())
def test_composition_is_associative_with_unit(data: st.DataObject) -> None:
    f = data.draw(layouts(max_size=24))
    assert compose(f, spatial(f.num_threads, 1) * local(1, f.num_locals)) == f
    g = data.draw(layouts_of((f.num_threads, f.num_locals)))
    h = data.draw(layouts_of((g.num_threads, g.num_locals)))
    try:
        inner = compose(g, h)
        left = compose(compose(f, g), h)
    except LayoutError:
        return
    assert compose(f, inner) == left


def test_composition_renumbers_threads_and_slots() -> None:
    fragment = local(2, 1).spatial(8, 4).local(1, 2)
    reversed_lanes = compose(fragment, column_spatial(32, 1).local(1, 4))
    assert reversed_lanes == fragment
    by_columns = compose(spatial(8, 4), column_spatial(8, 4).reshape((32, 1)))
    assert by_columns == column_spatial(8, 4)
    swapped = compose(fragment, spatial(32, 1) * local(1, 4).unflatten(1, (2, 2)).permute([0, 2, 1]).reshape((1, 4)))
    assert swapped == reorder_locals(fragment, [2, 2], [1, 0])
    with pytest.raises(LayoutError) as error:
        compose(fragment, spatial(32))
    assert str(error.value) == (
        "local(2, 1).spatial(8, 4).local(1, 2) after spatial(32): the inner layout has shape (32,), the outer one "
        "(threads, slots) (32, 4); expected them to be equal\n  hint: reshape or slice one of them"
    )


@given(st.data())
def test_flatten_and_unflatten(data: st.DataObject) -> None:
    f = data.draw(layouts(max_size=48))
    flat = f.flatten()
    assert flat.shape == (f.size,) and flat.unflatten(0, f.shape) == f
    assert flat.unflatten(-1, (1, f.size)).squeeze(0) == flat


def sliced(f: Function, dim: int, start: int, stop: int) -> Function | None:
    """The slots that are inside, numbered anew; None where they are not the same for all threads."""
    kept: dict[int, list[int]] = defaultdict(list)
    for (t, i), index in f.items():
        if start <= index[dim] < stop:
            kept[t].append(i)
    threads = max(t for t, _ in f) + 1
    if any(kept[t] != kept[0] for t in range(threads)):
        return None
    return {
        (t, k): tuple(x - start if d == dim else x for d, x in enumerate(f[t, i]))
        for t in range(threads)
        for k, i in enumerate(kept[t])
    }


def test_slices_exist_exactly_when_the_function_is_a_layout() -> None:
    """Every slice of every layout of some shapes with up to two replicas."""
    outcomes: dict[str, int] = defaultdict(int)
    for raw in universe([(4,), (6,), (8,), (2, 3), (4, 2)]):
        layout, f = build(raw), function(raw)
        for dim, extent in enumerate(layout.shape):
            for start, stop in ((a, b) for a in range(extent) for b in range(a + 1, extent + 1)):
                expected = sliced(f, dim, start, stop)
                try:
                    assert function_of(layout.slice(dim, start, stop)) == expected
                    outcomes["found"] += 1
                except LayoutError as error:
                    kind = "order" if "whose order" in str(error) else "threads"
                    outcomes[kind] += 1
                    assert kind == ("threads" if expected is None else "order")
                    assert expected is None or not is_layout(expected)
    assert min(outcomes.values()) > 20 and len(outcomes) == 3


def test_refused_slices_say_why() -> None:
    with pytest.raises(LayoutError) as error:
        spatial(8).local(2).slice(0, 4, 8)
    assert str(error.value) == (
        "slice 4:8 of dimension 0 of spatial(8).local(2) is no layout: threads hold indices 0..14 in slot 0, some inside and "
        "some not\n  hint: slice where no thread digit is cut, or convert to a layout with this dimension in slots"
    )
    columns = local(2, 2).permute([1, 0]).reshape((4,))
    with pytest.raises(LayoutError) as error:
        columns.slice(0, 1, 3)
    assert str(error.value) == (
        f"slice 1:3 of dimension 0 of {columns} is no layout: slots [1, 2] are left, whose order is not that of "
        "digits\n  hint: slice at multiples of the digits' sizes, or reorder the slots first"
    )
    with pytest.raises(LayoutError) as error:
        local(8).slice(0, 4, 9)
    assert str(error.value) == (
        "slice 4:9 of dimension 0 of local(8); expected 0 <= start < stop <= 8\n"
        "  hint: bounds count from 0, `stop` is excluded"
    )
    with pytest.raises(LayoutError) as error:
        replicated(4, 1).left_inverse()
    assert str(error.value) == (
        "replicated(4, 1) has no left inverse: 4 threads hold each element, each in 1 slots; expected one owner\n"
        "  hint: inverse() names the first owner, owner() all of them"
    )
    assert local(8).spatial(4).slice(0, 8, 24) == local(4).spatial(4)
    assert (local(4) * local_replicated(2, 1)).slice(0, 2, 4) == local(2) * local_replicated(2, 1)
