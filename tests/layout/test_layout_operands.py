"""Layouts of wgmma operands and TMA tiles, address by address, as the text of the PTX ISA describes them."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest

from tilus.layout import LayoutError, row_major
from tilus.layout.operands import Major, tma_tile, tma_tiles, wgmma_forms, wgmma_operand, wgmma_operands

SWIZZLES = (0, 32, 64, 128)


def swizzled_address(address: int, swizzle: int) -> int:
    """PTX ISA, "Swizzling modes": units of 16 bytes change places in a pattern that repeats every 256, 512 or 1024 bytes.

    Rows of 128 bytes hold eight units. In row r of the pattern, unit u is found at u ^ r for 128 bytes, at u ^ (r / 2) in its
    group of four for 64 (rows of 64 bytes: two in 128 bytes) and at u ^ (r / 4) in its pair for 32.
    """
    line, unit, rest = address // 128, address // 16 % 8, address % 16
    units = {0: 1, 32: 2, 64: 4, 128: 8}[swizzle]
    return 128 * line + 16 * (unit ^ line % units) + rest


def operand_address(mn: int, k: int, extent: tuple[int, int], nbytes: int, swizzle: int, major: str) -> int:
    """The byte address by core matrices: 8 rows of 16 bytes, of which 1, 2, 4 or 8 lie side by side in a row of a block."""
    (row, rows), (column, _) = ((mn, extent[0]), (k, extent[1]))[:: 1 if major == "k" else -1]
    byte = column * nbytes
    per_row = max(1, swizzle // 16)  # core matrices side by side
    core, in_core = divmod(byte, 16)
    block, place = divmod(core, per_row)
    # The stride between groups of 8 rows (SBO) is that of 8 rows of the block; between blocks it is a block of all rows.
    group, row_in_core = divmod(row, 8)
    row_nbytes = 16 * per_row
    address = block * rows * row_nbytes + group * 8 * row_nbytes + row_in_core * row_nbytes + place * 16 + in_core
    return swizzled_address(address, swizzle)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("major", ["k", "mn"])
@pytest.mark.parametrize("nbytes", [1, 2, 4])
@pytest.mark.parametrize("shape", [(64, 64), (8, 256), (192, 96), (128, 32)], ids=str)
def test_wgmma_operands(shape: tuple[int, int], nbytes: int, major: Major, swizzle: int) -> None:
    inner, outer = (shape[1], shape[0]) if major == "k" else (shape[0], shape[1])
    if (major == "mn" and nbytes != 2) or inner * nbytes % max(16, swizzle) or outer % 8:
        with pytest.raises(LayoutError, match="wgmma operand"):
            wgmma_operand(shape, nbytes, swizzle, major)
        return
    layout = wgmma_operand(shape, nbytes, swizzle, major)
    assert layout.shape == shape and layout.is_compact()
    for mn, k in product(*map(range, shape)):
        assert layout.offset((mn, k)) * nbytes == operand_address(mn, k, shape, nbytes, swizzle, major)


@pytest.mark.parametrize("nbytes", [1, 2, 4])
@pytest.mark.parametrize("shape", [(64, 64), (2, 8, 256), (192, 128)], ids=str)
def test_forms_say_what_a_descriptor_needs(shape: tuple[int, ...], nbytes: int) -> None:
    """PTX ISA, "Strides": the matrix that one instruction reads (32 bytes of k, any multiple of 8 along m or n) is found from its
    start by the two distances and the width of swizzled rows."""
    mn, k = shape[-2:]
    for layout, form in wgmma_forms(shape, nbytes).items():
        depth, unit = 32 // nbytes, 16 // nbytes
        for start in product(*(range(n) for n in shape[:-2]), range(0, mn, 64), range(0, k, depth)):
            first = form.linear.offset(start) * nbytes
            for i, j in product(range(min(64, mn)), range(depth)):
                leading, stride = form.leading_nbytes, form.stride_nbytes
                if form.major == "k":
                    row = max(16, form.swizzle_nbytes)
                    along_k = j // unit * (leading if form.swizzle_nbytes == 0 else 16) + j % unit * nbytes
                    address = first + i // 8 * stride + i % 8 * row + along_k
                elif form.swizzle_nbytes == 0:
                    address = first + i // unit * stride + i % unit * nbytes + j // 8 * leading + j % 8 * 16
                else:
                    width = form.swizzle_nbytes // nbytes
                    in_block = j // 8 * stride + j % 8 * form.swizzle_nbytes
                    address = first + i // width * leading + i % width * nbytes + in_block
                index = (*start[:-2], start[-2] + i, start[-1] + j)
                assert layout.offset(index) * nbytes == swizzled_address(address, form.swizzle_nbytes)


@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_buffers_follow_each_other(swizzle: int) -> None:
    tile, ring = (wgmma_operand(shape, 2, swizzle, "mn") for shape in ((64, 16), (2, 3, 64, 16)))
    table = ring.table().reshape(6, 64, 16)
    assert all((table[n] == tile.table() + n * 64 * 16).all() for n in range(6))


def test_all_operands() -> None:
    assert len(set(wgmma_operands((128, 64), 2))) == 8
    assert len(wgmma_operands((128, 64), 1)) == 3  # no mn-major, and rows of 64 bytes
    assert len(wgmma_operands((64, 96), 2)) == 3 + 4  # 192 bytes are no multiple of 128
    assert wgmma_operands((12, 64), 2) == ()
    for layout in wgmma_operands((3, 128, 64), 2):
        assert layout.shape == (3, 128, 64) and layout.is_compact()


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (4, 8, 192), (256,)], ids=str)
@pytest.mark.parametrize("nbytes", [1, 2, 4, 8])
def test_tma_tiles(shape: tuple[int, ...], nbytes: int, swizzle: int) -> None:
    """Each box is row-major in memory with rows of the swizzle's width, and boxes follow each other."""
    if shape[-1] * nbytes % max(16, swizzle):
        with pytest.raises(LayoutError, match="TMA tile with rows"):
            tma_tile(shape, nbytes, swizzle, rank=len(shape))
        return
    width = swizzle // nbytes or shape[-1]
    layout = tma_tile(shape, nbytes, swizzle, rank=len(shape))
    assert layout.is_compact() or prod(shape) * nbytes < 1024
    box = prod(shape[:-1]) * width
    for index in product(*map(range, shape)):
        flat = 0
        for i, extent in zip(index[:-1], shape[:-1]):
            flat = flat * extent + i
        linear = index[-1] // width * box + flat * width + index[-1] % width
        assert layout.offset(index) * nbytes == swizzled_address(linear * nbytes, swizzle)


