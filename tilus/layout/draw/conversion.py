"""From one register layout to another: where the value of each element comes from, and by which way it gets there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

from tilus.layout.conversion import plan_conversion
from tilus.layout.draw.picture import Picture, colour, fitting_size
from tilus.layout.draw.tiles import CELL, WARP_SIZE, cut, draw_cells, table_lines
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout

Owner = tuple[int, int]  # thread and slot

DISTANCES = (("same thread", colour(5)), ("same warp", colour(2)), ("another warp", colour(1)))


def conversion_table(src: RegisterLayout, dst: RegisterLayout, nbits: int = 16) -> str:
    """The ways of `plan_conversion` for `nbits`-bit elements, how many values travel how far, and where each element is before
    and afterwards, as `thread:slot>thread:slot`.

    Of a large tile the first rows and columns are listed. Raises LayoutError for different shapes or numbers of threads.
    """
    lines, shape = _heading(src, dst, nbits)
    counts = _travel(src, dst)
    travel = ", ".join(f"{counts[distance]} {name}" for distance, (name, _) in enumerate(DISTANCES))
    table = table_lines(shape, lambda index: "{}:{}>{}:{}".format(*_before(src, dst, index), *dst.owner(index)[0]))
    return "\n".join([*lines, f"where values come from: {travel}", *table])


def conversion_svg(src: RegisterLayout, dst: RegisterLayout, nbits: int = 16) -> str:
    """The table of `conversion_table` as an image: one cell an element, with the thread and slot before and afterwards.

    Green values stay in their thread, yellow ones travel within their warp, orange ones to another warp. Of several owners the
    nearest one counts.
    """
    lines, shape = _heading(src, dst, nbits)
    counts = _travel(src, dst)
    picture = Picture()
    top = picture.lines(6, 4, [*lines, "top: thread:slot before; bottom: afterwards"])
    entries = [(fill, f"{name}: {counts[distance]}") for distance, (name, fill) in enumerate(DISTANCES)]
    top = picture.legend(8, top, entries)
    draw_cells(picture, shape, top, lambda index, x, y: _cell(picture, src, dst, index, x, y))
    return picture.svg()


def _heading(src: RegisterLayout, dst: RegisterLayout, nbits: int) -> tuple[list[str], tuple[int, ...]]:
    """Both layouts, the plan of the conversion (the chosen way, then each dearer one), and the shape of what is drawn."""
    if src.shape != dst.shape or src.num_threads != dst.num_threads:
        raise LayoutError(
            f"a conversion from shape {list(src.shape)} over {src.num_threads} threads to shape {list(dst.shape)} over "
            f"{dst.num_threads} threads; expected the same shape and threads"
        )
    lines = [f"from {src}", f"to {dst}"]
    if src.num_threads % WARP_SIZE:
        lines.append(f"no plan: {src.num_threads} threads are not whole warps")
    else:
        chosen, *others = plan_conversion(src, dst, nbits).ways
        lines.append(f"{nbits}-bit elements, by {chosen.name}: {chosen}")
        lines += [f"dearer, by {way.name}: {way}" for way in others]
    shape, is_cut = cut(src.shape)
    if is_cut:
        lines.append(f"drawn: {' x '.join(map(str, shape))} elements at the start of {list(src.shape)}")
    return lines, shape


def _travel(src: RegisterLayout, dst: RegisterLayout) -> Counter[int]:
    """How many elements travel each distance."""
    indices = product(*map(range, src.shape))
    return Counter(_distance(_before(src, dst, index)[0], dst.owner(index)[0][0]) for index in indices)


def _before(src: RegisterLayout, dst: RegisterLayout, index: Sequence[int]) -> Owner:
    """The owner of an element before that is nearest to the first one afterwards."""
    thread = dst.owner(index)[0][0]
    return min(src.owner(index), key=lambda owner: (_distance(owner[0], thread), owner))


def _cell(picture: Picture, src: RegisterLayout, dst: RegisterLayout, index: Sequence[int], x: float, y: float) -> None:
    (source, from_slot), (thread, slot) = _before(src, dst, index), dst.owner(index)[0]
    _, fill = DISTANCES[_distance(source, thread)]
    note = f"[{', '.join(map(str, index))}]: from thread {source} slot {from_slot} to thread {thread} slot {slot}"
    picture.box(x + 0.5, y + 0.5, CELL - 1, CELL - 1, fill, note)
    for label, down in ((f"{source}:{from_slot}", 19), (f"{thread}:{slot}", 34)):
        picture.text(x + CELL / 2, y + down, label, size=fitting_size(label, CELL))


def _distance(source: int, thread: int) -> int:
    return 0 if source == thread else 1 if source // WARP_SIZE == thread // WARP_SIZE else 2
