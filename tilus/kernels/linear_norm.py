"""A linear layer that adds to the residual stream, and the norm behind it, in one kernel where the next layer takes its part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilus.errors import TilusError
from tilus.kernels.activation import activation_of
from tilus.kernels.allocate import empty, is_cuda
from tilus.kernels.deferred_norm import Addend, DeferredNorm, Norms
from tilus.kernels.linear import gpu_of, is_aligned, launch_without_spills, linear
from tilus.kernels.norm import add_rms_norm
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import TILE
from tilus.runtime.execute import place

if TYPE_CHECKING:
    from tilus.kernels.dense_weight import DenseWeight

# A step of decoding takes as long either way for one token, as weights of the next layer come while its norm is taken. Plans for
# more than 64 have no registers for the stream (docs/performance.md).
TOKENS = range(2, 65)


def linear_add_rms_norm(
    x: Any, weight: QuantizedWeight | DenseWeight, residual: Any, norm: Any, eps: float, *, bias: Any | None = None,
    reader: QuantizedWeight | DenseWeight | None = None, scale: float = 1.0, device: str | None = None,
    invariant: bool = False,
) -> Any:  # fmt: skip
    """Add a linear layer to the residual stream, in place, and normalise the sum: `residual += linear(x, weight, bias=bias);
    rms_norm(residual, norm, eps)`.

    x: float16 or bfloat16 [M, K]. weight: (H, K), not gated. residual: float32 [M, H]. norm: float32 [H], constant as weights are
    in the sense of "Dependent launch" (docs/language.md). bias, device, invariant: as in `linear`. reader: the weight of the only
    layer that reads the result, by `linear`; None for others, as any that multiply it by several weights. scale: a power of two;
    numbers of the stream times scale * norm must fit into the type of x, else the results are infinite.

    Returns: the norm [M, H] in the dtype of x, or a `DeferredNorm` for `linear` with the reader: on Hopper, for packed weights,
    `TOKENS` and results that need not be invariant, no kernel is launched for the norm. Then the layer's results are not rounded
    before they are added, and the norm's values are rounded before they are divided by their root mean square.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    if reader is not None and not invariant and _is_deferred(x, weight, reader, device):
        return deferred(x, weight, residual, norm, eps, bias=bias, scale=scale, device=device)
    y = linear(x, weight, bias=bias, device=device, invariant=invariant)
    return add_rms_norm(y, residual, norm, eps, constant=True, device=device)


def _is_deferred(x: Any, weight: Any, reader: Any, device: str | None) -> bool:
    return (
        isinstance(weight, QuantizedWeight)
        and isinstance(reader, QuantizedWeight)
        and not any(extent % TILE for extent in weight.shape)
        and x.shape[0] in TOKENS
        and place(device, is_cuda(x)) == "cuda"
        and gpu_of(x).target.sm == 90
        and is_aligned(x)
    )


def deferred(
    x: Any, weight: QuantizedWeight, residual: Any, norm: Any, eps: float, *, bias: Any | None = None, scale: float = 1.0,
    device: str | None = None,
) -> DeferredNorm:  # fmt: skip
    """`linear_add_rms_norm` whose norm is left to the reader, by the kernel of warpgroups alone. H and K are multiples of 64."""
    (n, k), m = weight.shape, int(x.shape[0])
    activation_of("linear_add_rms_norm", weight.is_gated, None)
    if tuple(x.shape) != (m, k) or tuple(residual.shape) != (m, n):
        raise TilusError(
            f"linear_add_rms_norm: x has shape {list(x.shape)}, residual {list(residual.shape)}, the weight is {[n, k]}",
            hint="x must be [M, K] and residual [M, H] for a weight of [H, K]",
        )
    values, squares = empty(x, (m, n)), empty(x, (m, n // TILE), "float32")
    addend = Addend(residual, norm, squares, scale)
    launch_without_spills(x, weight, values, bias, None, device, False, Norms(after=addend))
    return DeferredNorm(values, squares, eps * scale * scale)
