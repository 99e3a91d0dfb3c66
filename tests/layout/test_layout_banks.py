"""Wavefronts of many accesses at once, against a machine that serves one word of every bank at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus.layout import bank_conflicts
from tilus.layout.banks import wavefronts


def served(addresses: list[int], active: list[bool], nbytes: int) -> int:
    """Lanes wait in groups that want 128 bytes; in a wavefront every bank gives one word to all who want it."""
    group = 32 if nbytes <= 4 else 128 // nbytes
    count = 0
    for start in range(0, len(addresses), group):
        lanes = [a for a, on in zip(addresses[start : start + group], active[start : start + group]) if on]
        waiting = {(a + byte) // 4 for a in lanes for byte in range(nbytes)}
        while waiting:
            count += 1
            for bank in range(32):
                waiting.discard(min((w for w in waiting if w % 32 == bank), default=-1))
    return count


@given(st.data())
def test_wavefronts(data: st.DataObject) -> None:
    nbytes = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    lanes = data.draw(st.sampled_from([8, 32, 5]))
    row = st.lists(st.integers(0, 300), min_size=lanes, max_size=lanes)
    units = data.draw(st.lists(row, min_size=1, max_size=6))
    active = data.draw(st.lists(st.booleans(), min_size=lanes, max_size=lanes))
    addresses = np.array(units) * nbytes
    expected = [served(line, active, nbytes) for line in addresses.tolist()]
    assert wavefronts(addresses, nbytes, np.array(active)).tolist() == expected
    everyone = [served(line, [True] * lanes, nbytes) for line in addresses.tolist()]
    assert wavefronts(addresses, nbytes).tolist() == everyone
    assert wavefronts(addresses[:, None, :], nbytes).tolist() == [[count] for count in everyone]


@pytest.mark.parametrize(("nbytes", "phases"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4)])
def test_strides(nbytes: int, phases: int) -> None:
    """Lanes a stride of s accesses apart meet where the stride and the lanes of a phase have common factors."""
    for stride in range(1, 65) if nbytes >= 4 else ():
        meeting = int(np.gcd(stride, 32 // phases))
        assert wavefronts(np.arange(32) * stride * nbytes, nbytes) == phases * meeting
        assert bank_conflicts(np.arange(32) * stride * nbytes, nbytes) == phases * (meeting - 1)
    assert wavefronts(np.zeros(32, np.int64), nbytes) == phases


def test_nobody() -> None:
    assert wavefronts(np.zeros((3, 32), np.int64), 16, np.zeros(32, np.bool_)).tolist() == [0, 0, 0]
    assert wavefronts(np.zeros(0, np.int64), 4) == 0
