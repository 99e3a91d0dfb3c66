"""What follows linear layers element by element: the gated activations of feed-forward layers, and a cap on logits.

A gate times a factor is "SwiGLU" or "GEGLU" (N. Shazeer, arXiv 2002.05202). GELU in its approximation by tanh: D. Hendrycks and
K. Gimpel, arXiv 1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32
from tilus.kernels.allocate import empty


def silu(gate: Any) -> Any:
    """`gate * sigmoid(gate)`"""
    return gate * sigmoid(gate)


def gelu_tanh(gate: Any) -> Any:
    """`gate / 2 * (1 + tanh(u))` with `u = sqrt(2 / pi) * (gate + 0.044715 gate^3)`, which is `gate * sigmoid(2 u)`: the sigmoid
    stays exact where the tanh is near -1."""
    doubled = gate * (2.0 * math.sqrt(2.0 / math.pi)) * (1.0 + 0.044715 * gate * gate)
    return gate * sigmoid(doubled)


def sigmoid(x: Any) -> Any:
    """`1 / (1 + exp(-x))`; powers that vanish beside the 1 may as well be zero."""
    return tilus.rcp(1.0 + tilus.exp2(x * -math.log2(math.e), ftz=True), approx=True)


Activation = Callable[[Any], Any]
ACTIVATIONS: dict[str, Activation] = {"silu": silu, "gelu_tanh": gelu_tanh}


def activation_of(name: str, is_gated: bool, activation: str | None) -> Activation | None:
    """The function of gates that `linear` and others (name) apply to the sums of a weight.

    Raises: TilusError for an unknown one, for a gated weight without any, and for another weight with one.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise TilusError(f"{name}: activation {activation!r}, expected {' or '.join(ACTIVATIONS)}")
    if is_gated != (activation is not None):
        found = (
            "a gated weight without activation" if is_gated else f"activation {activation!r} of a weight without gates"
        )
        raise TilusError(
            f"{name}: {found}, expected both or neither",
            hint="pack(matrix, device, gated=True) packs gates and factors for activation='silu'",
        )
    return None if activation is None else ACTIVATIONS[activation]


@tilus.kernel(varying=("rows",))
def gated_kernel(
    gate_up: Tensor["dtype", "rows", 2, "width"],
    out: Tensor["dtype", "rows", "width"],
    *,
    activation: Const = silu,
    block: Const = 1024,
):
    """A block computes `block` elements of one row."""
    tilus.grid(gate_up.shape[0], tilus.cdiv(out.shape[1], block), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    row, first = tilus.block_id(0), tilus.block_id(1) * block
    gate = tilus.load(gate_up, [row, 0, first], [block]).to(f32)
    up = tilus.load(gate_up, [row, 1, first], [block]).to(f32)
    tilus.store(out, [row, first], (activation(gate) * up).to(out.dtype))


@tilus.kernel
def soft_cap_kernel(x: Tensor[f32, "rows", "width"], cap: f32, *, block: Const = 1024):
    tilus.grid(x.shape[0], tilus.cdiv(x.shape[1], block), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    row, first = tilus.block_id(0), tilus.block_id(1) * block
    values = tilus.load(x, [row, first], [block])
    # tanh by its definition: that of a GPU is off by 2^-11, which a cap of 30 makes a sixtieth of a logit.
    tanh = 1.0 - 2.0 / (1.0 + tilus.exp(values * (2.0 / cap)))
    tilus.store(x, [row, first], tanh * cap)


def silu_mul(gate_up: Any, *, device: str | None = None) -> Any:
    """`silu(gate) * up` with `silu(x) = x / (1 + exp(-x))`.

    gate_up: float16 or bfloat16 [M, 2 F], in each row F gates, then F factors; a torch tensor or numpy array. device: where to
    run (reference, emulator, cpu, cuda), by default as the argument says.

    Returns: [M, F] in the dtype of gate_up. Computed in f32 and rounded once.
    Raises: TilusError when the shape or dtype does not fit.
    """
    return _gated("silu_mul", gate_up, silu, device)


def gelu_mul(gate_up: Any, *, device: str | None = None) -> Any:
    """`gelu(gate) * up` with `gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`; all else as in `silu_mul`."""
    return _gated("gelu_mul", gate_up, gelu_tanh, device)


def soft_cap(x: Any, cap: float, *, device: str | None = None) -> Any:
    """`x = cap * tanh(x / cap)`, in place.

    x: float32 [M, N], a torch tensor or numpy array. cap: above 0. device: where to run (reference, emulator, cpu, cuda), by
    default as the argument says.

    Returns: x. Off by 2^-21 of the cap.
    Raises: TilusError when the shape, dtype or cap does not fit.
    """
    if x.ndim != 2 or not cap > 0:
        raise TilusError(
            f"soft_cap: x has shape {list(x.shape)} and the cap is {cap}, expected [rows, width] and a positive number"
        )
    soft_cap_kernel.on(device)(x, cap)
    return x


def _gated(name: str, gate_up: Any, activation: Activation, device: str | None) -> Any:
    if gate_up.ndim != 2 or gate_up.shape[1] < 2 or gate_up.shape[1] % 2:
        raise TilusError(
            f"{name}: gate_up has shape {list(gate_up.shape)}, expected [tokens, 2 * width]",
            hint="concatenate gates and factors along the last dim",
        )
    rows, width = int(gate_up.shape[0]), int(gate_up.shape[1]) // 2
    out = empty(gate_up, (rows, width))
    gated_kernel.on(device)(gate_up.reshape(rows, 2, width), out, activation=activation)
    return out
