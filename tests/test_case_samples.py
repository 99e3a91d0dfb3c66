"""A sample has its share of the cases, and shows each value of each parameter if it can."""

from __future__ import annotations

import itertools

import pytest
from case_samples import sample
from hypothesis import given
from hypothesis import strategies as st

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@given(sizes=SIZES, share=st.integers(1, 9))
def test_a_share(sizes: list[int], share: int) -> None:
    cases = {str(values): dict(zip("abc", values)) for values in itertools.product(*map(range, sizes))}
    found = sample(cases, share)
    assert len(found) == len(set(found)) == -(-len(cases) // share) and set(found) <= set(cases)
    assert found == sample(dict(reversed(cases.items())), share)


@pytest.mark.parametrize("share", [1, 2, 3])
def test_every_value_is_shown(share: int) -> None:
    cases = {str(values): dict(zip("abc", values)) for values in itertools.product(range(9), "xyz", (True, False))}
    found = [cases[name] for name in sample(cases, share)]
    for parameter, count in zip("abc", (9, 3, 2)):
        assert len({case[parameter] for case in found}) == count


def test_few_cases_show_much() -> None:
    """Three of three devices and nine sizes are on three devices, and of three sizes."""
    cases = {f"{device}-{size}": {"device": device, "size": size} for device in "abc" for size in range(9)}
    found = [cases[name] for name in sample(cases, 9)]
    assert len(found) == len({case["device"] for case in found}) == len({case["size"] for case in found}) == 3
