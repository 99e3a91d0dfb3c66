"""Attention over two sets of keys from attention over each of them: what splits, shared prefixes and other GPUs need.

A state is the softmax-weighted sum of values and the logarithm of the sum of exp(score). Merging is commutative and associative;
a state of no keys, whose logarithm is minus infinity, is its identity (T. Dao et al., "Flash-Decoding for long-context
inference", 2023; Z. Ye et al., "FlashInfer", arXiv 2501.01005).
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32
from tilus.kernels.allocate import empty

WARPS = 4
ELEMENTS = 8192  # of a block, about


@tilus.kernel
def merge_states_kernel(
    o_a: Tensor["dtype", "states", "head_dim"],
    lse_a: Tensor[f32, "states"],
    o_b: Tensor["dtype", "states", "head_dim"],
    lse_b: Tensor[f32, "states"],
    out: Tensor["dtype", "states", "head_dim"],
    lse: Tensor[f32, "states"],
    *,
    head_dim: Const,
    rows: Const,
):
    """The state with the larger logarithm has weight 1, so that the order of the two makes no difference to the last bit."""
    tilus.grid(tilus.cdiv(out.shape[0], rows), warps=WARPS)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    first = tilus.block_id(0) * rows
    logs_a, logs_b = tilus.load(lse_a, [first], [rows]), tilus.load(lse_b, [first], [rows])
    a, b = [tilus.load(o, [first, 0], [rows, head_dim]).to(f32) for o in (o_a, o_b)]
    more, less = tilus.maximum(logs_a, logs_b), tilus.minimum(logs_a, logs_b)
    weight = tilus.where(less > -math.inf, tilus.exp2((less - more) * math.log2(math.e)), 0.0)
    inverse = 1.0 / (1.0 + weight)
    by_row = tilus.reshape(logs_a >= logs_b, [rows, 1])
    heavy = tilus.where(tilus.reshape(more > -math.inf, [rows, 1]), tilus.where(by_row, a, b), 0.0)
    light = tilus.where(tilus.reshape(less > -math.inf, [rows, 1]), tilus.where(by_row, b, a), 0.0)
    result = tilus.fma(light, tilus.reshape(weight, [rows, 1]), heavy) * tilus.reshape(inverse, [rows, 1])
    tilus.store(out, [first, 0], result.to(out.dtype))
    tilus.store(lse, [first], more + tilus.log2(1.0 + weight) * math.log(2.0))


def merge_states(o_a: Any, lse_a: Any, o_b: Any, lse_b: Any, *, device: str | None = None) -> tuple[Any, Any]:
    """Attention over two sets of keys, from the results over each of them.

    o_a, o_b: f16, bf16 or f32 [..., D], contiguous. lse_a, lse_b: f32 [...], natural logarithms of sums of exp(scaled score), as
    attention with return_lse gives them; minus infinity where there was no key, and then o may be anything. Numpy arrays or
    torch tensors. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: (o [..., D] of o_a's dtype, lse f32 [...]). Sums are f32, o is rounded once. Both orders of the two give the same
    bits, and a state without keys leaves the other one as it is.
    Raises: TilusError when shapes or dtypes do not fit.
    """
    shape = tuple(o_a.shape)
    found = [tuple(array.shape) for array in (o_a, lse_a, o_b, lse_b)]
    if not shape or found != [shape, shape[:-1], shape, shape[:-1]]:
        raise TilusError(
            f"merge_states: shapes {', '.join(str(list(f)) for f in found)}, expected o [..., D], lse [...], and both again"
        )
    rows, head_dim = math.prod(shape[:-1]), shape[-1]
    out, lse = empty(o_a, shape), empty(lse_a, shape[:-1])
    if rows and head_dim:
        arguments = [
            array.reshape((rows, head_dim) if array.ndim == len(shape) else (rows,))
            for array in (o_a, lse_a, o_b, lse_b, out, lse)
        ]
        merge_states_kernel.on(device)(*arguments, head_dim=head_dim, rows=rows_of(head_dim))
    return out, lse


def rows_of(head_dim: int) -> int:
    """A power of two, so that a block has about ELEMENTS."""
    return 1 << max(0, (ELEMENTS // head_dim).bit_length() - 1)
