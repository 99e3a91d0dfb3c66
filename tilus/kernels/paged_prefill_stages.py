"""Queries, keys and values of the prefill kernel on their way into shared memory: the warps that copy.

A tile of the cache is a tensor copy for each page and each 64 columns; all complete on the barrier of the tile's stage.
Behind the end of a sequence the last page holds anything, also no numbers, which a weight of zero does not undo. So the tile that
contains the end is copied 16 tokens at a time: behind the end come zeros, as from a page that does not exist, and values of
the 16 tokens around the end go through registers.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus.kernels.paged_prefill_tiles import Tile

PIECE = 16  # tokens of a copy around the end of a sequence: every page is a multiple


class Stages:
    """Rings of tiles of keys and of values [stages, tokens, head_dim], and the tile of queries [2, 64, head_dim].

    full, empty: (of queries, of keys, of values). The warps that copy and those that compute count on their own.
    """

    def __init__(self, queries: Any, keys: Any, values: Any, full: Any, empty: Any) -> None:
        self.queries, self.keys, self.values = queries, keys, values
        self.full, self.empty = full, empty
        self.count = keys.shape[0]
        self.filled = 0

    def fill_queries(self, q: Any, tile: Tile, index: Any, heads: int) -> None:
        """One copy for each head: 64 rows of a warpgroup are `heads` / 2 of them, or half of the tokens of the only one."""
        full, empty = self.full[0], self.empty[0]
        tilus.wait_barrier(empty[0], (index + 1) % 2)
        tilus.arrive(full[0], nbytes=self.queries.nbytes)
        _, rows, head_dim = self.queries.shape
        per_half = max(1, heads // 2)
        tokens = rows // per_half
        for half in range(2):
            for i in tilus.range(per_half):
                head, token = (half * per_half + i, 0) if heads > 1 else (0, half * tokens)
                tilus.copy_tensor(
                    self.queries[half], q, [tile.row + token, tile.kv_head, tile.head + head, 0], shape=[tokens, head_dim],
                    dst_offsets=[i * tokens, 0], barrier=full[0], dims=[0, 3],
                )  # fmt: skip

    def fill(self, kv_cache: Any, table: Any, tile: Tile) -> None:
        """The tiles of the cache that some row sees, the last one first. Pages of the next one are looked up ahead."""
        length, page_size = self.keys.shape[1], kv_cache.shape[2]
        count = max(length // page_size, 1)
        at = (tile.end - 1) * length  # a variable: computed once, not at each use
        pages = tilus.load(table, [at // page_size], [count])
        for _ in tilus.range(tile.steps):
            following = tilus.load(table, [(at - length) // page_size], [count])
            if at + length > tile.length:
                self.fill_end(kv_cache, table, tile, at)
            else:
                for which in range(2):
                    self.fill_whole(which, pages, kv_cache, tile, at)
            pages = following
            at -= length
            self.filled += 1

    def fill_whole(self, which: int, pages: Any, kv_cache: Any, tile: Tile, at: Any) -> None:
        """Keys (0) or values (1) of the tile of the cache that starts at token `at`, which lies in these pages."""
        length = self.keys.shape[1]
        ring, full, stage = self.next_stage(which, self.keys[0].nbytes)
        slot = 0 if kv_cache.shape[2] <= length else at % kv_cache.shape[2]
        tilus.gather_tensor(
            ring[stage], kv_cache, pages, [0, which, slot, tile.kv_head, 0], dims=[2, 4], barrier=full[stage]
        )  # fmt: skip

    def next_stage(self, which: int, nbytes: Any) -> Any:
        """(ring, its barriers, the stage) of keys (0) or values (1), once it is free; so many bytes will come."""
        stage = self.wait_empty(which)
        full = self.full[1 + which]
        tilus.arrive(full[stage], nbytes=nbytes)
        return (self.keys, self.values)[which], full, stage

    def wait_empty(self, which: int) -> Any:
        stage = self.filled % self.count
        tilus.wait_barrier(self.empty[1 + which][stage], (self.filled // self.count + 1) % 2)
        return stage

    def fill_end(self, kv_cache: Any, table: Any, tile: Tile, at: Any) -> None:
        """The tile of the cache that contains the end of the sequence, which starts at token `at`."""
        pages, _, page_size, _, head_dim = kv_cache.shape
        length = self.keys.shape[1]
        nbytes = self.keys[0].nbytes
        rest = tile.length % PIECE
        whole = (tile.length - at) // PIECE * PIECE  # tokens in front of the piece with the end
        for which in range(2):
            stage = self.wait_empty(which)
            if which == 1 and rest > 0:
                token = at + whole
                rows = tilus.narrow(kv_cache[table[token // page_size], 1], 0, token % page_size, rest)
                end = tilus.load(rows, [0, tile.kv_head, 0], [PIECE, head_dim], dims=[0, 2])
                tilus.store_shared(self.values[stage], end, [whole, 0])
                tilus.fence_async()
            through_registers = min(rest, 1) * which
            ring, full, _ = self.next_stage(which, nbytes - through_registers * (nbytes * PIECE // length))
            for piece in tilus.range(length // PIECE):
                token = at + piece * PIECE
                page = table[min(token, tile.length - 1) // page_size]
                if piece * PIECE != whole or through_registers == 0:
                    slot = token % page_size // PIECE * PIECE
                    tilus.copy_tensor(
                        ring[stage], kv_cache, [page if token < tile.length else pages, which, slot, tile.kv_head, 0],
                        shape=[PIECE, head_dim], dst_offsets=[piece * PIECE, 0], barrier=full[stage], dims=[2, 4],
                    )  # fmt: skip