def test_tma_writes_what_wgmma_reads() -> None:
    """K-major operands with k contiguous in global memory, mn-major ones transposed; unswizzled in boxes of 16 bytes."""
    for swizzle in (32, 64, 128):
        assert tma_tile((3, 128, 64), 2, swizzle) == wgmma_operand((3, 128, 64), 2, swizzle, "k")
        transposed = tma_tile((3, 64, 128), 2, swizzle).permute((0, 2, 1))
        assert transposed == wgmma_operand((3, 128, 64), 2, swizzle, "mn")
    assert set(tma_tiles((128, 64), 2)) & set(wgmma_operands((128, 64), 2)) == set(wgmma_operands((128, 64), 2)[:3])
    assert tma_tile((128, 64), 2, 0) == row_major((128, 64))
    assert tma_tile((128, 8), 2, 0) == wgmma_operand((128, 8), 2, 0, "k")


def test_shapes_that_do_not_fit() -> None:
    def refused(make: object, *args: object) -> str:
        with pytest.raises(LayoutError) as error:
            make(*args)  # type: ignore[operator]
        return error.value.message

    assert "expected multiples of 8 and 64" in refused(wgmma_operand, (64, 32), 2, 128, "k")
    assert "only 2-byte elements can be mn-major" in refused(wgmma_operand, (64, 64), 1, 0, "mn")
    assert "0, 32, 64 or 128 bytes" in refused(wgmma_operand, (64, 64), 2, 16, "k")
    assert "expected a multiple of 32" in refused(tma_tile, (8, 40), 4, 128)
    assert "rank 1 to 5" in refused(tma_tile, (8, 64), 2, 128, 3)
