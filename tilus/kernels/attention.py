"""Causal attention over a paged key-value cache on any device: one kernel for prefill, chunked prefill and decode.

Tiling: T. Dao et al., "FlashAttention", arXiv 2205.14135. The query heads that share a kv head are rows of one tile (J. Ainslie
et al., "GQA", arXiv 2305.13245).
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f16, int32
from tilus.kernels.allocate import is_cuda
from tilus.kernels.attention_softmax import FRAGMENT_ROWS, Rows
from tilus.kernels.attention_tiles import WARPS, tiles_of
from tilus.kernels.kv_cache import QuantizedCache
from tilus.kernels.vectors import power_of_two
from tilus.runtime.execute import place

CPU_ROWS = 48  # rows of a block that does not decode, about
CPU_INVARIANT_ROWS = 16  # of any block, about, where a row's bits must not depend on it
KV_TILE = 64  # tokens of the cache per iteration, at most
MAX_GROUP = 16
MAX_HEAD_DIM, CPU_MAX_HEAD_DIM = 128, 256  # accumulators and queries of more do not fit into the registers of a GPU


def group_of(what: str, q_heads: int, kv_heads: int) -> int:
    """Query heads per kv head. Raises: TilusError, of the function `what`, where there are none of a kind that kernels have."""
    group, rest = divmod(q_heads, kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise TilusError(
            f"{what}: {q_heads} query heads for {kv_heads} kv heads, expected 1 to {MAX_GROUP} times as many"
        )
    return group


@tilus.kernel(varying=("tokens", "sequences", "sequences_plus_1", "pages"))
def paged_attention_kernel(
    q: Tensor["dtype", "tokens", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["unit", "pages", 2, "page_size", "kv_heads", "row"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["out_dtype", "tokens", "kv_heads", "group", "head_dim"],
    scale_log2: float,
    q_start: Tensor[int32, "sequences_plus_1"] = None,
    factors: Tensor[f16, "pages", "kv_heads", 2, "kinds", "page_size"] = None,
    *,
    group: Const,
    head_dim: Const,
    page_size: Const,
    rows: Const,
    kv_tile: Const,
    stages: Const = 2,
    heads: Const = None,
    parts: Const = None,
    kind: Const = None,
    window: Const = None,
    soft_cap: Const = None,
):
    """A block computes `rows` rows, a row being a query token and a head of the group, for one kv head.

    With 64 rows each warp has 16 of them and reads all keys; with 16, all warps have the same rows and each reads its own
    quarter of every kv tile. In both cases a warp's softmax is its own business: warps meet only to share loaded tiles, and
    at the end, when the parts of the softmax (axis 0 of all tiles) are merged.
    q_start: None where each sequence has one query. factors: of a quantised cache of the format `kind`, whose rows are bytes.
    kv_tile: tokens of the cache per iteration. stages: kv tiles in shared memory; one is used while the others arrive.
    heads: rows of a token, those of its group first; by default a power of two. parts: of a kv tile; by default as many as
    the warps need. window: how many keys a query sees at most, the last ones. soft_cap: see `paged_attention`."""
    heads = power_of_two(group) if heads is None else heads
    parts = FRAGMENT_ROWS * WARPS // rows if parts is None else parts
    tokens, sequences = rows // heads, kv_lens.shape[0]
    blocks = sequences if q_start is None else (q.shape[0] + sequences * (tokens - 1)) // tokens
    tilus.grid(blocks, q.shape[1], warps=WARPS)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    head = tilus.block_id(1)
    sequence, first, begin, end = queries_of(q_start, sequences, tokens, tilus.block_id(0))
    if begin + first >= end:
        return
    kv_len = kv_lens[sequence]
    limit = kv_len - (end - begin) + first + 1  # keys that the block's first query sees
    tiles = tilus.cdiv(max(min(kv_len, limit - 1 + tokens), 0), kv_tile)
    start = 0 if window is None else max(limit - window, 0) // kv_tile  # the first tile that the first query sees
    ring = [stages, parts, kv_tile // parts, head_dim]
    own_factors = None if kind is None else factors[:, head]
    kv = tiles_of(kv_cache[:, :, :, head], block_tables[sequence], kv_len, ring, own_factors, kind)
    kv.begin(start, tiles)
    queries = tilus.load(q, [begin + first, head, 0, 0], [tokens, heads, head_dim], dims=[0, 2, 3])
    limits = limit + tilus.arange(rows, shape=[1, rows, 1], axis=1) // heads
    softmax = Rows(kv, queries.reshape([rows, head_dim]), limits, scale_log2, window, soft_cap)
    for tile in tilus.range(start, tiles):
        ahead = kv.arrive(tile, tiles)
        softmax.attend(tile)
        kv.leave(tile, ahead)
    kv.end()
    result = softmax.result().to(out.dtype).reshape([tokens, heads, head_dim])
    tilus.store(out[begin:end], [first, head, 0, 0], result, dims=[0, 2, 3])


def queries_of(q_start: Any, sequences: Any, tokens: int, block: Any) -> Any:
    """(the sequence whose queries a block computes, the first of them, counted from the sequence's first, where the sequence's
    begin and end in q)"""
    if q_start is None:
        return block, 0, block, block + 1
    sequence, first = find_queries(q_start, sequences, tokens, block)
    return sequence, first, q_start[sequence], q_start[sequence + 1]


def find_queries(q_start: Any, sequences: Any, tokens: int, block: Any, slack: Any = None) -> Any:
    """The sequence whose queries a block computes, and the first of them, counted from the sequence's first.

    Blocks `first_block(s)` to `first_block(s + 1) - 1` serve sequence s: at least as many as it has tiles of queries, and at
    most one more, since floor(x + y) >= floor(x) + floor(y). Binary search for the last sequence that starts here or before.
    slack: queries that the last tile of any sequence lacks, at most; by default tokens - 1.
    """
    lacking = tokens - 1 if slack is None else slack

    def first_block(sequence: Any) -> Any:
        return (q_start[sequence] + sequence * lacking) // tokens

    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if first_block(middle) <= block:
            low = middle
        else:
            high = middle
    return low, (block - first_block(low)) * tokens


def portable_attention(
    q: Any, kv_cache: Any, block_tables: Any, q_start: Any, kv_lens: Any, out: Any, scale: float, device: str | None,
    invariant: bool = False, window: int | None = None, soft_cap: float | None = None,
) -> None:  # fmt: skip
    """Attention into `out` on any device: the arguments are those of `paged_attention`, which has checked them.

    q_start: where each sequence's queries start in q; None where each has one. invariant: a row has the same bits whatever its
    company is. window, soft_cap: as there.
    """
    _, _, page_size, kv_heads, head_dim = kv_cache.shape
    by_head, where = (kv_heads, q.shape[1] // kv_heads), place(device, is_cuda(q))
    if head_dim > MAX_HEAD_DIM and where in ("cuda", "emulator"):
        raise TilusError(
            f"paged_attention: head_dim {head_dim} for the kernel of all GPUs, expected at most {MAX_HEAD_DIM}",
            hint="on Hopper there are kernels for 256, but not with invariant=True",
        )
    on_cpu = where == "cpu"
    few = not invariant and q.shape[0] <= kv_lens.shape[0] * (FRAGMENT_ROWS // power_of_two(by_head[1]))
    quantized = isinstance(kv_cache, QuantizedCache)
    paged_attention_kernel.on(device)(
        q.unflatten(1, by_head), rows_of_codes(kv_cache) if quantized else kv_cache, block_tables, kv_lens,
        out.unflatten(1, by_head), scale * math.log2(math.e), q_start, kv_cache.factors if quantized else None,
        group=by_head[1], head_dim=head_dim, page_size=page_size, kind=kv_cache.format if quantized else None,
        window=window, soft_cap=soft_cap,
        **(_cpu_tiles(q_start is None, by_head[1], invariant) if on_cpu else _tensor_core_tiles(few, head_dim)),
    )  # fmt: skip


def rows_of_codes(cache: QuantizedCache) -> Any:
    """[pages, 2, page_size, Hkv, bytes of a row]"""
    return cache.codes.permute(0, 2, 3, 1, 4)


def _tensor_core_tiles(few: bool, head_dim: int) -> dict[str, int]:
    """Rows that fill the tensor cores' 16, for few of them as decoding has, or 16 for each warp."""
    return {
        "rows": FRAGMENT_ROWS if few else FRAGMENT_ROWS * WARPS,
        "kv_tile": KV_TILE if few or head_dim <= 64 else KV_TILE // 2,  # more would not fit into the registers
    }


def _cpu_tiles(single: bool, group: int, invariant: bool) -> dict[str, int]:
    """No row that is not needed, and one kv tile at a time: copies do not run ahead.

    Products of few rows add up in another order than those of many, so that invariant ones have as many rows in all cases.
    """
    rows = CPU_INVARIANT_ROWS if invariant else 1 if single else CPU_ROWS
    tokens = max(1, rows // group)
    return {"heads": group, "rows": tokens * group, "parts": 1, "kv_tile": KV_TILE, "stages": 1}
