"""Dense products against float64: small integers, whose products and sums are exact, so that only the last rounding is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import float64

from tilus import TilusError
from tilus.kernels import gemm
from tilus.kernels.gemm import launch
from tilus.kernels.gemm_schedule import Plan, Product, plan, possible

TYPES = [
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float32),
    (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16),
    (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16),
    (torch.int8, torch.int8, torch.bfloat16),
    (torch.int8, torch.int8, torch.float32),
]


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32).to(dtype)


def check(device: str, x: torch.Tensor, w: torch.Tensor, out: torch.dtype, chosen: Plan | None = None) -> None:
    """With factors that are powers of two and a bias, all of which are exact."""
    m, n = x.shape[0], w.shape[0]
    x_scale, w_scale = (2.0 ** torch.randint(-2, 3, (extent,)).float() for extent in (m, n))
    bias = integers((n,), torch.float32, 7)
    expected = float64(x) @ float64(w).T * 0.5 * float64(x_scale)[:, None] * float64(w_scale) + float64(bias)
    if device == "cpu":
        with pytest.raises(TilusError, match="which needs a GPU"):
            gemm(x, w, out_dtype=out, device=device)
        return
    if chosen is None:
        y = gemm(x, w, bias=bias, scale=0.5, x_scale=x_scale, w_scale=w_scale, out_dtype=out, device=device)
    else:
        y = torch.full((m, n), torch.nan, dtype=out)
        launch(x, w, y, (0.5, x_scale, w_scale, bias), chosen, device)
    assert y.dtype == out
    np.testing.assert_array_equal(float64(y), float64(torch.from_numpy(expected).to(out)))


@pytest.mark.sampled(9)
@pytest.mark.parametrize(("left", "right", "out"), TYPES, ids=str)
def test_types(device: str, left: torch.dtype, right: torch.dtype, out: torch.dtype) -> None:
    """Edges inside of tiles along m, n and k."""
    check(device, integers((40, 208), left), integers((136, 208), right, 1), out)


PLANS = [
    (1, 8, 8, Plan(16, 1, 1, 2, launched=1)),
    (64, 128, 64, Plan(64, 2, 1, 2, launched=1)),
    (70, 1160, 72, Plan(32, 2, 1, 2, launched=7)),
    (200, 392, 200, Plan(96, 1, 1, 3, launched=5)),
    (300, 264, 192, Plan(128, 2, 1, 3, launched=2)),
    (260, 264, 192, Plan(256, 2, 1, 2, launched=6)),
    (190, 200, 192, Plan(192, 1, 1, 2, once=True, launched=2)),
    # Warpgroups along K: of tiles with an even and an odd number of steps, and with fewer steps than warpgroups.
    (20, 264, 264, Plan(16, 1, 2, 4, launched=3)),
    (70, 264, 200, Plan(32, 2, 2, 4, launched=2)),
    (9, 200, 40, Plan(16, 1, 3, 6, launched=2)),
    (33, 136, 456, Plan(48, 1, 3, 6, launched=1)),
    # Blocks along K.
    (70, 264, 200, Plan(32, 2, 1, 2, blocks=2, launched=4)),
    (8, 136, 520, Plan(16, 1, 2, 4, blocks=4, launched=4)),
    (12, 136, 520, Plan(16, 2, 1, 2, blocks=8, launched=8)),
    # Blocks that bring activations and weights for each other.
    (100, 392, 200, Plan(64, 2, 1, 3, share_x=2, launched=4)),
    (300, 136, 192, Plan(128, 2, 1, 2, share_w=2, launched=2)),
    (70, 520, 200, Plan(64, 1, 2, 4, share_x=4, launched=8)),
    (100, 200, 200, Plan(32, 1, 1, 3, share_x=2, share_w=2, launched=8)),
]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("m", "n", "k", "chosen"), PLANS, ids=str)
def test_plans(device: str, m: int, n: int, k: int, chosen: Plan) -> None:
    """Fewer tiles than blocks and more, more bands than one, less k than there are stages and more."""
    if device != "cpu":
        check(device, integers((m, k), torch.float16), integers((n, k), torch.float16, 1), torch.float32, chosen)


@pytest.mark.parametrize(("m", "k"), [(3, 64), (3, 1600), (130, 64)])
def test_constant_weights(device: str, m: int, k: int) -> None:
    """Asked for before the kernel in front has ended, in fewer steps than there are stages and in more."""
    if device == "cpu":
        return
    x, w, bias = integers((m, k), torch.float16), integers((72, k), torch.float16, 1), integers((72,), torch.float32)
    y = gemm(x, w, bias=bias, w_scale=torch.full((72,), 0.5), out_dtype=torch.float32, constant=True, device=device)
    np.testing.assert_array_equal(float64(y), float64(x) @ float64(w).T / 2 + float64(bias))


def test_integers_add_up_exactly(device: str) -> None:
    """Codes of both ends of the range, in parts of K: f32 does not hold all of these sums."""
    if device == "cpu":
        return
    values = torch.tensor([-128, -127, 126, 127], dtype=torch.int8)
    x, w = (
        values[torch.randint(0, 4, (extent, 2064), generator=torch.Generator().manual_seed(extent))]
        for extent in (9, 24)
    )
    y = torch.full((9, 24), torch.nan)
    launch(x, w, y, (1.0, None, None, None), Plan(16, 1, 2, 4, blocks=2, launched=2), device)
    exact = float64(x) @ float64(w).T
    assert (exact % 2 != 0).any() and np.abs(exact).max() < 2**31
    np.testing.assert_array_equal(y.numpy(), exact.astype(np.float32))


SIZES = st.integers(1, 20000) | st.sampled_from([8, 16, 64, 128, 1000, 4096, 14336, 28672])


@given(SIZES, SIZES, st.integers(1, 3000), st.sampled_from([1, 8, 84, 132]), st.sampled_from([2, 4]))
def test_the_plan_fits(m: int, n: int, steps: int, num_sms: int, out_nbytes: int) -> None:
    """What the kernel relies on: room, whole clusters, at most as many as there are tiles, a step for every warpgroup."""
    product = Product(m, n, 128 * steps, out_nbytes, num_sms)
    for chosen in (plan(product), *possible(product)):
        sums = (chosen.splits + chosen.blocks - 2) * chosen.rows * chosen.tokens * 4
        buffers = 2 * chosen.stored * chosen.rows * out_nbytes
        assert chosen.stages * (chosen.rows + chosen.tokens) * 128 + sums + buffers <= 227 * 1024 - 2048
        assert chosen.stages % chosen.splits == 0 and steps >= chosen.splits * chosen.blocks
        assert chosen.blocks == 1 or chosen.share_x * chosen.share_w == 1
        team = chosen.blocks * chosen.share_x * chosen.share_w
        assert team <= 2 and chosen.launched % team == 0 and 1 <= chosen.launched <= max(num_sms, team)
        assert chosen.launched <= chosen.tiles(m, n) and chosen.once == (m <= chosen.tokens)
        assert chosen.tokens // chosen.share_x % 8 == 0 and chosen.rows // chosen.share_w % 8 == 0
        assert chosen.tokens <= 256 and chosen.warpgroups <= 2


def test_mistakes() -> None:
    x, w = integers((8, 64), torch.float16), integers((16, 64), torch.float16)
    with pytest.raises(TilusError, match=r"x has shape \[8, 64\], w \[16, 32\]"):
        gemm(x, w[:, :32], device="reference")
    with pytest.raises(TilusError, match=r"bias has shape \[8\], expected \[16\]"):
        gemm(x, w, bias=torch.zeros(8), device="reference")
    with pytest.raises(TilusError, match="without out_dtype"):
        gemm(x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), device="reference")
    assert gemm(x[:0], w, device="reference").shape == (0, 16)
