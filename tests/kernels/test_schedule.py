"""Schedules of the quantised linear, for shapes of every kind: what the kernel relies on, and that no multiprocessor idles."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus.dtypes import uint4
from tilus.kernels.quantize import pack, quantize
from tilus.kernels.schedule import MOST_FACTOR_WORDS, Schedule, schedule
from tilus.ptx.assembler import SpillError

counts = st.integers(1, 2000)


@given(counts, counts, st.integers(1, 600), st.integers(1, 8), st.sampled_from([0, 1, 108, 132]), st.integers(11, 172))
def test_what_the_kernel_relies_on(m: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int, words: int) -> None:
    """Warps that share factors divide their span, fragments have 8 columns, no warp is without a tile, and registers suffice."""
    plan = schedule(m, tiles_n, tiles_k, nbits, num_sms, words)
    assert plan.warps & (plan.warps - 1) == 0
    assert plan.tokens % 8 == 0
    assert min(plan.rows, plan.warps, plan.stages, plan.splits, plan.blocks_per_sm) >= 1
    assert plan.warps * plan.splits <= max(tiles_k, plan.warps)
    if num_sms:
        assert plan.rows * plan.warps * plan.blocks_per_sm <= 16
        assert words <= MOST_FACTOR_WORDS[plan.tokens, plan.stages][nbits - 1]


def test_one_block_for_each_multiprocessor() -> None:
    """At few tokens, for shapes of 128 tiles: nearly all of 132 have one, and 16 KB or more on their way."""
    for nbits in range(1, 9):
        for m in (1, 16):
            plan = schedule(m, 128, 128, nbits, 132)
            blocks = -(-128 // plan.rows) * plan.splits
            assert 0.9 * 132 <= blocks <= 132
            assert plan.rows * plan.warps * plan.stages * 512 * nbits >= (8 << 10) * (2 if nbits > 1 else 1)


def test_the_fastest_schedules_that_were_measured() -> None:
    """On an H100 at 8192 x 8192 with 16-bit scales for groups of 128: a row of tiles, eight warps, no splits."""
    for m, nbits, stages in ((1, 1, 2), (1, 2, 2), (1, 4, 2), (16, 1, 2), (16, 2, 2), (16, 4, 1)):
        assert schedule(m, 128, 128, nbits, 132) == Schedule(8 if m == 1 else 16, 1, 8, stages)


def test_a_kernel_that_spills_gets_an_easier_schedule_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("tilus.kernels.linear")
    tried: list[Schedule] = []

    def launch(x: Any, weight: Any, y: Any, bias: Any, plan: Schedule, device: Any) -> None:
        tried.append(plan)
        if plan.tokens > 8 or plan.stages > 1:
            raise SpillError("kernel spills")

    monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(module, "_easier", {})
    first = Schedule(16, 1, 8, 2)
    monkeypatch.setattr(module, "schedule", lambda *_: first)
    weight = pack(quantize(np.ones((64, 64), np.float32), uint4, 64))
    for _ in range(2):
        module.linear(np.ones((16, 64), np.float16), weight, device="reference")
    assert tried == [first, Schedule(16, 1, 8, 1), Schedule(8, 1, 8, 1), Schedule(8, 1, 8, 1)]
    monkeypatch.setattr(module, "schedule", lambda *_: Schedule(8, 1, 8, 1))
    monkeypatch.setattr(module, "launch", lambda *_: (_ for _ in ()).throw(SpillError("kernel spills")))
    with pytest.raises(SpillError, match="kernel spills"):
        module.linear(np.ones((16, 64), np.float16), weight, device="reference")
