"""Tiles as tables: which thread and slot hold each element, or at which address and bank it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod

from tilus.layout.banks import BANK_NBYTES, NUM_BANKS
from tilus.layout.draw.picture import FAINT, HUES, Picture, colour, fitting_size
from tilus.layout.register import RegisterLayout, local
from tilus.layout.shared import SharedLayout

Index = tuple[int, ...]

CELL = 44
MAX_CELLS = 4096  # more are summarised: the repeated part once, or the first rows and columns
MAX_EXTENT = 32
DOT = 5  # an element in the overview
MAX_DOTS = 1 << 17
WARP_SIZE = 32


def text_table(layout: RegisterLayout | SharedLayout, nbits: int = 16) -> str:
    """Which thread:slot holds each element, or the offset and bank of each element (offset/bank).

    Rows and columns are the last two dimensions; each index of the others starts a table of its own. Of several owners
    the first is shown, and the heading counts them. nbits: of an element; it matters to banks only.
    """
    lines = table_lines(layout.shape, lambda index: "".join(_label(layout, index, nbits)))
    return "\n".join([title(layout, nbits), *lines])


def table_lines(shape: Sequence[int], label: Callable[[Index], str]) -> list[str]:
    """A label for each index, in a table for each index of the leading dimensions."""
    lines: list[str] = []
    for prefix, rows in _pages(shape):
        if prefix:
            lines += ["", _page_name(prefix)]
        lines += ruled([[label(index) for index in row] for row in rows])
    return lines


def draw_cells(picture: Picture, shape: Sequence[int], top: float, cell: Callable[[Index, float, float], None]) -> None:
    """The tables of `table_lines`, from `top` down: row and column numbers, and `cell(index, x, y)` for each place."""
    for prefix, rows in _pages(shape):
        if prefix:
            top = picture.lines(6, top, [_page_name(prefix)])
        for c in range(len(rows[0])):
            picture.text(CELL * (c + 1.5), top + 14, str(c), ink=FAINT)
        top += 20
        for r, row in enumerate(rows):
            picture.text(CELL * 0.5, top + CELL * 0.6, str(r), ink=FAINT)
            for c, index in enumerate(row):
                cell(index, CELL * (c + 1), top)
            top += CELL
        top += 12


def ruled(cells: Sequence[Sequence[str]], names: Sequence[str] | None = None) -> list[str]:
    """The lines of a table with numbered columns; rows are numbered too, or have names."""
    names = names or [str(row) for row in range(len(cells))]
    width = max(len(cell) for row in cells for cell in row)
    gutter = max(map(len, names))
    heading = " " * gutter + " |" + "".join(f" {column:>{width}}" for column in range(len(cells[0])))
    rule = "-" * (gutter + 1) + "+" + "-" * ((width + 1) * len(cells[0]))
    rows = [f"{name:>{gutter}} |" + "".join(f" {cell:>{width}}" for cell in row) for name, row in zip(names, cells)]
    return [heading, rule, *rows]


def svg(layout: RegisterLayout | SharedLayout, nbits: int = 16) -> str:
    """The table of `text_table` as an image.

    Cells are coloured by lane (by warp when there are several), or by bank; the pointer shows all owners of a cell. Of a large
    tile the part that repeats is drawn once, or else the first rows and columns.
    """
    shown, repeats = (layout, None) if isinstance(layout, SharedLayout) else _repeated_part(layout)
    shape, is_cut = cut(shown.shape)
    picture = Picture()
    top = picture.lines(6, 4, _heading(layout, shown, repeats, is_cut, nbits))
    if is_cut and isinstance(shown, RegisterLayout):
        top = _overview(picture, shown, top)
    draw_cells(picture, shape, top, lambda index, x, y: _cell(picture, shown, index, nbits, x, y))
    return picture.svg()


def title(layout: RegisterLayout | SharedLayout, nbits: int) -> str:
    """One line that says what the layout is and what its table shows."""
    if isinstance(layout, SharedLayout):
        return f"{layout}: offset/bank of {nbits}-bit elements, {layout.size} elements of memory"
    words = f"{layout}: thread:slot, {layout.num_threads} threads x {layout.num_locals} slots"
    owners = layout.num_replicas * layout.num_local_replicas
    return words if owners == 1 else f"{words}, {owners} owners each"


def bank_of(layout: SharedLayout, index: Sequence[int], nbits: int) -> int:
    """The bank in which an element begins."""
    return layout.offset(index) * nbits // 8 // BANK_NBYTES % NUM_BANKS


def bank_colour(bank: int) -> str:
    """Four neighbouring banks, 16 bytes, share a hue."""
    return colour(bank // 4, bank % 4)


def thread_colour(thread: int, num_threads: int) -> str:
    """One warp: neighbouring lanes share a hue. Several: a warp has a hue, and every eight lanes a tint."""
    if num_threads <= WARP_SIZE:
        return colour(*divmod(thread, lanes_of_a_hue(num_threads)))
    warp, lane = divmod(thread, WARP_SIZE)
    return colour(warp, lane // 8)


def lanes_of_a_hue(num_threads: int) -> int:
    """Of at most one warp: so many that the hues suffice."""
    return -(-num_threads // len(HUES))


def _heading(
    layout: RegisterLayout | SharedLayout, shown: RegisterLayout | SharedLayout, repeats: tuple[int, ...] | None,
    is_cut: bool, nbits: int,
) -> list[str]:  # fmt: skip
    lines = [title(layout, nbits)]
    if repeats is not None:
        times = " x ".join(map(str, repeats))
        lines.append(f"drawn: {shown}, which repeats {times} times with further slots of the same threads")
    if is_cut:
        what = (
            "warps of all elements, and " if isinstance(shown, RegisterLayout) and shown.num_threads > WARP_SIZE else ""
        )
        lines.append(f"drawn: {what}the first {MAX_EXTENT} rows and columns at most of {list(shown.shape)}")
    if isinstance(layout, SharedLayout):
        lines.append("top: offset in elements; bottom: bank; a hue is 16 bytes")
    else:
        lanes = lanes_of_a_hue(layout.num_threads)
        hue = "warp" if layout.num_threads > WARP_SIZE else f"group of {lanes} lanes" if lanes > 1 else "lane"
        lines.append(f"top: thread; bottom: slot; a hue is a {hue}")
    return lines


def _repeated_part(layout: RegisterLayout) -> tuple[RegisterLayout, tuple[int, ...] | None]:
    """A large tile without the outermost slots that only repeat it, and how often they do along each dimension."""
    repeats = [1] * layout.rank
    while layout.size > MAX_CELLS and layout.local_digits and layout.local_digits[0].dim is not None:
        outermost = layout.local_digits[0]
        outer = local(*(outermost.size if dim == outermost.dim else 1 for dim in range(layout.rank)))
        inner = layout.try_left_divide(outer)
        if inner is None:
            break
        repeats = [a * b for a, b in zip(repeats, outer.shape)]
        layout = inner
    return layout, tuple(repeats) if max(repeats, default=1) > 1 else None


def _overview(picture: Picture, layout: RegisterLayout, top: float) -> float:
    """The warp of every element of the first page, without labels; returns where it ends."""
    inverse, (num_rows, num_columns) = layout.inverse(), (1, *layout.shape)[-2:]
    if layout.num_threads <= WARP_SIZE or num_rows * num_columns > MAX_DOTS:
        return top
    leading = (0,) * (layout.rank - 2)
    for row in range(num_rows):
        warps = [inverse((*leading, row, c)[-layout.rank :])[0] // WARP_SIZE for c in range(num_columns)]
        start = 0
        for column in range(1, num_columns + 1):
            if column == num_columns or warps[column] != warps[start]:
                picture.box(
                    CELL + DOT * start, top, DOT * (column - start), DOT, colour(warps[start]), f"warp {warps[start]}"
                )
                start = column
        top += DOT
    return top + 12


def cut(shape: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """The shape of the part of a tile that is drawn, and whether it is not the whole."""
    if prod(shape) <= MAX_CELLS:
        return tuple(shape), False
    return tuple(min(extent, MAX_EXTENT if dim >= len(shape) - 2 else 1) for dim, extent in enumerate(shape)), True


def _page_name(prefix: Index) -> str:
    return f"[{', '.join(map(str, prefix))}, :, :]"


def _pages(shape: Sequence[int]) -> Iterator[tuple[Index, list[list[Index]]]]:
    """(index of the leading dimensions, rows of full indices) of each two-dimensional page."""
    page = shape[-2:]
    for prefix in product(*map(range, shape[:-2])):
        if len(page) == 2:
            rows = [[(*prefix, r, c) for c in range(page[1])] for r in range(page[0])]
        else:
            rows = [[(*prefix, *index) for index in product(*map(range, page))]]
        yield prefix, rows


def _label(layout: RegisterLayout | SharedLayout, index: Sequence[int], nbits: int) -> tuple[str, str]:
    if isinstance(layout, SharedLayout):
        return str(layout.offset(index)), f"/{bank_of(layout, index, nbits)}"
    thread, slot = layout.inverse()(index)
    return str(thread), f":{slot}"


def _cell(
    picture: Picture, layout: RegisterLayout | SharedLayout, index: Sequence[int], nbits: int, x: float, y: float
) -> None:
    where = ", ".join(map(str, index))
    if isinstance(layout, SharedLayout):
        offset, bank = layout.offset(index), bank_of(layout, index, nbits)
        labels, fill = (str(offset), f"b{bank}"), bank_colour(bank)
        note = f"[{where}]: element {offset} of memory, byte {offset * nbits // 8}, bank {bank}"
    else:
        owners = layout.owner(index)
        thread, slot = owners[0]
        several = f" x{len(owners)}" if len(owners) > 1 else ""
        labels, fill = (f"t{thread}", f"i{slot}{several}"), thread_colour(thread, layout.num_threads)
        note = f"[{where}]: " + ", ".join(f"thread {t} slot {i}" for t, i in owners)
    picture.box(x + 0.5, y + 0.5, CELL - 1, CELL - 1, fill, note)
    for label, down in zip(labels, (19, 34)):
        picture.text(x + CELL / 2, y + down, label, size=fitting_size(label, CELL))
