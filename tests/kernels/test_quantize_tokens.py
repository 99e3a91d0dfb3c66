"""Codes and scales of activations, bit for bit: the definition in numpy's f32, rounded by torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import float64

import tilus
from tilus import TilusError
from tilus.kernels import gemm, quantize_tokens

SIZES = [1, 100, 256, 257, 4096, 4100, 20000]  # 256: one warp's tile; 4096: sixteen warps'; 20000: read twice
LARGEST = {tilus.int8: np.float32(127), tilus.float8_e4m3: np.float32(448)}


def tokens(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Rows of many sizes."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    return (x * 4.0 ** torch.arange(rows)[:, None]).to(dtype)


def check(x: torch.Tensor, dtype: tilus.DataType, device: str) -> None:
    codes, scales = quantize_tokens(x, dtype, device=device)
    values = x.float().numpy()
    peak = np.maximum(np.abs(values).max(1, initial=0.0), np.float32(2.0**-100))
    scaled = values * (LARGEST[dtype] / peak)[:, None]
    if dtype == tilus.int8:
        assert codes.dtype == torch.int8
        np.testing.assert_array_equal(codes.numpy(), np.rint(scaled))
    else:
        assert codes.dtype == torch.float8_e4m3fn
        wanted = torch.from_numpy(scaled).to(torch.float8_e4m3fn)
        np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), wanted.view(torch.uint8).numpy())
    np.testing.assert_array_equal(scales.numpy(), peak / LARGEST[dtype])


@pytest.mark.sampled(9)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_bit_for_bit(device: str, dtype: tilus.DataType, columns: int) -> None:
    check(tokens(3, columns), dtype, device)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_sizes_of_bfloat16(device: str, dtype: tilus.DataType) -> None:
    """Rows of zeros, of subnormal numbers, below and above the smallest peak, and of the largest numbers."""
    x = tokens(1, 64, torch.bfloat16) / 8
    sizes = torch.tensor([0.0, 2.0**-133, 2.0**-120, 2.0**-100, 2.0**-99, 1.0, 2.0**127])[:, None]
    check((x.float() * sizes).to(torch.bfloat16), dtype, device)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_every_f16(device: str, dtype: tilus.DataType) -> None:
    """All finite numbers, and in one row those up to a peak of 127 or 448, which are rounded as they are, ties and all."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = bits[np.isfinite(bits)]
    check(torch.from_numpy(finite.reshape(2, -1)), dtype, device)
    small = finite[np.abs(finite) <= float(LARGEST[dtype])]
    check(torch.from_numpy(np.ascontiguousarray(small[None])), dtype, device)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("what", [torch.inf, -torch.inf, torch.nan])
def test_not_finite(device: str, dtype: tilus.DataType, what: float) -> None:
    """The row's scale is infinity and its finite elements are zero; other rows do not notice."""
    x = tokens(3, 300)
    x[1, 17] = what
    codes, scales = quantize_tokens(x, dtype, device=device)
    assert scales[1] == torch.inf and torch.isfinite(scales[[0, 2]]).all()
    assert not np.delete(float64(codes[1].float()), 17).any()
    found = quantize_tokens(x[[0, 2]], dtype, device=device)
    assert torch.equal(found[0].view(torch.uint8), codes[[0, 2]].view(torch.uint8))
    if device != "cpu":
        whole = codes[:, :288].contiguous()
        y = gemm(whole, torch.ones(8, 288).to(whole.dtype), x_scale=scales, out_dtype=torch.float32, device=device)
        assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()


@pytest.mark.sampled(9)
@pytest.mark.parametrize("columns", [16, 48, 4096, 20000])
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_paired(device: str, dtype: tilus.DataType, columns: int) -> None:
    """The same codes, place 4 t + 2 c + h of each 16 having column 8 h + 2 t + c."""
    x = tokens(3, columns)
    codes, scales = quantize_tokens(x, dtype, device=device)
    moved, same = quantize_tokens(x, dtype, paired=True, device=device)
    assert torch.equal(scales, same)
    before, after = (found.view(torch.uint8).reshape(3, -1, 16) for found in (codes, moved))
    for h, t, c in np.ndindex(2, 4, 2):
        assert torch.equal(after[:, :, 4 * t + 2 * c + h], before[:, :, 8 * h + 2 * t + c])


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_products(device: str, dtype: tilus.DataType) -> None:
    """Both operands in 8 bits. Sums of int8 are exact. float8 has 64 times the integers here, so all of it is exact."""
    if device == "cpu":
        return
    x, w = (torch.randint(-4, 5, (rows, 272), generator=torch.Generator().manual_seed(rows)).half() for rows in (5, 24))
    x[:, 3], w[:, 100] = 7, -7
    (a, a_scale), (b, b_scale) = (quantize_tokens(operand, dtype, device=device) for operand in (x, w))
    y = gemm(a, b, x_scale=a_scale, w_scale=b_scale, out_dtype=torch.float32, device=device)
    if dtype == tilus.float8_e4m3:
        np.testing.assert_array_equal(float64(y), float64(x) @ float64(w).T)
    exact = float64(a.float()) @ float64(b.float()).T * float64(a_scale)[:, None] * float64(b_scale)
    np.testing.assert_allclose(float64(y), exact, rtol=2.0**-22, atol=0)


def test_strided_rows_and_numpy(device: str) -> None:
    wide = torch.full((3, 700), torch.nan, dtype=torch.float16)
    wide[:, 8:584] = tokens(3, 576)
    check(wide[:, 8:584], tilus.int8, device)
    x = tokens(2, 100)
    codes, scales = quantize_tokens(x.numpy(), device=device)
    expected = quantize_tokens(x, device=device)
    np.testing.assert_array_equal(codes, expected[0].numpy())
    np.testing.assert_array_equal(scales, expected[1].numpy())


def test_no_tokens(device: str) -> None:
    codes, scales = quantize_tokens(tokens(0, 64), device=device)
    assert codes.shape == (0, 64) and scales.shape == (0,)


def test_mistakes() -> None:
    with pytest.raises(TilusError, match=r"x has shape \[4\], expected \[tokens, K\]"):
        quantize_tokens(torch.zeros(4).half(), device="reference")
    with pytest.raises(TilusError, match=r"x has dtype torch\.float32, expected float16 or bfloat16"):
        quantize_tokens(torch.zeros(4, 4), device="reference")
    with pytest.raises(TilusError, match="quantize_tokens to uint4, expected int8 or float8_e4m3"):
        quantize_tokens(torch.zeros(4, 4).half(), tilus.uint4, device="reference")
    with pytest.raises(TilusError, match="x has 24 columns, expected a multiple of 16"):
        quantize_tokens(torch.zeros(4, 24).half(), paired=True, device="reference")
    with pytest.raises(TilusError, match="of a ndarray to float8_e4m3, expected a torch tensor"):
        quantize_tokens(np.zeros((4, 4), np.float16), tilus.float8_e4m3, device="reference")
