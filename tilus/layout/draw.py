"""Drawings of layouts: tables of text and self-contained SVG."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from itertools import product

from tilus.layout.banks import BANK_NBYTES, NUM_BANKS
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout
from tilus.layout.shared import SharedLayout

_CELL = 44
_MAX_CELLS = 16384


def text_table(layout: RegisterLayout | SharedLayout, nbytes_per_element: int = 2) -> str:
    """Which thread:slot holds each element, or the offset and bank of each element (offset/bank).

    Rows and columns are the last two dimensions; each index of the others starts a table of its own. Of several owners
    the first is shown, and the heading counts them. nbytes_per_element matters to banks only.
    """
    lines = [_title(layout, nbytes_per_element)]
    for prefix, rows in _pages(layout.shape):
        if prefix:
            lines += ["", f"[{', '.join(map(str, prefix))}, :, :]"]
        cells = [["".join(_label(layout, index, nbytes_per_element)) for index in row] for row in rows]
        width = max(len(cell) for row in cells for cell in row)
        gutter = len(str(len(cells) - 1))
        lines.append(" " * gutter + " |" + "".join(f" {column:>{width}}" for column in range(len(cells[0]))))
        lines.append("-" * (gutter + 1) + "+" + "-" * ((width + 1) * len(cells[0])))
        lines += [f"{r:>{gutter}} |" + "".join(f" {cell:>{width}}" for cell in row) for r, row in enumerate(cells)]
    return "\n".join(lines)


def svg(layout: RegisterLayout | SharedLayout, nbytes_per_element: int = 2) -> str:
    """The table of `text_table` as one SVG image; cells are coloured by thread (by warp and lane when there are several
    warps), or by bank."""
    if layout.size > _MAX_CELLS:
        raise LayoutError(
            f"a drawing of {layout.size} elements; expected at most {_MAX_CELLS}",
            hint="draw the atom or one repetition of the tile",
        )
    parts: list[str] = []
    top, width = 30, 0
    for prefix, rows in _pages(layout.shape):
        if prefix:
            parts.append(_text(4, top + 16, f"[{', '.join(map(str, prefix))}, :, :]", "start"))
            top += 22
        for c in range(len(rows[0])):
            parts.append(_text(_CELL * c + _CELL * 1.5, top + 14, str(c)))
        top += 20
        for r, row in enumerate(rows):
            parts.append(_text(_CELL * 0.5, top + _CELL * 0.6, str(r)))
            for c, index in enumerate(row):
                parts.append(_cell(layout, index, nbytes_per_element, _CELL * (c + 1), top))
            top += _CELL
        top += 12
        width = max(width, _CELL * (len(rows[0]) + 1) + 8)
    title = _title(layout, nbytes_per_element)
    width = max(width, 8 + 8 * len(title))
    style = "text{font:12px 'DejaVu Sans Mono',ui-monospace,monospace;fill:#222}rect{stroke:#fff;stroke-width:1}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}">'
        f'<style>{style}</style><rect width="{width}" height="{top}" fill="#fff"/>'
        f"{_text(4, 18, title, 'start')}{''.join(parts)}</svg>\n"
    )


def _pages(shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], list[list[tuple[int, ...]]]]]:
    """(index of the leading dimensions, rows of full indices) of each two-dimensional page."""
    page = shape[-2:]
    for prefix in product(*map(range, shape[:-2])):
        if len(page) == 2:
            rows = [[(*prefix, r, c) for c in range(page[1])] for r in range(page[0])]
        else:
            rows = [[(*prefix, *index) for index in product(*map(range, page))]]
        yield prefix, rows


def _title(layout: RegisterLayout | SharedLayout, nbytes_per_element: int) -> str:
    if isinstance(layout, SharedLayout):
        return f"{layout}: offset/bank of {nbytes_per_element}-byte elements, {layout.size} elements of memory"
    title = f"{layout}: thread:slot, {layout.num_threads} threads x {layout.num_locals} slots"
    owners = layout.num_replicas * layout.num_local_replicas
    return title if owners == 1 else f"{title}, {owners} owners each"


def _label(layout: RegisterLayout | SharedLayout, index: Sequence[int], nbytes_per_element: int) -> tuple[str, str]:
    if isinstance(layout, SharedLayout):
        return str(layout.offset(index)), f"/{_bank(layout, index, nbytes_per_element)}"
    thread, slot = layout.inverse()(index)
    return str(thread), f":{slot}"


def _bank(layout: SharedLayout, index: Sequence[int], nbytes_per_element: int) -> int:
    return layout.offset(index) * nbytes_per_element // BANK_NBYTES % NUM_BANKS


def _cell(
    layout: RegisterLayout | SharedLayout, index: Sequence[int], nbytes_per_element: int, x: float, y: float
) -> str:
    if isinstance(layout, SharedLayout):
        bank = _bank(layout, index, nbytes_per_element)
        labels, fill = (str(layout.offset(index)), f"b{bank}"), _colour(bank * 360 // NUM_BANKS, 80)
    else:
        thread, slot = layout.inverse()(index)
        warp, lane = divmod(thread, 32)
        # Hues far apart for neighbours: 137 degrees is the golden angle.
        hue, lightness = (warp * 137, 64 + lane) if layout.num_threads > 32 else (lane * 137, 82)
        labels, fill = (f"t{thread}", f"i{slot}"), _colour(hue % 360, lightness)
    middle = x + _CELL / 2
    square = f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="{fill}"/>'
    return square + _text(middle, y + 19, labels[0]) + _text(middle, y + 34, labels[1])


def _colour(hue: int, lightness: int) -> str:
    """An sRGB hex colour (SVG readers differ in whether they know hsl); lightness in percent."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue / 360, lightness / 100, 0.7))


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
