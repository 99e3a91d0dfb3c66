"""Dense products against float64: small integers, whose products and sums are exact, so that only the last rounding is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import float64

from tilus import TilusError
from tilus.kernels import gemm
from tilus.kernels.gemm import Plan, launch, plan

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


@pytest.mark.parametrize(("left", "right", "out"), TYPES, ids=str)
def test_types(device: str, left: torch.dtype, right: torch.dtype, out: torch.dtype) -> None:
    """Edges inside of tiles along m, n and k."""
    check(device, integers((40, 208), left), integers((136, 208), right, 1), out)


@pytest.mark.parametrize(
    ("m", "n", "k", "chosen"),
    [
        (1, 8, 8, Plan(16, 2, 1, 1)),
        (64, 128, 64, Plan(64, 2, 1, 1)),
        (200, 520, 256, Plan(64, 3, 1, 3)),
        (70, 1160, 72, Plan(32, 2, 1, 7)),
        (300, 264, 192, Plan(128, 3, 1, 2)),
        (260, 264, 192, Plan(256, 2, 1, 6)),
        (200, 520, 256, Plan(64, 3, 2, 4)),
        (300, 264, 192, Plan(128, 3, 2, 2)),
        (70, 264, 200, Plan(32, 2, 1, 4, splits=2)),
        (8, 136, 256, Plan(16, 3, 1, 4, splits=4)),
        (20, 264, 520, Plan(16, 2, 1, 8, splits=8)),
    ],
    ids=str,
)
def test_plans(device: str, m: int, n: int, k: int, chosen: Plan) -> None:
    """Fewer tiles than blocks and more, more bands than one, less k than there are stages and more, clusters of both kinds."""
    if device != "cpu":
        check(device, integers((m, k), torch.float16), integers((n, k), torch.float16, 1), torch.float32, chosen)


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
    launch(x, w, y, (1.0, None, None, None), Plan(16, 2, 1, 2, splits=2), device)
    exact = float64(x) @ float64(w).T
    assert (exact % 2 != 0).any() and np.abs(exact).max() < 2**31
    np.testing.assert_array_equal(y.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("row_nbytes", [16, 4096, 28672])
@pytest.mark.parametrize("num_sms", [1, 8, 132])
@pytest.mark.parametrize("n", [8, 128, 1000, 14336])
@pytest.mark.parametrize("m", [1, 17, 128, 300, 8192])
@pytest.mark.parametrize("out_nbytes", [2, 4])
def test_the_plan_fits(m: int, n: int, row_nbytes: int, num_sms: int, out_nbytes: int) -> None:
    chosen = plan(m, n, row_nbytes, num_sms, out_nbytes)
    assert chosen.stages >= 2 and chosen.blocks % (chosen.cluster * chosen.splits) == 0
    assert min(chosen.cluster, chosen.splits) == 1 and chosen.splits <= max(1, row_nbytes // 128)
    assert 1 <= chosen.blocks <= max(num_sms, 1)
    nbytes = (
        chosen.stages * (128 + chosen.tokens) * 128 + 2 * min(chosen.tokens, 64) * 128 // chosen.splits * out_nbytes
    )
    if chosen.splits > 1:
        nbytes += 128 * chosen.tokens * 4
    assert nbytes <= 227 * 1024 - 2048


@pytest.mark.parametrize(("n", "splits"), [(1024, 4), (4096, 4), (4224, 2), (8192, 2), (14336, 1)])
def test_few_tiles_are_shared(n: int, splits: int) -> None:
    """Of decoding: as many blocks as an H100 runs, as far as parts of K go; 33 clusters of four would not all run at once."""
    assert plan(16, n, 4096, 132).splits == splits


def test_mistakes() -> None:
    x, w = integers((8, 64), torch.float16), integers((16, 64), torch.float16)
    with pytest.raises(TilusError, match=r"x has shape \[8, 64\], w \[16, 32\]"):
        gemm(x, w[:, :32], device="reference")
    with pytest.raises(TilusError, match=r"bias has shape \[8\], expected \[16\]"):
        gemm(x, w, bias=torch.zeros(8), device="reference")
    with pytest.raises(TilusError, match="without out_dtype"):
        gemm(x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), device="reference")
    assert gemm(x[:0], w, device="reference").shape == (0, 16)
