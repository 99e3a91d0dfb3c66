"""exp2 of tiles, with subnormal results and with zeros in their place."""

from __future__ import annotations

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, f32


@tilus.kernel
def powers(x: Tensor[f32, "n"], y: Tensor[f32, "n"], *, ftz: Const):
    tilus.grid(1, warps=1)
    tilus.store(y, [0], tilus.exp2(tilus.load(x, [0], [1024]), ftz=ftz))


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("ftz", [False, True])
def test_powers(ftz: bool, device: str) -> None:
    """Within 2^-21 of the power. No x is so near to -126 that rounding decides what is below the least normal number."""
    x = np.append(np.arange(-148, 127, 0.375, np.float32), np.array([-np.inf, np.inf, -1e30], np.float32))
    y = np.full_like(x, np.nan)
    powers.on(device)(x, y, ftz=ftz)
    with np.errstate(over="ignore"):
        exact = np.exp2(x.astype(np.float64))
    expected = np.where(exact < 2.0**-126, 0, exact) if ftz else exact
    finite = np.isfinite(exact)
    assert (np.abs(y[finite] - expected[finite]) <= 2.0**-21 * expected[finite] + 2.0**-149).all()
    assert (y[~finite] == np.inf).all()
    assert bool((y[(x < -126) & (x > -148)] == 0).all()) == ftz
