"""CuTe as an oracle: its composition, complement, division, product, coalescing and values against tilus.layout.

Runs where nvidia-cutlass-dsl is installed. No GPU is needed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any, TypeVar

import pytest

from tilus.layout import (
    Digit,
    LayoutError,
    RegisterLayout,
    SharedLayout,
    Swizzle,
    atoms,
    column_major,
    complement,
    compose,
    local,
    row_major,
    spatial,
    strided,
    swizzled,
)

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
cute: Any = pytest.importorskip("cutlass.cute")

from tilus.interop.cute import memory_from_cute, register_from_cute, to_cute  # noqa: E402

T = TypeVar("T")


def traced(call: Callable[[], T]) -> T:
    """The result of a call within a trace, where CuTe's layouts live."""
    results: list[T] = []

    @cute.jit
    def run() -> None:
        results.append(call())

    run()
    return results[0]


def factors(rng: random.Random, extent: int) -> list[int]:
    sizes: list[int] = []
    while extent > 1:
        sizes.append(rng.choice([n for n in range(2, extent + 1) if extent % n == 0]))
        extent //= sizes[-1]
    return sizes


def random_memory(rng: random.Random, shape: tuple[int, ...], swizzle: bool = False) -> SharedLayout:
    """Digits of every dimension in any order, with gaps of 2 and 3 between some; no two elements share an address."""
    digits = [(dim, size) for dim, extent in enumerate(shape) for size in factors(rng, extent)]
    strides: dict[int, int] = {}
    stride = 1
    for k in rng.sample(range(len(digits)), len(digits)):
        strides[k] = stride
        stride *= digits[k][1] * rng.choice([1, 1, 1, 2, 3])
    dims = [
        tuple(Digit(size, 0, strides[k]) for k, (d, size) in enumerate(digits) if d == dim) for dim in range(len(shape))
    ]
    bits = rng.randint(1, 3)
    xor = Swizzle(rng.randint(0, 3), bits, rng.randint(bits, 4)) if swizzle else None
    return SharedLayout(shape, tuple(dims), xor, rng.choice([0, 8, 64]) if swizzle else 0)


def random_register(rng: random.Random, shape: tuple[int, ...]) -> RegisterLayout:
    threads: list[Digit] = []
    slots: list[Digit] = []
    for dim, extent in enumerate(shape):
        weight = 1
        for size in factors(rng, extent):
            rng.choice([threads, slots]).append(Digit(size, dim, weight))
            weight *= size
    if rng.random() < 0.3:
        rng.choice([threads, slots]).append(Digit(rng.choice([2, 3]), None, 0))
    rng.shuffle(threads)
    rng.shuffle(slots)
    return RegisterLayout(shape, tuple(threads), tuple(slots))


SHAPES = [(8,), (12,), (4, 8), (6, 4), (16, 16), (8, 12), (2, 4, 8), (3, 4, 2)]


@pytest.mark.parametrize("swizzle", [False, True])
def test_memory_layouts_have_the_values_of_cute(swizzle: bool) -> None:
    """Both conversions, and CuTe's own evaluation at random coordinates."""
    rng = random.Random(1)

    def check() -> int:
        composed = 0
        for _ in range(200):
            layout = random_memory(rng, rng.choice(SHAPES), swizzle)
            other = to_cute(layout)
            composed += hasattr(other, "inner")
            assert memory_from_cute(other) == layout
            for _ in range(4):
                index = tuple(rng.randrange(extent) for extent in layout.shape)
                assert other(index if len(index) > 1 else index[0]) == layout(index), (layout, index)
        return composed

    assert (traced(check) > 150) == swizzle


def test_register_layouts_are_thread_value_layouts() -> None:
    rng = random.Random(2)

    def check() -> None:
        known = [atoms.mma_a(), atoms.mma_b(), atoms.mma_c(), atoms.ldmatrix(), spatial(4).local(3)]
        for layout in [*known, *(random_register(rng, rng.choice(SHAPES)) for _ in range(200))]:
            other = to_cute(layout)
            assert register_from_cute(other, layout.shape) == layout
            for _ in range(3):
                place = rng.randrange(layout.num_threads), rng.randrange(layout.num_locals)
                assert other(place) == column_major(layout.shape)(layout(*place))

    traced(check)


