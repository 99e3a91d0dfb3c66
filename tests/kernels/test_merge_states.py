"""merge_states as an algebra: commutative, associative up to rounding, with an identity; and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus import TilusError
from tilus.kernels.merge_states import merge_states, merge_states_kernel
from tilus.runtime.binaries import build
from tilus.target import get_target

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HALF_STEPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}
State = tuple[torch.Tensor, torch.Tensor]


def state(shape: tuple[int, ...], dtype: torch.dtype, seed: int, none: float = 0.2) -> State:
    """Logarithms from -30 to 30, some of them of no keys: then the result is no number."""
    generator = torch.Generator().manual_seed(seed)
    lse = torch.empty(shape[:-1]).uniform_(-30, 30, generator=generator)
    empty = torch.rand(shape[:-1], generator=generator) < none
    o = torch.randn(shape, generator=generator).to(dtype)
    return torch.where(empty[..., None], torch.nan, o), torch.where(empty, -torch.inf, lse)


def same(a: State, b: State) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> None:
    """Off by the rounding of the result and a few steps of f32; logarithms by what f32 has at 32."""
    a, b = state(shape, dtype, seed), state(shape, dtype, seed + 1)
    o, lse = merge_states(*a, *b, device=device)
    assert o.dtype == dtype and o.shape == shape and lse.shape == shape[:-1]
    logs = np.stack([a[1].double().numpy(), b[1].double().numpy()])
    expected_lse = np.logaddexp(*logs)
    weights = np.where(np.isneginf(logs), 0, np.exp(logs - np.where(np.isneginf(expected_lse), 0, expected_lse)))
    values = np.nan_to_num(np.stack([a[0].double().numpy(), b[0].double().numpy()])) * weights[..., None]
    error = np.abs(o.double().numpy() - values.sum(0))
    assert (error <= HALF_STEPS[dtype] * np.abs(values.sum(0)) + 2.0**-20 * np.abs(values).sum(0) + 2.0**-25).all()
    assert np.array_equal(np.isneginf(lse.numpy()), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    assert np.abs(lse.double().numpy()[finite] - expected_lse[finite]).max(initial=0) <= 2.0**-18


@pytest.mark.sampled(9)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 64), (7, 96), (300, 128)], ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(shape, dtype, device)


def test_against_float64_on_the_emulator() -> None:
    check((9, 2, 64), torch.bfloat16, "emulator")


@given(st.integers(1, 6), st.sampled_from([16, 80, 128]), st.sampled_from(DTYPES), st.integers(0, 999))
@settings(max_examples=10)
def test_both_orders_have_the_same_bits(rows: int, head_dim: int, dtype: torch.dtype, seed: int) -> None:
    a, b = state((rows, head_dim), dtype, seed), state((rows, head_dim), dtype, seed + 1)
    assert same(merge_states(*a, *b, device="reference"), merge_states(*b, *a, device="reference"))
    equal = state((rows, head_dim), dtype, seed + 2, none=0.0)[0], b[1]  # the same logarithm
    assert same(merge_states(*equal, *b, device="reference"), merge_states(*b, *equal, device="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_keys_change_nothing(dtype: torch.dtype, device: str) -> None:
    """Whatever their result is: here it is no number."""
    a = state((40, 64), dtype, 0, none=0.0)
    nothing = torch.full_like(a[0], torch.nan), torch.full_like(a[1], -torch.inf)
    assert same(merge_states(*a, *nothing, device=device), a)
    assert same(merge_states(*nothing, *a, device=device), a)
    o, lse = merge_states(*nothing, *nothing, device=device)
    assert (o == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_associative_up_to_rounding(dtype: torch.dtype, device: str) -> None:
    """The result in between is rounded to the dtype, once on each side."""
    a, b, c = (state((60, 64), dtype, seed) for seed in range(3))
    left = merge_states(*merge_states(*a, *b, device=device), *c, device=device)
    right = merge_states(*a, *merge_states(*b, *c, device=device), device=device)
    most = max(float(x[0].nan_to_num().abs().max()) for x in (a, b, c))
    assert (left[0].double() - right[0].double()).abs().max() <= 4 * HALF_STEPS[dtype] * most
    finite = torch.isfinite(left[1])
    assert torch.equal(finite, torch.isfinite(right[1]))
    assert (left[1][finite] - right[1][finite]).abs().max() <= 2.0**-17


def test_numpy_arrays_and_nothing_to_do() -> None:
    a, b = state((4, 32), torch.float32, 0), state((4, 32), torch.float32, 1)
    o, lse = merge_states(*(t.numpy() for t in (*a, *b)), device="reference")
    assert same((torch.from_numpy(o), torch.from_numpy(lse)), merge_states(*a, *b, device="reference"))
    assert merge_states(*(t[:0] for t in (*a, *b)), device="reference")[0].shape == (0, 32)


def test_what_does_not_fit_is_refused() -> None:
    a, b = state((4, 32), torch.float32, 0), state((5, 32), torch.float32, 1)
    with pytest.raises(TilusError, match=r"\[4, 32\], \[4\], \[5, 32\], \[5\], expected o \[\.\.\., D\]"):
        merge_states(*a, *b, device="reference")
    with pytest.raises(TilusError, match="f16"):
        merge_states(*a, a[0].half(), a[1], device="reference")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sm", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assembles_without_spills(dtype: torch.dtype, sm: str) -> None:
    a = state((128, 128), dtype, 0)
    special = merge_states_kernel.specialize(*a, *a, *a, head_dim=128, rows=64)
    assert build(special.function, get_target(sm))[1]
