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
from tilus.kernels.schedule import MOST_FACTOR_WORDS, Schedule, cpu_schedule, schedule
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


@given(counts, counts, st.integers(1, 600), st.integers(1, 8), st.integers(1, 128))
def test_schedules_for_cpus(m: int, tiles_n: int, tiles_k: int, nbits: int, num_threads: int) -> None:
    """Few tokens are one block without padding, of many at most a half is padding; K is split only for threads that would idle,
    and into parts that are worth it.
    """
    plan = cpu_schedule(m, tiles_n, tiles_k, nbits, num_threads)
    assert (plan.rows, plan.warps, plan.stages, plan.blocks_per_sm) == (1, 1, 0, 1)
    assert plan.tokens == m if m <= 8 else plan.tokens in (16, 32, 64)
    blocks = tiles_n * -(-m // plan.tokens)
    assert m <= -(-m // plan.tokens) * plan.tokens < max(2 * m, m + 1)
    if blocks >= 2 * num_threads or num_threads == 1:
        assert plan.splits == 1
    assert plan.splits == 1 or tiles_k * 512 * nbits >= plan.splits << 15


def test_how_cpus_share_out_tokens() -> None:
    """A whole block of 64 tokens before two of 32, two of 32 before four of 16; little padding before few blocks."""
    shared = {9: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 32, 80: 32, 128: 64, 1000: 64}
    assert {m: cpu_schedule(m, 128, 128, 4, 8).tokens for m in shared} == shared
    assert [cpu_schedule(1, tiles_n, 128, 4, 8).splits for tiles_n in (1, 4, 15, 16)] == [8, 4, 2, 1]


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

    def launch(x: Any, weight: Any, y: Any, bias: Any, plan: Schedule, *others: Any) -> None:
        tried.append(plan)
        if plan.tokens > 8 or plan.stages > 1:
            raise SpillError("kernel spills")

    monkeypatch.setattr(module, "launch", launch)
    first = Schedule(16, 1, 8, 2)
    monkeypatch.setattr(module, "heuristic", lambda *_, **__: first)
    weight = pack(quantize(np.ones((64, 64), np.float32), uint4, 64))
    for _ in range(2):
        module.linear(np.ones((16, 64), np.float16), weight, device="reference")
    assert tried == [first, Schedule(16, 1, 8, 1), Schedule(8, 1, 8, 1), Schedule(8, 1, 8, 1)]
    monkeypatch.setattr(module, "heuristic", lambda *_, **__: Schedule(8, 1, 8, 1))
    monkeypatch.setattr(module, "launch", lambda *_: (_ for _ in ()).throw(SpillError("kernel spills")))
    with pytest.raises(SpillError, match="kernel spills"):
        module.linear(np.ones((16, 64), np.float16), weight, device="reference")


def test_cpus_have_schedules_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("tilus.kernels.linear")
    plans: list[Schedule] = []
    monkeypatch.setattr(module, "launch", lambda *args: plans.append(args[4]))
    monkeypatch.setenv("TILUS_NUM_THREADS", "4")
    weight = pack(quantize(np.ones((130, 8192), np.float32), uint4, 64), order="rows")
    module.linear(np.ones((3, 8192), np.float16), weight, device="cpu")
    assert plans == [cpu_schedule(3, 3, 128, 4, num_threads=4)] == [Schedule(3, 1, 1, 0, 3)]
