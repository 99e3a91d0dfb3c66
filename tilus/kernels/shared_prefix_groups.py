"""Which sequences of a batch begin with the same pages of the cache, found on the device, and how blocks share that work.

Sequences are put in *order*: by the page in which the shortest prefix ends, which those that share a prefix have in common, and
among equals as they come. Neighbours in that order are compared: the *common* pages of a sequence are those at the start of its
block table that are also at the start of its predecessor's, as far as all queries of both see them whole. A sequence joins its
predecessor if there are enough of them, and at least half as many as between the sequences on either side: a short common prefix
of all (a system prompt) does not cut down the longer ones of some. Sequences that join each other are a *group*; its prefix is
what all have in common. All that is found, and the kernels that use it, count sequences in that order, by *ranks*.

Query rows of a group make *row tiles* of 128 rows, `members` sequences each. The prefix of a row tile and kv head is cut into
units, which are numbered through the batch, row tile by row tile, and shared evenly among blocks, as in `paged_decode_split`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, int32
from tilus.kernels.paged_decode_split import owners, share
from tilus.kernels.paged_prefill_tiles import ROWS, Tile, Visits
from tilus.kernels.vectors import power_of_two
from tilus.layout import local, replicated, spatial

LEAST_TOKENS = 256  # of a prefix: less is read as fast by every sequence on its own
WHOLE = 64  # tokens: prefixes are multiples, so that no tile of a prefix has an end in it
WARPS = 4
COLUMNS = 1024  # entries of a block table that are compared together
PAIRS = 4096  # of sequences that are compared together
FOUND = 32  # sequences that are compared with all others together
LOOKED_AT = 64  # row tiles' ends that a warp looks at together
MANY = 2**30
# What is found of each rank, rows of a tensor:
ORDER = 0  # the sequence
LENGTH = 1  # tokens behind the prefix
TOKENS = 2  # of the prefix; 0 where nothing is shared
ENDS = 3  # units of a kv head, of all row tiles up to and including that of the sequence
TILE = 4  # number of the row tile
MEMBER = 5  # which sequence of the row tile it is
MEMBERS = 6  # sequences of the row tile
FIELDS = 7


@dataclass(frozen=True, eq=False)
class SharedTile(Tile):
    """rank: of its first sequence. token: of the prefix, the first of this tile's. place: of its result among partial results."""

    rank: Any
    token: Any
    place: Any


def members_of(q_len: int, group: int) -> int:
    """Sequences of a row tile."""
    return ROWS // (row_heads(group) * power_of_two(q_len))


def row_heads(group: int) -> int:
    """Rows of a query token: a power of two, at least 2, since boxes of single rows of 96 elements would not be aligned."""
    return max(2, power_of_two(group))


