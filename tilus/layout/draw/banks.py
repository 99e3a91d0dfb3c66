"""Shared memory as the hardware has it: rows of 32 banks, and which elements stand in each."""

from __future__ import annotations

import numpy as np

from tilus.layout.banks import BANK_NBYTES, NUM_BANKS
from tilus.layout.draw.picture import EMPTY, FAINT, HUES, Picture, colour, fitting_size
from tilus.layout.draw.tiles import ruled
from tilus.layout.shared import SharedLayout

Elements = list[tuple[int, ...]]

WIDTH, HEIGHT, GUTTER = 28, 34, 44
CHUNK_NBITS = 128  # of a hue: the most that a lane moves at once
MAX_ROWS = 32


def bank_table(layout: SharedLayout, nbits: int = 16) -> str:
    """The bank columns of `bank_svg` as text: byte address of each row of memory, and the first element in each bank."""
    held = _elements_by_word(layout, nbits)
    held += [[]] * (-len(held) % NUM_BANKS)
    cells = [[",".join(map(str, elements[0])) if elements else "-" for elements in row] for row in _rows(held)]
    names = [str(row * NUM_BANKS * BANK_NBYTES) for row in range(len(cells))]
    heading = f"{layout}: bank columns of {nbits}-bit elements, the first element in each bank by its index"
    return "\n".join([heading, *ruled(cells, names)])


def bank_svg(layout: SharedLayout, nbits: int = 16) -> str:
    """The bank columns of a tile of `nbits`-bit elements: a row is 128 bytes of memory, a cell one bank of 4 bytes.

    A cell names the first element that begins in it, the pointer shows all. Cells are coloured by the place in a row of the tile,
    16 bytes a hue: where a column of the tile lies in few banks, its hue is a column of the picture, and a swizzle or padding
    spreads it. Memory without elements is grey.
    """
    held = _rows(_elements_by_word(layout, nbits))
    num_rows = len(held)
    picture = Picture()
    lines = [f"{layout}: bank columns of {nbits}-bit elements, {num_rows} rows of {NUM_BANKS * BANK_NBYTES} bytes"]
    if num_rows > MAX_ROWS:
        lines.append(f"drawn: the first {MAX_ROWS} rows")
    key = "the first element of each bank: row above column; a hue is 16 bytes of a row of the tile; grey: no element"
    top = picture.lines(6, 4, [*lines, key])
    for bank in range(NUM_BANKS):
        picture.text(GUTTER + WIDTH * (bank + 0.5), top + 14, str(bank), ink=FAINT)
    top += 20
    for row, words in enumerate(held[:MAX_ROWS]):
        picture.text(GUTTER - 6, top + 19, str(row * NUM_BANKS * BANK_NBYTES), anchor="end", ink=FAINT)
        for bank, elements in enumerate(words):
            _cell(picture, elements, nbits, GUTTER + WIDTH * bank, top)
        top += HEIGHT
    return picture.svg()


def _rows(words: list[Elements]) -> list[list[Elements]]:
    return [words[start : start + NUM_BANKS] for start in range(0, len(words), NUM_BANKS)]


def _elements_by_word(layout: SharedLayout, nbits: int) -> list[Elements]:
    """The indices of the elements that begin in each 4-byte word of memory, in the order of their addresses."""
    words: list[Elements] = [[] for _ in range(-(-layout.size * nbits // (8 * BANK_NBYTES)))]
    offsets = layout.table()
    for flat in np.argsort(offsets, axis=None, kind="stable"):
        index = tuple(int(part) for part in np.unravel_index(flat, layout.shape))
        words[int(offsets[index]) * nbits // (8 * BANK_NBYTES)].append(index)
    return words


def _cell(picture: Picture, elements: Elements, nbits: int, x: float, y: float) -> None:
    if not elements:
        picture.box(x + 0.5, y + 0.5, WIDTH - 1, HEIGHT - 1, EMPTY)
        return
    *row, column = elements[0] or (0,)
    chunk = column * nbits // CHUNK_NBITS
    note = "; ".join(f"[{','.join(map(str, index))}]" for index in elements)
    picture.box(x + 0.5, y + 0.5, WIDTH - 1, HEIGHT - 1, colour(chunk, chunk // len(HUES)), note)
    for label, down in ((",".join(map(str, row)), 15), (str(column), 28)):
        picture.text(x + WIDTH / 2, y + down, label, size=fitting_size(label, WIDTH, 11))
