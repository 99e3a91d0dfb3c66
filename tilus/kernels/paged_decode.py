"""Attention of few queries a sequence over a paged key-value cache, on Hopper: one launch, no plan, at the speed of memory.

The cached tokens of the whole batch are shared evenly among blocks (`paged_decode_split`). In each block one warp asks for the
pages of its tokens by tensor copies, `stages` tiles ahead, across sequences; the other warps compute. Tokens of the cache are rows
of the products and query heads are columns, so that nothing is padded to more than eight columns:

    scores [tokens, columns] = K Q^T        weights = exp2(scores - highest)        acc [head_dim, columns] += V^T weights

A warp has 16 tokens of each tile, and its own maximum, sum and accumulator: warps of a block meet at the end of a part only, blocks
that share a sequence and head meet in global memory, where the last one to come adds up all partial results in order.

Budget: a multiprocessor of an H100 gets 24 bytes in a nanosecond and issues four instructions a clock, at 1.7 GHz 0.28 for each byte.
16 tokens of 128 elements in 16 bits are 8 KB of keys and values, which leaves 2300 instructions. mma.m16n8k16 and
ldmatrix need 16 each for eight columns, scaling the accumulator 32, the softmax about 60: warp-wide products suffice, and
there is no need for those of warpgroups, whose rows would be spread over warps that then had to exchange maxima.

Online softmax: M. Milakov and N. Gimelshein, arXiv 1805.02867. Sums of parts merged by their log-sum-exp: T. Dao et al.,
"Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.kernels.attention import NO_SCORE, merged, power_of_two
from tilus.kernels.paged_decode_split import (
    Part,
    Split,
    count_units,
    each_part,
    find_sequence,
    parts_of,
    share,
)
from tilus.layout import RegisterLayout, local, replicated, spatial
from tilus.layout.atoms import mma_c

PAGES = 128  # entries of a block table that the copying warp holds
MERGED = 16  # partial results that are loaded together


@dataclass(frozen=True)
class DecodePlan:
    """What a block does. tile: tokens of a stage. stages: tiles on their way. warps: those that compute; `column_groups` of them
    share tokens and compute different columns. blocks_per_sm: blocks that run beside each other on a multiprocessor."""

    tile: int
    stages: int
    warps: int
    column_groups: int = 1
    blocks_per_sm: int = 1

    @property
    def parts(self) -> int:
        """Of the tokens of a tile, each for other warps."""
        return self.warps // self.column_groups


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
    kv_heads, warps = q.shape[2], plan.warps
    tilus.grid(blocks, warps=warps + 1, blocks_per_sm=plan.blocks_per_sm)
    tilus.launch_dependents()
    chunk = min(plan.tile, page_size)
    ring = tilus.shared(kv_cache.dtype, [plan.stages, plan.tile // chunk, 2, chunk, head_dim])
    full, empty = tilus.mbarrier(plan.stages), tilus.mbarrier(plan.stages)
    tilus.wait_dependencies()
    units = count_units(kv_lens, kv_heads, split, warps + 1)
    begin, end = share(units, blocks, tilus.block_id(0)), share(units, blocks, tilus.block_id(0) + 1)
    start = find_sequence(kv_lens, kv_heads, split, warps + 1, begin)

    with tilus.warps(warps, 1):
        filling = Stages(ring, full, empty)

        def fill(part):
            fill_part(part, filling, kv_cache, block_tables)

        each_part(kv_lens, kv_heads, start, begin, end, split, fill)

    with tilus.warps(0, warps):
        using = Stages(ring, full, empty)
        columns = Columns(q_len, group, head_dim, plan)

        def attend(part):
            highest, total, acc = softmax_of(part, using, columns.queries(q, part), columns, scale_log2)
            result, result_lse = normalized(highest, total, acc)
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

    def tokens(self, kind: int, parts: int) -> Any:
        """Keys (0) or values (1) of the present stage, [parts, tokens, head_dim]"""
        _, chunks, _, chunk, head_dim = self.ring.shape
        tile = tilus.load_shared(self.ring, [self.stage, 0, kind, 0, 0], [chunks, chunk, head_dim], dims=[1, 3, 4])
        return tile.reshape([parts, chunks * chunk // parts, head_dim])


def fill_part(part: Part, stages: Stages, kv_cache: Any, block_tables: Any) -> None:
    """Copy the tiles of a part into the ring. For pages behind the part's end zeros arrive, and no memory is read."""
    _, chunks, _, chunk, head_dim = stages.ring.shape
    page_size, nowhere = kv_cache.shape[2], kv_cache.shape[0]
    tile, token, end = chunks * chunk, part.token, part.end_token
    lanes = spatial(32).local(PAGES // 32)
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


def softmax_of(part: Part, stages: Stages, queries: Any, columns: Columns, scale_log2: Any) -> Any:
    """(highest score, sum of weights, weighted sum of values) of each warp's tokens of a part, tile by tile."""
    width, head_dim, parts = columns.width, columns.head_dim, columns.plan.parts
    tile, end = columns.plan.tile, part.end_token
    keys = tile // parts
    token = tilus.arange(parts, shape=[parts, 1, 1]) * keys + tilus.arange(keys, shape=[1, keys, 1], axis=1)
    limits = part.length - columns.q_len + 1 + tilus.arange(width, shape=[1, 1, width], axis=2) // columns.heads
    limits = tilus.minimum(limits, end)
    highest = tilus.full([parts, 1, width], NO_SCORE)
    total = tilus.zeros([parts, 1, width])
    acc = tilus.zeros([parts, head_dim, width], layout=columns.layout(head_dim))
    for first in tilus.range(part.token, end, tile):
        stages.wait_full()
        scores = tilus.zeros([parts, keys, width], layout=columns.layout(keys))
        scores = tilus.dot(stages.tokens(0, parts), queries, scores)
        values = stages.tokens(1, parts)
        if end - first < tile:  # what lies behind the end may be anything, also no number
            values = tilus.where(token < end - first, values, 0.0)
        scores = tilus.where(token < limits - first, scores * scale_log2, -math.inf)
        higher = tilus.maximum(highest, tilus.max(scores, 1, keepdims=True))
        weights = tilus.exp2(scores - higher)
        shrink = tilus.exp2(highest - higher)
        highest = higher
        total = total * shrink + tilus.sum(weights, 1, keepdims=True)
        acc = tilus.dot(tilus.transpose(values, [0, 2, 1]), weights.to(queries.dtype), acc * shrink)
        tilus.arrive(stages.empty[stages.stage])
        stages.advance()
    return highest, total, acc


def normalized(highest: Any, total: Any, acc: Any) -> Any:
    """([head_dim, width] softmax-weighted sum, [1, width] log2 of the sum of weights) of all warps' tokens.

    A column without any key is zero, and the log2 is that of next to nothing.
    """
    result = merged(highest, total, acc)
    most = tilus.max(highest, 0, keepdims=True)
    everything = tilus.sum(total * tilus.exp2(highest - most), 0)
    return result, tilus.where(everything > 0.0, tilus.log2(everything) + most.reshape(everything.shape), NO_SCORE)


class Columns:
    """The columns of a block's products: query tokens, and in each the heads of the group, both padded."""

    def __init__(self, q_len: int, group: int, head_dim: int, plan: DecodePlan) -> None:
        self.q_len, self.group, self.head_dim, self.plan = q_len, group, head_dim, plan
        self.heads = power_of_two(group)
        self.tokens = padded_tokens(q_len, group, plan.column_groups)
        self.width = self.tokens * self.heads

    def layout(self, rows: int) -> RegisterLayout:
        """Of products [parts, rows, width] in which a warp has all rows of its part and its group of columns."""
        parts, groups = self.plan.parts, self.plan.column_groups
        return spatial(parts, 1, groups) * local(1, rows // 16, self.width // (8 * groups)) * mma_c().unsqueeze(0)

    def queries(self, q: Any, part: Part) -> Any:
        """[parts, head_dim, width]"""
        tile = tilus.load(
            q[part.sequence], [0, part.head, 0, 0], [self.tokens, self.heads, self.head_dim], dims=[0, 2, 3]
        )
        tile = tilus.transpose(tile.reshape([1, self.width, self.head_dim]), [0, 2, 1])
        return tilus.broadcast(tile, [self.plan.parts, self.head_dim, self.width])

    def rows(self, result: Any) -> Any:
        """[head_dim, width] as [tokens, heads, head_dim]"""
        rows = tilus.transpose(result).reshape([self.tokens, self.heads, self.head_dim])
        return tilus.with_layout(rows, self.by_element())

    def store(self, out: Any, lse: Any, part: Part, result: Any, result_lse: Any) -> None:
        where = [0, part.head, 0, 0]
        tilus.store(out[part.sequence], where, self.rows(result).to(out.dtype), dims=[0, 2, 3])
        self.store_lse(lse, part, result_lse.reshape([self.tokens, self.heads]))

    def store_lse(self, lse: Any, part: Part, log2: Any) -> None:
        """Of the softmax itself: a natural logarithm, minus infinity where there was no key."""
        if lse is not None:
            natural = tilus.where(log2 > NO_SCORE, log2 * math.log(2.0), -math.inf)
            tilus.store(lse[part.sequence], [0, part.head, 0], natural, dims=[0, 2])

    def store_partial(self, partial_out: Any, partial_lse: Any, place: Any, result: Any, result_lse: Any) -> None:
        tilus.store(partial_out[place], [0, 0, 0], self.rows(result))
        tilus.store(partial_lse[place], [0, 0], result_lse.reshape([self.tokens, self.heads]))

    def merge(
        self, partial_out: Any, partial_lse: Any, place: Any, count: Any, out: Any, lse: Any, part: Part
    ) -> None:
        """Add up `count` partial results from `place` on, always in the same order, and store the sum."""
        shape = [MERGED, self.tokens, self.heads]
        own = tilus.narrow(partial_out, 0, place, count), tilus.narrow(partial_lse, 0, place, count)
        spread = self.by_element()
        acc = tilus.zeros([self.tokens, self.heads, self.head_dim], layout=spread)
        total = tilus.zeros([self.tokens, self.heads, 1])
        highest = tilus.full([self.tokens, self.heads, 1], NO_SCORE)
        for at in tilus.range(0, count, MERGED):
            logs = tilus.load(own[1], [at, 0, 0], shape).reshape([*shape, 1])
            logs = tilus.where(tilus.arange(MERGED, shape=[MERGED, 1, 1, 1], start=at) < count, logs, NO_SCORE)
            higher = tilus.maximum(highest, tilus.max(logs, 0))
            factors, shrink = tilus.exp2(logs - higher), tilus.exp2(highest - higher)
            factors = tilus.where(logs > NO_SCORE, factors, 0.0)
            values = tilus.load(
                own[0], [at, 0, 0, 0], [*shape, self.head_dim], layout=spread.unsqueeze(0).expand(0, MERGED)
            )
            acc = acc * shrink + tilus.sum(values * factors, 0)
            total = total * shrink + tilus.sum(factors, 0)
            highest = higher
        result = acc / tilus.where(total > 0.0, total, 1.0)
        tilus.store(out[part.sequence], [0, part.head, 0, 0], result.to(out.dtype), dims=[0, 2, 3])
        log2 = tilus.where(total > 0.0, tilus.log2(total) + highest, NO_SCORE)
        self.store_lse(lse, part, log2.reshape([self.tokens, self.heads]))

    def by_element(self) -> RegisterLayout:
        """[tokens, heads, head_dim] over the computing warps: neighbouring threads have neighbouring vectors."""
        threads, vectors = 32 * self.plan.warps, self.head_dim // 4
        across = math.gcd(threads, vectors)
        rows = min(threads // across, self.width)
        copies, repeats = threads // (across * rows), self.width // rows
        flat = replicated(copies, 2) * local(repeats, vectors // across) * spatial(rows, across) * local(1, 4)
        return flat.reshape((self.tokens, self.heads, self.head_dim))


def padded_tokens(q_len: int, group: int, column_groups: int) -> int:
    """Query tokens of a tile, at least q_len, so that its columns are multiples of 8 for each group of them."""
    least = max(1, 8 * column_groups // power_of_two(group))
    return -(-q_len // least) * least
