"""SiLU-mul against float64. The f32 work in between: an exponential (ex2.approx), a division, two products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import assert_rounded_once, float64

from tilus import TilusError
from tilus.kernels import silu_mul
from tilus.kernels.activation import silu_mul_kernel


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


def test_other_block_sizes(device: str) -> None:
    gate_up = inputs(2, 300)
    out = torch.empty(2, 300, dtype=torch.float16)
    silu_mul_kernel.on(device)(gate_up.view(2, 2, 300), out, block=256)
    assert torch.equal(out, silu_mul(gate_up, device=device))


def test_odd_row_is_refused() -> None:
    with pytest.raises(TilusError, match=r"silu_mul: gate_up has shape \[2, 7\], expected \[tokens, 2 \* width\]"):
        silu_mul(torch.zeros(2, 7, dtype=torch.float16))
