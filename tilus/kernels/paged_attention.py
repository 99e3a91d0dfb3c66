"""Attention over a paged key-value cache of any format: the one entry, which picks the kernel for the device.

On Hopper (sm_90a) sequences with one query each go to `paged_decode`, whose blocks share the cached tokens evenly, and others to
`paged_prefill`, whose tiles have 128 rows: a mixed batch is two launches, as no tile is good for both. Elsewhere, and for what
those two do not have, both go to the portable kernel of `tilus.kernels.attention`.
"""

from __future__ import annotations

from typing import Any

from tilus import TilusError
from tilus.kernels.allocate import empty, is_cuda
from tilus.kernels.attention import CPU_MAX_HEAD_DIM, KV_TILE, group_of, portable_attention
from tilus.kernels.attention_variant import windowed
from tilus.kernels.kv_cache import QuantizedCache, has_whole_rows
from tilus.kernels.linear import gpu_of
from tilus.kernels.paged_decode import paged_decode
from tilus.kernels.paged_decode_arguments import HEAD_DIMS
from tilus.kernels.paged_prefill import paged_prefill
from tilus.runtime.execute import place


def paged_attention(
    q: Any, kv_cache: Any, block_tables: Any, q_start: Any, kv_lens: Any, scale: float, *, decodes: int = 0,
    window: int | None = None, soft_cap: float | None = None, out_dtype: Any = None, invariant: bool = False,
    constant_tables: bool = False, constant_past: bool = False, device: str | None = None,
) -> Any:  # fmt: skip
    """Attention of ragged queries over paged keys and values, causal and aligned at the end.

    q: float16 or bfloat16 [M, Hq, D]: one query of each of the first `decodes` sequences, then the queries of the other ones one
    after another. kv_cache: [pages, 2, page_size, Hkv, D] of the same dtype, keys at index 0, values at 1; a strided view (one
    layer of a pool, say) is fine. Or a `QuantizedCache`, whose codes are multiplied in f16. block_tables: int32 [S, max_pages],
    the pages of each sequence in order. q_start: int32 [S - decodes + 1], where the queries of each of the other sequences
    start, counted from the first of them; None where there are none. kv_lens: int32 [S], tokens in the cache, those of the
    queries included. scale: what scores are multiplied with. window: how many keys a query sees at most, the last ones, its own
    included. soft_cap: scaled scores s become soft_cap * tanh(s / soft_cap). out_dtype: float16 or bfloat16, by default that of
    q. invariant: a row has the same bits whatever its company is, and whether it decodes (on one kind of device), which takes
    longer for rows that decode. constant_tables: block_tables and kv_lens are constant in the sense of "Dependent launch"
    (docs/language.md); constant_past: and so are the cached tokens in front of those that the queries are of.
    Torch tensors. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Query j of a sequence with q_len queries sees the first kv_len - q_len + j + 1 tokens of the cache; one that sees none gets
    zeros. Nothing beyond kv_len is looked at. The host reads no tensor, so launches can be captured in a CUDA graph, in which
    lengths and tables may change.

    Returns: [M, Hq, D]. Scores and sums are f32; softmax weights are rounded for the tensor cores, to f16 for quantised caches.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    _check(q, kv_cache, q_start, kv_lens, decodes)
    variant = windowed(window, soft_cap)
    out = empty(q, tuple(q.shape), out_dtype)
    where = place(device, is_cuda(q))
    hopper = _is_hopper(q, where) and _fits_hopper(kv_cache, scale)
    if decodes:
        first = (q[:decodes], kv_cache, block_tables[:decodes])
        if hopper and not invariant:
            paged_decode(
                first[0][:, None], *first[1:], kv_lens[:decodes], scale, constant_tables=constant_tables,
                constant_past=constant_past, variant=variant,
                device=device, out=out[:decodes, None],
            )  # fmt: skip
        else:
            portable_attention(
                *first, None, kv_lens[:decodes], out[:decodes], scale, device, invariant, window, soft_cap
            )
    if decodes < kv_lens.shape[0] and decodes < q.shape[0]:
        others = (q[decodes:], kv_cache, block_tables[decodes:], q_start, kv_lens[decodes:])
        if hopper and not invariant:
            paged_prefill(*others, scale, variant=variant, device=device, out=out[decodes:])
        else:
            portable_attention(*others, out[decodes:], scale, device, invariant, window, soft_cap)
    return out


def _is_hopper(q: Any, where: str) -> bool:
    """Whether the GPU that runs it has warpgroups and tensor copies."""
    return where == "cuda" and gpu_of(q).target.sm == 90


def _fits_hopper(kv_cache: Any, scale: float) -> bool:
    """Whether the kernels for Hopper have such heads and pages."""
    page_size, head_dim = kv_cache.shape[2], kv_cache.shape[4]
    pages = page_size in (16, 32, 64) or page_size % 128 == 0
    return head_dim in HEAD_DIMS and pages and scale > 0 and has_whole_rows(kv_cache)


def _check(q: Any, kv_cache: Any, q_start: Any, kv_lens: Any, decodes: int) -> None:
    if q.ndim != 3 or len(kv_cache.shape) != 5 or kv_lens.ndim != 1:
        raise TilusError(
            f"paged_attention: shapes q {list(q.shape)}, kv_cache {list(kv_cache.shape)} and kv_lens {list(kv_lens.shape)}, "
            "expected [tokens, q_heads, head_dim], [pages, 2, page_size, kv_heads, head_dim] and [sequences]"
        )
    _check_sequences(q, q_start, kv_lens, decodes)
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    if not isinstance(kv_cache, QuantizedCache) and q.dtype != kv_cache.dtype:
        raise TilusError(
            f"paged_attention: q of {q.dtype} and kv_cache of {kv_cache.dtype}, expected the same dtype",
            hint="rope_append gives queries of the cache's dtype; caches of other types are made by quantized_cache",
        )
    group_of("paged_attention", q.shape[1], kv_heads)
    if q.shape[2] != head_dim:
        raise TilusError(f"paged_attention: head_dim {q.shape[2]} of q and {head_dim} of kv_cache, expected the same")
    if head_dim % 16 or not 16 <= head_dim <= CPU_MAX_HEAD_DIM:
        raise TilusError(
            f"paged_attention: head_dim {head_dim}, expected a multiple of 16 from 16 to {CPU_MAX_HEAD_DIM}",
            hint="pad heads with zeros; scale stays that of the real head_dim",
        )
    if page_size not in (16, 32) and (page_size < KV_TILE or page_size % KV_TILE):
        raise TilusError(f"paged_attention: page_size {page_size}, expected 16, 32 or a multiple of {KV_TILE}")


def _check_sequences(q: Any, q_start: Any, kv_lens: Any, decodes: int) -> None:
    sequences = kv_lens.shape[0]
    if not 0 <= decodes <= min(sequences, q.shape[0]):
        raise TilusError(
            f"paged_attention: decodes = {decodes} with {q.shape[0]} queries of {sequences} sequences, expected at most as many"
        )
    others = sequences - decodes
    if q_start is None:
        if others:
            raise TilusError(f"paged_attention: no q_start for {others} sequences that do not decode")
    elif tuple(q_start.shape) != (others + 1,):
        raise TilusError(
            f"paged_attention: q_start of shape {list(q_start.shape)} for {others} sequences, expected [{others + 1}]",
            hint="the last entry is the number of query tokens",
        )
    elif not others and q.shape[0] != decodes:
        raise TilusError(f"paged_attention: {q.shape[0]} queries of {decodes} sequences that decode, expected one each")
