"""Candidates for shared tensors: every one is a layout of the tensor, no two elements share an address, padding is bounded."""

from __future__ import annotations

from math import prod

import pytest

from tilus.layout import SharedLayout, column_major, row_major, swizzled
from tilus.layout.candidates import ELABORATE_KINDS, orders, plain, roomy, variants
from tilus.layout.operands import wgmma_operand

SHAPES = [
    (64, 64), (128, 32), (8, 96), (96, 48), (3, 16, 32), (2, 1, 8, 128), (2, 3, 4, 8, 16), (33, 7), (256,), (1, 64), (64, 1),
    (4, 1, 16, 1), (),
]  # fmt: skip


def everything(shape: tuple[int, ...], nbits: int) -> dict[str, list[SharedLayout]]:
    found = {
        kind: [v for order in orders(shape) for v in variants(kind, shape, nbits, order)] for kind in ELABORATE_KINDS
    }
    return {"plain": [plain(shape, order) for order in orders(shape)], **found}


@pytest.mark.parametrize("nbits", [1, 3, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_candidates_are_layouts_of_the_tensor(shape: tuple[int, ...], nbits: int) -> None:
    for kind, layouts in everything(shape, nbits).items():
        for layout in layouts:
            assert layout.shape == shape and layout.is_injective(), (kind, layout)
            assert (layout.swizzle is not None) == (kind == "swizzled"), (kind, layout)
            if kind in ("plain", "core matrices"):
                assert layout.is_compact(), (kind, layout)
            if kind == "padded":
                assert prod(shape) < layout.size, (kind, layout)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orders_are_permutations_and_begin_with_row_major(shape: tuple[int, ...]) -> None:
    found = orders(shape)
    matter = [d for d, extent in enumerate(shape) if extent > 1]
    assert plain(shape, found[0]) == row_major(shape)
    assert all(sorted(order) == matter for order in found)
    assert len({plain(shape, order) for order in found}) == len(found)
    assert {order[-1] for order in found if matter} == set(matter)
    for order in found:
        assert roomy(shape, order).is_injective()


def test_the_modes_of_the_hardware_are_candidates_and_come_first() -> None:
    for columns in (16, 32, 64):
        first = next(variants("swizzled", (128, columns), 16, (0, 1)))
        assert first == swizzled((128, columns), 2) == wgmma_operand((128, columns), 2, 2 * columns, "k")
    core = next(variants("core matrices", (3, 128, 64), 16, (0, 1, 2)))
    assert core == wgmma_operand((3, 128, 64), 2, 0, "k")
    assert plain((8, 4), (1, 0)) == column_major((8, 4)) and plain((8, 4), (0, 1)) == row_major((8, 4))


def test_paddings_shift_rows_by_4_8_and_16_bytes() -> None:
    assert [v.offset((1, 0)) for v in variants("padded", (8, 64), 16, (0, 1))] == [66, 68, 72]
    assert [v.offset((1, 0)) for v in variants("padded", (8, 50), 16, (0, 1))] == [52, 56, 64]
    assert [v.offset((1, 0)) for v in variants("padded", (8, 32), 3, (0, 1))] == [64, 128, 256]
