"""The usual memory layouts, and bank conflicts against a wavefront-by-wavefront count. Laws: test_layout_memory.py."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus.layout import (
    LayoutError,
    Swizzle,
    bank_conflicts,
    column_major,
    padded,
    row_major,
    strided,
    swizzled,
)


def test_constructors() -> None:
    assert row_major((2, 3, 4)).table().reshape(-1).tolist() == list(range(24))
    assert column_major((2, 3)).table().tolist() == [[0, 2, 4], [1, 3, 5]]
    assert padded((3, 4), 2).table().tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [12, 13, 14, 15]]
    assert padded((2, 3, 4), 1).offset((1, 2, 3)) == 1 * 15 + 2 * 5 + 3
    assert strided(((2, 4), 8), ((512, 8), 1)).offset((5, 3)) == 512 + 8 + 3
    assert row_major((64, 32)) == strided((64, 32), (32, 1)) == strided(((8, 8), 32), ((256, 32), 1))
    assert str(row_major((64, 32)).swizzled(3, 2, 3)) == "row_major((64, 32)).swizzled(3, 2, 3)"
    assert str(padded((64, 32), 8)) == "strided((64, 32), (40, 1))"
    assert Swizzle(3, 3, 3).period == 512


@pytest.mark.parametrize(("row_nbytes", "bits"), [(128, 3), (64, 2), (32, 1), (16, 0)])
@pytest.mark.parametrize("nbytes", [1, 2, 4])
def test_swizzled_rows_are_those_of_the_hardware(row_nbytes: int, bits: int, nbytes: int) -> None:
    """The 128, 64 and 32 byte modes of TMA XOR the 16-byte chunk with bits 7.. of the byte address."""
    layout = swizzled((64, row_nbytes // nbytes), nbytes)
    for row, column in product(range(64), range(row_nbytes // nbytes)):
        address = row * row_nbytes + column * nbytes
        expected = address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)
        assert layout.offset((row, column)) * nbytes == expected


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 24, 64, 96])
@pytest.mark.parametrize("row_nbytes", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024])
def test_swizzled_tiles_have_no_conflicts(rows: int, row_nbytes: int) -> None:
    """Neither ldmatrix (eight rows of one chunk) nor eight lanes on consecutive chunks wait for a bank."""
    layout = swizzled((rows, row_nbytes // 2), 2)
    assert layout.is_injective()
    chunks = layout.table()[:, ::8] * 2
    down = [chunks[first : first + 8, c] for first in range(0, rows, 8) for c in range(chunks.shape[1])]
    along = [chunks.reshape(-1)[first : first + 8] for first in range(0, chunks.size, 8)]
    assert [bank_conflicts(lanes, 16) for lanes in down + along] == [0] * len(down + along)


def wavefronts(lane_addresses: list[int], access_nbytes: int) -> int:
    """Serve words one wavefront at a time: each bank delivers one word, to all lanes of the group that want it."""
    group = 32 * 4 // max(4, access_nbytes)
    total = 0
    for start in range(0, len(lane_addresses), group):
        waiting = {(a + byte) // 4 for a in lane_addresses[start : start + group] for byte in range(access_nbytes)}
        while waiting:
            total += 1
            served: dict[int, int] = {}
            for word in sorted(waiting):
                served.setdefault(word % 32, word)
            waiting -= set(served.values())
    return total


@given(st.data())
def test_bank_conflicts_are_wavefronts_beyond_the_groups(data: st.DataObject) -> None:
    access = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    lanes = data.draw(st.lists(st.integers(0, 300), max_size=32))
    lane_addresses = [lane * access for lane in lanes]
    groups = -(-len(lanes) * max(4, access) // 128)
    assert bank_conflicts(lane_addresses, access) == wavefronts(lane_addresses, access) - groups


def test_bank_conflict_examples() -> None:
    lanes = np.arange(32)
    assert [bank_conflicts(lanes * 4 * step, 4) for step in (0, 1, 2, 3, 4, 8, 32)] == [0, 0, 1, 0, 3, 7, 31]
    assert bank_conflicts(lanes * 8, 8) == 0
    assert bank_conflicts(lanes * 16, 16) == 0
    assert bank_conflicts(np.arange(8) * 128, 16) == 7
    assert bank_conflicts([], 4) == 0
    with pytest.raises(LayoutError, match="12 bytes a lane; expected 1, 2, 4, 8 or 16"):
        bank_conflicts([0], 12)
    with pytest.raises(LayoutError, match="not a multiple of 8"):
        bank_conflicts([4], 8)
    with pytest.raises(LayoutError, match="33 addresses"):
        bank_conflicts(range(33), 1)
