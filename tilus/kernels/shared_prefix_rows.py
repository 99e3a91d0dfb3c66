"""Attention of all sequences of a group over the pages that they share, and of each over its own, side by side in each block.

Prefixes: products of warpgroups, as in prefill. 128 rows, query heads of one kv head and queries of neighbouring sequences, see
all tokens of their part of the prefix. The rest: products of warps, as in `paged_decode`. Results of both are partial:
softmax-weighted sums and logarithms, which `shared_prefix_merge_kernel` adds up. Codes of a quantised cache become f16 on their way:
those of prefixes in shared memory, by a warp for keys and one for values (`paged_prefill_codes`), those of the rest in registers.

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
from tilus.kernels.attention import NO_SCORE
from tilus.kernels.attention_variant import NO_VARIANT, Position, Words
from tilus.kernels.paged_decode_columns import Columns
from tilus.kernels.paged_decode_operands import UNIT_NBITS, Codes, Elements
from tilus.kernels.paged_decode_softmax import Columnwise, Softmax, result_of_part
from tilus.kernels.paged_decode_split import Part, Split, each_part, find_share
from tilus.kernels.paged_decode_stages import TileMemory, fill_part
from tilus.kernels.paged_prefill import PrefillPlan
from tilus.kernels.paged_prefill_codes import CodeMemory, Converters
from tilus.kernels.paged_prefill_softmax import HALF, Kind, Rows, Turns
from tilus.kernels.paged_prefill_stages import Memory
from tilus.kernels.paged_prefill_tiles import Visits
from tilus.kernels.shared_prefix_groups import LENGTH, ORDER, TOKENS, SharedTile, each_shared_tile, row_heads
from tilus.kernels.shared_prefix_merge import note_places
from tilus.kernels.vectors import power_of_two

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


@dataclass(frozen=True, eq=False)
class Shares:
    """What a block has of prefixes, and of what sequences have behind them."""

    shared: Any
    kv_heads: int
    q_len: int
    blocks: Any
    unit: int
    split: Split
    visits: Visits

    def each_tile(self, warps: int, work: Callable[[Any, SharedTile], None]) -> None:
        """`work(index, tile)`, see `each_shared_tile`."""
        each_shared_tile(self.shared, self.kv_heads, self.q_len, self.unit, self.blocks, self.visits, warps, work)

    def each_part(self, warps: int, work: Callable[[Part], None]) -> None:
        """`work(part)` for parts of what is behind prefixes: `passed` counts these, `pair` is of the sequence's rank."""
        shared, lengths = self.shared, self.shared[LENGTH]
        _, begin, end, start = find_share(lengths, self.kv_heads, self.split, warps, self.blocks, tilus.block_id(0))

        def of_sequence(part: Part) -> None:
            rank = part.sequence
            work(Part(
                shared[ORDER, rank], part.head, part.pair, part.length, part.passed + shared[TOKENS, rank], part.first,
                part.last, part.begin, part.end, part.token, part.end_token,
            ))  # fmt: skip

        each_part(lengths, self.kv_heads, start, begin, end, self.split, of_sequence)


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


class MemberWords(Words):
    """Bits of the queries of several sequences; `row` is a tile of their numbers."""

    def word(self, index: int) -> Any:
        heads, tokens = self.runs
        values = tilus.gather(self.bits, [0, index], self.row, [tokens, 1], axis=0)
        return tilus.broadcast(values, [tokens, heads]).reshape(self.shape)


