"""Queries, keys and values of the prefill kernel on their way into shared memory: the warps that copy.

A tile of the cache is a tensor copy for each page and each 64 columns; all complete on the barrier of the tile's stage.
Behind the end of a sequence the last page holds anything, also no numbers, which a weight of zero does not undo. So the tile that
contains the end is copied 16 tokens at a time: behind the end come zeros, as from a page that does not exist, and values of
the 16 tokens around the end go through registers.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus.kernels.paged_prefill_tiles import ROWS, Tables, Tile

PIECE = 16  # tokens of a copy around the end of a sequence: every page is a multiple


class Ring:
    """Tiles of keys or of values [stages, tokens, head_dim], and which stage is next.

    A turn is a round through all stages; barriers tell even and odd ones apart. The warps that fill and those that use a ring
    count on their own.
    """

    def __init__(self, tiles: Any, full: Any, empty: Any) -> None:
        self.tiles, self.full, self.empty = tiles, full, empty
        self.stage, self.turn = 0, 0

    def wait_full(self) -> None:
        tilus.wait_barrier(self.full[self.stage], self.turn)

    def wait_empty(self) -> None:
        tilus.wait_barrier(self.empty[self.stage], 1 - self.turn)

    def announce(self, nbytes: Any) -> None:
        """So many bytes will come into the present stage."""
        tilus.arrive(self.full[self.stage], nbytes=nbytes)

    def leave(self) -> None:
        """The present stage has been read, and may be filled again."""
        tilus.arrive(self.empty[self.stage])
        self.advance()

    def advance(self) -> None:
        last = self.stage == self.tiles.shape[0] - 1
        self.turn = 1 - self.turn if last else self.turn
        self.stage = 0 if last else self.stage + 1


class Memory:
    """The shared memory of a block: a tile of queries, tiles of keys and of values, and their barriers.

    gathered: queries are copied by one warp, not by a warpgroup, and so have a barrier of their own. Else there is one tensor for
    all that wait for single arrivals: each takes 128 bytes, for which beside codes there is no room.
    """

    def __init__(self, dtype: Any, head_dim: int, plan: Any, gathered: bool = False) -> None:
        self.queries = tilus.shared(dtype, [2, ROWS // 2, head_dim])
        self.turns = tilus.mbarrier(2 if gathered else 3)
        self.full = tilus.mbarrier() if gathered else self.turns[2]
        self.empty = tilus.mbarrier(arrivals=2)
        self.rings = [
            (
                tilus.shared(dtype, [count, plan.kv_tile, head_dim]),
                tilus.mbarrier(count),
                tilus.mbarrier(count, arrivals=2),
            )
            for count in (plan.key_stages, plan.value_stages)
        ]

    def stages(self) -> Stages:
        """For one role, which counts on its own."""
        keys, values = self.rings
        return Stages(self.queries, self.full, self.empty, Ring(*keys), Ring(*values))


class Stages:
    """The tile of queries [2, 64, head_dim], and rings of tiles of keys and of values. full, empty: barriers of the queries."""

    def __init__(self, queries: Any, full: Any, empty: Any, keys: Ring, values: Ring) -> None:
        self.queries, self.full, self.empty = queries, full, empty
        self.keys, self.values = keys, values

    def fill_queries(self, q: Any, tile: Tile, index: Any, heads: int) -> None:
        """One copy for each head: 64 rows of a warpgroup are `heads` / 2 of them, or half of the tokens of the only one."""
        full, empty = self.full, self.empty
        tilus.wait_barrier(empty, (index + 1) % 2)
        tilus.arrive(full, nbytes=self.queries.nbytes)
        _, rows, head_dim = self.queries.shape
        per_half = max(1, heads // 2)
        tokens = rows // per_half
        for half in range(2):
            for i in tilus.range(per_half):
                head, token = (half * per_half + i, 0) if heads > 1 else (0, half * tokens)
                tilus.copy_tensor(
                    self.queries[half], q, [tile.row + token, tile.kv_head, tile.head + head, 0], shape=[tokens, head_dim],
                    dst_offsets=[i * tokens, 0], barrier=full, dims=[0, 3],
                )  # fmt: skip

    def fill(self, kv_cache: Any, table: Any, tile: Tile, rest: Any) -> None:
        """The tiles of the cache that some row sees, the last one first. Pages of the next one are looked up ahead. rest: tokens
        of the last piece, 0 where it is whole."""
        length, page_size = self.keys.tiles.shape[1], kv_cache.shape[2]
        count = max(length // page_size, 1)
        at = (tile.end - 1) * length  # a variable: computed once, not at each use
        pages = tilus.load(table, [at // page_size], [count])
        for _ in tilus.range(tile.steps):
            following = tilus.load(table, [(at - length) // page_size], [count])
            if at + length > tile.length:
                self.fill_end(kv_cache, table, tile, at, rest)
            else:
                self.fill_whole(self.keys, 0, pages, kv_cache, tile, at)
                self.fill_whole(self.values, 1, pages, kv_cache, tile, at)
            pages = following
            at -= length

    def fill_whole(self, ring: Ring, which: int, pages: Any, kv_cache: Any, tile: Tile, at: Any) -> None:
        """Keys (0) or values (1) of the tile of the cache that starts at token `at`, which lies in these pages."""
        ring.wait_empty()
        ring.announce(ring.tiles[0].nbytes)
        slot = 0 if kv_cache.shape[2] <= ring.tiles.shape[1] else at % kv_cache.shape[2]
        tilus.gather_tensor(
            ring.tiles[ring.stage], kv_cache, pages, [0, which, slot, tile.kv_head, 0], dims=[2, 4],
            barrier=ring.full[ring.stage],
        )  # fmt: skip
        ring.advance()

    def fill_end(self, kv_cache: Any, table: Any, tile: Tile, at: Any, rest: Any) -> None:
        """The tile of the cache that contains the end of the sequence, which starts at token `at`."""
        pages, page_size = kv_cache.shape[0], kv_cache.shape[2]
        _, length, head_dim = self.keys.tiles.shape
        nbytes = self.keys.tiles[0].nbytes
        whole = (tile.length - at) // PIECE * PIECE  # tokens in front of the piece with the end
        for which in range(2):
            ring = (self.keys, self.values)[which]
            ring.wait_empty()
            if which == 1 and rest > 0:
                token = at + whole
                rows = tilus.narrow(kv_cache[table[token // page_size], 1], 0, token % page_size, rest)
                end = tilus.load(rows, [0, tile.kv_head, 0], [PIECE, head_dim], dims=[0, 2])
                tilus.store_shared(ring.tiles[ring.stage], end, [whole, 0])
                tilus.fence_async()
            through_registers = min(rest, 1) * which
            ring.announce(nbytes - through_registers * (nbytes * PIECE // length))
            for piece in tilus.range(length // PIECE):
                token = at + piece * PIECE
                page = table[min(token, tile.length - 1) // page_size]
                if piece * PIECE != whole or through_registers == 0:
                    slot = token % page_size // PIECE * PIECE
                    tilus.copy_tensor(
                        ring.tiles[ring.stage], kv_cache, [page if token < tile.length else pages, which, slot, tile.kv_head, 0],
                        shape=[PIECE, head_dim], dst_offsets=[piece * PIECE, 0], barrier=ring.full[ring.stage], dims=[2, 4],
                    )  # fmt: skip
            ring.advance()


class Copying:
    """What warps that copy elements do of each tile of rows. heads: of a tile."""

    def __init__(self, stages: Stages, q: Any, kv_cache: Any, tables: Tables, heads: int) -> None:
        self.stages, self.q, self.kv_cache, self.tables, self.heads = stages, q, kv_cache, tables, heads

    def work(self, index: Any, tile: Tile) -> None:
        """For the index-th tile of the block."""
        self.stages.fill_queries(self.q, tile, index, self.heads)
        self.stages.fill(self.kv_cache, self.tables.of(tile), tile, tile.length % PIECE)
