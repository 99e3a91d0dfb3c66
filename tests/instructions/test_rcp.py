"""Reciprocals of tiles, exactly rounded and with an error of one unit in the last place."""

from __future__ import annotations

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, f32


@tilus.kernel
def reciprocals(x: Tensor[f32, "n"], y: Tensor[f32, "n"], *, approx: Const):
    tilus.grid(1, warps=1)
    tilus.store(y, [0], tilus.rcp(tilus.load(x, [0], [512]), approx=approx))


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("approx", "units"), [(False, 0), (True, 1)])
def test_reciprocals(approx: bool, units: int, device: str) -> None:
    """Of numbers of all sizes, both signs, whose reciprocals may be subnormal; and of infinity."""
    x = np.random.default_rng(0).uniform(1, 2, 508).astype(np.float32) * np.float32(2.0) ** (np.arange(508) % 254 - 126)
    x = np.append(x * (-1) ** np.arange(508), [1, 2.0**127, np.inf, -np.inf]).astype(np.float32)
    y = np.full_like(x, np.nan)
    reciprocals.on(device)(x, y, approx=approx)
    np.testing.assert_array_max_ulp(y, (1 / x.astype(np.float64)).astype(np.float32), units)


def test_the_instruction() -> None:
    assert "rcp.approx.f32" in reciprocals.ptx(approx=True)
    assert "rcp.approx" not in reciprocals.ptx(approx=False)
