"""Gated activations and caps against float64. The f32 work in between: an exponential (ex2.approx), a division, products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import assert_rounded_once, float64

from tilus import TilusError
from tilus.kernels import gelu_mul, silu_mul, soft_cap
from tilus.kernels.activation import gated_kernel


def exact_silu_mul(gate_up: torch.Tensor) -> np.ndarray:
    gate, up = np.split(float64(gate_up), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def inputs(tokens: int, width: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Gates from -24 to 24 or so: from where silu underflows in f16 to where it is the identity."""
    return (8 * torch.randn(tokens, 2 * width, generator=torch.Generator().manual_seed(width))).to(dtype)


@pytest.mark.parametrize("width", [1, 7, 8, 100, 1023, 1024, 1025, 1536])
@pytest.mark.parametrize("tokens", [1, 3])
def test_silu_mul(device: str, tokens: int, width: int) -> None:
    gate_up = inputs(tokens, width)
    # The argument of the exponential has an error of 2^-24 of its size, up to 40.
    assert_rounded_once(silu_mul(gate_up, device=device), exact_silu_mul(gate_up), work=2.0**-17)


def test_bfloat16(device: str) -> None:
    gate_up = inputs(2, 100, torch.bfloat16)
    assert_rounded_once(silu_mul(gate_up, device=device), exact_silu_mul(gate_up), work=2.0**-17)


def test_large_gates(device: str) -> None:
    """exp overflows to infinity below about -88; the limit is zero, not NaN."""
    gate_up = torch.tensor([[-65504.0, -100.0, 0.0, 65504.0, 1.0, 2.0, 3.0, 1.0]], dtype=torch.float16)
    assert torch.equal(silu_mul(gate_up, device=device), torch.tensor([[0.0, 0.0, 0.0, 65504.0]], dtype=torch.float16))


@pytest.mark.parametrize("width", [7, 1025])
def test_gelu_mul(device: str, width: int) -> None:
    """The error of the exponential's argument, up to 40 and more with the error of the cube, is relative to the result, also in
    the tail where a tanh would have lost it; results below f16's normal numbers are rounded absolutely."""
    gate_up = inputs(3, width) / 4
    gate, up = np.split(float64(gate_up), 2, axis=-1)
    u = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    assert np.abs(u).max() > 8
    assert_rounded_once(gelu_mul(gate_up, device=device), gate * up / (1 + np.exp(-2 * u)), work=2.0**-14)


@pytest.mark.parametrize("width", [7, 1025])
def test_soft_cap(device: str, width: int) -> None:
    """Also of logits at which the exponential overflows."""
    x = 20 * torch.randn(2, width, generator=torch.Generator().manual_seed(width))
    x[0, :3] = torch.tensor([-3e4, 3e4, 0.0])
    expected = 30 * np.tanh(float64(x) / 30)
    assert soft_cap(x, 30.0, device=device) is x
    assert np.abs(float64(x) - expected).max() <= 30 * 2.0**-21


def test_caps_are_positive() -> None:
    with pytest.raises(TilusError, match=r"soft_cap: x has shape \[2, 7\] and the cap is 0, expected \[rows, width\]"):
        soft_cap(torch.zeros(2, 7), 0)


def test_other_block_sizes(device: str) -> None:
    gate_up = inputs(2, 300)
    out = torch.empty(2, 300, dtype=torch.float16)
    gated_kernel.on(device)(gate_up.view(2, 2, 300), out, block=256)
    assert torch.equal(out, silu_mul(gate_up, device=device))


def test_odd_row_is_refused() -> None:
    with pytest.raises(TilusError, match=r"silu_mul: gate_up has shape \[2, 7\], expected \[tokens, 2 \* width\]"):
        silu_mul(torch.zeros(2, 7, dtype=torch.float16))
