"""Attention of all sequences of a group over the pages that they share, and of each over its own, side by side in each block.

Prefixes: products of warpgroups, as in prefill. 128 rows, query heads of one kv head and queries of neighbouring sequences, see
all tokens of their part of the prefix. The rest: products of warps, as in `paged_decode`. Results of both are partial:
softmax-weighted sums and logarithms, which `shared_prefix_merge_kernel` adds up. Codes of a quantised cache become f16 on their
way: those of prefixes in shared memory, by a warp for keys and one for values (`paged_prefill_codes`), those of the rest in
registers.

Budget of 128 rows by 128 tokens, as that of `paged_prefill`: 2048 cycles; those are 64 KB, which take a multiprocessor of an H100
4600 cycles to read. So prefixes that many rows share wait for tensor cores, and the rest for memory: side by side they take less
than one after the other. A group of two sequences already costs less here than two reads, and 64 queries of a group of 4 heads
are two row tiles a kv head, of which the second reads the L2 cache. Tiles of 64 tokens instead of 128 leave registers and shared
memory to the rest: two tiles of 32 KB, which come in 2.7 us, longer than its warps take to end a part and begin the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, bf16, f16, f32, int32
from tilus.kernels.attention_variant import NO_VARIANT, Variant
from tilus.kernels.kv_cache import KvFormat
from tilus.kernels.paged_decode_columns import Columns
from tilus.kernels.paged_decode_operands import operands_of
from tilus.kernels.paged_decode_softmax import Attending, Columnwise
from tilus.kernels.paged_decode_split import Part, Split, each_part, find_share
from tilus.kernels.paged_decode_stages import Filling, TileMemory
from tilus.kernels.paged_prefill import PrefillPlan
from tilus.kernels.paged_prefill_codes import CodeMemory, Converters
from tilus.kernels.paged_prefill_softmax import Kind, Turns
from tilus.kernels.paged_prefill_stages import Memory
from tilus.kernels.paged_prefill_tiles import Visits
from tilus.kernels.shared_prefix_groups import LENGTH, ORDER, TOKENS, SharedTile, each_shared_tile
from tilus.kernels.shared_prefix_merge import note_places
from tilus.kernels.shared_prefix_rows import SharedRows, fill_members

WARPGROUP = 4  # warps
OWN = 8  # the first warp that computes the rest; in front of it are two warpgroups for prefixes
COPYING = 12  # the first warp that copies: two for prefixes, one for the rest; the last one asks for queries
COPYING_PREFIX = 2
CONVERTERS = Converters(COPYING_PREFIX // 2, 512, whole=True)
PAGES = 4  # of the rest, looked up at once: more take more registers than there are


@dataclass(frozen=True)
class SharedPlan:
    """prefix: of prefixes; its registers_to_copy are those of all warps that copy. tile, stages: of the rest, see `DecodePlan`.
    registers: of a thread that computes the rest. column_groups: of its warps, that compute different columns."""

    prefix: PrefillPlan
    tile: int
    stages: int
    registers: int
    column_groups: int


@dataclass(frozen=True)
class SharedProblem:
    """What a kernel is compiled for beside shapes. unit: tokens of a unit of prefixes. split: how blocks share the rest. kind:
    the format of a quantised cache. q_type: of queries that come as bits of another type. words: of the bits of a query."""

    plan: SharedPlan
    unit: int
    split: Split
    kind: KvFormat | None = None
    q_type: Any = None
    variant: Variant = NO_VARIANT
    words: int = 0

    def rows_of(self, dtype: Any) -> Kind:
        """What the rows are that see a prefix, of queries of this type."""
        terms = 2 if dtype == bf16 else 1
        return Kind(self.plan.prefix.heads, False, self.variant, self.words, self.q_type, terms)


@dataclass(frozen=True, eq=False)
class Shares:
    """What a block has of prefixes, and of what sequences have behind them."""

    problem: SharedProblem
    shared: Any
    kv_heads: int
    q_len: int
    blocks: Any

    def each_tile(self, warps: int, work: Callable[[Any, SharedTile], None]) -> None:
        """`work(index, tile)`, see `each_shared_tile`."""
        variant, prefix = self.problem.variant, self.problem.plan.prefix
        visits = Visits(prefix.heads, prefix.kv_tile, False, variant.hides, variant.window)
        each_shared_tile(self.shared, self.kv_heads, self.q_len, self.problem.unit, self.blocks, visits, warps, work)

    def each_part(self, warps: int, work: Callable[[Part], None]) -> None:
        """`work(part)` for parts of what is behind prefixes: `passed` counts these, `pair` is of the sequence's rank."""
        shared, lengths, split = self.shared, self.shared[LENGTH], self.problem.split
        _, begin, end, start = find_share(lengths, self.kv_heads, split, warps, self.blocks, tilus.block_id(0))

        def of_sequence(part: Part) -> None:
            rank = part.sequence
            work(Part(
                shared[ORDER, rank], part.head, part.pair, part.length, part.passed + shared[TOKENS, rank], part.first,
                part.last, part.begin, part.end, part.token, part.end_token,
            ))  # fmt: skip

        each_part(lengths, self.kv_heads, start, begin, end, split, of_sequence)


def compute_rest(shares: Shares, attending: Attending, q: Any, out: Any, lse: Any) -> None:
    """Partial results of what sequences have behind prefixes, as in `paged_decode`, by place."""

    def attend(part: Part) -> None:
        result, log2 = attending.result_of(part, q)
        attending.columns.store_partial(out, lse, tilus.block_id(0) + part.pair, result, log2)

    shares.each_part(WARPGROUP, attend)


