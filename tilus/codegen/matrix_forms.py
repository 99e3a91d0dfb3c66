"""Tiles as matrices of eight 16-byte rows, which ldmatrix and stmatrix move between shared memory and a warp's registers.

A lane holds one 32-bit word of each matrix: word c of row r is in lane 4 r + c, or, transposed, elements 2c and 2c + 1 of a
column (16-bit elements only). So a tile can move this way when that fragment divides its layout and every row is 16 aligned
consecutive bytes of shared memory; elements of other widths than 16 bits travel as parts of such rows.
Source: PTX ISA, "Warp-level matrix instructions: ldmatrix" and "stmatrix".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tilus.layout import RegisterLayout, local, spatial
from tilus.layout.atoms import ldmatrix, ldmatrix_trans

MATRIX_ROWS = 8
MATRIX_ROW_NBITS = 128


@dataclass(frozen=True)
class Matrices:
    """How matrices cover a tile.

    rows: who gives the address of which row, 8 "threads" a warp; a run of slots is a row. starts: tile index at which each of
    a warp's matrices begins. groups: how many of them each instruction moves. row_axis: the tile axis along which the rows of
    a matrix follow each other. transposed: whether lanes get columns.
    """

    rows: RegisterLayout
    starts: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    row_axis: int
    transposed: bool


@lru_cache(maxsize=1024)
def matrix_forms(layout: RegisterLayout, nbits: int) -> tuple[Matrices, ...]:
    """All ways in which the fragment of a matrix divides the layout of a tile of `nbits` wide elements."""
    if 32 % nbits:
        return ()
    fragments = [(False, ldmatrix(nbits))] + ([(True, ldmatrix_trans())] if nbits == 16 else [])
    count, forms = MATRIX_ROW_NBITS // nbits, list[Matrices]()
    for columns in reversed(range(layout.rank)):
        for row_axis in (axis for axis in range(layout.rank) if axis != columns):
            for transposed, fragment in fragments:
                places = layout.try_divide(_along(fragment, layout.rank, row_axis, columns))
                if places is not None:
                    row = _along(spatial(MATRIX_ROWS, 1) * local(1, count), layout.rank, row_axis, columns)
                    starts = tuple(map(tuple, layout.table()[0, :: 32 // nbits].tolist()))
                    forms.append(Matrices(places * row, starts, _groups(starts), row_axis, transposed))
    return tuple(forms)


def _along(matrix: RegisterLayout, rank: int, rows: int, columns: int) -> RegisterLayout:
    """A layout of two dims as one of `rank`, whose dims are those two axes."""
    while matrix.rank < rank:
        matrix = matrix.unsqueeze(0)
    others = iter(range(rank - 2))
    return matrix.permute([rank - 2 if a == rows else rank - 1 if a == columns else next(others) for a in range(rank)])


def _groups(starts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """How many matrices each instruction moves, 4 where possible: four whose places are sums of two steps, or any one or two."""
    groups: list[int] = []
    while (done := sum(groups)) < len(starts):
        left = starts[done:]
        four = len(left) >= 4 and all(d == b + c - a for a, b, c, d in zip(*left[:4], strict=True))
        groups.append(4 if four else min(2, len(left)))
    return tuple(groups)
