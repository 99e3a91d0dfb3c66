"""A variable that changes in a loop keeps the layout that its first value was pinned to, and so do copies of it."""

from __future__ import annotations

import numpy as np

import tilus
from tilus import Tensor, uint8, uint16
from tilus.ir.visit import instructions
from tilus.layout import spatial

BYTES = spatial(32).local(4)
HALVES = spatial(32).local(2)


@tilus.kernel
def words(x: Tensor[uint8, "n"], out: Tensor[uint16, "m"]):
    """The bytes of the previous trip, two at a time: `view` needs to know which thread holds which bytes."""
    tilus.grid(1, warps=1)
    following = tilus.load(x, [0], [128], layout=BYTES)
    for trip in tilus.range(x.shape[0] // 128):
        now = following
        following = tilus.load(x, [(trip + 1) * 128], [128], layout=BYTES)
        tilus.store(out, [trip * 64], tilus.view(now, uint16, [64], HALVES))


def test_a_loop_variable_can_be_viewed() -> None:
    x = np.random.default_rng(0).integers(0, 256, 384).astype(np.uint8)
    for device in ("reference", "cpu", "emulator"):
        out = np.zeros(192, np.uint16)
        words.on(device)(x, out)
        np.testing.assert_array_equal(out, x.view(np.uint16))


def test_slots_and_copies_have_the_layout() -> None:
    tiles = {t for s in instructions(words.ir().body) for t in s.inst.operands if getattr(t, "dtype", None) == uint8}
    mutable = [t for t in tiles if getattr(t, "mutable", False)]
    assert len(mutable) == 2
    assert all(t.layout == BYTES for t in mutable)