def fill_prefixes(shares: Shares, memory: Memory, codes: Any, kv_cache: Any, factors: Any, block_tables: Any) -> None:
    """By the warps that copy prefixes: elements by all of them, or codes that become elements, keys and values by other ones."""
    page_size, registers = kv_cache.shape[2], shares.problem.plan.prefix.registers_to_copy
    if codes is None:
        with tilus.warps(COPYING, COPYING_PREFIX, registers=registers):
            stages = memory.stages()
            shares.each_tile(
                COPYING_PREFIX, lambda _, tile: stages.fill(kv_cache, pages_of(block_tables, tile, page_size), tile, 0)
            )
    else:
        for which in range(2):
            with tilus.warps(COPYING + which * CONVERTERS.warps, CONVERTERS.warps, registers=registers):
                stages = memory.stages()
                rings = (stages.keys, stages.values)
                convert_prefixes(shares, rings, codes.of((which,)), (kv_cache, factors), block_tables)


def convert_prefixes(shares: Shares, rings: Any, codes: Any, sources: Any, block_tables: Any) -> None:
    """Codes that become elements: keys or values. sources: (codes, factors)."""
    kv_cache, factors = sources
    page_size = kv_cache.shape[2]
    shares.each_tile(
        CONVERTERS.warps,
        lambda _, tile: codes.fill(rings, kv_cache, factors, pages_of(block_tables, tile, page_size), tile),
    )


def ask_for_queries(shares: Shares, stages: Any, q_rows: Any) -> None:
    """By one warp."""
    order, heads = shares.shared[ORDER], shares.problem.plan.prefix.heads
    shares.each_tile(1, lambda index, tile: fill_members(stages, q_rows, order, tile, index, shares.q_len, heads))


def pages_of(block_tables: Any, tile: SharedTile, page_size: int) -> Any:
    """Of a part of a prefix, which is whole pages."""
    return tilus.narrow(block_tables[tile.sequence], 0, tile.token // page_size, tilus.cdiv(tile.length, page_size))


@tilus.kernel(varying=("sequences", "tokens", "pages", "pairs", "prefix_places", "places"))
def shared_prefix_kernel(
    q: Tensor["dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    q_rows: Tensor["row_dtype", "tokens", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["unit", "pages", 2, "page_size", "kv_heads", "row"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    shared: Tensor[int32, 7, "sequences"],
    notes: Tensor[int32, 4, "pairs"],
    prefix_out: Tensor[f32, "prefix_places", 128, "head_dim"],
    prefix_lse: Tensor[f32, "prefix_places", 128],
    own_out: Tensor[f32, "places", "q_len", "group", "head_dim"],
    own_lse: Tensor[f32, "places", "q_len", "group"],
    scale_log2: float,
    factors: Tensor[f16, "pages", "kv_heads", 2, "kinds", "page_size"] = None,
    parameters: Tensor[f32, "count"] = None,
    bits: Tensor[int32, "queries", "words"] = None,
    *,
    q_len: Const,
    kv_heads: Const,
    group: Const,
    head_dim: Const,
    page_size: Const,
    blocks: Const,
    problem: Const,
):
    """q_rows: q, all tokens one after another; with a quantised cache, whose rows are codes in units of 16 bits, its bits as f16.
    shared: what `shared_prefix_groups` found. blocks: each has an even share of the prefixes and one of the rest. places: as
    `places` of each says. notes: what `note_places` says. The next kernel may start once all earlier ones have ended: it relies
    on that."""
    tilus.grid(blocks, warps=COPYING + WARPGROUP)
    plan, prefix, kind = problem.plan, problem.plan.prefix, problem.kind
    memory = Memory(q_rows.dtype, head_dim, prefix, gathered=True)
    codes = None if kind is None else CodeMemory(kind, head_dim, page_size, prefix, CONVERTERS)
    own = TileMemory(kv_cache, head_dim, kind, plan)
    tilus.wait_dependencies()
    tilus.launch_dependents()
    shares = Shares(problem, shared, kv_heads, q_len, blocks)

    for half in range(2):
        with tilus.warps(WARPGROUP * half, WARPGROUP, registers=prefix.registers):
            stages, turns, outputs = memory.stages(), Turns(memory.turns, half), (prefix_out, prefix_lse)
            batch = shared, q_len, group
            rows = SharedRows(
                stages, turns, outputs, scale_log2, problem.rows_of(q_rows.dtype), parameters, bits, batch
            )
            shares.each_tile(WARPGROUP, rows.compute)

    with tilus.warps(OWN, WARPGROUP, registers=plan.registers):
        columns = Columns(q_len, group, head_dim, WARPGROUP, plan.column_groups)
        changed = Columnwise.of(problem.variant, columns, parameters, bits, problem.words)
        attending = Attending(columns, operands_of(kind, columns), own.stages(), scale_log2, own.kinds, changed)
        compute_rest(shares, attending, q, own_out, own_lse)

    fill_prefixes(shares, memory, codes, kv_cache, factors, block_tables)

    with tilus.warps(COPYING + COPYING_PREFIX, 1, registers=prefix.registers_to_copy):
        shares.each_part(1, Filling(own.stages(), kv_cache, factors, block_tables, None, most=PAGES).fill)

    with tilus.warps(COPYING + COPYING_PREFIX + 1, 1, registers=prefix.registers_to_copy):
        ask_for_queries(shares, memory.stages(), q_rows)
        note_places(notes, shared, kv_heads, problem.unit, problem.split, blocks)
