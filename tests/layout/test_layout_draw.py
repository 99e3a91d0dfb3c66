"""Layouts as tables and drawings: everything is drawn once and in its place, and counts agree with enumeration."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_oracle import layouts

from tilus.layout import (
    LayoutError,
    RegisterLayout,
    SharedLayout,
    atoms,
    column_major,
    local,
    padded,
    plan_conversion,
    replicated,
    row_major,
    spatial,
    svg,
    swizzled,
    text_table,
)
from tilus.layout.draw import access_svg, access_table, bank_svg, bank_table, conversion_svg, conversion_table

SVG = "{http://www.w3.org/2000/svg}"


def notes(image: str) -> list[str]:
    """What the pointer shows on each cell."""
    return [element.text or "" for element in ElementTree.fromstring(image).iter(f"{SVG}title")]


def texts(image: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(image).iter(f"{SVG}text")]


def test_register_table() -> None:
    assert text_table(spatial(2, 1).local(1, 3)).splitlines() == [
        "spatial(2, 1).local(1, 3): thread:slot, 2 threads x 3 slots",
        "  |   0   1   2",
        "--+------------",
        "0 | 0:0 0:1 0:2",
        "1 | 1:0 1:1 1:2",
    ]
    assert text_table(replicated(2, 1).local(2)).splitlines() == [
        "replicated(2, 1).local(2): thread:slot, 2 threads x 2 slots, 2 owners each",
        "  |   0   1",
        "--+--------",
        "0 | 0:0 0:1",
    ]
    assert "[1, :, :]" in text_table(spatial(2, 2, 2))


def test_shared_table() -> None:
    assert text_table(padded((2, 2), 62), nbits=32).splitlines() == [
        "strided((2, 2), (64, 1)): offset/bank of 32-bit elements, 66 elements of memory",
        "  |    0    1",
        "--+----------",
        "0 |  0/0  1/1",
        "1 | 64/0 65/1",
    ]


@given(layouts(max_size=64))
def test_every_element_is_drawn_with_all_its_owners(layout: RegisterLayout) -> None:
    owners: dict[tuple[int, ...], set[tuple[int, int]]] = {}
    for note in notes(svg(layout)):
        where, _, who = note.partition(": ")
        index = tuple(int(part) for part in re.findall(r"\d+", where))
        assert index not in owners
        owners[index] = {(int(t), int(i)) for t, i in re.findall(r"thread (\d+) slot (\d+)", who)}
    expected: dict[tuple[int, ...], set[tuple[int, int]]] = {}
    for thread in range(layout.num_threads):
        for slot in range(layout.num_locals):
            expected.setdefault(layout(thread, slot), set()).add((thread, slot))
    assert owners == expected


@pytest.mark.parametrize(
    ("num_threads", "hue"), [(4, "lane"), (12, "group of 2 lanes"), (32, "group of 4 lanes"), (96, "warp")]
)
def test_hues_tell_threads_apart(num_threads: int, hue: str) -> None:
    """Within a warp each lane has a colour of its own; of several warps each has its own four."""
    image = svg(spatial(num_threads))
    assert f"top: thread; bottom: slot; a hue is a {hue}" in texts(image)
    fills = [box.attrib["fill"] for box in ElementTree.fromstring(image).iter(f"{SVG}rect")][1:]
    assert len(set(fills)) == (num_threads if num_threads <= 32 else num_threads // 8)


def test_a_large_tile_is_drawn_by_the_part_that_repeats() -> None:
    repeated = local(8, 4) * atoms.mma_c().spatial(4, 2)
    image = svg(repeated)
    assert len(notes(image)) <= 4096
    lines = [line for line in texts(image) if line.startswith("drawn: ")]
    assert len(lines) == 1 and "repeats" in lines[0]
    drawn, times = re.fullmatch(r"drawn: (.*), which repeats (\d+ x \d+) times .*", lines[0]).groups()  # pyright: ignore
    rows, columns = map(int, times.split(" x "))
    assert rows * columns * len(notes(image)) == repeated.size
    assert str(local(rows, columns) * repeated.left_divide(local(rows, columns))) == str(repeated) and drawn


def test_a_large_tile_that_does_not_repeat_is_cut_below_an_overview_of_its_warps() -> None:
    image = svg(atoms.mma_layouts(128, 128, 64, (2, 2))[2])
    assert "drawn: warps of all elements, and the first 32 rows and columns at most of [128, 128]" in texts(image)
    dots = Counter(note for note in notes(image) if note.startswith("warp "))
    assert dots == {f"warp {w}": 64 for w in range(4)}  # one run of each warp in the 64 rows that it works on
    assert len(notes(image)) == 32 * 32 + sum(dots.values())
    assert "drawn: the first 32 rows and columns at most of [256, 256]" in texts(svg(row_major((256, 256))))


@st.composite
def memories(draw: st.DrawFn) -> SharedLayout:
    rows, columns = draw(st.sampled_from([(8, 64), (16, 32), (4, 8), (6, 16), (12, 24)]))
    kind = draw(st.sampled_from(["row", "column", "padded", "swizzled"]))
    match kind:
        case "row":
            return row_major((rows, columns))
        case "column":
            return column_major((rows, columns))
        case "padded":
            return padded((rows, columns), draw(st.integers(1, 9)))
        case _:
            return swizzled((rows, columns), 2)


@given(memories(), st.sampled_from([4, 8, 16, 32, 64]))
def test_bank_columns_have_each_element_where_its_bytes_begin(memory: SharedLayout, nbits: int) -> None:
    """Of the table, which names the first element of a bank: the smallest offset among those that begin in the word."""
    lines = bank_table(memory, nbits).splitlines()[3:]
    found = {}
    for line in lines:
        address, _, row = line.partition("|")
        for bank, cell in enumerate(row.split()):
            if cell != "-":
                found[int(address) // 4 + bank] = tuple(map(int, cell.split(",")))
    expected: dict[int, tuple[int, tuple[int, ...]]] = {}
    for index in np.ndindex(*memory.shape):
        offset = memory.offset(index)
        expected[offset * nbits // 32] = min(expected.get(offset * nbits // 32, (1 << 30, index)), (offset, index))
    assert found == {word: index for word, (_, index) in expected.items()}


def test_a_hue_of_bank_columns_is_a_column_of_the_tile() -> None:
    """Row-major the columns of 16 bytes keep to four banks, swizzled each of them is in all of them."""
    for memory, num_banks in ((row_major((8, 64)), 4), (swizzled((8, 64), 2), 32)):
        places: dict[str, set[str]] = {}
        columns: dict[str, set[int]] = {}
        for box in ElementTree.fromstring(bank_svg(memory)).iter(f"{SVG}rect"):
            held = re.findall(r"\[\d+,(\d+)\]", "".join(box.itertext()))
            if held:
                places.setdefault(box.attrib["fill"], set()).add(box.attrib["x"])
                columns.setdefault(box.attrib["fill"], set()).update(map(int, held))
        assert {len(banks) for banks in places.values()} == {num_banks}
        assert sorted(map(sorted, columns.values())) == [list(range(first, first + 8)) for first in range(0, 64, 8)]
    assert "0,1" in texts(bank_svg(row_major((2, 2, 4)), 32))  # rows of more dimensions


def test_bank_columns_name_all_elements_of_a_word() -> None:
    image = bank_svg(swizzled((8, 64), 2))
    drawn = [index for note in notes(image) for index in re.findall(r"\[(\d+),(\d+)\]", note)]
    assert sorted((int(r), int(c)) for r, c in drawn) == [(r, c) for r in range(8) for c in range(64)]
    assert "drawn: the first 32 rows" in texts(bank_svg(row_major((64, 128))))


@given(memories(), st.sampled_from([(32, 1), (8, 4), (4, 8), (2, 16), (1, 32)]), st.sampled_from([16, 32]))
def test_accesses_count_the_wavefronts_of_the_first_warp(
    memory: SharedLayout, threads: tuple[int, int], nbits: int
) -> None:
    """Against a count that takes every byte of every lane by itself."""
    if any(extent % count for extent, count in zip(memory.shape, threads)):
        return
    rows, columns = (extent // count for extent, count in zip(memory.shape, threads))
    tile = spatial(*threads).local(rows, columns)
    offsets = np.array([[memory(tile(t, i)) for i in range(tile.num_locals)] for t in range(32)])
    size = max(
        size
        for size in (1, 2, 4, 8, 16)
        if size * nbits <= 128
        and tile.num_locals % size == 0
        and all(
            run[0] % size == 0 and list(run) == list(range(run[0], run[0] + size))
            for lane in offsets
            for run in lane.reshape(-1, size).tolist()
        )
    )
    nbytes = size * nbits // 8
    together = min(32, 128 // nbytes)
    total = 0
    for access in range(0, tile.num_locals, size):
        for start in range(0, 32, together):
            touched = {
                (offsets[lane, access] * nbits // 8 + byte) // 4
                for lane in range(start, start + together)
                for byte in range(nbytes)
            }
            total += max(Counter(word % 32 for word in touched).values())
    assert re.search(rf" {total} wavefronts?, ", access_table(memory, tile, nbits).splitlines()[-1])


def test_accesses_are_drawn_bank_by_bank() -> None:
    columns = local(1, 8).spatial(8, 4).local(1, 2)
    bad, good = access_svg(row_major((8, 64)), columns), access_svg(swizzled((8, 64), 2), columns)
    assert "8 phases, 64 wavefronts, 56 of them conflicts, at worst 8 in a phase" in texts(bad)
    assert "8 phases, 8 wavefronts, 0 of them conflicts" in texts(good)
    assert texts(bad).count("x8") == 8 * 4 and "x2" not in texts(good)
    assert notes(bad)[0] == (
        "bank 0: word 0: lanes 0; word 32: lanes 4; word 64: lanes 8; word 96: lanes 12; word 128: lanes 16; "
        "word 160: lanes 20; word 192: lanes 24; word 224: lanes 28"
    )


def test_accesses_that_cannot_be_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"has shape \[8, 4\], but row_major\(\(8, 8\)\) has shape \[8, 8\]"):
        access_table(row_major((8, 8)), spatial(8, 4), 16)
    with pytest.raises(LayoutError, match=r"hold no whole aligned bytes .* for 4-bit elements"):
        access_table(row_major((8, 4)), spatial(8, 4), 4)


def test_conversions_say_how_far_values_travel() -> None:
    src, dst = atoms.mma_c(), spatial(16, 2).local(1, 4)
    lines = conversion_table(src, dst).splitlines()
    shuffles, memory = plan_conversion(src, dst, 16).ways
    assert lines[:5] == [
        f"from {src}",
        f"to {dst}",
        f"16-bit elements, by shuffles: {shuffles}",
        f"dearer, by shared memory: {memory}",
        "where values come from: 4 same thread, 124 same warp, 0 another warp",
    ]
    assert texts(conversion_svg(src, dst))[:4] == lines[:4]
    for index in np.ndindex(*src.shape):
        (before,), (after,) = src.owner(index), dst.owner(index)
        cell = lines[7 + index[0]].partition("|")[2].split()[index[1]]
        assert cell == f"{before[0]}:{before[1]}>{after[0]}:{after[1]}"
    assert len(notes(conversion_svg(src, dst))) == 128
    across = conversion_table(spatial(64).local(2), local(2).spatial(64), 8)
    assert "where values come from: 2 same thread, 62 same warp, 64 another warp" in across.splitlines()
    assert "8-bit elements, by shared memory: 128 bytes of shared memory, " in across
    assert "no plan: 8 threads are not whole warps" in conversion_table(spatial(8), spatial(8))
    with pytest.raises(LayoutError, match=r"expected the same shape and threads"):
        conversion_table(src, spatial(32, 4))


def test_conversions_of_large_tiles_are_cut() -> None:
    src, dst = atoms.mma_layouts(128, 128, 64, (2, 2))[2], spatial(128, 1).local(1, 128)
    lines = conversion_table(src, dst).splitlines()
    assert lines[3] == "drawn: 32 x 32 elements at the start of [128, 128]" and len(lines) == 5 + 2 + 32
    assert sum(map(int, re.findall(r"\d+", lines[4]))) == src.size
    image = conversion_svg(src, dst)
    assert len(notes(image)) == 32 * 32 and lines[3] in texts(image)
    assert "[1, :, :]" in conversion_table(spatial(2, 4, 4), spatial(2, 4, 4).permute([0, 2, 1])).splitlines()


@given(layouts(max_size=64))
def test_the_nearest_owner_counts(layout: RegisterLayout) -> None:
    """A layout that is converted to itself moves nothing, however often elements are replicated."""
    assert f": {layout.size} same thread, 0 same warp, 0 another warp" in conversion_table(layout, layout)


def test_notebooks_show_the_drawing() -> None:
    for layout in (atoms.mma_c(), swizzled((8, 64), 2)):
        assert layout._repr_svg_() == svg(layout)  # pyright: ignore[reportPrivateUsage]
