"""Root-mean-square normalisation, alone or fused with the start of the residual stream or the addition to it.

B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32
from tilus.kernels.allocate import empty

VECTOR = 8  # elements of 16 bits that a thread loads at once
MAX_WARPS = 8


@tilus.kernel(varying=("rows",))
def rms_norm_kernel(
    x: Tensor["dtype", "rows", "hidden"],
    weight: Tensor[f32, "hidden"],
    out: Tensor["dtype", "rows", "hidden"],
    eps: f32,
    residual: Tensor[f32, "rows", "hidden"] = None,
    *,
    hidden: Const,
    starts: Const = False,
):
    """One row a block; every thread holds its part of the row from the load to the store. starts: x begins the residual stream,
    instead of being added to it."""
    warps = min(MAX_WARPS, tilus.cdiv(hidden, 32 * VECTOR))
    step = 32 * VECTOR * warps
    width = tilus.cdiv(hidden, step) * step
    tilus.grid(x.shape[0], warps=warps)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    row = tilus.block_id(0)
    values = tilus.load(x, [row, 0], [width]).to(f32)
    if residual is not None:
        if not starts:
            values = values + tilus.load(residual, [row, 0], [width])
        tilus.store(residual, [row, 0], values)
    # Elements beyond the row are zeros and add nothing.
    inverse = tilus.rsqrt(tilus.sum(values * values, 0, keepdims=True) / hidden + eps)
    result = values * inverse * tilus.load(weight, [0], [width])
    tilus.store(out, [row, 0], result.to(out.dtype))


def rms_norm(x: Any, weight: Any, eps: float, *, device: str | None = None) -> Any:
    """`x / sqrt(mean(x^2) + eps) * weight` along the rows of x.

    x: float16 or bfloat16 [M, H], rows may be strided. weight: float32 [H]. Torch tensors or numpy arrays. device: where to
    run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: [M, H] in the dtype of x. Computed in f32 and rounded once.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    _check_rank("rms_norm", x)
    out = empty(x, tuple(x.shape))
    rms_norm_kernel.on(device)(x, weight, out, eps, hidden=int(x.shape[1]))
    return out


def start_rms_norm(x: Any, weight: Any, eps: float, *, device: str | None = None) -> tuple[Any, Any]:
    """Begin a residual stream with x, and normalise it: `rms_norm(x, weight, eps), x.float()`.

    x: float16 or bfloat16 [M, H], rows may be strided. weight: float32 [H]. Torch tensors or numpy arrays. device: where to
    run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: the norm, [M, H] in the dtype of x, and the residual stream, float32 [M, H], for `add_rms_norm`.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    _check_rank("start_rms_norm", x)
    out, residual = empty(x, tuple(x.shape)), empty(x, tuple(x.shape), "float32")
    rms_norm_kernel.on(device)(x, weight, out, eps, residual, hidden=int(x.shape[1]), starts=True)
    return out, residual


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float, *, device: str | None = None) -> Any:
    """Add x to the residual stream, in place, and normalise the sum: `residual += x; rms_norm(residual, weight, eps)`.

    x: float16 or bfloat16 [M, H]. residual: float32 [M, H]. weight: float32 [H]. The sum is normalised as it is, before any
    rounding to the dtype of x.

    Returns: [M, H] in the dtype of x.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    _check_rank("add_rms_norm", x)
    out = empty(x, tuple(x.shape))
    rms_norm_kernel.on(device)(x, weight, out, eps, residual, hidden=int(x.shape[1]))
    return out


def _check_rank(name: str, x: Any) -> None:
    if x.ndim != 2 or x.shape[1] < 1:
        raise TilusError(
            f"{name}: x has shape {list(x.shape)}, expected [tokens, hidden] with hidden >= 1",
            hint="reshape it: x.reshape(-1, x.shape[-1])",
        )
