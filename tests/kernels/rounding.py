"""How exact a kernel must be: it computes in f32 and rounds each result once, to nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

# The relative error of rounding to nearest, 2 to the minus (bits of the significand), and half of the smallest subnormal.
RELATIVE = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
ABSOLUTE = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150}


def float64(values: Any) -> Array:
    """A torch tensor or numpy array of any float type, exactly."""
    return values.double().numpy() if isinstance(values, torch.Tensor) else np.float64(values)


def assert_rounded_once(found: torch.Tensor, exact: Array, size: Array | None = None, work: float = 2.0**-18) -> None:
    """`found` is `exact` with a relative error of `work` (relative to `size`, the magnitude of what was added up), rounded."""
    size = np.abs(exact) if size is None else size
    error = work * size
    bound = error + RELATIVE[found.dtype] * (np.abs(exact) + error) + ABSOLUTE[found.dtype]
    wrong = ~(np.abs(float64(found) - exact) <= bound)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} are wrong, the first at {np.argwhere(wrong)[0]}: "
        f"{float64(found)[wrong][0]} instead of {exact[wrong][0]}"
    )
