"""Fragments against tables written by hand from the formulas of the PTX ISA (groupID = lane >> 2, and so on)."""

from __future__ import annotations

import pytest

from tilus.layout import LayoutError, RegisterLayout, atoms

# "Matrix fragments for mma.m16n8k*": for element i of a lane, with groupID = lane >> 2 and tid = lane % 4.


def a_m16n8k16_16bit(i: int, group: int, tid: int) -> tuple[int, int]:
    row = group if i in (0, 1, 4, 5) else group + 8
    column = tid * 2 + (i & 1) if i < 4 else tid * 2 + (i & 1) + 8
    return row, column


def b_m16n8k16_16bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return (tid * 2 + (i & 1) if i < 2 else tid * 2 + (i & 1) + 8), group


def c_m16n8(i: int, group: int, tid: int) -> tuple[int, int]:
    return (group if i < 2 else group + 8), tid * 2 + (i & 1)


def a_m16n8k8_16bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return (group if i < 2 else group + 8), tid * 2 + (i & 1)


def b_m16n8k8_16bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return tid * 2 + i, group


def a_m16n8k8_tf32(i: int, group: int, tid: int) -> tuple[int, int]:
    return (group if i in (0, 2) else group + 8), (tid if i in (0, 1) else tid + 4)


def b_m16n8k8_tf32(i: int, group: int, tid: int) -> tuple[int, int]:
    return (tid if i == 0 else tid + 4), group


def a_m16n8k4_tf32(i: int, group: int, tid: int) -> tuple[int, int]:
    return (group if i == 0 else group + 8), tid


def b_m16n8k4_tf32(i: int, group: int, tid: int) -> tuple[int, int]:
    return tid, group


def a_m16n8k32_8bit(i: int, group: int, tid: int) -> tuple[int, int]:
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    return row, (tid * 4 + (i & 3) if i < 8 else tid * 4 + (i & 3) + 16)


def b_m16n8k32_8bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return (tid * 4 + (i & 3) if i < 4 else tid * 4 + (i & 3) + 16), group


def a_m16n8k16_8bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return (group if i < 4 else group + 8), tid * 4 + (i & 3)


def b_m16n8k16_8bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return tid * 4 + i, group


def a_m16n8k32_4bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return (group if i < 8 else group + 8), tid * 8 + (i & 7)


def b_m16n8k32_4bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return tid * 8 + i, group


def a_m16n8k64_4bit(i: int, group: int, tid: int) -> tuple[int, int]:
    row = group if 0 <= i < 8 or 16 <= i < 24 else group + 8
    return row, (tid * 8 + (i & 7) if i < 16 else tid * 8 + (i & 7) + 32)


def b_m16n8k64_4bit(i: int, group: int, tid: int) -> tuple[int, int]:
    return (tid * 8 + (i & 7) if i < 8 else tid * 8 + (i & 7) + 32), group


FRAGMENTS = [
    (atoms.mma_a(16), a_m16n8k16_16bit, (16, 16)),
    (atoms.mma_b(16), b_m16n8k16_16bit, (16, 8)),
    (atoms.mma_c(), c_m16n8, (16, 8)),
    (atoms.mma_a(16, 8), a_m16n8k8_16bit, (16, 8)),
    (atoms.mma_b(16, 8), b_m16n8k8_16bit, (8, 8)),
    (atoms.mma_a(32), a_m16n8k8_tf32, (16, 8)),
    (atoms.mma_b(32), b_m16n8k8_tf32, (8, 8)),
    (atoms.mma_a(32, 4), a_m16n8k4_tf32, (16, 4)),
    (atoms.mma_b(32, 4), b_m16n8k4_tf32, (4, 8)),
    (atoms.mma_a(8), a_m16n8k32_8bit, (16, 32)),
    (atoms.mma_b(8), b_m16n8k32_8bit, (32, 8)),
    (atoms.mma_a(8, 16), a_m16n8k16_8bit, (16, 16)),
    (atoms.mma_b(8, 16), b_m16n8k16_8bit, (16, 8)),
    (atoms.mma_a(4), a_m16n8k64_4bit, (16, 64)),
    (atoms.mma_b(4), b_m16n8k64_4bit, (64, 8)),
    (atoms.mma_a(4, 32), a_m16n8k32_4bit, (16, 32)),
    (atoms.mma_b(4, 32), b_m16n8k32_4bit, (32, 8)),
]


