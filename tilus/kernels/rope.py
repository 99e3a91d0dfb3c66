"""Rotary position embedding of queries and keys, fused with the norm of their heads in front of it, where there is one, and the
write of keys and values to the paged cache."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import empty
from tilus.kernels.index_checks import check_tokens
from tilus.kernels.kv_cache import QuantizedCache, append_quantized
from tilus.kernels.kv_frame import KvFrame
from tilus.kernels.rotation import angles_of, loaded_norm, normed, rotated
from tilus.kernels.vectors import power_of_two


@tilus.kernel(
    varying=(
        "tokens",
        "pages",
    )
)
def rope_append_kernel(
    qkv: Tensor["act", "tokens", "heads", "head_dim"],
    positions: Tensor[int32, "tokens"],
    cos_sin: Tensor[f32, "max_positions", "head_dim"],
    slots: Tensor[int32, "tokens"],
    kv_cache: Tensor["dtype", "pages", 2, "page_size", "kv_heads", "head_dim"],
    q: Tensor["dtype", "tokens", "q_heads", "head_dim"],
    eps: f32,
    q_norm: Tensor[f32, "head_dim"] = None,
    k_norm: Tensor[f32, "head_dim"] = None,
    *,
    head_dim: Const,
    q_heads: Const,
    kv_heads: Const,
    page_size: Const,
    constant: Const = False,
):
    """A block has a token's queries, or its keys and values, which are all asked for first. Tiles hold a power of two of heads:
    those beyond the last read zeros and are not written."""
    tilus.grid(qkv.shape[0], 2, warps=4)
    tilus.launch_dependents()
    token = tilus.block_id(0)
    half = head_dim // 2
    if not constant:
        tilus.wait_dependencies()
    position, slot = positions[token], slots[token]
    angles = angles_of(cos_sin, position, half)
    q_weight, k_weight = loaded_norm(q_norm, half), loaded_norm(k_norm, half)
    if constant:  # asked for while the kernel in front ends
        tilus.wait_dependencies(constant=[positions, slots, cos_sin, q_norm, k_norm])
    page, offset = slot // page_size, slot % page_size

    def loaded(first: int, count: int) -> Any:
        part, shape = qkv[token, first : first + count], [power_of_two(count), half]
        return [tilus.load(part, [0, at], shape).to(f32) for at in (0, half)]

    if tilus.block_id(1) == 0:
        low, high = rotated(normed(loaded(0, q_heads), q_weight, eps), angles)
        tilus.store(q, [token, 0, 0], low.to(q.dtype))
        tilus.store(q, [token, 0, half], high.to(q.dtype))
    else:
        keys, values = loaded(q_heads, kv_heads), loaded(q_heads + kv_heads, kv_heads)
        for which, halves in enumerate((rotated(normed(keys, k_weight, eps), angles), values)):
            for at, part in zip((0, half), halves):
                tilus.store(kv_cache, [page, which, offset, 0, at], part.to(kv_cache.dtype))


def rope_append(
    qkv: Any, positions: Any, cos_sin: Any, slots: Any, kv_cache: Any, *, q_norm: Any = None, k_norm: Any = None,
    eps: float = 0.0, frame: KvFrame | None = None, constant: bool = False, device: str | None = None,
) -> Any:  # fmt: skip
    """Rotate queries and keys by their positions; write keys and values to the cache, in its format.

    qkv: float16 or bfloat16 [M, (Hq + 2 Hkv) D], the heads of queries, keys and values of M tokens one after another.
    positions: int32 [M]. cos_sin: float32 [max_positions, D], the D/2 cosines, then the D/2 sines of each position.
    slots: int32 [M], page * page_size + offset; a token whose slot is outside of the cache (a negative one, say) is not
    written to it. kv_cache: float16 or bfloat16 [pages, 2, page_size, Hkv, D], keys at index 0, values at 1; may be strided. Or a
    `QuantizedCache`, with D a multiple of 16 up to 256: scales and minimums are rounded to f16 and codes computed with those, so
    that an element is off by half a step at most, half of the last place of an fp8 code; with minimums by half a step around the
    mean of a head's errors, which is then added to the minimum. q_norm, k_norm: float32 [D]; where
    given, each head of queries (keys) becomes its `rms_norm` with this weight and eps before it is rotated. Torch tensors.
    frame: the coordinates in which keys and values of a quantised cache are kept (`fit_kv_frame`); attention's results go through
    `restore_values` then, and logarithms of sums that it returns are off by the product of the query and the centre.
    constant: positions, slots, cos_sin and the norms' weights are constant in the sense of "Dependent launch"
    (docs/language.md): read while the kernel in front ends.
    device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: the rotated queries [M, Hq, D], of the dtype of a 16-bit cache, else of qkv's; for a quantised cache whose format
    mixes keys, transformed as they are. Norms and rotations are
    computed in f32 and rounded once; keys are not rounded before they are quantised.
    Raises: TilusError when shapes, dtypes or devices do not fit together; with TILUS_DEBUG=1 also for positions without angles
    and slots behind the cache.
    """
    heads = check_append(qkv, kv_cache, frame)
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    q_heads = heads - 2 * kv_heads
    check_tokens("rope_append", positions, slots, cos_sin.shape[0], kv_cache, device=device)
    by_head = qkv.unflatten(1, (heads, head_dim))
    if isinstance(kv_cache, QuantizedCache):
        return append_quantized(
            by_head, positions, cos_sin, slots, kv_cache, (q_norm, k_norm, eps), frame, constant, device
        )
    q = empty(qkv, (qkv.shape[0], q_heads, head_dim), kv_cache.dtype)
    rope_append_kernel.on(device)(
        by_head, positions, cos_sin, slots, kv_cache, q, eps, q_norm, k_norm,
        head_dim=head_dim, q_heads=q_heads, kv_heads=kv_heads, page_size=page_size,
        constant=constant,
    )  # fmt: skip
    return q


def check_append(qkv: Any, kv_cache: Any, frame: KvFrame | None) -> int:
    """The heads of a row of qkv: those of queries, keys and values. Raises: TilusError for shapes and dtypes that do not fit."""
    if qkv.ndim != 2 or len(kv_cache.shape) != 5:
        raise TilusError(
            f"rope_append: qkv of shape {list(qkv.shape)} and kv_cache of shape {list(kv_cache.shape)}, "
            "expected [tokens, (q_heads + 2 kv_heads) * head_dim] and [pages, 2, page_size, kv_heads, head_dim]"
        )
    kv_heads, head_dim = kv_cache.shape[3:]
    heads, rest = divmod(qkv.shape[1], head_dim)
    q_heads = heads - 2 * kv_heads
    if rest or q_heads < 1 or head_dim % 2:
        raise TilusError(
            f"rope_append: rows of {qkv.shape[1]} elements with {kv_heads} kv heads of {head_dim}, expected an even head "
            f"size and (q_heads + {2 * kv_heads}) * {head_dim} elements with at least one q head"
        )
    if frame is not None and not isinstance(kv_cache, QuantizedCache):
        raise TilusError(
            "rope_append: a frame for a cache of 16 bits", hint="frames are for caches made by quantized_cache"
        )
    if not isinstance(kv_cache, QuantizedCache) and str(kv_cache.dtype) not in ("torch.float16", "torch.bfloat16"):
        raise TilusError(
            f"rope_append: kv_cache of {kv_cache.dtype}, expected float16 or bfloat16",
            hint="caches of fewer bits are made by quantized_cache",
        )
    return heads
