"""Layouts as text."""

from __future__ import annotations

import pytest

from tilus.layout import (
    LayoutError,
    atoms,
    column_spatial,
    local,
    padded,
    parse_layout,
    parse_shared_layout,
    replicated,
    row_major,
    spatial,
    swizzled,
)


@pytest.mark.parametrize(
    "text",
    [
        "local(2, 1).spatial(8, 4).local(1, 2)",
        "column_local(2, 2).spatial(8, 4).local(1, 2)",
        "local(2, 1).column_spatial(4, 8).local(2, 1)",
        "replicated(4, 1).local(3).spatial(32)",
        "identity(0)",
        "identity(2)",
        "spatial(2, 1).replicated(2).local(3, 5)",
        "spatial(8).local_replicated(2)",
    ],
)
def test_product_expressions_print_as_they_are_written(text: str) -> None:
    assert str(parse_layout(text)) == text


def test_parse_reads_the_whole_algebra() -> None:
    names = {"mma_c": atoms.mma_c()}
    assert parse_layout("local(2, 2) * mma_c", names) == local(2, 2) * atoms.mma_c()
    assert parse_layout("(local(2, 2) * mma_c) / mma_c", names) == local(2, 2)
    assert parse_layout("spatial(2, 4).left_divide(spatial(2, 1))") == spatial(1, 4)
    assert parse_layout("column_spatial(4, 8).reshape((32,))") == column_spatial(4, 8).reshape((32,))
    assert parse_layout("spatial(4, 8).permute([1, 0])") == column_spatial(8, 4)
    assert parse_layout("spatial(4, 8).reduce([1], keepdims=False)") == spatial(4).replicated(8)
    assert parse_layout("replicated(4, rank=2)") == replicated(4, 2)
    assert parse_shared_layout("padded((8, 8), 2)") == padded((8, 8), 2)
    assert parse_shared_layout("swizzled((64, 64), 2).stages(3)") == swizzled((64, 64), 2).stages(3)
    assert parse_shared_layout("row_major((2, 1)) * row_major((8, 8))") == row_major((16, 8))


@pytest.mark.parametrize(
    "text",
    [
        "spatial(4",
        "spatial",
        "open('x')",
        "spatial(4).__class__",
        "spatial(4).table()",
        "spatial(4) + local(4)",
        "[1]",
        "spatial(x)",
        "spatial('a')",
        "spatial(4.0)",
        "spatial(4).permute(1, 2, 3)",
        "spatial(4).permute()",
        "spatial(4).squeeze(spatial(4))",
        "spatial(**{'a': 1})",
        "",
    ],
)
def test_what_is_not_a_layout_is_refused(text: str) -> None:
    with pytest.raises(LayoutError):
        parse_layout(text)
