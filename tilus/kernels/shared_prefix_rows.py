"""Attention of all sequences of a group over the pages that they share, and of each over its own, side by side in each block.

Prefixes: products of warpgroups, as in prefill. 128 rows, query heads of one kv head and queries of neighbouring sequences, see
all tokens of their part of the prefix. The rest: products of warps, as in `paged_decode`. Results of both are partial:
softmax-weighted sums and logarithms, which `shared_prefix_merge_kernel` adds up.

Budget of 128 rows by 128 tokens, as that of `paged_prefill`: 2048 cycles; those are 64 KB, which take a multiprocessor of an H100
4600 cycles to read. So prefixes that many rows share wait for tensor cores, and the rest for memory: side by side they take less
than one after the other. A group of two sequences already costs less here than two reads, and 64 queries of a group of 4 heads
are two row tiles a kv head, of which the second reads the L2 cache. Tiles of 64 tokens instead of 128 leave registers and shared
memory to the rest: two tiles of 32 KB, which come in 2.7 us, longer than its warps take to end a part and begin the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.kernels.attention_variant import NO_VARIANT
from tilus.kernels.paged_decode_columns import Columns, normalized
from tilus.kernels.paged_decode_operands import Elements
from tilus.kernels.paged_decode_softmax import Softmax, attend_to_part
from tilus.kernels.paged_decode_split import each_part, find_share
from tilus.kernels.paged_decode_stages import Stages, fill_part
from tilus.kernels.paged_prefill import PrefillPlan
from tilus.kernels.paged_prefill_softmax import HALF, Kind, Rows, Turns
from tilus.kernels.paged_prefill_stages import Memory
from tilus.kernels.shared_prefix_groups import LENGTH, ORDER, TOKENS, SharedTile, each_shared_tile
from tilus.kernels.shared_prefix_merge import note_places
from tilus.kernels.vectors import power_of_two

WARPGROUP = 4  # warps
OWN = 8  # the first warp that computes the rest; in front of it are two warpgroups for prefixes
COPYING = 12  # the first warp that copies: two for prefixes, one for the rest; the last one asks for queries
COPYING_PREFIX = 2
PAGES = 4  # of the rest, looked up at once: more take more registers than there are


@dataclass(frozen=True)
class SharedPlan:
    """prefix: of prefixes; its registers_to_copy are those of all warps that copy. tile, stages: of the rest, see `DecodePlan`.
    registers: of a thread that computes the rest. column_groups: of its warps, that compute different columns. pieces: of
    elements, see `Elements`."""

    prefix: PrefillPlan
    tile: int
    stages: int
    registers: int
    column_groups: int
    pieces: int


def fill_members(stages: Any, q_rows: Any, order: Any, tile: SharedTile, index: Any, q_len: int, heads: int) -> None:
    """The queries of a row tile's sequences: token by token, `heads` rows each, of q_len tokens rounded up to a power of two.

    Rows of other ranks and of further tokens are anything: what becomes of them is not read.
    """
    full, queries = stages.full, stages.queries
    tilus.wait_barrier(stages.empty, (index + 1) % 2)
    tilus.arrive(full, nbytes=queries.nbytes)
    tokens = power_of_two(q_len)
    members = queries.shape[1] // (heads * tokens)
    query = tilus.arange(tokens, shape=[1, tokens], axis=1)
    for half in range(2):
        sequences = tilus.load(order, [tile.rank + half * members], [members]).reshape([members, 1])
        token = (sequences * q_len + query).reshape([members * tokens])
        tilus.gather_tensor(queries[half], q_rows, token, [0, tile.kv_head, 0, 0], dims=[2, 3], barrier=full)


class SharedRows(Rows):
    """64 rows of a row tile, whose results are partial ones: token by token, all heads of each."""

    def store(self, tile: Any) -> None:
        """Of a `SharedTile`: the weighted mean of the values, and log2 of the sum of weights: there always is a key."""
        rows = [HALF // self.heads, self.heads]
        first = self.turns.half * rows[0]
        result = (self.acc * tilus.rcp(self.total)).reshape([*rows, self.acc.shape[1]])
        tilus.store(tilus.narrow(self.out[tile.place], 0, 0, tile.queries), [first, 0, 0], result)
        log2 = (tilus.log2(self.total) + self.highest * self.unit).reshape(rows)
        tilus.store(tilus.narrow(self.lse[tile.place], 0, 0, tile.queries), [first, 0], log2)


@tilus.kernel(varying=("sequences", "tokens", "pages", "pairs", "prefix_places", "places"))
def shared_prefix_kernel(
    q: Tensor["dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    q_rows: Tensor["dtype", "tokens", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["dtype", "pages", 2, "page_size", "kv_heads", "head_dim"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    shared: Tensor[int32, 7, "sequences"],
    notes: Tensor[int32, 4, "pairs"],
    prefix_out: Tensor[f32, "prefix_places", "row_tokens", "heads", "head_dim"],
    prefix_lse: Tensor[f32, "prefix_places", "row_tokens", "heads"],
    own_out: Tensor[f32, "places", "q_len", "group", "head_dim"],
    own_lse: Tensor[f32, "places", "q_len", "group"],
    scale_log2: float,
    blocks: int32,
    *,
    q_len: Const,
    kv_heads: Const,
    group: Const,
    head_dim: Const,
    heads: Const,
    row_tokens: Const,
    page_size: Const,
    unit: Const,
    split: Const,
    plan: Const,
):
    """heads: `row_heads` of the group. row_tokens: 128 / heads. q_rows: q, all tokens one after another. shared: what
    `shared_prefix_groups` found. blocks: each has an even share of the prefixes, in units of `unit` tokens, and one of the rest,
    by `split`. places: as `places` of each says. notes: what `note_places` says.

    The next kernel may start once all earlier ones have ended: it relies on that.
    """
    tilus.grid(blocks, warps=COPYING + WARPGROUP)
    prefix = plan.prefix
    memory = Memory(q.dtype, head_dim, prefix, gathered=True)
    chunk = min(plan.tile, page_size)
    ring = tilus.shared(kv_cache.dtype, [plan.stages, plan.tile // chunk, 2, chunk, head_dim])
    full, empty = tilus.mbarrier(plan.stages), tilus.mbarrier(plan.stages)
    tilus.wait_dependencies()
    tilus.launch_dependents()

    def each_tile(warps, work):
        each_shared_tile(shared, kv_heads, q_len, unit, blocks, prefix.kv_tile, warps, work)

    def each_own_part(warps, work):
        _, begin, end, start = find_share(shared[LENGTH], kv_heads, split, warps, blocks, tilus.block_id(0))
        each_part(shared[LENGTH], kv_heads, start, begin, end, split, work)

    for half in range(2):
        with tilus.warps(WARPGROUP * half, WARPGROUP, registers=prefix.registers):
            kind = Kind(heads, False, NO_VARIANT)
            rows = SharedRows(
                memory.stages(), Turns(memory.turns, half), (prefix_out, prefix_lse), scale_log2, kind, None, None
            )
            each_tile(WARPGROUP, rows.compute)

    with tilus.warps(OWN, WARPGROUP, registers=plan.registers):
        using = Stages(ring, None, full, empty)
        columns = Columns(q_len, group, head_dim, WARPGROUP, plan.column_groups)

        def attend(part):
            queries = columns.queries(q[shared[ORDER, part.sequence]], part.head)
            softmax = Softmax(columns, Elements(plan.pieces), queries, scale_log2, None, None)
            attend_to_part(part, using, softmax)
            result, lse = normalized(softmax.highest, softmax.total, softmax.acc, columns.result_layout())
            place = tilus.block_id(0) + part.sequence * kv_heads + part.head
            columns.store_partial(own_out, own_lse, place, result, lse)

        each_own_part(WARPGROUP, attend)

    with tilus.warps(COPYING, COPYING_PREFIX, registers=prefix.registers_to_copy):
        filling = memory.stages()

        def fill(_, tile):
            count = tilus.cdiv(tile.length, page_size)
            pages = tilus.narrow(block_tables[tile.sequence], 0, tile.token // page_size, count)
            filling.fill(kv_cache, pages, tile, 0)  # prefixes are whole pages

        each_tile(COPYING_PREFIX, fill)

    with tilus.warps(COPYING + COPYING_PREFIX, 1, registers=prefix.registers_to_copy):
        bringing = Stages(ring, None, full, empty)

        def bring(part):
            table = block_tables[shared[ORDER, part.sequence]]
            fill_part(part, bringing, kv_cache, None, table, shared[TOKENS, part.sequence], None, PAGES)

        each_own_part(1, bring)

    with tilus.warps(COPYING + COPYING_PREFIX + 1, 1, registers=prefix.registers_to_copy):
        asking = memory.stages()

        def ask(index, tile):
            fill_members(asking, q_rows, shared[ORDER], tile, index, q_len, heads)

        each_tile(1, ask)
        note_places(notes, shared, kv_heads, unit, split, blocks)
