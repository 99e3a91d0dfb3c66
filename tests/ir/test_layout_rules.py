"""Laws of the layout rules, for layouts of any digits."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from tile_programs import random_layout

from tilus.dtypes import f32
from tilus.ir.layout_rules import conversion_cost, same_owners
from tilus.layout import LayoutError, RegisterLayout, slot_map


def renames(a: RegisterLayout, b: RegisterLayout) -> bool:
    try:
        slot_map(a, b)
    except LayoutError:
        return False
    return True


@given(seed=st.integers(0, 2**32))
def test_same_owners_are_those_between_which_registers_are_renamed(seed: int) -> None:
    """For pairs with common thread digits and shuffled slots, and pairs that differ in their threads too."""
    rng = random.Random(seed)
    a = random_layout(rng, rng.choice([1, 2, 3]), rng.choice([1, 2, 3]))
    slots = rng.sample(a.local_digits, len(a.local_digits))
    threads = rng.sample(a.thread_digits, len(a.thread_digits)) if rng.random() < 0.5 else a.thread_digits
    b = RegisterLayout(a.shape, tuple(threads), tuple(slots))
    assert same_owners(a, b) == renames(a, b) == renames(b, a)
    held = [{a.index(t, i) for i in range(a.num_locals)} for t in range(a.num_threads)]
    others = [{b.index(t, i) for i in range(b.num_locals)} for t in range(b.num_threads)]
    assert same_owners(a, b) == (held == others)
    assert (conversion_cost(f32, a, b) == 0) == (held == others)  # whole registers only get new numbers
