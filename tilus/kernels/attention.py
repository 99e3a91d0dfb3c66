"""Causal attention over a paged key-value cache: one kernel for prefill, chunked prefill and decode, in one launch.

Online softmax: M. Milakov and N. Gimelshein, arXiv 1805.02867; tiling: T. Dao et al., "FlashAttention", arXiv 2205.14135. The
query heads that share a kv head are rows of one tile (J. Ainslie et al., "GQA", arXiv 2305.13245).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.layout import RegisterLayout, local, spatial
from tilus.layout.atoms import mma_c

if TYPE_CHECKING:
    import torch

WARPS = 4
KV_TILE = 64  # tokens of the cache per iteration, at most
MAX_GROUP = 16
NO_SCORE = -1e30  # a maximum of no scores; finite, so that differences with it are no NaN


@tilus.kernel
def paged_attention_kernel(
    q: Tensor["dtype", "tokens", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["dtype", "pages", 2, "page_size", "kv_heads", "head_dim"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    q_start: Tensor[int32, "sequences_plus_1"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["dtype", "tokens", "kv_heads", "group", "head_dim"],
    scale_log2: f32,
    *,
    group: Const,
    head_dim: Const,
    page_size: Const,
    rows: Const,
    kv_tile: Const,
    stages: Const = 2,
):
    """A block computes `rows` rows, a row being a query token and a head of the group, for one kv head.

    With 64 rows each warp has 16 of them and reads all keys; with 16, all warps have the same rows and each reads its own
    quarter of every kv tile. In both cases a warp's softmax is its own business: warps meet only to share loaded tiles, and
    at the end, when the parts of the softmax (axis 0 of all tiles) are merged.

    kv_tile: tokens of the cache per iteration. stages: kv tiles in shared memory; one is used while the others arrive.
    """
    heads = padded_group(group)
    tokens = rows // heads
    parts = 16 * WARPS // rows
    keys = kv_tile // parts
    tilus.grid((q.shape[0] + (kv_lens.shape[0]) * (tokens - 1)) // tokens, q.shape[1], warps=WARPS, blocks_per_sm=1)
    head = tilus.block_id(1)
    sequence, first = find_tile(q_start, kv_lens.shape[0], tokens)
    begin, end = q_start[sequence], q_start[sequence + 1]
    if begin + first >= end:
        return
    kv_len = kv_lens[sequence]
    past = kv_len - (end - begin)  # keys that the first query sees besides its own
    seen = min(kv_len, past + first + tokens)
    tiles = (max(seen, 0) + (kv_tile - 1)) // kv_tile
    table = block_tables[sequence]
    queries = tilus.load(q, [begin + first, head, 0, 0], [tokens, heads, head_dim], dims=[0, 2, 3])
    queries = tilus.broadcast(queries.reshape([1, rows, head_dim]), [parts, rows, head_dim])
    kv = tilus.shared(q.dtype, [stages, parts, 2, keys, head_dim])

    chunk = min(page_size, keys)
    chunks = range(0, kv_tile, chunk)

    def pages_of(tile):
        """The page of each chunk of a kv tile; behind the sequence's end, its last one."""
        return [table[min(tile * kv_tile + start, kv_len - 1) // page_size] for start in chunks]

    def fetch(tile, pages, stage):
        """Start copying a kv tile; tokens that the sequence does not have arrive as zeros."""
        for start, page in zip(chunks, pages):
            token = tile * kv_tile + start
            slot = 0 if page_size <= chunk else token % page_size
            count = max(0, min(kv_len - token, chunk))
            source = tilus.narrow(kv_cache[page, :, :, head], 1, slot, count)
            tilus.copy_async(
                source, [0, 0, 0], kv, shape=[2, chunk, head_dim], dst_offsets=[stage, start // keys, 0, start % keys, 0]
            )

    for tile in range(stages - 1):
        if tile < tiles:
            fetch(tile, pages_of(tile), tile)
        tilus.commit()
    # Of each part: scores see keys below `limit`; `key` counts them from the tile's first.
    limit = past + first + 1 + tilus.arange(rows, shape=[1, rows, 1], axis=1) // heads
    key = tilus.arange(parts, shape=[parts, 1, 1]) * keys + tilus.arange(keys, shape=[1, 1, keys], axis=2)
    highest = tilus.full([parts, rows, 1], NO_SCORE)
    total = tilus.zeros([parts, rows, 1])
    acc = tilus.zeros([parts, rows, head_dim], layout=warp_rows(parts, rows, head_dim))
    for tile in tilus.range(tiles):
        following = tile + (stages - 1)
        pages = pages_of(following)  # early: the copies below need them
        tilus.wait(stages - 2)
        tilus.sync()
        if following < tiles:
            fetch(following, pages, following % stages)
        tilus.commit()
        stage = tile % stages
        k = tilus.load_shared(kv, [stage, 0, 0, 0, 0], [parts, head_dim, keys], dims=[1, 4, 3])
        scores = tilus.dot(queries, k, tilus.zeros([parts, rows, keys], layout=warp_rows(parts, rows, keys)))
        scores = tilus.where(key + tile * kv_tile < limit, scores * scale_log2, -math.inf)
        higher = tilus.maximum(highest, tilus.max(scores, 2, keepdims=True))
        shrink = tilus.exp2(highest - higher)
        weights = tilus.exp2(scores - higher)
        highest = higher
        total = total * shrink + tilus.sum(weights, 2, keepdims=True)
        v = tilus.load_shared(kv, [stage, 0, 1, 0, 0], [parts, keys, head_dim], dims=[1, 3, 4])
        acc = tilus.dot(weights.to(q.dtype), v, acc * shrink)
    tilus.wait(0)

    factor = tilus.exp2(highest - tilus.max(highest, 0, keepdims=True))
    total = tilus.sum(total * factor, 0)
    result = tilus.sum(acc * factor, 0) / tilus.where(total > 0.0, total, 1.0)
    result = result.to(q.dtype).reshape([tokens, heads, head_dim])
    tilus.store(out[begin:end], [first, head, 0, 0], result, dims=[0, 2, 3])


def find_tile(q_start, sequences, tokens):
    """The sequence whose queries this block computes and the first of them, counted from the sequence's first.

    Blocks `tile_start(s)` to `tile_start(s + 1) - 1` are for sequence s: at least as many as its tiles, the last one may have
    nothing to do. Binary search for the last sequence that starts at this block or before.
    """

    def tile_start(sequence):
        return (q_start[sequence] + sequence * (tokens - 1)) // tokens

    block = tilus.block_id(0)
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tile_start(middle) <= block:
            low = middle
        else:
            high = middle
    return low, (block - tile_start(low)) * tokens


def padded_group(group: int) -> int:
    """Rows that a query token takes: a power of two."""
    return 1 << (group - 1).bit_length()


def warp_rows(parts: int, rows: int, columns: int) -> RegisterLayout:
    """Accumulator of `parts` products [rows, columns] in which every row belongs to one warp."""
    return spatial(parts, 1, 1) * spatial(1, WARPS // parts, 1) * local(1, 1, columns // 8) * mma_c().unsqueeze(0)


def paged_attention(
    q: torch.Tensor, kv_cache: torch.Tensor, block_tables: torch.Tensor, q_start: torch.Tensor, kv_lens: torch.Tensor,
    scale: float, *, device: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of ragged queries over paged keys and values, causal and aligned at the end.

    q: float16 or bfloat16 [M, Hq, D], the queries of all sequences one after another. kv_cache: [pages, 2, page_size, Hkv, D]
    of the same dtype, keys at index 0, values at 1; a strided view (one layer of a pool, say) is fine. block_tables: int32
    [S, max_pages], the pages of each sequence in order. q_start: int32 [S + 1], where each sequence's queries start in q.
    kv_lens: int32 [S], tokens in the cache, those of the queries included. scale: what scores are multiplied with.
    device: where to run (reference, emulator, cuda), by default as the arguments say.

    Query j of a sequence with q_len queries sees the first kv_len - q_len + j + 1 tokens of the cache; one that sees none gets
    zeros. Nothing beyond kv_len is looked at. Nothing is read on the host, so that launches can be captured in a CUDA graph.

    Returns: [M, Hq, D]. Scores and sums are f32; the softmax weights are rounded to q's dtype for the tensor cores.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    if q.ndim != 3 or kv_cache.ndim != 5 or block_tables.ndim != 2:
        raise TilusError(
            f"paged_attention: shapes q {list(q.shape)}, kv_cache {list(kv_cache.shape)}, block_tables "
            f"{list(block_tables.shape)}, expected [tokens, q_heads, head_dim], [pages, 2, page_size, kv_heads, head_dim], "
            "[sequences, max_pages]"
        )
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    group, rest = divmod(q.shape[1], kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise TilusError(
            f"paged_attention: {q.shape[1]} query heads for {kv_heads} kv heads, expected 1 to {MAX_GROUP} times as many"
        )
    if head_dim % 16 or not 16 <= head_dim <= 128 or (page_size % 16 if page_size < KV_TILE else page_size % KV_TILE):
        raise TilusError(
            f"paged_attention: head_dim {head_dim} and page_size {page_size}, expected a head_dim of 16 to 128 that 16 "
            f"divides and a page_size of 16, 32 or a multiple of {KV_TILE}"
        )
    sequences = kv_lens.shape[0]
    if q_start.shape != (sequences + 1,):
        raise TilusError(
            f"paged_attention: q_start of shape {list(q_start.shape)} for {sequences} sequences, expected [{sequences + 1}]"
        )
    out = q.new_empty(q.shape)
    few = q.shape[0] <= sequences * (16 // padded_group(group))
    split = {"group": group, "head_dim": head_dim, "page_size": page_size, "rows": 16 if few else 64, "kv_tile": 64 if few or head_dim <= 64 else 32}
    heads = (kv_heads, group)
    paged_attention_kernel.on(device)(
        q.unflatten(1, heads), kv_cache, block_tables, q_start, kv_lens, out.unflatten(1, heads),
        scale * math.log2(math.e), **split,
    )  # fmt: skip
    return out
