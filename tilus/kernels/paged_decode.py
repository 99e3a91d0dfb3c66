"""Attention of few queries a sequence over a paged key-value cache, on Hopper: one launch, no plan, at the speed of memory.

The cached tokens of the whole batch are shared evenly among blocks (`paged_decode_split`). In each block one warp asks for the
pages of its tokens by tensor copies, several tiles ahead, across sequences; the other warps compute. Tokens of the cache are rows
of the products and query heads are columns, so that nothing is padded to more than eight columns:

    scores [tokens, columns] = K Q^T        weights = exp2(scores - highest)        acc [head_dim, columns] += V^T weights

A warp has some tokens of each tile, and its own maximum, sum and accumulator: warps of a block meet at the end of a part only.
Blocks that share a sequence and head meet in global memory, where the last one to come adds up the partial results in order.

Budget: a multiprocessor of an H100 gets 24 bytes in a nanosecond and issues four instructions a clock, at 1.7 GHz 0.28 for each
byte. 16 tokens of 128 elements in 16 bits are 8 KB of keys and values, which leaves 2300 instructions. For eight columns
mma.m16n8k16 and ldmatrix need 16 each, the accumulator 32, the softmax about 60. So products of a warp will do, and need no
maximum of rows that other warps have, as products of warpgroups would.

Online softmax: M. Milakov and N. Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.attention import MAX_GROUP, NO_SCORE
from tilus.kernels.paged_decode_columns import Columns, normalized, padded_columns
from tilus.kernels.paged_decode_split import (
    Part,
    Split,
    count_units,
    each_part,
    find_sequence,
    parts_of,
    places,
    share,
    units_of,
)
from tilus.kernels.warpgroup_ring import num_sms_of
from tilus.layout import replicated, spatial
from tilus.runtime.execute import place
from tilus.target import TARGETS

ROWS = 16  # tokens of a warp's product
PAGES = 128  # entries of a block table that the copying warp holds
TILE = 64  # tokens of a stage
HEAD_DIMS = (64, 96, 128, 256)
MAX_QUERIES = 8
RESERVED_NBYTES = 4096  # of shared memory, for barriers and the starts of tensors


@dataclass(frozen=True)
class DecodePlan:
    """What a block does. tile: tokens of a stage. stages: tiles on their way. warps: those that compute; `column_groups` of them
    share tokens and compute different columns. blocks_per_sm: blocks that run beside each other on a multiprocessor.

    copiers: warps that copy. One is enough; a whole warpgroup can leave registers to the others. registers, registers_to_copy:
    what a thread has then.
    """

    tile: int
    stages: int
    warps: int
    column_groups: int = 1
    blocks_per_sm: int = 1
    copiers: int = 1
    registers: int | None = None
    registers_to_copy: int | None = None


@tilus.kernel
def paged_decode_kernel(
    q: Tensor["dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["dtype", "pages", 2, "page_size", "kv_heads", "head_dim"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    partial_out: Tensor[f32, "places", "q_len", "group", "head_dim"],
    partial_lse: Tensor[f32, "places", "q_len", "group"],
    tickets: Tensor[int32, "pairs"],
    scale_log2: float,
    lse: Tensor[f32, "sequences", "q_len", "kv_heads", "group"] = None,
    *,
    q_len: Const,
    group: Const,
    head_dim: Const,
    page_size: Const,
    blocks: Const,
    split: Const,
    plan: Const,
):
    """tickets: zeros, one for each sequence and kv head, and left so. places: as `paged_decode_split.places` says."""
    kv_heads, warps, all_warps = q.shape[2], plan.warps, plan.warps + plan.copiers
    tilus.grid(blocks, warps=all_warps, blocks_per_sm=plan.blocks_per_sm)
    tilus.launch_dependents()
    chunk = min(plan.tile, page_size)
    ring = tilus.shared(kv_cache.dtype, [plan.stages, plan.tile // chunk, 2, chunk, head_dim])
    full, empty = tilus.mbarrier(plan.stages), tilus.mbarrier(plan.stages)
    tilus.wait_dependencies()
    units = count_units(kv_lens, kv_heads, split, all_warps)
    begin, end = share(units, blocks, tilus.block_id(0)), share(units, blocks, tilus.block_id(0) + 1)
    start = find_sequence(kv_lens, kv_heads, split, all_warps, begin)

    with tilus.warps(warps, plan.copiers, registers=plan.registers_to_copy):
        filling = Stages(ring, full, empty)

        def fill(part):
            fill_part(part, filling, kv_cache, block_tables, plan.copiers)

        each_part(kv_lens, kv_heads, start, begin, end, split, fill)

    with tilus.warps(0, warps, registers=plan.registers):
        using = Stages(ring, full, empty)
        columns = Columns(q_len, group, head_dim, plan.warps, plan.column_groups)

        def attend(part):
            softmax = Softmax(columns, scale_log2)
            attend_to_part(part, using, columns.queries(q, part), softmax)
            result, result_lse = normalized(softmax.highest, softmax.total, softmax.acc)
            count, index, place = parts_of(part, units, blocks, split)
            if count > 1:
                columns.store_partial(partial_out, partial_lse, place + index, result, result_lse)
                if tilus.atomic_add(tickets, [part.pair], 1) == count - 1:
                    tilus.store(tickets, [part.pair], tilus.zeros([1], int32))
                    columns.merge(partial_out, partial_lse, place, count, out, lse, part)
            else:
                columns.store(out, lse, part, result, result_lse)

        each_part(kv_lens, kv_heads, start, begin, end, split, attend)


class Stages:
    """The ring of tiles [stages, chunks, keys and values, tokens of a chunk, head_dim], and which stage is next.

    A chunk is what a page has of a tile. A turn is a round through all stages; barriers tell even and odd ones apart.
    """

    def __init__(self, ring: Any, full: Any, empty: Any) -> None:
        self.ring, self.full, self.empty = ring, full, empty
        self.stage, self.turn = 0, 0

    def wait_empty(self) -> None:
        tilus.wait_barrier(self.empty[self.stage], 1 - self.turn)
        tilus.arrive(self.full[self.stage], nbytes=self.ring[0].nbytes)

    def wait_full(self) -> None:
        tilus.wait_barrier(self.full[self.stage], self.turn)

    def advance(self) -> None:
        last = self.stage == self.ring.shape[0] - 1
        self.turn = 1 - self.turn if last else self.turn
        self.stage = 0 if last else self.stage + 1

    def tokens(self, kind: int, step: int, count: int) -> Any:
        """Keys (0) or values (1) of the present stage, the step-th `count` tokens of it: [count / 16, 16, head_dim]"""
        _, _, _, chunk, head_dim = self.ring.shape
        first = [self.stage, step * count // chunk, kind, step * count % chunk, 0]
        shape = [max(1, count // chunk), min(count, chunk), head_dim]
        return tilus.load_shared(self.ring, first, shape, dims=[1, 3, 4]).reshape([count // ROWS, ROWS, head_dim])


def fill_part(part: Part, stages: Stages, kv_cache: Any, block_tables: Any, warps: int) -> None:
    """Copy the tiles of a part into the ring. For pages behind the part's end zeros arrive, and no memory is read."""
    _, chunks, _, chunk, _ = stages.ring.shape
    page_size, nowhere = kv_cache.shape[2], kv_cache.shape[0]
    tile, token, end = chunks * chunk, part.token, part.end_token
    lanes = replicated(warps, 1) * spatial(32).local(PAGES // 32)
    for pages in tilus.range(token // page_size, tilus.cdiv(end, page_size), PAGES):
        table = tilus.load(block_tables, [part.sequence, pages], [PAGES], layout=lanes)
        for first in tilus.range(max(token, pages * page_size), min(end, (pages + PAGES) * page_size), tile):
            stages.wait_empty()
            for index in range(chunks):
                at = first + index * chunk
                found = tilus.where(tilus.arange(PAGES, start=pages) == at // page_size, table, 0)
                page = tilus.item(tilus.sum(found)) if at < end else nowhere
                slot = 0 if chunk == page_size else at % page_size
                tilus.copy_tensor(
                    stages.ring[stages.stage, index], kv_cache, [page, 0, slot, part.head, 0],
                    barrier=stages.full[stages.stage], dims=[1, 2, 4], evict="first",
                )  # fmt: skip
            stages.advance()


class Softmax:
    """Each warp's highest score, sum of weights and weighted sum of values, of the tokens that it has seen of a part."""

    def __init__(self, columns: Columns, scale_log2: Any) -> None:
        self.columns, self.scale_log2 = columns, scale_log2
        shape = [columns.parts, 1, columns.width]
        self.highest, self.total = tilus.full(shape, NO_SCORE), tilus.zeros(shape)
        acc_shape = [columns.parts, columns.head_dim, columns.width]
        self.acc = tilus.zeros(acc_shape, layout=columns.layout(columns.head_dim))

    def weights(self, keys: Any, queries: Any, seen: Any) -> Any:
        """Of 16 tokens for each warp, [parts, 16, width]; what is not seen may be anything."""
        parts, width = self.columns.parts, self.columns.width
        scores = tilus.dot(keys, queries, tilus.zeros([parts, ROWS, width], layout=self.columns.layout(ROWS)))
        scores = tilus.where(seen, scores * self.scale_log2, -math.inf)
        higher = tilus.maximum(self.highest, tilus.max(scores, 1, keepdims=True))
        weights = tilus.exp2(scores - higher)
        shrink = tilus.exp2(self.highest - higher)
        self.highest = higher
        self.total = self.total * shrink + tilus.sum(weights, 1, keepdims=True)
        self.acc = self.acc * shrink
        return weights.to(queries.dtype)

    def add(self, values: Any, weights: Any) -> None:
        self.acc = tilus.dot(tilus.transpose(values, [0, 2, 1]), weights, self.acc)


def attend_to_part(part: Part, stages: Stages, queries: Any, softmax: Softmax) -> None:
    """Add all tokens of a part."""
    columns, end = softmax.columns, part.end_token
    tile, count = stages.ring.shape[1] * stages.ring.shape[3], ROWS * columns.parts
    token = tilus.arange(columns.parts, shape=[columns.parts, 1, 1]) * ROWS + tilus.arange(
        ROWS, shape=[1, ROWS, 1], axis=1
    )
    query = tilus.arange(columns.width, shape=[1, 1, columns.width], axis=2) // columns.heads
    limits = tilus.minimum(part.length - columns.q_len + 1 + query, end)
    for first in tilus.range(part.token, end, tile):
        stages.wait_full()
        for step in tilus.range(tile // count):
            at = first + step * count
            weights = softmax.weights(stages.tokens(0, step, count), queries, token < limits - at)
            values = stages.tokens(1, step, count)
            if end - at < count:  # what lies behind the end may be anything, also no number
                values = tilus.where(token < end - at, values, 0.0)
            softmax.add(values, weights)
        tilus.arrive(stages.empty[stages.stage])
        stages.advance()


def paged_decode(
    q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, scale: float, *, return_lse: bool = False,
    fixed_split: int | None = None, device: str | None = None,
) -> Any:  # fmt: skip
    """Attention of the last few tokens of each sequence over its paged keys and values, causal (sm_90a).

    q: float16 or bfloat16 [S, q_len, Hq, D], q_len from 1 to 8. kv_cache: [pages, 2, page_size, Hkv, D] of the same dtype, keys
    at index 0, values at 1; a strided view with contiguous last dim is fine. Hq / Hkv is 1 to 16, D 64, 96, 128 or 256, page_size
    16, 32 or a multiple of 64. block_tables: int32 [S, max_pages], the pages of each sequence in order. kv_lens: int32 [S],
    tokens in the cache, those of the queries included. scale: what scores are multiplied with. Torch tensors. fixed_split:
    tokens of a part, a multiple of 64. Sequences are then cut at its multiples alone, so that the bits of a result do not depend
    on what else is in the batch; by default they are cut so that all multiprocessors have the same to do. device: where to run
    (reference, emulator, cuda), by default as the arguments say.

    Query j of a sequence sees the first kv_len - q_len + j + 1 tokens of the cache; one that sees none gets zeros. Nothing beyond
    kv_len is looked at, nor are entries of block_tables for it. One launch; the host reads no tensor, so it can be captured in a
    CUDA graph, and the lengths may change from replay to replay.

    Returns: [S, q_len, Hq, D]; with return_lse also float32 [S, q_len, Hq], the logarithm of the sum of exp(scaled score), minus
    infinity where there is no key. Scores and sums are f32; the softmax weights are rounded to q's dtype for the tensor cores.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    group = _check(q, kv_cache, block_tables, kv_lens, fixed_split)
    where = place(device, is_cuda(q))
    plan = plan_of(q.shape[1], group, q.shape[3], kv_cache.dtype.itemsize)
    split = Split(TILE) if fixed_split is None else Split(fixed_split, fixed=True)
    units = q.shape[0] * kv_cache.shape[3] * units_of(block_tables.shape[1] * kv_cache.shape[2], split.unit)
    blocks = max(1, min(num_sms_of(q, where) * plan.blocks_per_sm, units))
    out, lse = launch(q, kv_cache, block_tables, kv_lens, scale, plan, split, blocks, return_lse, device)
    return (out, lse) if return_lse else out


def launch(
    q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, scale: float, plan: DecodePlan, split: Split, blocks: int,
    return_lse: bool, device: str | None,
) -> tuple[Any, Any]:  # fmt: skip
    """(output, log-sum-exp or None) by a given plan."""
    sequences, q_len, q_heads, head_dim = q.shape
    page_size, kv_heads = kv_cache.shape[2:4]
    group, pairs = q_heads // kv_heads, sequences * kv_heads
    most = places(pairs, block_tables.shape[1] * page_size, blocks, split)
    out = empty(q, (sequences, q_len, kv_heads, group, head_dim))
    lse = empty(q, (sequences, q_len, kv_heads, group), "float32") if return_lse else None
    paged_decode_kernel.on(device)(
        q.unflatten(2, (kv_heads, group)), kv_cache, block_tables, kv_lens, out,
        empty(q, (most, q_len, group, head_dim), "float32"), empty(q, (most, q_len, group), "float32"),
        counters(q, pairs), scale * math.log2(math.e), lse,
        q_len=q_len, group=group, head_dim=head_dim, page_size=page_size, blocks=blocks, split=split, plan=plan,
    )  # fmt: skip
    return out.flatten(2, 3), None if lse is None else lse.flatten(2, 3)


def plan_of(q_len: int, group: int, head_dim: int, nbytes: int) -> DecodePlan:
    """Warps whose registers hold their columns, and as many stages as the shared memory holds. nbytes: of a cached element."""
    most = 16 if head_dim <= 128 else 8  # columns of a warp
    groups = 1
    while padded_columns(q_len, group, groups) > most * groups:
        groups *= 2
    few = padded_columns(q_len, group, groups) <= 32
    warps = 4 if few else 8
    to_merge = head_dim * padded_columns(q_len, group, groups) * f32.nbytes * (warps // groups)
    free = TARGETS["sm_90a"].max_shared_nbytes - RESERVED_NBYTES - to_merge
    plan = DecodePlan(TILE, free // (2 * TILE * head_dim * nbytes), warps, groups)
    return plan if few else replace(plan, copiers=4, registers=224, registers_to_copy=56)


def _check(q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, fixed_split: int | None) -> int:
    """The number of query heads per kv head."""
    if q.ndim != 4 or kv_cache.ndim != 5 or block_tables.ndim != 2 or kv_lens.ndim != 1:
        raise TilusError(
            f"paged_decode: shapes q {list(q.shape)}, kv_cache {list(kv_cache.shape)}, block_tables {list(block_tables.shape)} "
            f"and kv_lens {list(kv_lens.shape)}, expected [sequences, q_len, q_heads, head_dim], [pages, 2, page_size, kv_heads, "
            "head_dim], [sequences, max_pages] and [sequences]",
            hint="one query a sequence: q.unsqueeze(1)",
        )
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    group, rest = divmod(q.shape[2], kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise TilusError(
            f"paged_decode: {q.shape[2]} query heads for {kv_heads} kv heads, expected 1 to {MAX_GROUP} times as many"
        )
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise TilusError(
            f"paged_decode: {q.shape[1]} queries a sequence, expected 1 to {MAX_QUERIES}",
            hint="tilus.kernels.paged_attention takes more",
        )
    if head_dim not in HEAD_DIMS:
        raise TilusError(
            f"paged_decode: head_dim {head_dim}, expected one of {', '.join(map(str, HEAD_DIMS))}",
            hint="pad heads with zeros; scale stays that of the real head_dim",
        )
    columns = padded_columns(q.shape[1], group, 1)
    if head_dim > 128 and columns > 32:
        raise TilusError(
            f"paged_decode: {q.shape[1]} queries of {group} heads are {columns} columns, expected at most 32 "
            f"with head_dim {head_dim}",
            hint="ask for fewer queries at a time",
        )
    if page_size not in (16, 32) and (page_size < TILE or page_size % TILE):
        raise TilusError(f"paged_decode: page_size {page_size}, expected 16, 32 or a multiple of {TILE}")
    if fixed_split is not None and (fixed_split < TILE or fixed_split % TILE):
        raise TilusError(f"paged_decode: fixed_split={fixed_split}, expected a multiple of {TILE}")
    return group
