"""Roles that pass tiles on through shared memory: barriers make them wait for each other, and nothing else does."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.compiler import compile_for_cpu
from tilus.runtime.cpu.features import host_target

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTH = 128


@tilus.kernel
def doubled(x: Tensor[f32, "n"], y: Tensor[f32, "n"], *, producers: Const, consumers: Const, stages: Const):
    """One role loads, the next one computes."""
    tilus.grid(2, warps=producers + consumers)
    ring = tilus.shared(f32, [stages, WIDTH])
    full, empty = tilus.mbarrier(stages), tilus.mbarrier(stages)
    steps = x.shape[0] // (2 * WIDTH)
    first = tilus.block_id(0) * steps
    with tilus.warps(0, producers):
        for k in tilus.range(steps):
            tilus.wait_barrier(empty[k % stages], (k // stages + 1) % 2)
            tilus.store_shared(ring[k % stages], tilus.load(x, [(first + k) * WIDTH], shape=[WIDTH]))
            tilus.arrive(full[k % stages])
    with tilus.warps(producers, consumers):
        phase = 0
        for k in tilus.range(steps):
            tilus.wait_barrier(full[k % stages], phase)
            tile = tilus.load_shared(ring[k % stages])
            tilus.arrive(empty[k % stages])
            tilus.store(y, [(first + k) * WIDTH], tile * 2)
            if k % stages == stages - 1:
                phase = 1 - phase


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("warps", [(1, 1), (1, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_pipeline(device: str, warps: tuple[int, int], stages: int) -> None:
    x = np.arange(2 * 7 * WIDTH, dtype=np.float32)
    y = np.zeros_like(x)
    doubled.on(device)(x, y, producers=warps[0], consumers=warps[1], stages=stages)
    np.testing.assert_array_equal(y, 2 * x)


@tilus.kernel
def chain(x: Tensor[int32, "n"], y: Tensor[int32, "n"], *, stages: Const, size: Const = 64):
    """Three roles in a row, then two that share what arrives; all of them leave their loops in their own ways."""
    tilus.grid(1, warps=6)
    steps = x.shape[0] // size
    rings = [tilus.shared(int32, [count, size]) for count in stages]
    full = [tilus.mbarrier(count) for count in stages]
    empty = [tilus.mbarrier(stages[0]), tilus.mbarrier(stages[1], arrivals=2)]
    with tilus.warps(2, 2):
        for k in tilus.range(steps + 100):
            if k >= steps:
                break
            tilus.wait_barrier(full[0][k % stages[0]], k // stages[0] % 2)
            tile = tilus.load_shared(rings[0][k % stages[0]])
            tilus.arrive(empty[0][k % stages[0]])
            tilus.wait_barrier(empty[1][k % stages[1]], (k // stages[1] + 1) % 2)
            tilus.store_shared(rings[1][k % stages[1]], tile * 3)
            tilus.arrive(full[1][k % stages[1]])
    with tilus.warps(1, 1):
        k = steps * 0
        while True:
            if k == steps:
                return
            tilus.wait_barrier(empty[0][k % stages[0]], (k // stages[0] + 1) % 2)
            tilus.store_shared(rings[0][k % stages[0]], tilus.load(x, [k * size], shape=[size]) + 1)
            tilus.arrive(full[0][k % stages[0]])
            k += 1
    with tilus.warps(4, 1):
        _collect(rings[1], full[1], empty[1], y, stages[1], size, 0)
    with tilus.warps(0, 1):
        _collect(rings[1], full[1], empty[1], y, stages[1], size, 1)


@tilus.inline
def _collect(ring: Any, full: Any, empty: Any, y: Any, stages: int, size: int, half: int) -> None:
    for k in tilus.range(y.shape[0] // size):
        tilus.wait_barrier(full[k % stages], k // stages % 2)
        tile = tilus.load_shared(ring, [k % stages, half * (size // 2)], [size // 2])
        tilus.arrive(empty[k % stages])
        tilus.store(y, [k * size + half * (size // 2)], tile - half)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stages", [(1, 1), (2, 3), (4, 1)])
def test_roles_in_a_row(device: str, stages: tuple[int, int]) -> None:
    x = np.arange(9 * 64, dtype=np.int32)
    y = np.zeros_like(x)
    chain.on(device)(x, y, stages=stages)
    np.testing.assert_array_equal(y.reshape(9, 2, 32), ((x + 1) * 3).reshape(9, 2, 32) - np.array([0, 1])[:, None])


@tilus.kernel
def uneven(x: Tensor[int32, "n"], *, size: Const = 32):
    """Every block has its own number of steps, and a stage of its own to begin with."""
    tilus.grid(5, warps=2)
    ring = tilus.shared(int32, [2, size])
    full, empty = tilus.mbarrier(2), tilus.mbarrier(2)
    first = tilus.block_id(0)
    steps = (first * 3) % 5
    with tilus.warps(0, 1):
        for k in tilus.range(steps):
            tilus.wait_barrier(empty[(first + k) % 2], (k // 2 + 1) % 2)
            tilus.store_shared(ring[(first + k) % 2], tilus.arange(size) + k)
            tilus.arrive(full[(first + k) % 2])
    with tilus.warps(1, 1):
        total = tilus.zeros([size], int32)
        for k in tilus.range(steps):
            tilus.wait_barrier(full[(first + k) % 2], k // 2 % 2)
            total += tilus.load_shared(ring[(first + k) % 2])
            tilus.arrive(empty[(first + k) % 2])
        tilus.store(x, [tilus.block_id(0) * size], total)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_go_their_own_ways(device: str) -> None:
    x = np.zeros((5, 32), np.int32)
    uneven.on(device)(x.reshape(-1))
    steps = [0, 3, 1, 4, 2]
    np.testing.assert_array_equal(x, [[sum(range(s)) + s * i for i in range(32)] for s in steps])


# What does not work is reported.


@tilus.kernel
def broken(x: Tensor[f32, "n"], *, mistake: Const):
    tilus.grid(1, warps=3)
    ring = tilus.shared(f32, [2, 32])
    full = tilus.mbarrier(2)
    empty = tilus.mbarrier(2)
    if mistake == "alone":
        tilus.wait_barrier(full[0], 0)
    with tilus.warps(0, 1):
        for k in tilus.range(4):
            tilus.wait_barrier(empty[k % 2], k // 2 % 2 if mistake == "phase" else (k // 2 + 1) % 2)
            tilus.store_shared(ring[k % 2], tilus.zeros([32]))
            if mistake in ("bytes", "twice"):
                tilus.arrive(full[k % 2], nbytes=128)
            if mistake != "bytes":
                tilus.arrive(full[k % 2])
            if mistake == "index":
                tilus.arrive(full[k + 1])
            if mistake == "parity":
                tilus.wait_barrier(full[k % 2], k + 2)
    with tilus.warps(2, 1):
        for k in tilus.range(4):
            tilus.wait_barrier(full[k % 2], 1 if mistake == "flipped" else k // 2 % 2)
            tilus.store(x, [k * 32], tilus.load_shared(ring[k % 2]))
            if mistake != "free":
                tilus.arrive(empty[k % 2])


def refusal(mistake: str) -> str:
    with pytest.raises(tilus.TilusError) as caught:
        broken.on("reference")(np.zeros(128, np.float32), mistake=mistake)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mistake", "first", "second"),
    [
        ("phase", "0 of empty[0], whose phase 0 lacks 1 of 1", "0 of full[0], whose phase 0 lacks 1 of 1"),
        ("free", "0 of empty[0], whose phase 0 lacks 1 of 1", "1 of full[0], whose phase 1 lacks 1 of 1"),
        ("flipped", "0 of empty[0], whose phase 0 lacks 1 of 1", "1 of full[0], whose phase 1 lacks 1 of 1"),
        ("bytes", "0 of empty[0], whose phase 0 lacks 1 of 1", "0 of full[0], whose phase 0 lacks 0 of 1"),
    ],
)
def test_who_waits_for_what_is_said(mistake: str, first: str, second: str) -> None:
    """A producer that starts with phase 0, and consumers that free nothing, start with phase 1, or wait for lost bytes."""
    lines = refusal(mistake).splitlines()
    assert lines[0] == "the roles wait for each other, and nobody can go on"
    assert lines[1] == f"  note: warp 0: waits for phase {first} arrivals"
    assert lines[5] == f"  note: warp 2: waits for phase {second} arrivals{' and 128 bytes' * (mistake == 'bytes')}"
    for place, barrier in ((2, "empty"), (6, "full")):
        assert "test_mbarrier.py:" in lines[place]
        assert f"tilus.wait_barrier({barrier}[k % 2], " in lines[place + 1]
        assert "^^^^" in lines[place + 2]
    assert lines[9:] == [
        "  hint: every phase needs its arrivals; a consumer starts with phase 0, a producer that waits for free stages with 1"
    ]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "alone",
            "the block waits for phase 0 of full[0], whose phase 0 lacks 1 of 1 arrivals, and nobody else runs\n",
        ),
        ("twice", "arrives at a barrier that waits for 0 of 1 arrivals in its phase 0, expected no more than those\n"),
        ("index", "barrier full[2], expected an index from 0 to 1\n"),
        ("parity", "wait for phase 2 of full[0], expected its parity, 0 or 1\n"),
    ],
)
def test_misuse_is_refused(mistake: str, message: str) -> None:
    assert message in refusal(mistake)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("element type", "arrive: shared is f32[2], expected barriers"),
        ("which", "wait_barrier: [2] barriers, expected one"),
        ("constant index", "index 2 of shared tensor mbarrier is out of range"),
        ("constant phase", "wait_barrier for phase 2, expected its parity, 0 or 1"),
        ("arrivals", "mbarrier of 0 arrivals, expected 1 to 1048575"),
        ("in a branch", "mbarrier in a loop, branch or role, expected where the whole block passes once"),
        ("in a role", "mbarrier in a loop, branch or role, expected where the whole block passes once"),
    ],
)
def test_what_is_no_use_of_a_barrier(mistake: str, message: str) -> None:
    @tilus.kernel
    def wrong(n: int32, *, mistake: Const):
        tilus.grid(1)
        ring = tilus.shared(f32, [2])
        full = tilus.mbarrier(2, arrivals=0 if mistake == "arrivals" else 1)
        if mistake == "element type":
            tilus.arrive(ring[0])
        if mistake == "which":
            tilus.wait_barrier(full, 0)
        if mistake == "constant index":
            tilus.arrive(full[2])
        if mistake == "constant phase":
            tilus.wait_barrier(full[0], 2)
        if mistake == "in a branch" and n > 0:
            tilus.mbarrier()
        if mistake == "in a role":
            with tilus.warps(0, 1):
                tilus.mbarrier()

    with pytest.raises(tilus.TilusError, match=re.escape(message)) as caught:
        wrong.ptx(mistake=mistake)
    assert "test_mbarrier.py:" in str(caught.value)


def test_targets_without_these_barriers() -> None:
    options = {"producers": 1, "consumers": 1, "stages": 2}
    with pytest.raises(tilus.TilusError, match=r"tilus.mbarrier needs sm_90a or a later GPU, the target is sm_80"):
        doubled.ptx(target="sm_80", **options)
    with pytest.raises(tilus.TilusError, match=r"kernel doubled uses tilus.mbarrier, which needs a GPU") as caught:
        compile_for_cpu(doubled.ir(**options), host_target())
    assert "test_mbarrier.py:" in str(caught.value)
    assert 'device "reference" or "emulator"' in str(caught.value)
