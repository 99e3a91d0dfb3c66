"""Root-mean-square normalisation, alone or fused with the start of the residual stream or the addition to it.

B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32
from tilus.kernels.allocate import empty
from tilus.layout import local

VECTOR = 4  # neighbouring elements of a thread: 16 bytes of the residual stream; with 8 these would be read in halves
MAX_WARPS = 8


@tilus.kernel(varying=("rows",))
def rms_norm_kernel(
    x: Tensor["dtype", "rows", "hidden"],
    weight: Tensor[f32, "hidden"],
    out: Tensor["out_dtype", "rows", "hidden"],
    eps: f32,
    residual: Tensor[f32, "rows", "hidden"] = None,
    x_norm: Tensor[f32, "hidden"] = None,
    *,
    hidden: Const,
    starts: Const = False,
    scale: Const = 1.0,
    constant: Const = False,
):
    """One row a block; every thread holds its part of the row from the load to the store. starts: x times the scale begins the
    residual stream, instead of being added to it. x_norm: weight of the norm of x in front of all else."""
    warps = min(MAX_WARPS, tilus.cdiv(hidden, 32 * VECTOR))
    step = 32 * VECTOR * warps
    width = tilus.cdiv(hidden, step) * step
    layout = local(width // step).spatial(32 * warps).local(VECTOR)
    tilus.grid(x.shape[0], warps=warps)
    tilus.launch_dependents()
    if not constant:
        tilus.wait_dependencies()
    factors = tilus.load(weight, [0], [width], layout=layout)
    x_factors = None if x_norm is None else tilus.load(x_norm, [0], [width], layout=layout)
    if constant:  # asked for while the kernel in front ends
        tilus.wait_dependencies(constant=[weight, x_norm])
    row = tilus.block_id(0)

    def normed(values: Any, factors: Any) -> Any:
        """Elements beyond the row are zeros and add nothing."""
        inverse = tilus.rsqrt(tilus.sum(values * values, 0, keepdims=True) / hidden + eps)
        return values * inverse * factors

    values = tilus.load(x, [row, 0], [width], layout=layout).to(f32)
    if scale != 1.0:
        values = values * scale
    if x_norm is not None:
        values = normed(values, x_factors)
    if residual is not None:
        if not starts:
            values = values + tilus.load(residual, [row, 0], [width], layout=layout)
        tilus.store(residual, [row, 0], values)
    tilus.store(out, [row, 0], normed(values, factors).to(out.dtype))


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


def start_rms_norm(
    x: Any, weight: Any, eps: float, *, scale: float = 1.0, out_dtype: Any = None, device: str | None = None
) -> tuple[Any, Any]:  # fmt: skip
    """Begin a residual stream with x, and normalise it: `stream = x.float() * scale; rms_norm(stream, weight, eps), stream`.

    x: float16 or bfloat16 [M, H], rows may be strided. weight: float32 [H]. Torch tensors or numpy arrays. out_dtype: of the
    norm, by default that of x. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: the norm, [M, H] in out_dtype, and the residual stream, float32 [M, H], for `add_rms_norm`.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    _check_rank("start_rms_norm", x)
    out, residual = empty(x, tuple(x.shape), out_dtype), empty(x, tuple(x.shape), "float32")
    rms_norm_kernel.on(device)(x, weight, out, eps, residual, hidden=int(x.shape[1]), starts=True, scale=scale)
    return out, residual


def add_rms_norm(
    x: Any, residual: Any, weight: Any, eps: float, *, x_norm: Any = None, constant: bool = False, device: str | None = None
) -> Any:  # fmt: skip
    """Add x to the residual stream, in place, and normalise the sum: `residual += x; rms_norm(residual, weight, eps)`.

    x: float16 or bfloat16 [M, H]. residual: float32 [M, H]. weight: float32 [H]. x_norm: float32 [H]; where given,
    `rms_norm(x, x_norm, eps)` is added instead of x. Nothing is rounded to the dtype of x but the result. constant: the weights
    are constant in the sense of "Dependent launch" (docs/language.md): read while the kernel in front ends.

    Returns: [M, H] in the dtype of x.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    _check_rank("add_rms_norm", x)
    out = empty(x, tuple(x.shape))
    rms_norm_kernel.on(device)(x, weight, out, eps, residual, x_norm, hidden=int(x.shape[1]), constant=constant)
    return out


def _check_rank(name: str, x: Any) -> None:
    if x.ndim != 2 or x.shape[1] < 1:
        raise TilusError(
            f"{name}: x has shape {list(x.shape)}, expected [tokens, hidden] with hidden >= 1",
            hint="reshape it: x.reshape(-1, x.shape[-1])",
        )
