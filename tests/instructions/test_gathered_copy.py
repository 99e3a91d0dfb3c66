"""Copies of tiles at indices: what arrives for any index on every execution, who starts them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tilus
from tilus import Const, Tensor, f16, f32, int32
from tilus.compiler import compile_function
from tilus.target import get_target

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
Array = npt.NDArray[Any]


@tilus.kernel
def pages_of(
    x: Tensor["T", "pages", 2, "page", "columns"], table: Tensor[int32, "entries"], y: Tensor["T", "n", "rows", "columns"],
    first: int32, which: int32, *, count: Const, page: Const, columns: Const, warps: Const, stacked: Const, bulk: Const,
):  # fmt: skip
    """Keys or values of `count` pages of a table, from entry `first` on, through the second of two stages."""
    tilus.grid(1, warps=warps + 1)
    shape = [2, count, page, columns] if stacked else [2, count * page, columns]
    ring = tilus.shared(x.dtype, shape)
    full = tilus.mbarrier(2)
    with tilus.warps(0, warps):
        index = tilus.load(table, [first], [count])
        tilus.arrive(full[1], nbytes=ring[1].nbytes)
        if bulk:
            tilus.gather_bulk(ring[1], x, index, [0, which, 0, 0], dims=[2, 3], barrier=full[1], evict="first")
        else:
            tilus.gather_tensor(ring[1], x, index, [0, which, 0, 0], dims=[2, 3], barrier=full[1])
    with tilus.warps(warps, 1):
        tilus.wait_barrier(full[1], 0)
        tile = tilus.load_shared(ring[1])
        tilus.store(y, [0, 0, 0], tile.reshape([count, page, columns]))


def drawn(pages: int, page: int, columns: int) -> Array:
    return np.random.default_rng(pages).normal(size=(pages, 2, page, columns)).astype(np.float16)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize(("count", "warps"), [(1, 1), (8, 1), (8, 4), (2, 4), (6, 4), (3, 4), (4, 8)])
def test_each_index_brings_its_tile(device: str, stacked: bool, bulk: bool, count: int, warps: int) -> None:
    """Also the same tile twice. More warps than indices, or a number that does not divide them, start each copy once."""
    x = drawn(9, 16, 128)
    table = np.array([5, 4, 8, 0, 8, 3, 1, 7, 2, 6], np.int32)
    y = np.zeros((count, 16, 128), np.float16)
    options: dict[str, Any] = {"page": 16, "columns": 128, "stacked": stacked, "bulk": bulk}
    pages_of.on(device)(x, table, y, 1, 1, count=count, warps=warps, **options)
    np.testing.assert_array_equal(y, x[table[1 : 1 + count], 1])


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_outside_of_a_tensor_arrive_as_zeros(device: str) -> None:
    x = drawn(5, 8, 64)
    table = np.array([4, -1, 0, 5, 2**31 - 1, 3], np.int32)
    y = np.ones((6, 8, 64), np.float16)
    options: dict[str, Any] = {"page": 8, "columns": 64, "stacked": True, "bulk": False}
    pages_of.on(device)(x, table, y, 0, 0, count=6, warps=2, **options)
    expected = np.zeros_like(y)
    inside = [0, 2, 5]
    expected[inside] = x[table[inside], 0]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("device", ["reference", "emulator"])
def test_bulk_copies_from_outside_are_errors(device: str) -> None:
    x, y = drawn(5, 8, 64), np.ones((2, 8, 64), np.float16)
    with pytest.raises(tilus.TilusError):
        pages_of.on(device)(
            x, np.array([1, 5], np.int32), y, 0, 0, count=2, warps=1, page=8, columns=64, stacked=True, bulk=True
        )  # fmt: skip


@tilus.kernel
def rows_of(
    x: Tensor[f16, "n", "few", 128],
    table: Tensor[int32, "entries"],
    eye: Tensor[f16, 128, 128],
    y: Tensor[f32, 64, 128],
    *,
    few: Const,
):
    """Products with a unit matrix of 64 rows, which were gathered `few` at a time."""
    tilus.grid(1, warps=4)
    rows, unit, full = tilus.shared(f16, [64, 128]), tilus.shared(f16, [128, 128]), tilus.mbarrier()
    tilus.arrive(full, nbytes=rows.nbytes + unit.nbytes)
    tilus.gather_tensor(rows, x, tilus.load(table, [0], [64 // few]), [0, 0, 0], dims=[1, 2], barrier=full)
    tilus.copy_tensor(unit, eye, [0, 0], barrier=full)
    tilus.wait_barrier(full, 0)
    total = tilus.wgmma(rows, unit)
    tilus.wgmma_wait()
    tilus.store(y, [0, 0], total)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("few", [1, 2, 4, 8])
def test_tiles_of_few_rows_lie_within_the_swizzle_of_all(device: str, few: int) -> None:
    """Whose pattern repeats every eight rows, by the address."""
    notes = compile_function(rows_of.ir(few=few), get_target("sm_90a")).lowered.notes
    assert any(note.mnemonic == "gather_tensor" and "swizzled by 128 bytes" in note.text for note in notes)
    x = np.random.default_rng(few).integers(-9, 9, (80 // few, few, 128)).astype(np.float16)
    table = np.random.default_rng(1).permutation(80 // few)[: 64 // few].astype(np.int32)
    y = np.zeros((64, 128), np.float32)
    rows_of.on(device)(x, table, np.eye(128, dtype=np.float16), y, few=few)
    np.testing.assert_array_equal(y, x[table].reshape(64, 128))


def test_every_warp_starts_its_own_copies() -> None:
    options: dict[str, Any] = {"T": f16, "page": 16, "columns": 128, "stacked": True, "bulk": False}
    for warps, copies in ((1, 16), (2, 8), (4, 4)):
        ptx = compile_function(pages_of.ir(count=8, warps=warps, **options), get_target("sm_90a")).ptx
        assert ptx.count("cp.async.bulk.tensor.4d") == copies  # of 8 tiles with two boxes each


@tilus.kernel
def wrong(x: Tensor[f16, 9, 16, 64], table: Tensor[int32, 8], *, case: Const):
    tilus.grid(1, warps=1)
    ring = tilus.shared(f16, [8, 16, 64])
    full = tilus.mbarrier()
    index = tilus.load(table, [0], [8])
    tilus.arrive(full, nbytes=ring.nbytes)
    if case == "dim":
        tilus.gather_tensor(ring, x, index, [0, 0, 0], dims=[0, 1, 2], barrier=full)
    elif case == "rank":
        tilus.gather_tensor(ring, x, index, [0, 0, 0], dims=[2], barrier=full)
    elif case == "dtype":
        tilus.gather_tensor(ring, x, index.to(f16), [0, 0, 0], dims=[1, 2], barrier=full)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("dim", "indices along dim 0 of x, whose tiles run along .0, 1, 2.; expected another dim"),
        ("rank", "tiles along 1 dims into a shared tensor with 3 dims here, expected 1 or 2"),
        ("dtype", r"indices are f16\[8\], expected int32 of rank 1"),
    ],
)
def test_refusals(case: str, message: str) -> None:
    with pytest.raises(tilus.TilusError, match=message) as error:
        wrong.on("reference")(np.zeros((9, 16, 64), np.float16), np.zeros(8, np.int32), case=case)
    assert "tilus.gather_tensor(" in str(error.value)  # the user's line


@tilus.kernel
def between_units(x: Tensor[f16, 9, 3, 4], table: Tensor[int32, 2]):
    """Tiles of 16 bytes, every other of which starts 8 bytes off."""
    tilus.grid(1, warps=1)
    ring, full = tilus.shared(f16, [2, 2, 4]), tilus.mbarrier()
    tilus.arrive(full, nbytes=ring.nbytes)
    tilus.gather_bulk(ring, x, tilus.load(table, [0], [2]), [0, 0, 0], dims=[1, 2], barrier=full)


def test_bulk_copies_start_at_units_whatever_the_index() -> None:
    with pytest.raises(tilus.TilusError, match="known to start at multiples of 8 bytes, expected 16 bytes"):
        compile_function(between_units.ir(), get_target("sm_90a"))


@tilus.kernel
def asked_for(
    x: Tensor[f16, "pages", 2, "page", 64], table: Tensor[int32, "entries"], y: Tensor[f16, "n", "page", 64], *,
    count: Const, page: Const, dims: Const = (1, 2, 3),
):  # fmt: skip
    """`pages_of`, once the kernel in front has ended; before, its pages are brought into the L2 cache."""
    tilus.grid(1, warps=3)
    ring, full = tilus.shared(f16, [count, page, 64]), tilus.mbarrier()
    with tilus.warps(0, 2):
        index = tilus.load(table, [0], [count])
        tilus.prefetch_gathered(x, index, [0, 0, 0, 0], [2, page, 64], dims=dims)
        tilus.wait_dependencies(constant=[table])
        tilus.arrive(full[0], nbytes=ring.nbytes)
        tilus.gather_tensor(ring, x, index, [0, 1, 0, 0], dims=[2, 3], barrier=full[0])
    with tilus.warps(2, 1):
        tilus.wait_dependencies(constant=[table])
        tilus.wait_barrier(full[0], 0)
        tilus.store(y, [0, 0, 0], tilus.load_shared(ring))


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernel_in_front_may_still_write_may_be_asked_for(device: str) -> None:
    """Also pages that do not exist. It changes nothing."""
    x, table, y = drawn(5, 8, 64), np.array([4, 7, -1, 0], np.int32), np.ones((4, 8, 64), np.float16)
    asked_for.on(device)(x, table, y, count=4, page=8)
    np.testing.assert_array_equal(y[[0, 3]], x[[4, 0], 1])
    assert not y[1:3].any()


def test_each_warp_asks_for_its_own_pages_before_it_waits() -> None:
    ptx = compile_function(asked_for.ir(count=4, page=8), get_target("sm_90a")).ptx
    asked = "cp.async.bulk.prefetch.tensor.4d.L2.global.tile"
    assert ptx.count(asked) == 2 and ptx.rindex(asked) < ptx.index("griddepcontrol.wait")


def test_pages_along_a_dim_of_the_tiles_are_refused() -> None:
    x, table, y = drawn(5, 8, 64), np.zeros(4, np.int32), np.ones((4, 8, 64), np.float16)
    with pytest.raises(tilus.TilusError, match="prefetch_gathered: indices along dim 0 of x, whose tiles run along"):
        asked_for.on("reference")(x, table, y, count=4, page=8, dims=(0, 2, 3))
