"""Prefixes in a block of the kernel of shared prefixes: products of warpgroups, as in prefill, of the queries of many sequences.

128 rows, query heads of one kv head and queries of neighbouring sequences, see all tokens of their part of the prefix, or what a
variant leaves of them. Results are partial: softmax-weighted sums and logarithms.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import int32
from tilus.kernels.attention_variant import NO_VARIANT, Position, Words
from tilus.kernels.online_softmax import NO_SCORE
from tilus.kernels.paged_prefill_softmax import HALF, Kind, Rows, Turns
from tilus.kernels.shared_prefix_groups import LENGTH, ORDER, TOKENS, SharedTile
from tilus.kernels.vectors import power_of_two


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

    batch: (what `shared_prefix_groups` found, queries of a sequence, query heads of a kv head). past: of each row the cached
    tokens in front of its sequence's queries."""

    def __init__(
        self, stages: Any, turns: Turns, outputs: Any, scale_log2: Any, kind: Kind, parameters: Any, bits: Any, batch: Any
    ) -> None:  # fmt: skip
        Rows.__init__(self, stages, turns, outputs, scale_log2, kind, parameters, bits)
        self.shared, self.q_len, self.group = batch
        self.tokens_of_each = power_of_two(self.q_len)
        self.members = HALF // (self.heads * self.tokens_of_each)
        self.past = tilus.zeros([HALF, 1], int32)

    def first_rank(self, tile: Any) -> Any:
        """Of these rows."""
        return tile.rank + self.turns.half * self.members

    def begin(self, tile: Any) -> None:
        """Nothing is seen yet: a sink counts once, among the sequence's own tokens."""
        self.highest, self.total = tilus.full([HALF, 1], NO_SCORE), tilus.zeros([HALF, 1])
        if self.variant != NO_VARIANT:
            lengths = tilus.load(self.shared[LENGTH], [self.first_rank(tile)], [self.members])
            past = (lengths + (self.shared[TOKENS, tile.rank] - self.q_len)).reshape([self.members, 1])
            self.past = tilus.broadcast(past, [self.members, HALF // self.members]).reshape([HALF, 1])

    def position(self, tile: Any, first: Any, length: int) -> Position:
        """Of scores with the keys of the tile from `first` on."""
        rows = tilus.arange(HALF, shape=[HALF, 1])
        query = rows // self.heads % self.tokens_of_each + self.past
        key = tilus.arange(length, start=tile.token + first, shape=[1, length], axis=1)
        head = tile.kv_head * self.group
        runs = self.heads, HALF // self.heads
        words = MemberWords(self.variant, self.bits, self.words, self.query_rows(tile), runs, (HALF, 1), True)
        return Position(query, key, rows % self.heads + head, self.past, self.parameters, head, words)

    def query_rows(self, tile: Any) -> Any:
        """Numbers of these rows' queries among those of the batch, [64 / heads]; None where they have no bits."""
        if self.bits is None:
            return None
        sequences = tilus.load(self.shared[ORDER], [self.first_rank(tile)], [self.members]).reshape([self.members, 1])
        query = tilus.arange(self.tokens_of_each, shape=[1, self.tokens_of_each], axis=1)
        return (sequences * self.q_len + query).reshape([HALF // self.heads])

    def seen(self, tile: Any, first: Any, length: int) -> Any:
        """Which of the keys from `first` on a row sees, [64, length]."""
        allowed = Rows.seen(self, tile, first, length)
        if self.variant.window is not None:
            at = self.position(tile, first, length)
            allowed = allowed & (at.key > at.query - self.variant.window)
        return allowed

    def store(self, tile: Any) -> None:
        """What these rows are partial results of."""
        first, rows = HALF * self.turns.half, tile.queries * self.heads
        result, log2 = self.partial()
        tilus.store(tilus.narrow(self.out[tile.place], 0, 0, rows), [first, 0], result)
        tilus.store(tilus.narrow(self.lse[tile.place], 0, 0, rows), [first], log2)
