"""Attention to lists of blocks of keys: a block-sparse matrix of scores in the format of compressed rows (BSR).

A row of blocks is some queries; its columns are pages of a cache, anywhere and in any order. That is what a block table says of
a sequence, so it is the prefill kernel that computes it, with tables of as many entries as each has, one behind the other.
Formats compose: rows of few queries for what they have apart, rows of many for what they share, and `merge_states` for both
(Z. Ye et al., "FlashInfer", arXiv 2501.01005).
"""

from __future__ import annotations

from typing import Any

from tilus import TilusError
from tilus.kernels.attention_variant import AS_IT_IS
from tilus.kernels.index_checks import check_lists
from tilus.kernels.paged_prefill import by_plans, check_prefill


def block_sparse_attention(
    q: Any, kv_cache: Any, row_start: Any, block_start: Any, blocks: Any, scale: float, *, kv_lens: Any = None,
    return_lse: bool = False, device: str | None = None,
) -> Any:  # fmt: skip
    """Attention of rows of queries, each to all keys of its own list of blocks (sm_90a).

    q: float16 or bfloat16 [M, Hq, D]. kv_cache: [blocks, 2, block_size, Hkv, D] of the same dtype, keys at index 0, values at 1;
    a strided view is fine. Hq / Hkv is 1 to 16, D 64, 96, 128 or 256, block_size 16, 32, 64 or a multiple of 128. row_start:
    int32 [R + 1], where the queries of each row start in q. block_start: int32 [R + 1], where its list starts in blocks: int32
    [N], numbers of blocks. A block that is listed twice counts twice. kv_lens: int32 [R], tokens of each list where its last
    block is not full; by default all blocks are. Queries of multiples of 128 / (Hq / Hkv) make the most of the products. Torch
    tensors. device: where to run (reference, emulator, cuda), by default as the arguments say.

    A query with an empty list gets zeros. The host reads no tensor, so it can be captured in a CUDA graph.

    Returns: [M, Hq, D]; with return_lse also float32 [M, Hq], the natural logarithm of the sum of exp(scaled score), minus
    infinity where there is no key (`merge_states` takes both).
    Raises: TilusError when shapes, dtypes or devices do not fit together; with TILUS_DEBUG=1 also for blocks that there are not.
    """
    what, rows = "block_sparse_attention", row_start.shape[0] - 1
    if tuple(block_start.shape) != (rows + 1,) or blocks.ndim != 1:
        raise TilusError(
            f"{what}: row_start, block_start and blocks of shapes {list(row_start.shape)}, {list(block_start.shape)} and "
            f"{list(blocks.shape)}, expected [rows + 1], [rows + 1] and [entries]"
        )
    if kv_lens is None:
        kv_lens = (block_start[1:] - block_start[:-1]) * kv_cache.shape[2]
    check_prefill(what, q, kv_cache, row_start, kv_lens, scale)
    check_lists(what, block_start, blocks, kv_lens, kv_cache, device=device)
    out, lse = by_plans(
        q, kv_cache, blocks.reshape(1, -1), row_start, kv_lens, scale, False, return_lse, device, AS_IT_IS, block_start
    )  # fmt: skip
    return (out, lse) if return_lse else out
