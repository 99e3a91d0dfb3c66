"""Rotary position embedding of queries and keys, fused with the write of keys and values to the paged cache.

Rotation: J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864, with the pairs of
Hugging Face's models: element i of a head's first half goes with element i of its second half.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import empty
from tilus.kernels.attention import power_of_two
from tilus.kernels.index_checks import check_tokens


@tilus.kernel
def rope_append_kernel(
    qkv: Tensor["dtype", "tokens", "heads", "head_dim"],
    positions: Tensor[int32, "tokens"],
    cos_sin: Tensor[f32, "max_positions", "head_dim"],
    slots: Tensor[int32, "tokens"],
    kv_cache: Tensor["dtype", "pages", 2, "page_size", "kv_heads", "head_dim"],
    q: Tensor["dtype", "tokens", "q_heads", "head_dim"],
    *,
    head_dim: Const,
    heads: Const,
    q_heads: Const,
    kv_heads: Const,
    page_size: Const,
):
    """One token a block. Tiles hold a power of two of heads: those beyond the last read zeros and are not written."""
    tilus.grid(qkv.shape[0], warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    token = tilus.block_id(0)
    half = head_dim // 2
    position, slot = positions[token], slots[token]
    page, offset = slot // page_size, slot % page_size

    def rotated_heads(first: int, count: int) -> Any:
        part = qkv[token, first : first + count]
        shape = [power_of_two(count), half]
        low = tilus.load(part, [0, 0], shape).to(f32)
        high = tilus.load(part, [0, half], shape).to(f32)
        return rotated((low, high), cos_sin, position)

    low, high = rotated_heads(0, q_heads)
    tilus.store(q, [token, 0, 0], low.to(q.dtype))
    tilus.store(q, [token, 0, half], high.to(q.dtype))
    low, high = rotated_heads(q_heads, kv_heads)
    tilus.store(kv_cache, [page, 0, offset, 0, 0], low.to(q.dtype))
    tilus.store(kv_cache, [page, 0, offset, 0, half], high.to(q.dtype))
    values = tilus.load(qkv[token, q_heads + kv_heads : heads], [0, 0], [power_of_two(kv_heads), head_dim])
    tilus.store(kv_cache, [page, 1, offset, 0, 0], values)


def rotated(halves: Any, cos_sin: Any, position: Any) -> Any:
    """The two halves [heads, D/2] of heads, turned by the angles of a position."""
    low, high = halves
    half = low.shape[1]
    cos, sin = (tilus.load(cos_sin, [position, at], [1, half]) for at in (0, half))
    return low * cos - high * sin, high * cos + low * sin


def rope_append(qkv: Any, positions: Any, cos_sin: Any, slots: Any, kv_cache: Any, *, device: str | None = None) -> Any:
    """Rotate queries and keys by their positions; write keys and values to the cache.

    qkv: float16 or bfloat16 [M, (Hq + 2 Hkv) D], the heads of queries, keys and values of M tokens one after another.
    positions: int32 [M]. cos_sin: float32 [max_positions, D], the D/2 cosines, then the D/2 sines of each position.
    slots: int32 [M], page * page_size + offset; a token whose slot is outside of the cache (a negative one, say) is not
    written to it. kv_cache: [pages, 2, page_size, Hkv, D] of qkv's dtype, keys at index 0, values at 1; may be strided.
    Torch tensors. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: the rotated queries [M, Hq, D]. Rotations are computed in f32 and rounded once.
    Raises: TilusError when shapes, dtypes or devices do not fit together; with TILUS_DEBUG=1 also for positions without angles
    and slots behind the cache.
    """
    if qkv.ndim != 2 or kv_cache.ndim != 5:
        raise TilusError(
            f"rope_append: qkv of shape {list(qkv.shape)} and kv_cache of shape {list(kv_cache.shape)}, "
            "expected [tokens, (q_heads + 2 kv_heads) * head_dim] and [pages, 2, page_size, kv_heads, head_dim]"
        )
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    heads, rest = divmod(qkv.shape[1], head_dim)
    q_heads = heads - 2 * kv_heads
    if rest or q_heads < 1 or head_dim % 2:
        raise TilusError(
            f"rope_append: rows of {qkv.shape[1]} elements with {kv_heads} kv heads of {head_dim}, expected an even head "
            f"size and (q_heads + {2 * kv_heads}) * {head_dim} elements with at least one q head"
        )
    check_tokens("rope_append", positions, slots, cos_sin.shape[0], kv_cache, device=device)
    q = empty(qkv, (qkv.shape[0], q_heads, head_dim))
    rope_append_kernel.on(device)(
        qkv.unflatten(1, (heads, head_dim)), positions, cos_sin, slots, kv_cache, q,
        head_dim=head_dim, heads=heads, q_heads=q_heads, kv_heads=kv_heads, page_size=page_size,
    )  # fmt: skip
    return q
