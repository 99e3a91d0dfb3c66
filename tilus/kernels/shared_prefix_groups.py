"""Which sequences of a batch begin with the same pages of the cache, found on the device, and how blocks share that work.

Neighbours in the batch are compared: the *common* pages of a sequence are those at the start of its block table that are also at
the start of its predecessor's, as far as all queries of both see them whole. A sequence joins its predecessor if there are enough
of them, and at least half as many as between the sequences on either side: a short common prefix of all (a system prompt) does
not cut down the longer ones of some. Sequences that join each other are a *group*; its prefix is what all have in common.

Query rows of a group make *row tiles* of 128 rows, `members` sequences each. The prefix of a row tile and kv head is cut into
units, which are numbered through the batch, row tile by row tile, and shared evenly among blocks, as in `paged_decode_split`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, int32
from tilus.kernels.paged_decode_split import owner, share
from tilus.kernels.paged_prefill_tiles import ROWS, Tile
from tilus.kernels.vectors import power_of_two
from tilus.layout import local, replicated, spatial

LEAST_TOKENS = 256  # of a prefix: less is read as fast by every sequence on its own
WARPS = 4
COLUMNS = 1024  # entries of a block table that are compared together
PAIRS = 4096  # of sequences that are compared together
FOUND = 32  # sequences that a warp looks at together
MANY = 2**30
# What is found of each sequence, rows of a tensor:
LENGTH = 0  # tokens behind the prefix
TOKENS = 1  # of the prefix; 0 where nothing is shared
ENDS = 2  # units of a kv head, of all row tiles up to and including that of the sequence
TILE = 3  # number of the row tile
MEMBER = 4  # which sequence of the row tile it is
MEMBERS = 5  # sequences of the row tile
FIELDS = 6


@dataclass(frozen=True, eq=False)
class SharedTile(Tile):
    """token: of the prefix, the first of this tile's. place: of its result among partial results."""

    token: Any
    place: Any


def members_of(q_len: int, group: int) -> int:
    """Sequences of a row tile."""
    return ROWS // (power_of_two(group) * q_len)


