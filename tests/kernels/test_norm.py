"""RMSNorm against float64. The f32 work in between: a sum in trees, a reciprocal root (2 ulp), two products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import Array, assert_rounded_once, float64

from tilus import TilusError
from tilus.kernels import add_rms_norm, rms_norm, start_rms_norm

SIZES = [1, 2, 100, 255, 256, 257, 576, 2048, 2049, 4096]  # 256: one warp's tile; 2048: eight warps'
EPS = 1e-5


def exact_norm(x: Array, weight: torch.Tensor) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * float64(weight)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_rms_norm(device: str, tokens: int, hidden: int) -> None:
    x, weight = normal(tokens, hidden, dtype=torch.float16), normal(hidden, seed=1)
    assert_rounded_once(rms_norm(x, weight, EPS, device=device), exact_norm(float64(x), weight))


@pytest.mark.parametrize("hidden", [100, 576, 2049])
def test_add_rms_norm(device: str, hidden: int) -> None:
    """The residual stream is the f32 sum, exactly; its norm is that of the sum before any rounding to f16."""
    x, weight, residual = normal(3, hidden, dtype=torch.float16), normal(hidden, seed=1), 30 * normal(3, hidden, seed=2)
    total = residual + x
    out = add_rms_norm(x, residual, weight, EPS, device=device)
    assert torch.equal(residual, total)
    assert_rounded_once(out, exact_norm(float64(total), weight))


@pytest.mark.parametrize("hidden", [100, 576, 2049])
def test_start_rms_norm(device: str, hidden: int) -> None:
    """The stream is x in f32; its norm is that of `rms_norm`, bit by bit."""
    x, weight = normal(3, hidden, dtype=torch.float16), normal(hidden, seed=1)
    out, residual = start_rms_norm(x, weight, EPS, device=device)
    assert residual.dtype == torch.float32 and torch.equal(residual, x.float())
    assert torch.equal(out, rms_norm(x, weight, EPS, device=device))


@pytest.mark.parametrize("hidden", [100, 576])
def test_what_is_added_may_be_normed_first(device: str, hidden: int) -> None:
    x, residual = normal(3, hidden, dtype=torch.float16), 30 * normal(3, hidden, seed=2)
    weight, x_norm = normal(hidden, seed=1), normal(hidden, seed=3)
    total = float64(residual) + exact_norm(float64(x), x_norm)
    out = add_rms_norm(x, residual, weight, EPS, x_norm=x_norm, constant=True, device=device)
    assert_rounded_once(residual, total, np.abs(total) + 4 * np.abs(float64(x_norm)))
    assert_rounded_once(out, exact_norm(float64(residual), weight))


def test_a_stream_may_begin_scaled_and_go_on_wider(device: str) -> None:
    """A scale whose products need more than 16 bits, and a norm in another type than x."""
    x, weight = normal(3, 100, dtype=torch.float16), normal(100, seed=1)
    out, residual = start_rms_norm(x, weight, EPS, scale=10.1, out_dtype=torch.bfloat16, device=device)
    assert out.dtype == torch.bfloat16
    assert torch.equal(residual, x.float() * 10.1)
    assert_rounded_once(out, exact_norm(float64(residual), weight))


def test_bfloat16(device: str) -> None:
    x, weight = normal(2, 576, dtype=torch.bfloat16), normal(576, seed=1)
    out = rms_norm(x, weight, EPS, device=device)
    assert out.dtype == torch.bfloat16
    assert_rounded_once(out, exact_norm(float64(x), weight))


def test_strided_rows(device: str) -> None:
    """A slice of wider rows, with NaN beside it."""
    wide = torch.full((3, 700), torch.nan, dtype=torch.float16)
    wide[:, 8:584] = normal(3, 576)
    weight = normal(576, seed=1)
    out = rms_norm(wide[:, 8:584], weight, EPS, device=device)
    assert_rounded_once(out, exact_norm(float64(wide[:, 8:584]), weight))


def test_zero_rows_stay_zero(device: str) -> None:
    out = rms_norm(torch.zeros(2, 100, dtype=torch.float16), torch.ones(100), EPS, device=device)
    assert torch.equal(out, torch.zeros(2, 100, dtype=torch.float16))


def test_no_tokens(device: str) -> None:
    assert rms_norm(normal(0, 64, dtype=torch.float16), normal(64), EPS, device=device).shape == (0, 64)


def test_numpy_arrays(device: str) -> None:
    x, weight = normal(3, 100, dtype=torch.float16), normal(100, seed=1)
    out = rms_norm(x.numpy(), weight.numpy(), EPS, device=device)
    assert_rounded_once(torch.from_numpy(out), exact_norm(float64(x), weight))
    _, residual = start_rms_norm(x.numpy(), weight.numpy(), EPS, device=device)
    assert residual.dtype == np.float32 and (residual == x.numpy()).all()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (normal(4, dtype=torch.float16), normal(4), r"rms_norm: x has shape \[4\], expected \[tokens, hidden\]"),
        (normal(2, 8, dtype=torch.float16), normal(9), "parameter weight: found hidden = 9, expected 8"),
        (normal(2, 8), normal(8, dtype=torch.float16), "parameter weight: found dtype f16, expected f32"),
    ],
)
def test_misfits_are_named_with_both_values(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(TilusError, match=message):
        rms_norm(x, weight, EPS)


def test_residual_of_another_shape() -> None:
    with pytest.raises(TilusError, match="parameter residual: found rows = 3, expected 2"):
        add_rms_norm(normal(2, 8, dtype=torch.float16), normal(3, 8), normal(8), EPS)