class SharedRows(Rows):
    """64 rows of a row tile, whose results are partial ones: sequence by sequence, token by token, all heads of each.

    shared: what `shared_prefix_groups` found. group: query heads of a kv head. past: of each row the cached tokens in front of
    its sequence's queries."""

    def __init__(
        self, stages: Any, turns: Turns, outputs: Any, scale_log2: Any, kind: Kind, parameters: Any, bits: Any, shared: Any,
        q_len: int, group: int,
    ) -> None:  # fmt: skip
        Rows.__init__(self, stages, turns, outputs, scale_log2, kind, parameters, bits)
        self.shared, self.q_len, self.group = shared, q_len, group
        self.tokens_of_each = power_of_two(q_len)
        self.members = HALF // (self.heads * self.tokens_of_each)
        self.past = tilus.zeros([HALF, 1], int32)

    def first_rank(self, tile: SharedTile) -> Any:
        """Of these rows."""
        return tile.rank + self.turns.half * self.members

    def begin(self, tile: SharedTile) -> None:
        """Nothing is seen yet: a sink counts once, among the sequence's own tokens."""
        self.highest, self.total = tilus.full([HALF, 1], NO_SCORE), tilus.zeros([HALF, 1])
        if self.variant != NO_VARIANT:
            lengths = tilus.load(self.shared[LENGTH], [self.first_rank(tile)], [self.members])
            past = (lengths + (self.shared[TOKENS, tile.rank] - self.q_len)).reshape([self.members, 1])
            self.past = tilus.broadcast(past, [self.members, HALF // self.members]).reshape([HALF, 1])

    def position(self, tile: SharedTile, first: Any, length: int) -> Position:
        """Of scores with the keys of the tile from `first` on."""
        rows = tilus.arange(HALF, shape=[HALF, 1])
        query = rows // self.heads % self.tokens_of_each + self.past
        key = tilus.arange(length, start=tile.token + first, shape=[1, length], axis=1)
        head = tile.kv_head * self.group
        runs = self.heads, HALF // self.heads
        words = MemberWords(self.variant, self.bits, self.words, self.query_rows(tile), runs, (HALF, 1), True)
        return Position(query, key, rows % self.heads + head, self.past, self.parameters, head, words)

    def query_rows(self, tile: SharedTile) -> Any:
        """Numbers of these rows' queries among those of the batch, [64 / heads]; None where they have no bits."""
        if self.bits is None:
            return None
        sequences = tilus.load(self.shared[ORDER], [self.first_rank(tile)], [self.members]).reshape([self.members, 1])
        query = tilus.arange(self.tokens_of_each, shape=[1, self.tokens_of_each], axis=1)
        return (sequences * self.q_len + query).reshape([HALF // self.heads])

    def seen(self, tile: SharedTile, first: Any, length: int) -> Any:
        """Which of the keys from `first` on a row sees, [64, length]."""
        allowed = Rows.seen(self, tile, first, length)
        if self.variant.window is not None:
            at = self.position(tile, first, length)
            allowed = allowed & (at.key > at.query - self.variant.window)
        return allowed

    def store(self, tile: SharedTile) -> None:
        """What these rows are partial results of."""
        first, rows = HALF * self.turns.half, tile.queries * self.heads
        result, log2 = self.partial()
        tilus.store(tilus.narrow(self.out[tile.place], 0, 0, rows), [first, 0], result)
        tilus.store(tilus.narrow(self.lse[tile.place], 0, 0, rows), [first], log2)


@tilus.kernel(varying=("sequences", "tokens", "pages", "pairs", "prefix_places", "places"))
def shared_prefix_kernel(
    q: Tensor["dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    q_rows: Tensor["row_dtype", "tokens", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["unit_dtype", "pages", 2, "page_size", "kv_heads", "row"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    shared: Tensor[int32, 7, "sequences"],
    notes: Tensor[int32, 4, "pairs"],
    prefix_out: Tensor[f32, "prefix_places", 128, "head_dim"],
    prefix_lse: Tensor[f32, "prefix_places", 128],
    own_out: Tensor[f32, "places", "q_len", "group", "head_dim"],
    own_lse: Tensor[f32, "places", "q_len", "group"],
    scale_log2: float,
    blocks: int32,
    factors: Tensor[f16, "pages", "kv_heads", 2, "kinds", "page_size"] = None,
    parameters: Tensor[f32, "count"] = None,
    bits: Tensor[int32, "queries", "words"] = None,
    *,
    q_len: Const,
    kv_heads: Const,
    group: Const,
    head_dim: Const,
    page_size: Const,
    unit: Const,
    split: Const,
    plan: Const,
    kind: Const = None,
    q_type: Const = None,
    variant: Const = NO_VARIANT,
    words: Const = 0,
):
    """q_rows: q, all tokens one after another; of a quantised cache its bits as f16, what they are is `q_type`. shared: what
    `shared_prefix_groups` found. blocks: each has an even share of the prefixes, in units of `unit` tokens, and one of the rest,
    by `split`. places: as `places` of each says. notes: what `note_places` says. kind: the format of a quantised cache, whose rows
    are its codes in units of 16 bits, and whose factors are given.

    The next kernel may start once all earlier ones have ended: it relies on that.
    """
    tilus.grid(blocks, warps=COPYING + WARPGROUP)
    prefix, heads = plan.prefix, row_heads(group)
    memory = Memory(q_rows.dtype, head_dim, prefix, gathered=True)
    codes = None if kind is None else CodeMemory(kind, head_dim, page_size, prefix, CONVERTERS)
    row = head_dim if kind is None else head_dim * kind.code.nbits // UNIT_NBITS
    own = TileMemory(kv_cache, page_size, row, None if kind is None else kind.kinds, plan)
    tilus.wait_dependencies()
    tilus.launch_dependents()
    visits = Visits(heads, prefix.kv_tile, False, variant.hides, variant.window)
    shares = Shares(shared, kv_heads, q_len, blocks, unit, split, visits)

    for half in range(2):
        with tilus.warps(WARPGROUP * half, WARPGROUP, registers=prefix.registers):
            rows_kind = Kind(heads, False, variant, words, q_type, 2 if q_rows.dtype == bf16 else 1)
            rows = SharedRows(
                memory.stages(), Turns(memory.turns, half), (prefix_out, prefix_lse), scale_log2, rows_kind, parameters, bits,
                shared, q_len, group,
            )  # fmt: skip
            shares.each_tile(WARPGROUP, rows.compute)

    with tilus.warps(OWN, WARPGROUP, registers=plan.registers):
        using, columns = own.stages(), Columns(q_len, group, head_dim, WARPGROUP, plan.column_groups)
        changed = None if variant == NO_VARIANT else Columnwise(variant, columns, parameters, bits, words)
        operands = Elements() if kind is None else Codes(kind.code, head_dim, columns.parts, columns.column_groups)

        def attend(part):
            queries = columns.queries(q[part.sequence], part.head)
            softmax = Softmax(columns, operands, queries, scale_log2, None if kind is None else kind.kinds, changed)
            result, log2 = result_of_part(part, using, softmax)
            if changed is not None and variant.sink is not None and part.begin == part.first:
                result, log2 = changed.with_sink(result, log2, part)
            columns.store_partial(own_out, own_lse, tilus.block_id(0) + part.pair, result, log2)

        shares.each_part(WARPGROUP, attend)

    def pages_of(tile):  # prefixes are whole pages
        return tilus.narrow(block_tables[tile.sequence], 0, tile.token // page_size, tilus.cdiv(tile.length, page_size))

    if kind is None:
        with tilus.warps(COPYING, COPYING_PREFIX, registers=prefix.registers_to_copy):
            filling = memory.stages()
            shares.each_tile(COPYING_PREFIX, lambda _, tile: filling.fill(kv_cache, pages_of(tile), tile, 0))
    else:
        for which in range(2):
            with tilus.warps(COPYING + which, 1, registers=prefix.registers_to_copy):
                making, filled = codes.of(which), memory.stages()
                ring = filled.keys if which == 0 else filled.values
                shares.each_tile(1, lambda _, tile: making.fill(ring, kv_cache, factors, pages_of(tile), tile))

    with tilus.warps(COPYING + COPYING_PREFIX, 1, registers=prefix.registers_to_copy):
        bringing = own.stages()

        def bring(part):
            fill_part(part, bringing, kv_cache, factors, block_tables[part.sequence], part.passed, None, PAGES)

        shares.each_part(1, bring)

    with tilus.warps(COPYING + COPYING_PREFIX + 1, 1, registers=prefix.registers_to_copy):
        asking = memory.stages()
        shares.each_tile(1, lambda index, tile: fill_members(asking, q_rows, shared[ORDER], tile, index, q_len, heads))
        note_places(notes, shared, kv_heads, unit, split, blocks)
