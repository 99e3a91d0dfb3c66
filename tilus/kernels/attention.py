"""Causal attention over a paged key-value cache: one kernel and one launch for prefill, chunked prefill and decode.

Online softmax: M. Milakov and N. Gimelshein, arXiv 1805.02867; tiling: T. Dao et al., "FlashAttention", arXiv 2205.14135. The
query heads that share a kv head are rows of one tile (J. Ainslie et al., "GQA", arXiv 2305.13245).
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, int32
from tilus.kernels.allocate import empty, is_cuda
from tilus.layout import RegisterLayout, local, spatial
from tilus.layout.atoms import mma_c
from tilus.runtime.execute import place

WARPS = 4
FRAGMENT_ROWS = 16  # rows of a tensor-core product, of which a warp takes one
CPU_ROWS = 48  # rows of a block that does not decode, about
KV_TILE = 64  # tokens of the cache per iteration, at most
MAX_GROUP = 16
MAX_HEAD_DIM = 128
NO_SCORE = -1e30  # the maximum of no scores; finite, so that differences with it are no NaN


@tilus.kernel
def paged_attention_kernel(
    q: Tensor["dtype", "tokens", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["dtype", "pages", 2, "page_size", "kv_heads", "head_dim"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    q_start: Tensor[int32, "sequences_plus_1"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["dtype", "tokens", "kv_heads", "group", "head_dim"],
    scale_log2: float,
    *,
    group: Const,
    head_dim: Const,
    page_size: Const,
    rows: Const,
    kv_tile: Const,
    stages: Const = 2,
    heads: Const = None,
    parts: Const = None,
):
    """A block computes `rows` rows, a row being a query token and a head of the group, for one kv head.

    With 64 rows each warp has 16 of them and reads all keys; with 16, all warps have the same rows and each reads its own
    quarter of every kv tile. In both cases a warp's softmax is its own business: warps meet only to share loaded tiles, and
    at the end, when the parts of the softmax (axis 0 of all tiles) are merged.

    kv_tile: tokens of the cache per iteration. stages: kv tiles in shared memory; one is used while the others arrive.
    heads: rows of a token, those of its group first; by default a power of two. parts: of a kv tile; by default as many as
    the warps need.
    """
    heads = power_of_two(group) if heads is None else heads
    parts = FRAGMENT_ROWS * WARPS // rows if parts is None else parts
    tokens = rows // heads
    keys = kv_tile // parts
    sequences = kv_lens.shape[0]
    tilus.grid((q.shape[0] + sequences * (tokens - 1)) // tokens, q.shape[1], warps=WARPS)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    head = tilus.block_id(1)
    sequence, first = find_queries(q_start, sequences, tokens, tilus.block_id(0))
    begin, end = q_start[sequence], q_start[sequence + 1]
    if begin + first >= end:
        return
    kv_len = kv_lens[sequence]
    limit = kv_len - (end - begin) + first + 1  # keys that the block's first query sees
    tiles = tilus.cdiv(max(min(kv_len, limit - 1 + tokens), 0), kv_tile)
    kv = KvTiles(kv_cache[:, :, :, head], block_tables[sequence], kv_len, [stages, parts, keys])
    for tile in range(stages - 1):
        if tile < tiles:
            kv.fetch(tile, kv.pages(tile))
        tilus.commit()
    queries = tilus.load(q, [begin + first, head, 0, 0], [tokens, heads, head_dim], dims=[0, 2, 3])
    queries = tilus.broadcast(queries.reshape([1, rows, head_dim]), [parts, rows, head_dim])
    limits = limit + tilus.arange(rows, shape=[1, rows, 1], axis=1) // heads
    key = tilus.arange(parts, shape=[parts, 1, 1]) * keys + tilus.arange(keys, shape=[1, 1, keys], axis=2)
    highest = tilus.full([parts, rows, 1], NO_SCORE)
    total = tilus.zeros([parts, rows, 1])
    acc = tilus.zeros([parts, rows, head_dim], layout=rows_by_warp(parts, rows, head_dim))
    for tile in tilus.range(tiles):
        following = tile + (stages - 1)
        pages = kv.pages(following)  # before the wait: the copies need them
        tilus.wait(max(stages - 2, 0))
        tilus.sync()
        if following < tiles:
            kv.fetch(following, pages)
        tilus.commit()
        scores = tilus.zeros([parts, rows, keys], layout=rows_by_warp(parts, rows, keys))
        scores = tilus.dot(queries, kv.keys(tile), scores) * scale_log2
        scores = tilus.where(key < limits - tile * kv_tile, scores, -math.inf)
        higher = tilus.maximum(highest, tilus.max(scores, 2, keepdims=True))
        weights = tilus.exp2(scores - higher)
        shrink = tilus.exp2(highest - higher)
        highest = higher
        total = total * shrink + tilus.sum(weights, 2, keepdims=True)
        acc = tilus.dot(weights.to(q.dtype), kv.values(tile), acc * shrink)
    tilus.wait(0)
    result = merged(highest, total, acc).to(q.dtype).reshape([tokens, heads, head_dim])
    tilus.store(out[begin:end], [first, head, 0, 0], result, dims=[0, 2, 3])


class KvTiles:
    """Keys and values of one sequence and head, a ring of tiles in shared memory.

    cache: [pages, 2, page_size, head_dim]. table: its pages in order. length: in tokens. ring: stages, parts of a tile, and
    keys of a part.
    """

    def __init__(self, cache: Any, table: Any, length: Any, ring: Any) -> None:
        self.cache, self.table, self.length = cache, table, length
        self.stages, self.parts, self.part = ring
        _, _, self.page_size, self.head_dim = cache.shape
        self.chunk = min(self.page_size, self.part)  # tokens of one page in one part
        self.tile = self.parts * self.part
        self.buffer = tilus.shared(cache.dtype, [self.stages, self.parts, 2, self.part, self.head_dim])

    def pages(self, tile: Any) -> Any:
        """The page of each chunk of a tile; behind the sequence's end, its last one."""
        last = self.length - 1
        return [
            self.table[min(tile * self.tile + at, last) // self.page_size] for at in range(0, self.tile, self.chunk)
        ]

    def fetch(self, tile: Any, pages: Any) -> None:
        """Start copying a tile; tokens behind the sequence's end arrive as zeros, whatever the page holds there."""
        for at, page in zip(range(0, self.tile, self.chunk), pages):
            token = tile * self.tile + at
            slot = 0 if self.page_size == self.chunk else token % self.page_size
            source = tilus.narrow(self.cache[page], 1, slot, max(0, min(self.length - token, self.chunk)))
            place = [tile % self.stages, at // self.part, 0, at % self.part, 0]
            tilus.copy_async(source, [0, 0, 0], self.buffer, shape=[2, self.chunk, self.head_dim], dst_offsets=place)

    def keys(self, tile: Any) -> Any:
        """[parts, head_dim, keys of a part]"""
        shape = [self.parts, self.head_dim, self.part]
        return tilus.load_shared(self.buffer, [tile % self.stages, 0, 0, 0, 0], shape, dims=[1, 4, 3])

    def values(self, tile: Any) -> Any:
        """[parts, keys of a part, head_dim]"""
        shape = [self.parts, self.part, self.head_dim]
        return tilus.load_shared(self.buffer, [tile % self.stages, 0, 1, 0, 0], shape, dims=[1, 3, 4])


def find_queries(q_start: Any, sequences: Any, tokens: int, block: Any) -> Any:
    """The sequence whose queries a block computes, and the first of them, counted from the sequence's first.

    Blocks `first_block(s)` to `first_block(s + 1) - 1` serve sequence s: at least as many as it has tiles of queries, and at
    most one more, since floor(x + y) >= floor(x) + floor(y). Binary search for the last sequence that starts here or before.
    """

    def first_block(sequence: Any) -> Any:
        return (q_start[sequence] + sequence * (tokens - 1)) // tokens

    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if first_block(middle) <= block:
            low = middle
        else:
            high = middle
    return low, (block - first_block(low)) * tokens


def merged(highest: Any, total: Any, acc: Any) -> Any:
    """The softmax-weighted sum [rows, head_dim] from its parts; rows without any key are zero."""
    factor = tilus.exp2(highest - tilus.max(highest, 0, keepdims=True))
    total = tilus.sum(total * factor, 0)
    return tilus.sum(acc * factor, 0) / tilus.where(total > 0.0, total, 1.0)


def power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def rows_by_warp(parts: int, rows: int, columns: int) -> RegisterLayout | None:
    """The accumulator of `parts` products [rows, columns] in which every row belongs to one warp; None for tiles of CPUs."""
    if parts * rows != FRAGMENT_ROWS * WARPS:
        return None
    fragments = local(1, 1, columns // 8) * mma_c().unsqueeze(0)
    return spatial(parts, 1, 1) * spatial(1, WARPS // parts, 1) * fragments


def paged_attention(
    q: Any, kv_cache: Any, block_tables: Any, q_start: Any, kv_lens: Any, scale: float, *, device: str | None = None
) -> Any:
    """Attention of ragged queries over paged keys and values, causal and aligned at the end.

    q: float16 or bfloat16 [M, Hq, D], the queries of all sequences one after another. kv_cache: [pages, 2, page_size, Hkv, D]
    of the same dtype, keys at index 0, values at 1; a strided view (one layer of a pool, say) is fine. block_tables: int32
    [S, max_pages], the pages of each sequence in order. q_start: int32 [S + 1], where each sequence's queries start in q.
    kv_lens: int32 [S], tokens in the cache, those of the queries included. scale: what scores are multiplied with. Torch
    tensors. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Query j of a sequence with q_len queries sees the first kv_len - q_len + j + 1 tokens of the cache; one that sees none gets
    zeros. Nothing beyond kv_len is looked at. The host reads no tensor, so launches can be captured in a CUDA graph.

    Returns: [M, Hq, D]. Scores and sums are f32; the softmax weights are rounded to q's dtype for the tensor cores.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    group = _check(q, kv_cache, q_start, kv_lens)
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    out = empty(q, tuple(q.shape))
    on_cpu = place(device, is_cuda(q)) == "cpu"
    tiles = _cpu_tiles if on_cpu else _tensor_core_tiles
    paged_attention_kernel.on(device)(
        q.unflatten(1, (kv_heads, group)), kv_cache, block_tables, q_start, kv_lens, out.unflatten(1, (kv_heads, group)),
        scale * math.log2(math.e), group=group, head_dim=head_dim, page_size=page_size,
        **tiles(q.shape[0], kv_lens.shape[0], group, head_dim),
    )  # fmt: skip
    return out


def _tensor_core_tiles(queries: int, sequences: int, group: int, head_dim: int) -> dict[str, int]:
    """Rows that fill the tensor cores' 16, or 16 for each warp."""
    few = queries <= sequences * (FRAGMENT_ROWS // power_of_two(group))  # as many as decoding has
    return {
        "rows": FRAGMENT_ROWS if few else FRAGMENT_ROWS * WARPS,
        "kv_tile": KV_TILE if few or head_dim <= 64 else KV_TILE // 2,  # more would not fit into the registers
    }


def _cpu_tiles(queries: int, sequences: int, group: int, head_dim: int) -> dict[str, int]:
    """No row that is not needed, and one kv tile at a time: copies do not run ahead."""
    tokens = 1 if queries <= sequences else max(1, CPU_ROWS // group)
    return {"heads": group, "rows": tokens * group, "parts": 1, "kv_tile": KV_TILE, "stages": 1}


def _check(q: Any, kv_cache: Any, q_start: Any, kv_lens: Any) -> int:
    """The number of query heads per kv head."""
    if q.ndim != 3 or kv_cache.ndim != 5 or kv_lens.ndim != 1:
        raise TilusError(
            f"paged_attention: shapes q {list(q.shape)}, kv_cache {list(kv_cache.shape)} and kv_lens {list(kv_lens.shape)}, "
            "expected [tokens, q_heads, head_dim], [pages, 2, page_size, kv_heads, head_dim] and [sequences]"
        )
    sequences = kv_lens.shape[0]
    if tuple(q_start.shape) != (sequences + 1,):
        raise TilusError(
            f"paged_attention: q_start of shape {list(q_start.shape)} for {sequences} sequences, expected [{sequences + 1}]",
            hint="the last entry is the number of query tokens",
        )
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    group, rest = divmod(q.shape[1], kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise TilusError(
            f"paged_attention: {q.shape[1]} query heads for {kv_heads} kv heads, expected 1 to {MAX_GROUP} times as many"
        )
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise TilusError(
            f"paged_attention: head_dim {head_dim}, expected a multiple of 16 from 16 to {MAX_HEAD_DIM}",
            hint="pad heads with zeros; scale stays that of the real head_dim",
        )
    if page_size not in (16, 32) and (page_size < KV_TILE or page_size % KV_TILE):
        raise TilusError(f"paged_attention: page_size {page_size}, expected 16, 32 or a multiple of {KV_TILE}")
    return group
