"""What fits a call of `paged_decode`: shapes and dtypes are checked on the host, which reads no tensor."""

from __future__ import annotations

from typing import Any

from tilus import TilusError
from tilus.kernels.attention import group_of
from tilus.kernels.attention_variant import GivenVariant, check_variant
from tilus.kernels.kv_cache import QuantizedCache, check_rows

UNIT = 128  # tokens: parts of a fixed split are multiples of it
HEAD_DIMS = (64, 96, 128, 256)
MAX_QUERIES = 8


def check_given(given: GivenVariant, q: Any, most: int) -> None:
    """Raise a TilusError where a variant and its tensors do not fit; bits only come with `most` queries of a launch."""
    check_variant("paged_decode", given.variant, given.bits, q.shape[0] * q.shape[1], causal=True)
    if given.bits is not None and q.shape[1] > most:
        raise TilusError(
            f"paged_decode: bits with {q.shape[1]} queries a sequence, expected at most {most}: those of a launch",
            hint="paged_prefill takes more",
        )


def check_decode(q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, fixed_split: int | None) -> int:
    """The number of query heads per kv head."""
    if not isinstance(kv_cache, QuantizedCache) and q.dtype != kv_cache.dtype:
        raise TilusError(
            f"paged_decode: q of {q.dtype} and kv_cache of {kv_cache.dtype}, expected the same dtype",
            hint="caches of other types are QuantizedCache: tilus.kernels.kv_cache.quantized_cache",
        )
    if q.ndim != 4 or len(kv_cache.shape) != 5 or block_tables.ndim != 2 or kv_lens.ndim != 1:
        raise TilusError(
            f"paged_decode: shapes q {list(q.shape)}, kv_cache {list(kv_cache.shape)}, block_tables {list(block_tables.shape)} "
            f"and kv_lens {list(kv_lens.shape)}, expected [sequences, q_len, q_heads, head_dim], [pages, 2, page_size, kv_heads, "
            "head_dim], [sequences, max_pages] and [sequences]",
            hint="one query a sequence: q.unsqueeze(1)",
        )
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    group = group_of("paged_decode", q.shape[2], kv_heads)
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise TilusError(
            f"paged_decode: {q.shape[1]} queries a sequence, expected 1 to {MAX_QUERIES}",
            hint="tilus.kernels.paged_attention takes more",
        )
    if q.shape[3] != head_dim:
        raise TilusError(f"paged_decode: head_dim {q.shape[3]} of q and {head_dim} of kv_cache, expected the same")
    if head_dim not in HEAD_DIMS:
        raise TilusError(
            f"paged_decode: head_dim {head_dim}, expected one of {', '.join(map(str, HEAD_DIMS))}",
            hint="pad heads with zeros; scale stays that of the real head_dim",
        )
    check_rows("paged_decode", kv_cache)
    if page_size not in (16, 32, 64) and (page_size < UNIT or page_size % UNIT):
        raise TilusError(f"paged_decode: page_size {page_size}, expected 16, 32, 64 or a multiple of {UNIT}")
    if fixed_split is not None and (fixed_split < UNIT or fixed_split % UNIT):
        raise TilusError(f"paged_decode: fixed_split={fixed_split}, expected a multiple of {UNIT}")
    return group
