"""Which rows of a ragged batch a block of the prefill kernel computes, and which tiles of the cache it visits for them.

A row is a query token and a head. Rows of a tile have one sequence and one kv head, and lie head by head: `heads` query heads of
the kv head by 128 / heads tokens. Tiles are numbered; blocks take them in turns, so that the last tokens of a sequence, which see
the most keys, come first, and every other turn in reverse order: the longest tiles of a turn meet the shortest of the next.

Plain arithmetic on ints: kernels inline these functions, tests call them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tilus
from tilus.kernels.attention import find_queries

ROWS = 128  # of a tile; each of two warpgroups has half of them


@dataclass(frozen=True, eq=False)
class Tile:
    """Rows of one sequence and kv head, of numbers that a kernel knows at run time.

    begin, end: rows of q that are the sequence's. first: of its queries, the first one of the tile. head: of the query heads of a
    kv head, the first one. length: cached tokens. limit: how many of them the first query of the tile sees; the next one sees one
    more. unmasked, steps: tiles of the cache that all rows see whole, and that any row sees.
    """

    sequence: Any
    kv_head: Any
    head: Any
    begin: Any
    end: Any
    first: Any
    length: Any
    limit: Any
    unmasked: Any
    steps: Any


def tokens_of(heads: int) -> int:
    """Query tokens of a tile with so many heads."""
    return ROWS // heads


def slots(queries: Any, sequences: Any, tokens: int) -> Any:
    """Tiles that batches of so many queries have for each head, at most: those of ragged batches may stay empty."""
    return (queries + sequences * (tokens - 1)) // tokens


def number(turn: Any, block: Any, blocks: Any) -> Any:
    """The tile that a block takes in its turn."""
    return turn * blocks + (block if turn % 2 == 0 else blocks - 1 - block)


def visited(limit: Any, length: Any, tokens: int, kv_tile: int, causal: bool) -> Any:
    """(tiles of the cache that all rows see whole, that any of them sees)"""
    if not causal:
        return length // kv_tile, tilus.cdiv(length, kv_tile)
    seen = max(min(length, limit + (tokens - 1)), 0)
    return max(min(limit, length), 0) // kv_tile, tilus.cdiv(seen, kv_tile)


def each_tile(
    q: Any, q_start: Any, kv_lens: Any, blocks: Any, heads: int, kv_tile: int, causal: bool, work: Any
) -> None:
    """`work(index, tile)` for the tiles of this block, in order; index counts them. Empty ones are left out.

    q: [tokens, kv_heads, group, head_dim].
    """
    tokens, sequences = tokens_of(heads), kv_lens.shape[0]
    kv_heads, parts = q.shape[1], tilus.cdiv(q.shape[2], heads)
    rows = slots(q.shape[0], sequences, tokens)
    count = rows * kv_heads * parts
    # Variables: computed once, not at each use.
    index, at, sequence, kv_head, head, begin, end, first = 0, 0, 0, 0, 0, 0, 0, 0
    length, limit, unmasked, steps = 0, 0, 0, 0
    for turn in tilus.range(tilus.cdiv(count, blocks)):
        at = number(turn, tilus.block_id(0), blocks)
        if at < count:
            sequence, first = find_queries(q_start, sequences, tokens, rows - 1 - at // (kv_heads * parts))
            begin, end = q_start[sequence], q_start[sequence + 1]
            if begin + first < end:
                length = kv_lens[sequence]
                limit = length - (end - begin) + first + 1
                unmasked, steps = visited(limit, length, tokens, kv_tile, causal)
                kv_head = at % (kv_heads * parts) // parts
                head = at % parts * heads
                work(index, Tile(sequence, kv_head, head, begin, end, first, length, limit, unmasked, steps))
                index += 1