def places(sequences: int, members: int, kv_heads: int, blocks: int) -> int:
    """Of partial results. Groups have two sequences or more, so that there are half as many row tiles of three as sequences."""
    return (sequences if members < 3 else sequences // 2) * kv_heads + blocks


@tilus.kernel
def shared_prefix_groups_kernel(
    block_tables: Tensor[int32, "sequences", "max_pages"],
    kv_lens: Tensor[int32, "sequences"],
    common: Tensor[int32, "sequences_plus_1"],
    shared: Tensor[int32, 6, "sequences"],
    ticket: Tensor[int32, "tickets"],
    *,
    q_len: Const,
    page_size: Const,
    members: Const,
    unit: Const,
    lanes: Const,
    early: Const = False,
):
    """A block counts the common pages of a sequence; the last one makes groups of them.

    common: [0], then the common pages of each sequence. ticket: zero, and left so. lanes: a power of two, at least the sequences.
    """
    tilus.grid(kv_lens.shape[0], warps=WARPS)
    tilus.launch_dependents()
    constant = [block_tables, kv_lens] if early else []
    if not early:
        tilus.wait_dependencies()
    sequence = tilus.block_id(0)
    found = common_pages(block_tables, kv_lens, sequence, q_len, page_size)
    tilus.wait_dependencies(constant=constant)
    tilus.store(common, [sequence + 1], tilus.full([1], found, int32))
    if sequence == 0:
        tilus.store(common, [0], tilus.zeros([1], int32))
    if tilus.atomic_add(ticket, [0], 1) == kv_lens.shape[0] - 1:
        tilus.store(ticket, [0], tilus.zeros([1], int32))
        make_groups(common, kv_lens, shared, page_size, members, unit, lanes)


def common_pages(block_tables: Any, kv_lens: Any, sequence: Any, q_len: int, page_size: int) -> Any:
    """With the sequence in front of this one; none of the first sequence."""
    before = max(sequence - 1, 0)
    seen = min(kv_lens[sequence], kv_lens[before]) - q_len + 1 if sequence > 0 else 0
    pages = max(seen, 0) // page_size
    found, at = pages, 0
    while at < found:
        columns = tilus.arange(COLUMNS, start=at)
        own = tilus.load(block_tables, [sequence, at], [1, COLUMNS]).reshape([COLUMNS])
        other = tilus.load(block_tables, [before, at], [1, COLUMNS]).reshape([COLUMNS])
        found = min(found, tilus.item(tilus.min(tilus.where(own == other, MANY, columns))))
        at += COLUMNS
    return found


def make_groups(common: Any, kv_lens: Any, shared: Any, page_size: int, members: int, unit: int, lanes: int) -> None:
    """Groups, their prefixes and row tiles, of all sequences at once."""
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
    for at in tilus.range(0, kv_lens.shape[0], together):
        others = tilus.load_shared(firsts, [at], [together]).reshape([1, together])
        theirs = tilus.load_shared(owns, [at], [together]).reshape([1, together])
        inside = tilus.arange(together, shape=[1, together], axis=1, start=at) < kv_lens.shape[0]
        same = (own_first == others) & inside  # a thread has whole rows of pairs: they need no exchange between threads
        pages = tilus.minimum(pages, tilus.min(tilus.where(same, theirs, MANY), 1))
        count = count + tilus.sum(same.to(int32), 1)
    member = index - first
    starts = (count > 1) & (member % members == 0) & (index < kv_lens.shape[0])
    tokens = tilus.where(count > 1, pages, 0) * page_size
    units = tilus.where(starts, (tokens + (unit - 1)) // unit, 0)
    tilus.store(shared[LENGTH], [0], tilus.load(kv_lens, [0], [lanes]) - tokens)
    tilus.store(shared[TOKENS], [0], tokens)
    tilus.store(shared[ENDS], [0], tilus.cumsum(units))
    tilus.store(shared[TILE], [0], tilus.cumsum(starts.to(int32)) - 1)
    tilus.store(shared[MEMBER], [0], member % members)
    tilus.store(shared[MEMBERS], [0], tilus.minimum(count - member // members * members, members))


def each_shared_tile(
    shared: Any, kv_heads: Any, q_len: int, unit: int, blocks: int, kv_tile: int, warps: int,
    work: Callable[[Any, SharedTile], None],
) -> None:  # fmt: skip
    """`work(index, tile)` for what this block has of row tiles and prefixes; index counts. unit: tokens of a unit, a multiple of
    the page size. blocks: that share the units. warps: of the role that calls."""
    block = tilus.block_id(0)
    total = shared[ENDS, shared.shape[1] - 1] * kv_heads
    at, end = share(total, blocks, block), share(total, blocks, block + 1)
    # Variables: computed once, not at each use.
    index, sequence, tokens, units, begin, head, of_pair, until, token, length, rows = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
    while at < end:
        sequence = sequence_of(shared[ENDS], kv_heads, at, warps)
        tokens = shared[TOKENS, sequence]
        units = (tokens + (unit - 1)) // unit
        begin = (shared[ENDS, sequence] - units) * kv_heads
        head = max(at - begin, 0) // max(units, 1)
        of_pair = begin + head * units
        until = min(of_pair + units, end)
        token = (at - of_pair) * unit
        length = min((until - of_pair) * unit, tokens) - token
        rows = shared[MEMBERS, sequence] * q_len
        work(index, SharedTile(
            sequence, head, 0, sequence * q_len, rows, length, 0, 0, length // kv_tile, tilus.cdiv(length, kv_tile),
            tilus.cdiv(length, kv_tile), token, block + shared[TILE, sequence] * kv_heads + head,
        ))  # fmt: skip
        at = until
        index += 1


def sequence_of(ends: Any, kv_heads: Any, unit: Any, warps: int) -> Any:
    """The first sequence of the row tile that has a unit."""
    lanes = replicated(warps, 1) * spatial(32).local(FOUND // 32)
    found = 0
    for at in tilus.range(0, ends.shape[0], FOUND):
        passed = tilus.load(ends, [at], [FOUND], layout=lanes) * kv_heads <= unit
        inside = tilus.arange(FOUND, start=at) < ends.shape[0]
        found = found + tilus.item(tilus.sum((passed & inside).to(int32)))
    return found


def prefix_results(shared: Any, sequence: Any, head: Any, kv_heads: Any, unit: int, blocks: int) -> Any:
    """(how many partial results there are of a sequence's prefix, the place of the first one, the sequence's place in each)."""
    tokens = shared[TOKENS, sequence]
    units = (tokens + (unit - 1)) // unit
    total = shared[ENDS, shared.shape[1] - 1] * kv_heads
    first = (shared[ENDS, sequence] - units) * kv_heads + head * units
    block = owner(total, blocks, first)
    count = owner(total, blocks, max(first + units - 1, 0)) - block + 1
    return count if tokens > 0 else 0, block + shared[TILE, sequence] * kv_heads + head, shared[MEMBER, sequence]
