"""Weights of 16 bits in `linear`: the products of `gemm`, and bits that do not depend on other rows where that is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import float64

from tilus import TilusError
from tilus.kernels import DenseWeight, linear
from tilus.kernels.gemm_schedule import Product, invariant_plan

EXECUTIONS = ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_have_the_same_bits_in_any_company(execution: str, dtype: torch.dtype) -> None:
    """Numbers whose sums are rounded, so that another order along K would show."""
    x, weight = normal((72, 584), dtype, 0), DenseWeight(normal((16, 584), dtype, 1))
    together = linear(x, weight, out_dtype=torch.float32, device=execution, invariant=True)
    np.testing.assert_allclose(together, float64(x) @ float64(weight.values).T, rtol=1e-5, atol=1e-4)
    for rows in (slice(0, 1), slice(5, 25)):
        alone = linear(x[rows], weight, out_dtype=torch.float32, device=execution, invariant=True)
        np.testing.assert_array_equal(alone, together[rows])


@given(
    m=st.integers(1, 5000),
    n=st.integers(1, 30000),
    steps=st.integers(1, 300),
    num_sms=st.sampled_from([1, 2, 114, 132]),
)
def test_invariant_plans_cut_nothing_along_k(m: int, n: int, steps: int, num_sms: int) -> None:
    found = invariant_plan(Product(m, n, steps * 128, 2, num_sms))
    assert (found.blocks, found.splits) == (1, 1)


@pytest.mark.parametrize("execution", ["reference", *EXECUTIONS])
def test_bias_and_out(execution: str) -> None:
    x, weight, bias = torch.ones(3, 64).half(), DenseWeight(torch.eye(64).half()), torch.arange(64).float()
    out = torch.zeros(3, 96).half()
    linear(x, weight, bias=bias, out=out[:, 32:], device=execution)
    np.testing.assert_array_equal(out[:, 32:], 1 + bias.expand(3, 64))
    assert not out[:, :32].any()


def test_mistakes() -> None:
    with pytest.raises(TilusError, match=r"float32\[2, 8\], expected float16 or bfloat16"):
        DenseWeight(torch.zeros(2, 8))
    with pytest.raises(TilusError, match="K a multiple of 8"):
        DenseWeight(torch.zeros(2, 9).half())
    weight = DenseWeight(torch.zeros(16, 8).half())
    assert (weight.shape, weight.nbytes) == ((16, 8), 256)
    with pytest.raises(TilusError, match="which needs a GPU"):
        linear(torch.zeros(1, 8).half(), weight, device="cpu")
