"""`with tilus.warps(...)`: names of a role are its own, and Python's statements work in it as everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.ir.stmt import Role
from tilus.ir.visit import walk

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start

    def bump(self) -> None:
        self.value += 3


@tilus.kernel
def named(x: Tensor[int32, "n"], *, base: Const = 10):
    tilus.grid(2, warps=4)
    place = tilus.block_id(0) * 8
    seen = place + x.shape[0] - 64  # 0 more than place
    for trip in tilus.range(2):
        seen += trip
    with tilus.warps(0, 1):
        # A variable that was changed in a loop, changed again for these warps only.
        mine = seen
        for k in tilus.range(3):
            mine += k
        tilus.store(x, [place], tilus.full([1], mine, int32))
    with tilus.warps(2, 2):
        count = Counter(base)
        for k in tilus.range(4):
            if k == 2:
                continue
            if k == 3:
                break
            count.bump()
        tilus.store(x, [place + 1], tilus.full([1], count.value, int32))
        mine = place * 2
        tilus.store(x, [place + 2], tilus.full([1], mine, int32))
    mine = seen + 100
    tilus.store(x, [place + 3], tilus.full([1], mine, int32))
    for trip in tilus.range(2):
        with tilus.warps(1, 1):
            total = trip + seen
            tilus.store(x, [place + 4 + trip], tilus.full([1], total, int32))
    if seen > 4:
        with tilus.warps(3, 1):
            tilus.store(x, [place + 6], tilus.full([1], 1, int32))


@pytest.mark.parametrize("device", DEVICES)
def test_names_and_statements(device: str) -> None:
    x = np.full(64, -1, np.int32)
    named.on(device)(x)
    expected = np.full(64, -1, np.int32)
    for block in range(2):
        place = 8 * block
        seen = place + 1
        expected[place : place + 6] = [seen + 3, 16, 2 * place, seen + 100, seen, seen + 1]
        if seen > 4:
            expected[place + 6] = 1
    np.testing.assert_array_equal(x, expected)


def test_what_becomes_of_a_role() -> None:
    @tilus.kernel
    def plain(x: Tensor[f32, "n"]):
        tilus.grid(1, warps=12)
        with tilus.warps(4, count=8, registers=208):
            tilus.store(x, [0], tilus.zeros([32]))

    found = [stmt for stmt in walk(plain.ir().body) if isinstance(stmt, Role)]
    assert [(r.first_warp, r.num_warps, r.registers) for r in found] == [(4, 8, 208)]
    assert found[0].loc is not None
    assert "with tilus.warps(4" in found[0].loc.snippet()


def run(kernel: Any) -> str:
    with pytest.raises(tilus.TilusError) as caught:
        kernel.ir(after="eliminate_dead_code")
    assert "test_roles.py:" in str(caught.value)
    return caught.value.message


def test_what_a_role_assigns_is_not_known_behind_it() -> None:
    @tilus.kernel
    def behind(x: Tensor[int32, "n"]):
        tilus.grid(1, warps=2)
        n = x.shape[0]
        with tilus.warps(0, 1):
            n = 5
        tilus.store(x, [n], tilus.zeros([1], int32))

    assert "n is assigned in the role at line" in run(behind)

    @tilus.kernel
    def neighbour(x: Tensor[int32, "n"]):
        tilus.grid(1, warps=2)
        with tilus.warps(0, 1):
            n = x.shape[0]
        with tilus.warps(1, 1):
            tilus.store(x, [n], tilus.zeros([1], int32))

    assert "n is assigned in the role at line" in run(neighbour)


def test_a_role_does_not_change_what_outlives_it() -> None:
    @tilus.kernel
    def loop(x: Tensor[int32, "n"]):
        tilus.grid(1, warps=2)
        n = x.shape[0]
        for _ in tilus.range(3):
            with tilus.warps(0, 1):
                n += 1

    assert "n is assigned in a role and was bound outside of the run-time loop or branch around it" in run(loop)

    @tilus.kernel
    def attribute(x: Tensor[int32, "n"]):
        tilus.grid(1, warps=2)
        count = Counter(1)
        with tilus.warps(0, 1):
            count.bump()
        tilus.store(x, [0], tilus.full([1], count.value, int32))

    assert "value is assigned in a role, and belongs to what was made outside of it" in run(attribute)

    @tilus.kernel
    def container(x: Tensor[int32, "n"]):
        tilus.grid(1, warps=2)
        items = [1]
        with tilus.warps(0, 1):
            items.append(2)
        tilus.store(x, [0], tilus.full([1], items[-1], int32))

    assert "changes a list made before it" in run(container)


def test_tiles_do_not_enter_roles() -> None:
    @tilus.kernel
    def tile(x: Tensor[f32, "n"]):
        tilus.grid(1, warps=2)
        t = tilus.load(x, [0], [64])
        with tilus.warps(0, 1):
            tilus.store(x, [0], t)

    assert "is read in a role and was made outside of it" in run(tile)


def test_what_warps_expects() -> None:
    @tilus.kernel
    def misuse(n: int32, *, mistake: Const):
        tilus.grid(1, warps=4)
        for _ in tilus.range(2):
            with tilus.warps(
                n if mistake == "first" else 0,
                0 if mistake == "count" else 1,
                registers=n if mistake == "registers" else None,
            ):
                if mistake == "nested":
                    with tilus.warps(0, 1):
                        pass
                if mistake == "break":
                    break

    for mistake, message in (
        ("first", "first is a run-time scalar of int32, expected a compile-time int of 0 or more"),
        ("count", "count is 0, expected a compile-time int of 1 or more"),
        ("registers", "registers is a run-time scalar of int32, expected a compile-time int or None"),
        ("nested", "a role inside of a role, expected them side by side"),
        ("break", "break leaves a role, expected a loop inside of it"),
    ):
        with pytest.raises(tilus.TilusError) as caught:
            misuse.ir(mistake=mistake)
        assert caught.value.message == message