def places(sequences: int, members: int, kv_heads: int, blocks: int) -> int:
    """Of partial results. Groups have two sequences or more, so that there are half as many row tiles of three as sequences."""
    return (sequences if members < 3 else sequences // 2) * kv_heads + blocks


@tilus.kernel(varying=("sequences", "sequences_plus_1"))
def shared_prefix_groups_kernel(
    block_tables: Tensor[int32, "sequences", "max_pages"],
    kv_lens: Tensor[int32, "sequences"],
    found: Tensor[int32, 2, "sequences_plus_1"],
    shared: Tensor[int32, 7, "sequences"],
    ticket: Tensor[int32, "tickets"],
    *,
    q_len: Const,
    page_size: Const,
    members: Const,
    unit: Const,
    lanes: Const,
    early: Const = False,
):
    """A block finds the rank and the common pages of a sequence; the last one makes groups of them.

    found: [0], then the common pages of each rank; and their lengths. ticket: zero, and left so. lanes: a power of two, at least
    the sequences.
    """
    tilus.grid(kv_lens.shape[0], warps=WARPS)
    tilus.launch_dependents()
    constant = [block_tables, kv_lens] if early else []
    if not early:
        tilus.wait_dependencies()
    sequence = tilus.block_id(0)
    rank, before = place_of(block_tables, kv_lens, sequence, q_len, page_size, lanes)
    common = common_pages(block_tables, kv_lens, sequence, before, q_len, page_size)
    length = kv_lens[sequence]
    tilus.wait_dependencies(constant=constant)
    tilus.store(shared, [ORDER, rank], tilus.full([1, 1], sequence, int32))
    tilus.store(found, [0, rank + 1], tilus.full([1, 1], common, int32))
    tilus.store(found, [1, rank], tilus.full([1, 1], length, int32))
    if sequence == 0:
        tilus.store(found, [0, 0], tilus.zeros([1, 1], int32))
    if tilus.atomic_add(ticket, [0], 1) == kv_lens.shape[0] - 1:
        tilus.store(ticket, [0], tilus.zeros([1], int32))
        make_groups(found[0], found[1], shared, page_size, members, unit, lanes)


def place_of(block_tables: Any, kv_lens: Any, sequence: Any, q_len: int, page_size: int, lanes: int) -> Any:
    """(rank of a sequence, the one in front of it that may share its prefix, or -1).

    Keys are the pages in which the shortest prefix ends; of sequences that are shorter, numbers that nobody else has.
    """
    last = max(LEAST_TOKENS // page_size, 1) - 1
    index = tilus.arange(lanes)
    pages = tilus.load(block_tables, [0, last], [lanes, 1]).reshape([lanes])
    whole = (tilus.load(kv_lens, [0], [lanes]) - (q_len - 1)) // page_size > last
    keys = tilus.where(whole, pages, -1 - index)
    own = tilus.item(tilus.max(tilus.where(index == sequence, keys, -MANY)))
    inside, earlier = index < kv_lens.shape[0], (keys == own) & (index < sequence)
    rank = tilus.item(tilus.sum((inside & ((keys < own) | earlier)).to(int32)))
    return rank, tilus.item(tilus.max(tilus.where(earlier, index, -1)))


def common_pages(block_tables: Any, kv_lens: Any, sequence: Any, other: Any, q_len: int, page_size: int) -> Any:
    """Of two sequences; none where the other one is negative."""
    before = max(other, 0)
    seen = min(kv_lens[sequence], kv_lens[before]) - q_len + 1 if other >= 0 else 0
    pages = max(seen, 0) // page_size
    found, at = pages, 0
    while at < found:
        columns = tilus.arange(COLUMNS, start=at)
        own = tilus.load(block_tables, [sequence, at], [1, COLUMNS]).reshape([COLUMNS])
        theirs = tilus.load(block_tables, [before, at], [1, COLUMNS]).reshape([COLUMNS])
        found = min(found, tilus.item(tilus.min(tilus.where(own == theirs, MANY, columns))))
        at += COLUMNS
    return found


def make_groups(common: Any, lengths: Any, shared: Any, page_size: int, members: int, unit: int, lanes: int) -> None:
    """Groups, their prefixes and row tiles, of all ranks at once."""
    sequences = shared.shape[1]
    own, before = tilus.load(common, [1], [lanes]), tilus.load(common, [0], [lanes])
    behind = tilus.load(common, [2], [lanes])
    index = tilus.arange(lanes)
    joined = (own * page_size >= LEAST_TOKENS) & (2 * own >= before) & (2 * own >= behind)
    first = tilus.cummax(tilus.where(joined, 0, index))  # of the group
    firsts, owns = tilus.shared(int32, [lanes]), tilus.shared(int32, [lanes])
    tilus.store_shared(firsts, first)
    tilus.store_shared(owns, tilus.where(joined, own, MANY))
    tilus.sync()
    pages, count = tilus.full([lanes], MANY, int32), tilus.zeros([lanes], int32)
    together = max(1, min(FOUND, lanes, PAIRS // lanes))
    across = min(lanes, 32 * WARPS)
    by_lane = replicated(32 * WARPS // across, 2) * spatial(across, 1) * local(lanes // across, together)
    own_first = tilus.with_layout(tilus.broadcast(first.reshape([lanes, 1]), [lanes, together]), by_lane)
    for at in tilus.range(0, sequences, together):
        others = tilus.load_shared(firsts, [at], [together]).reshape([1, together])
        theirs = tilus.load_shared(owns, [at], [together]).reshape([1, together])
        inside = tilus.arange(together, shape=[1, together], axis=1, start=at) < sequences
        same = (own_first == others) & inside  # a thread has whole rows of pairs: they need no exchange between threads
        pages = tilus.minimum(pages, tilus.min(tilus.where(same, theirs, MANY), 1))
        count = count + tilus.sum(same.to(int32), 1)
    member = index - first
    starts = (count > 1) & (member % members == 0) & (index < sequences)
    tokens = tilus.where(count > 1, pages, 0) * page_size // WHOLE * WHOLE
    units = tilus.where(starts, (tokens + (unit - 1)) // unit, 0)
    tilus.store(shared[LENGTH], [0], tilus.load(lengths, [0], [lanes]) - tokens)
    tilus.store(shared[TOKENS], [0], tokens)
    tilus.store(shared[ENDS], [0], tilus.cumsum(units))
    tilus.store(shared[TILE], [0], tilus.cumsum(starts.to(int32)) - 1)
    tilus.store(shared[MEMBER], [0], member % members)
    tilus.store(shared[MEMBERS], [0], tilus.minimum(count - member // members * members, members))


def each_shared_tile(
    shared: Any, kv_heads: Any, q_len: int, unit: int, blocks: Any, visits: Visits, warps: int,
    work: Callable[[Any, SharedTile], None],
) -> None:  # fmt: skip
    """`work(index, tile)` for what this block has of row tiles and prefixes; index counts. unit: tokens of a unit, a multiple of
    the page size. blocks: that share the units. warps: of the role that calls.

    Of a tile, `steps` are the tiles of the cache that a window leaves to some sequence. Shares are those of whole prefixes, so
    that with a window they are not even; no block has more to do than without."""
    block = tilus.block_id(0)
    total = shared[ENDS, shared.shape[1] - 1] * kv_heads
    at, end = share(total, blocks, block), share(total, blocks, block + 1)
    # Variables: computed once, not at each use.
    index, rank, tokens, units, begin, head, of_pair, until, token, length, end_tile, hidden = (
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    )
    while at < end:
        rank = rank_of(shared[ENDS], kv_heads, at, warps)
        tokens = shared[TOKENS, rank]
        units = (tokens + (unit - 1)) // unit
        begin = (shared[ENDS, rank] - units) * kv_heads
        head = max(at - begin, 0) // max(units, 1)
        of_pair = begin + head * units
        until = min(of_pair + units, end)
        token = (at - of_pair) * unit
        length = min((until - of_pair) * unit, tokens) - token
        end_tile = tilus.cdiv(length, visits.kv_tile)
        hidden = hidden_tiles(shared, rank, tokens - token, end_tile, q_len, visits, warps)
        work(index, SharedTile(
            shared[ORDER, rank], head, 0, 0, shared[MEMBERS, rank] * power_of_two(q_len), length, 0, 0,
            0 if visits.masked else length // visits.kv_tile, end_tile, end_tile - hidden, rank, token,
            block + shared[TILE, rank] * kv_heads + head,
        ))  # fmt: skip
        at = until
        index += 1


def hidden_tiles(shared: Any, rank: Any, behind: Any, tiles: Any, q_len: int, visits: Visits, warps: int) -> Any:
    """How many of the first `tiles` tiles of the cache no sequence of a row tile sees. behind: tokens of the prefix from the
    first one's first on."""
    if visits.window is None:
        return 0
    lanes = replicated(warps, 1) * spatial(32).local(LOOKED_AT // 32)  # a row tile has no more sequences
    lengths = tilus.load(shared[LENGTH], [rank], [LOOKED_AT], layout=lanes)
    shortest = tilus.min(tilus.where(tilus.arange(LOOKED_AT) < shared[MEMBERS, rank], lengths, MANY))
    seen_from = tilus.item(shortest) + behind - (q_len - 1) - visits.window
    return min(max(seen_from, 0) // visits.kv_tile, tiles)


def rank_of(ends: Any, kv_heads: Any, unit: Any, warps: int) -> Any:
    """The first one of the row tile that has a unit."""
    lanes = replicated(warps, 1) * spatial(32).local(LOOKED_AT // 32)
    found = 0
    for at in tilus.range(0, ends.shape[0], LOOKED_AT):
        passed = tilus.load(ends, [at], [LOOKED_AT], layout=lanes) * kv_heads <= unit
        inside = tilus.arange(LOOKED_AT, start=at) < ends.shape[0]
        found = found + tilus.item(tilus.sum((passed & inside).to(int32)))
    return found


def prefix_results(shared: Any, rank: Any, head: Any, kv_heads: Any, unit: int, blocks: Any) -> Any:
    """(how many partial results there are of a rank's prefix, the place of the first one)."""
    tokens = shared[TOKENS, rank]
    units = (tokens + (unit - 1)) // unit
    total = shared[ENDS, shared.shape[1] - 1] * kv_heads
    first = (shared[ENDS, rank] - units) * kv_heads + head * units
    block, count = owners(total, blocks, first, first + units)
    return count if tokens > 0 else 0, block + shared[TILE, rank] * kv_heads + head
