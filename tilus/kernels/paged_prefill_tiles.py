"""Which rows of a ragged batch a block of the prefill kernel computes, and which tiles of the cache it visits for them.

A row is a query token and a head. Rows of a tile have one sequence and one kv head, and lie head by head: `heads` query heads of
the kv head by 128 / heads tokens. Tiles are numbered; blocks take them in turns, so that the last tokens of a sequence, which see
the most keys, come first, and every other turn in reverse order: the longest tiles of a turn meet the shortest of the next. With
16 sequences of 1024 tokens the busiest of 132 blocks has 5 % more to do than the mean.

Plain arithmetic on ints: kernels inline these functions, tests call them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import int32
from tilus.kernels.attention import find_queries
from tilus.layout import replicated, spatial

ROWS = 128  # of a tile; each of two warpgroups has half of them
SEQUENCES = 128  # that a warp looks at together
LEAST_STEPS = 4  # of a part of a tile: what is stored and merged for it takes as long as about two


@dataclass(frozen=True, eq=False)
class Tile:
    """Rows of one sequence and kv head, of numbers that a kernel knows at run time.

    head: of the query heads of the kv head, the first one. row: of q, that of its first query. queries: of the sequence, from
    that on. length: cached tokens. past: those in front of the sequence's queries. limit: how many of them the first query sees;
    the next one sees one more. unmasked: tiles of the cache, from the first one on, that all rows see whole. end: the tile behind
    the last one that any row sees. steps: how many of those in front of it some row sees.
    """

    sequence: Any
    kv_head: Any
    head: Any
    row: Any
    queries: Any
    length: Any
    past: Any
    limit: Any
    unmasked: Any
    end: Any
    steps: Any


@dataclass(frozen=True, eq=False)
class Tables:
    """Block tables of sequences: a row of `tables` for each, or all in its only row, each from the place that `lists` has."""

    tables: Any
    lists: Any
    page_size: int

    def of(self, tile: Tile) -> Any:
        """The pages of the sequence of a tile."""
        if self.lists is None:
            table = self.tables[tile.sequence]
        else:
            table = tilus.narrow(self.tables[0], 0, self.lists[tile.sequence], tilus.cdiv(tile.length, self.page_size))
        return table


@dataclass(frozen=True, eq=False)
class PartOfTile(Tile):
    """Some steps of a tile, of which other blocks have the others. number: of the tile. part, parts: which of how many. place: of
    the first part's partial result, the others' follow."""

    number: Any
    part: Any
    parts: Any
    place: Any


@dataclass(frozen=True)
class Visits:
    """heads: of a tile of rows. kv_tile: tokens of a tile of the cache. causal: queries do not see what comes behind them.
    masked: any key may be hidden from any query. window: how many keys a query sees at most, the last ones."""

    heads: int
    kv_tile: int
    causal: bool
    masked: bool = False
    window: int | None = None


def tokens_of(heads: int) -> int:
    """Query tokens of a tile with so many heads."""
    return ROWS // heads


def slots(queries: Any, sequences: Any, tokens: int, slack: Any = None) -> Any:
    """Tiles that batches of so many queries have for each head, at most: those of ragged batches may stay empty.

    slack: what `slack_of` finds in a batch, by default the most that there is in any.
    """
    return (queries + sequences * (tokens - 1 if slack is None else slack)) // tokens


def slack_of(q_start: Any, tokens: int, warps: int) -> Any:
    """Queries that the last tile of any sequence lacks, at most. Where all sequences lack as many, no slot stays empty."""
    lanes = replicated(warps, 1) * spatial(32).local(SEQUENCES // 32)
    slack = 0
    for at in tilus.range(0, q_start.shape[0] - 1, SEQUENCES):
        begin = tilus.load(q_start, [at], [SEQUENCES], layout=lanes)
        end = tilus.load(q_start, [at + 1], [SEQUENCES], layout=lanes)
        inside = tilus.arange(SEQUENCES, start=at) < q_start.shape[0] - 1
        lacking = tilus.where(inside, tokens - 1 - (end - begin + (tokens - 1)) % tokens, 0)
        slack = max(slack, tilus.item(tilus.max(lacking)))
    return slack


def kept_slack(q_start: Any, tokens: int, warps: int) -> Any:
    """What `slack_of` finds, in shared memory, int32 [1]: it costs no register."""
    slack = tilus.shared(int32, [1])
    tilus.store_shared(slack, tilus.full([1], slack_of(q_start, tokens, warps), int32))
    tilus.sync()
    return slack


def number(turn: Any, block: Any, blocks: Any) -> Any:
    """The tile that a block takes in its turn.

    From one pair of turns to the next, places move on by five eighths: else a block would get long tiles again and again where
    as many tiles as a sequence has are about those of a pair of turns.
    """
    place = (block + turn // 2 * (blocks * 5 // 8)) % blocks
    return turn * blocks + (place if turn % 2 == 0 else blocks - 1 - place)


def visited(limit: Any, length: Any, visits: Visits) -> Any:
    """(tiles of the cache from the first on that all rows see whole, the tile behind the last one that any row sees, how many of
    those in front of it some row sees)"""
    first = min(limit, length) if visits.causal else length
    last = min(length, limit + (tokens_of(visits.heads) - 1)) if visits.causal else length
    unmasked = 0 if visits.masked else max(first, 0) // visits.kv_tile
    end = tilus.cdiv(max(last, 0), visits.kv_tile)
    return unmasked, end, end if visits.window is None else end - max(limit - visits.window, 0) // visits.kv_tile


def steps_of(part: Any, parts: Any, steps: Any) -> Any:
    """(the first step of a part of so many steps, the first one behind it)"""
    return part * steps // parts, (part + 1) * steps // parts


@dataclass(frozen=True, eq=False)
class Tiles:
    """Those of a batch that blocks take in turns. q: [tokens, kv_heads, group, head_dim]. slack: see `kept_slack`. splits: if
    given, what blocks take are parts of tiles, `PartOfTile`, so many of each, or less for few steps."""

    q: Any
    q_start: Any
    kv_lens: Any
    blocks: Any
    slack: Any
    visits: Visits
    splits: Any

    def each(self, work: Callable[[Any, Tile], None]) -> None:
        """`work(index, tile)` for the tiles of this block, in order; index counts them. Empty ones are left out."""
        heads, tokens, sequences = self.visits.heads, tokens_of(self.visits.heads), self.kv_lens.shape[0]
        kv_heads, parts = self.q.shape[1], tilus.cdiv(self.q.shape[2], heads)
        each = kv_heads * parts * (1 if self.splits is None else self.splits)  # tiles, or parts of them, of a slot
        # Variables: computed once, not at each use.
        index, at, sequence, first, row, queries, length, limit, unmasked, end, steps = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
        sharers, begin, behind = 0, 0, 0
        for turn in tilus.range(tilus.cdiv(slots(self.q.shape[0], sequences, tokens) * each, self.blocks)):
            lacking = tilus.item(tilus.load_shared(self.slack))
            rows = slots(self.q.shape[0], sequences, tokens, lacking)
            taken = number(turn, tilus.block_id(0), self.blocks)
            at = taken if self.splits is None else taken // self.splits
            if taken < rows * each:
                sequence, first = find_queries(
                    self.q_start, sequences, tokens, rows - 1 - at // (kv_heads * parts), lacking
                )
                row = self.q_start[sequence] + first
                queries = self.q_start[sequence + 1] - row
                if queries > 0:
                    length = self.kv_lens[sequence]
                    limit = length - queries + 1
                    unmasked, end, steps = visited(limit, length, self.visits)
                    kv_head, head = at % (kv_heads * parts) // parts, at % parts * heads
                    past = limit - 1 - first
                    if self.splits is None:
                        work(index, Tile(
                            sequence, kv_head, head, row, queries, length, past, limit, unmasked, end, steps
                        ))  # fmt: skip
                        index += 1
                    else:
                        sharers = max(1, min(self.splits, steps // LEAST_STEPS))
                        part = taken % self.splits
                        if part < sharers:
                            begin, behind = steps_of(part, sharers, steps)
                            work(index, PartOfTile(
                                sequence, kv_head, head, row, queries, length, past, limit, unmasked, end - begin, behind - begin,
                                at, part, sharers, at * self.splits,
                            ))  # fmt: skip
                            index += 1
