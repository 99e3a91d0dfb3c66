"""From one register layout to another: where the value of each element comes from, and by which way it gets there."""

from __future__ import annotations

from collections import Counter

from tilus.layout.conversion import plan_conversion
from tilus.layout.draw.picture import FAINT, Picture, colour, fitting_size
from tilus.layout.draw.tiles import CELL, MAX_CELLS, WARP_SIZE, ruled
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout

Owner = tuple[int, int]  # thread and slot

STAYS, IN_WARP, ACROSS = colour(5), colour(2), colour(1)


def conversion_table(src: RegisterLayout, dst: RegisterLayout, nbits: int = 16) -> str:
    """Where each element is before and afterwards, as `thread:slot>thread:slot`, how many values travel how far, and the ways of
    `plan_conversion` for `nbits`-bit elements."""
    _check(src, dst)
    cells: list[list[str]] = []
    counts = Counter[int]()
    for row in _indices(src.shape):
        cells.append([])
        for index in row:
            (source, from_slot), (thread, slot) = _owners(src, dst, index)
            counts[_distance(source, thread)] += 1
            cells[-1].append(f"{source}:{from_slot}>{thread}:{slot}")
    names = ("stay", "in the warp", "across warps")
    travel = ", ".join(f"{counts[distance]} {name}" for distance, name in enumerate(names))
    heading = [*_heading(src, dst, nbits), f"elements by how far they travel: {travel}"]
    return "\n".join([*heading, *ruled(cells)])


def conversion_svg(src: RegisterLayout, dst: RegisterLayout, nbits: int = 16) -> str:
    """The tile of two layouts, one cell an element: the thread and slot that hold it before and afterwards, below the ways of
    `plan_conversion` for `nbits`-bit elements.

    Green values stay in their thread, yellow ones travel within their warp, orange ones to another warp. Of several owners the
    nearest one counts. Raises LayoutError for other shapes than matrices and vectors, and for large ones.
    """
    _check(src, dst)
    picture = Picture()
    top = picture.lines(6, 4, [*_heading(src, dst, nbits), "top: thread:slot before; bottom: afterwards"])
    entries = [(STAYS, "same thread"), (IN_WARP, "same warp"), (ACROSS, "another warp")]
    top = picture.legend(8, top, entries)
    for column in range(src.shape[-1]):
        picture.text(CELL * (column + 1.5), top + 14, str(column), ink=FAINT)
    top += 20
    for row, indices in enumerate(_indices(src.shape)):
        picture.text(CELL * 0.5, top + CELL * 0.6, str(row), ink=FAINT)
        for column, index in enumerate(indices):
            _cell(picture, src, dst, index, CELL * (column + 1), top)
        top += CELL
    return picture.svg()


def _heading(src: RegisterLayout, dst: RegisterLayout, nbits: int) -> list[str]:
    """Both layouts, and the plan of the conversion: the chosen way, then each dearer one."""
    lines = [f"from {src}", f"to {dst}"]
    if src.num_threads % WARP_SIZE:
        return [*lines, f"no plan: {src.num_threads} threads are not whole warps"]
    chosen, *others = plan_conversion(src, dst, nbits).ways
    lines.append(f"{nbits}-bit elements, by {chosen.name}: {chosen}")
    return [*lines, *(f"dearer, by {way.name}: {way}" for way in others)]


def _check(src: RegisterLayout, dst: RegisterLayout) -> None:
    if src.shape != dst.shape or src.num_threads != dst.num_threads:
        raise LayoutError(
            f"a conversion from shape {list(src.shape)} over {src.num_threads} threads to shape {list(dst.shape)} over "
            f"{dst.num_threads} threads; expected the same shape and threads"
        )
    if not 1 <= src.rank <= 2 or src.size > MAX_CELLS:
        raise LayoutError(
            f"a drawing of a conversion of shape {list(src.shape)}, expected rank 1 or 2 and at most {MAX_CELLS} elements",
            hint="draw the part that repeats",
        )


def _indices(shape: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    if len(shape) == 1:
        return [[(column,) for column in range(shape[0])]]
    return [[(row, column) for column in range(shape[1])] for row in range(shape[0])]


def _owners(src: RegisterLayout, dst: RegisterLayout, index: tuple[int, ...]) -> tuple[Owner, Owner]:
    """The first owner of an element afterwards, and the nearest one before."""
    thread, slot = dst.owner(index)[0]
    return min(src.owner(index), key=lambda owner: (_distance(owner[0], thread), owner)), (thread, slot)


def _cell(
    picture: Picture, src: RegisterLayout, dst: RegisterLayout, index: tuple[int, ...], x: float, y: float
) -> None:
    (source, from_slot), (thread, slot) = _owners(src, dst, index)
    fill = (STAYS, IN_WARP, ACROSS)[_distance(source, thread)]
    note = f"[{', '.join(map(str, index))}]: from thread {source} slot {from_slot} to thread {thread} slot {slot}"
    picture.box(x + 0.5, y + 0.5, CELL - 1, CELL - 1, fill, note)
    for label, down in ((f"{source}:{from_slot}", 19), (f"{thread}:{slot}", 34)):
        picture.text(x + CELL / 2, y + down, label, size=fitting_size(label, CELL))


def _distance(source: int, thread: int) -> int:
    return 0 if source == thread else 1 if source // WARP_SIZE == thread // WARP_SIZE else 2
