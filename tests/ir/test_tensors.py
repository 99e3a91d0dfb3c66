"""Tensors refuse layouts that cannot be theirs."""

from __future__ import annotations

import pytest

from tilus.dtypes import f16
from tilus.errors import TilusError
from tilus.ir.tensor import SharedTensor
from tilus.layout import SharedLayout, row_major, strided, swizzled


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        (row_major((8, 8)).at(4), "starts at address 4"),
        (strided((8, 8), (4, 1)), "gives elements the same address"),
        (row_major((8, 1)).expand(1, 8), "gives elements the same address"),
    ],
)
def test_a_buffer_starts_at_0_and_holds_every_element_once(layout: SharedLayout, found: str) -> None:
    with pytest.raises(TilusError) as error:
        SharedTensor(f16, (8, 8), layout, "tile")
    assert str(error.value) == (
        f"layout {layout} of tile {found}; a buffer starts at 0 and holds every element once\n"
        "  hint: give the buffer the layout of all of its memory, and load or store the part"
    )
    assert SharedTensor(f16, (8, 8), swizzled((8, 8), 2)).nbytes == 128