@pytest.mark.parametrize(("layout", "formula", "shape"), FRAGMENTS, ids=[f[1].__name__ for f in FRAGMENTS])
def test_fragments_of_mma(layout: RegisterLayout, formula: object, shape: tuple[int, int]) -> None:
    assert (layout.shape, layout.num_threads, layout.num_locals) == (shape, 32, shape[0] * shape[1] // 32)
    for lane in range(32):
        for i in range(layout.num_locals):
            assert layout(lane, i) == formula(i, lane >> 2, lane % 4)  # type: ignore[operator]


@pytest.mark.parametrize("nbits", [1, 2, 4, 8, 16, 32])
def test_ldmatrix(nbits: int) -> None:
    """Lane 4 * row + c receives the four bytes c of the row of 16 bytes."""
    layout = atoms.ldmatrix(nbits)
    assert layout.shape == (8, 128 // nbits)
    for lane in range(32):
        for i in range(32 // nbits):
            assert layout(lane, i) == (lane // 4, (lane % 4) * 32 // nbits + i)


def test_ldmatrix_trans() -> None:
    """With .trans lane 4 * column + c receives the elements of rows 2c and 2c + 1."""
    for lane in range(32):
        for i in range(2):
            assert atoms.ldmatrix_trans()(lane, i) == (lane % 4 * 2 + i, lane // 4)


@pytest.mark.parametrize("n", [8, 16, 24, 96, 128, 256])
def test_wgmma_d(n: int) -> None:
    layout = atoms.wgmma_d(n)
    assert (layout.shape, layout.num_threads, layout.num_locals) == ((64, n), 128, n // 2)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            row = 16 * warp + lane // 4 + 8 * ((i // 2) % 2)
            assert layout(thread, i) == (row, 8 * (i // 4) + lane % 4 * 2 + i % 2)


@pytest.mark.parametrize(("nbits", "formula"), [(16, a_m16n8k16_16bit), (8, a_m16n8k32_8bit), (32, a_m16n8k8_tf32)])
def test_wgmma_a(nbits: int, formula: object) -> None:
    layout = atoms.wgmma_a(nbits)
    assert layout.shape == (64, 256 // nbits)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(layout.num_locals):
            row, column = formula(i, lane >> 2, lane % 4)  # type: ignore[operator]
            assert layout(thread, i) == (16 * warp + row, column)


@pytest.mark.parametrize(
    ("m", "n", "k", "warps"), [(32, 16, 16, (2, 2)), (64, 48, 32, (2, 3)), (16, 8, 16, (1, 1)), (96, 32, 48, (3, 1))]
)
def test_block_level_mma(m: int, n: int, k: int, warps: tuple[int, int]) -> None:
    """Each warp holds, repeat by repeat, the fragments of its block of C and of the A rows and B columns it needs."""
    a, b, c = atoms.mma_layouts(m, n, k, warps)
    assert (a.shape, b.shape, c.shape) == ((m, k), (k, n), (m, n))
    assert a.num_threads == b.num_threads == c.num_threads == 32 * warps[0] * warps[1]
    assert (a.num_replicas, b.num_replicas, c.num_replicas) == (warps[1], warps[0], 1)
    rm, rn, rk = m // 16 // warps[0], n // 8 // warps[1], k // 16
    for thread in range(c.num_threads):
        warp, lane = divmod(thread, 32)
        wm, wn = divmod(warp, warps[1])
        blocks = (
            (a, 8, a_m16n8k16_16bit, (rm, rk), (16, 16), (wm * rm, 0)),
            (b, 4, b_m16n8k16_16bit, (rk, rn), (16, 8), (0, wn * rn)),
            (c, 4, c_m16n8, (rm, rn), (16, 8), (wm * rm, wn * rn)),
        )
        for layout, size, formula, repeats, shape, first in blocks:
            for slot in range(layout.num_locals):
                repeat, i = divmod(slot, size)
                tile = (first[0] + repeat // repeats[1], first[1] + repeat % repeats[1])
                row, column = formula(i, lane >> 2, lane % 4)
                assert layout(thread, slot) == (tile[0] * shape[0] + row, tile[1] * shape[1] + column)


def test_atoms_divide_the_block_layouts() -> None:
    a, b, c = atoms.mma_layouts(64, 64, 64, (2, 2))
    for layout, atom in ((a, atoms.mma_a()), (b, atoms.mma_b()), (c, atoms.mma_c())):
        assert layout.divide(atom) * atom == layout
    assert a.try_divide(atoms.ldmatrix()) is not None
    assert b.try_divide(atoms.ldmatrix_trans()) is not None
    assert b.try_divide(atoms.ldmatrix()) is None
    assert b.permute([1, 0]).try_divide(atoms.ldmatrix()) is not None


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(LayoutError, match="expected 4, 8, 16 or 32"):
        atoms.mma_a(6)
    with pytest.raises(LayoutError, match="no k = 32 on 16 bits; expected 8 or 16"):
        atoms.mma_b(16, 32)
    with pytest.raises(LayoutError, match="cannot hold elements of 3 bits"):
        atoms.ldmatrix(3)
    with pytest.raises(LayoutError, match="n = 12"):
        atoms.wgmma_d(12)
    with pytest.raises(LayoutError, match=r"m, n, k = 48, 16, 16 by 2 x 1 warps; expected multiples of \(32, 8, 16\)"):
        atoms.mma_layouts(48, 16, 16, (2, 1))