def test_composition() -> None:
    """Where CuTe has a composition, it is ours; ours exist for more."""
    rng = random.Random(3)

    def check() -> tuple[int, int]:
        both = ours_only = 0
        for _ in range(300):
            shape = rng.choice(SHAPES)
            memory, tile = random_memory(rng, shape), random_register(rng, shape)
            try:
                ours = compose(memory, tile)
            except LayoutError:
                ours = None
            try:
                theirs = memory_from_cute(cute.composition(to_cute(memory), to_cute(tile)))
            except Exception as error:
                assert "unable to compute the following composition" in str(error)
                theirs = None
            assert theirs is None or theirs == ours, (memory, tile)
            both += theirs is not None
            ours_only += theirs is None and ours is not None
        return both, ours_only

    both, _ = traced(check)
    assert both > 150


def test_complement() -> None:
    rng = random.Random(4)

    def check() -> int:
        found = 0
        for _ in range(300):
            layout = random_memory(rng, rng.choice(SHAPES))
            size = layout.size * rng.choice([1, 2, 3, 4])
            try:
                ours = complement(layout, size)
            except LayoutError:
                continue
            theirs = memory_from_cute(cute.complement(to_cute(layout), size))
            # CuTe keeps a mode for each gap; both count from the innermost gap outwards.
            assert theirs.permute(range(theirs.rank)[::-1]).flatten() == ours, (layout, size)
            found += 1
        return found

    assert traced(check) > 100


def test_product_and_division() -> None:
    """blocked_product(g, f) is f * g for tiles without gaps; zipped_divide takes it apart."""
    rng = random.Random(5)

    def check() -> None:
        for _ in range(200):
            shape = rng.choice([s for s in SHAPES if len(s) == 2])
            g = rng.choice([row_major, column_major])(shape)
            f = random_memory(rng, rng.choice([s for s in SHAPES if len(s) == 2]))
            whole = f * g
            assert memory_from_cute(cute.blocked_product(to_cute(g), to_cute(f))) == whole, (f, g)
            divided = cute.zipped_divide(to_cute(whole), g.shape)
            tiles, rest = (memory_from_cute(cute.get(divided, mode=[k])) for k in (0, 1))
            assert tiles == g == whole.left_divide(f)
            assert all(rest(x) == g.size * f(x) for x in product(*map(range, f.shape))) and whole / g == f

    traced(check)


def test_the_normal_form_is_coalesced() -> None:
    """The digits of a flat layout are the modes that CuTe's coalescing leaves."""
    rng = random.Random(6)

    def check() -> None:
        for _ in range(300):
            layout = random_memory(rng, rng.choice(SHAPES))
            flat = layout.permute(range(layout.rank)[::-1]).flatten()  # colexicographic order of the same layout
            theirs = cute.coalesce(to_cute(layout))
            shape, stride = theirs.shape, theirs.stride
            modes = list(zip(shape, stride)) if isinstance(shape, tuple) else [(shape, stride)]
            assert [(d.size, d.weight) for d in reversed(flat.digits[0])] == modes, layout

    traced(check)


def test_inverse_of_compact_layouts() -> None:
    """CuTe's right inverse maps an address to the colexicographic index that our inverse finds."""
    rng = random.Random(7)

    def check() -> None:
        for _ in range(100):
            layout = random_memory(rng, rng.choice(SHAPES))
            if not layout.is_compact():
                continue
            theirs = memory_from_cute(cute.right_inverse(to_cute(layout)))
            theirs = theirs.permute(range(theirs.rank)[::-1]).flatten()  # of an address, colexicographically
            for address in range(prod(layout.shape)):
                assert theirs((address,)) == column_major(layout.shape)(layout.inverse()(address))

    traced(check)


def refused(call: Callable[[], object], text: str) -> None:
    with pytest.raises(LayoutError) as error:
        call()
    assert str(error.value) == text


def test_what_cute_does_not_have_is_refused() -> None:
    def check() -> None:
        deep = row_major((8, 8)).swizzled(0, 3, 1)
        refused(
            lambda: to_cute(deep),
            f"{deep} has a swizzle of 3 bits and shift 1; CuTe has only those with shift >= bits\n  hint: use another swizzle",
        )
        refused(
            lambda: to_cute(row_major(())),
            "row_major(()) has rank 0; expected a dimension, as CuTe has no such layouts\n  hint: unsqueeze it",
        )
        three = to_cute(row_major((2, 2, 2)))
        refused(lambda: register_from_cute(three, (8,)), f"{three} has 3 modes; expected two, (thread, value)")
        wide = to_cute(strided((4, 2), (1, 4)))
        refused(
            lambda: register_from_cute(wide, (3, 4)),
            f"{wide} is not a layout of a tile of shape (3, 4): its mode of size 4 and stride 1 straddles dimensions or leaves "
            "the tile",
        )
        assert to_cute(swizzled((64, 64), 2))((9, 5)) == 589
        assert register_from_cute(to_cute(local(2, 3)), (2, 3)) == local(2, 3)

    traced(check)
