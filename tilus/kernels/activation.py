"""The gated activation of feed-forward layers: SiLU of one half times the other ("SwiGLU", N. Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32
from tilus.kernels.allocate import empty


@tilus.kernel(varying=("rows",))
def silu_mul_kernel(
    gate_up: Tensor["dtype", "rows", 2, "width"], out: Tensor["dtype", "rows", "width"], *, block: Const = 1024
):
    """A block computes `block` elements of one row."""
    tilus.grid(gate_up.shape[0], tilus.cdiv(out.shape[1], block), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    row, first = tilus.block_id(0), tilus.block_id(1) * block
    gate = tilus.load(gate_up, [row, 0, first], [block]).to(f32)
    up = tilus.load(gate_up, [row, 1, first], [block]).to(f32)
    tilus.store(out, [row, first], (gate / (1.0 + tilus.exp(-gate)) * up).to(out.dtype))


def silu_mul(gate_up: Any, *, device: str | None = None) -> Any:
    """`silu(gate) * up` with `silu(x) = x / (1 + exp(-x))`.

    gate_up: float16 or bfloat16 [M, 2 F], in each row F gates, then F factors; a torch tensor or numpy array. device: where to
    run (reference, emulator, cpu, cuda), by default as the argument says.

    Returns: [M, F] in the dtype of gate_up. Computed in f32 and rounded once.
    Raises: TilusError when the shape or dtype does not fit.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] < 2 or gate_up.shape[1] % 2:
        raise TilusError(
            f"silu_mul: gate_up has shape {list(gate_up.shape)}, expected [tokens, 2 * width]",
            hint="concatenate gates and factors along the last dim",
        )
    rows, width = int(gate_up.shape[0]), int(gate_up.shape[1]) // 2
    out = empty(gate_up, (rows, width))
    silu_mul_kernel.on(device)(gate_up.reshape(rows, 2, width), out)
    return out
