"""Feed-forward layers that are mixtures of experts: each token is computed by the few that a router prefers.

Rows are sorted by expert on the device, so that nothing is read back and a step can be captured: a row's place is the number of
rows that come before it, those of lower experts and those of its own from earlier tokens. Counting takes the square of the number
of rows: 16 million comparisons for the 4096 rows of 512 tokens with 8 experts each.

N. Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", arXiv 1701.06538; A. Q.
Jiang et al., "Mixtral of Experts", arXiv 2401.04088.
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.activation import silu_mul
from tilus.kernels.allocate import empty
from tilus.kernels.grouped_linear import grouped_linear
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.vectors import power_of_two

BLOCK = 1024  # elements of a row that a block moves


@tilus.kernel
def route_kernel(
    logits: Tensor[f32, "tokens", "experts"],
    ids: Tensor[int32, "tokens", "top"],
    weights: Tensor[f32, "tokens", "top"],
    *,
    experts: Const,
    top: Const,
    normalized: Const,
):
    """One token a warp. Of equal logits the first expert's counts more. Where logits are no numbers, neither are weights, and the
    expert is none."""
    tilus.grid(logits.shape[0], warps=1)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    token, width = tilus.block_id(0), power_of_two(experts)
    expert = tilus.arange(width)
    values = tilus.where(expert < experts, tilus.load(logits, [token, 0], [width]), -math.inf)
    highest = tilus.max(values, 0, keepdims=True)
    total = tilus.sum(tilus.exp(values - highest), 0, keepdims=True)
    chosen = []
    for place in range(top):
        best = tilus.max(values, 0, keepdims=True)
        index = tilus.min(tilus.where(values == best, expert, width), 0, keepdims=True)
        tilus.store(ids, [token, place], index)
        chosen = [*chosen, tilus.exp(best - highest)]
        values = tilus.where(expert == index, -math.inf, values)
    divisor = sum(chosen) if normalized else total
    for place, weight in enumerate(chosen):
        tilus.store(weights, [token, place], weight / divisor)


@tilus.kernel
def places_kernel(ids: Tensor[int32, "rows"], places: Tensor[int32, "count"], *, items: Const = 32, chunk: Const = 256):
    """places: of each row, then where the rows of each expert begin, and of all end. Rows are ordered by the number
    expert * rows + row; that of an expert's beginning is expert * rows."""
    tilus.grid(tilus.cdiv(places.shape[0], items), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    rows, first_item = ids.shape[0], tilus.block_id(0) * items
    item = first_item + tilus.arange(items, shape=[items, 1], axis=0)
    own = tilus.load(ids, [first_item], [items]).reshape([items, 1])
    mine = tilus.where(item < rows, own * rows + item, (item - rows) * rows)
    before = tilus.zeros([items, 1], int32)
    for first in tilus.range(0, rows, chunk):
        other = first + tilus.arange(chunk, shape=[1, chunk], axis=1)
        theirs = tilus.load(ids, [first], [chunk]).reshape([1, chunk]) * rows + other
        comes_before = (theirs < mine) & (other < rows)
        before = before + tilus.sum(comes_before.to(int32), 1, keepdims=True)
    tilus.store(places, [first_item], before.reshape([items]))


@tilus.kernel
def scatter_kernel(
    x: Tensor["dtype", "tokens", "width"],
    places: Tensor[int32, "rows"],
    out: Tensor["dtype", "rows", "width"],
    *,
    top: Const,
):
    tilus.grid(out.shape[0], tilus.cdiv(out.shape[1], BLOCK), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    row, first = tilus.block_id(0), tilus.block_id(1) * BLOCK
    tilus.store(out, [places[row], first], tilus.load(x, [row // top, first], [BLOCK]))


@tilus.kernel
def combine_kernel(
    y: Tensor["dtype", "rows", "width"],
    places: Tensor[int32, "rows"],
    weights: Tensor[f32, "tokens", "top"],
    out: Tensor["dtype", "tokens", "width"],
    *,
    top: Const,
):
    tilus.grid(out.shape[0], tilus.cdiv(out.shape[1], BLOCK), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    token, first = tilus.block_id(0), tilus.block_id(1) * BLOCK
    total = tilus.zeros([BLOCK])
    for index in range(top):
        own = tilus.load(y, [places[token * top + index], first], [BLOCK])
        total = total + own.to(f32) * weights[token, index]
    tilus.store(out, [token, first], total.to(out.dtype))


def mixture(
    x: Any, logits: Any, gate_up: QuantizedWeight, down: QuantizedWeight, *, top: int, normalized: bool,
    invariant: bool = False, device: str | None = None,
) -> Any:  # fmt: skip
    """The weighted sum of `silu_mul(x W^T) V^T` over the `top` experts of each token.

    x: float16 or bfloat16 [M, H]. logits: float32 [M, E], the router's. gate_up: of all experts on top of each other, of each F
    gates and then F factors, [E * 2 F, H]. down: [E * H, F]. H and F are multiples of 64. A token's weights are the softmax of
    its logits, normalized: divided by the sum of those of its experts. invariant: see `linear`. Torch tensors or numpy arrays.
    device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Eight launches, and the host reads nothing, so that they can be captured.
    Returns: [M, H] in the dtype of x. What an expert gives is rounded to it before it is weighted.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    tokens, experts = _check(x, logits, top)
    ids, weights = empty(logits, (tokens, top), "int32"), empty(logits, (tokens, top))
    route_kernel.on(device)(logits, ids, weights, experts=experts, top=top, normalized=normalized)
    rows = tokens * top
    counted = empty(ids, (rows + experts + 1,))
    places_kernel.on(device)(ids.reshape(-1), counted)
    places, offsets = counted[:rows], counted[rows:]
    own = empty(x, (rows, x.shape[1]))
    scatter_kernel.on(device)(x, places, own, top=top)
    options = {"invariant": invariant, "device": device}
    gated = silu_mul(grouped_linear(own, gate_up, offsets, **options), device=device)
    found = grouped_linear(gated, down, offsets, **options)
    out = empty(x, tuple(x.shape))
    combine_kernel.on(device)(found, places, weights, out, top=top)
    return out


def _check(x: Any, logits: Any, top: int) -> tuple[int, int]:
    """Tokens and experts."""
    if x.ndim != 2 or logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        raise TilusError(
            f"mixture: x of shape {list(x.shape)} and logits of shape {list(logits.shape)}, expected [tokens, hidden] and "
            "[tokens, experts]"
        )
    tokens, experts = (int(extent) for extent in logits.shape)
    if not 1 <= top <= experts:
        raise TilusError(f"mixture: top = {top} of {experts} experts, expected 1 to {experts}")
    if tokens * top * (experts + 1) >= 2**31:
        raise TilusError(
            f"mixture: {tokens} tokens by {top} of {experts} experts, expected fewer than 2^31 / (experts + 1) rows",
            hint="compute fewer tokens at once",
        )
    return tokens, experts
