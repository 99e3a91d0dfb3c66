"""Quantised keys and values on their way to the products of the prefill kernel: copied as codes, turned into f16 by four warps.

Codes of keys and of values take turns in one ring of shared memory, each tile with its scales, and minimums where the format has
them. Four warps make elements of them: f16(code * scale + minimum), rounded once, which lie in the rings that the products read,
as those of a cache of 16 bits would. So the warps that compute do not know of codes.

Budget of a tile of 128 tokens of 128 elements on an H100, keys and values, beside that of `paged_prefill`, in cycles: the copies
write 32 KB of codes of 8 bits, which are read once, and 64 KB of elements are written: 1024 of 128 bytes. The products read 1280
at the same time, together more than the 2048 of the products. A scheduler issues about 500 instructions to turn 8192 codes.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f16, int16
from tilus.kernels.kv_cache import KvFormat
from tilus.kernels.paged_prefill_stages import Ring, Stages
from tilus.kernels.paged_prefill_tiles import Tile
from tilus.kernels.vectors import by_vector, power_of_two

CONVERTERS = 4  # warps
VECTOR = 8  # elements that a thread stores together
ELEMENTS = 4096  # that are on their way through registers together, about


class CodeMemory:
    """Of a block: tiles of codes [stages, tokens, 16-bit units of a row], their factors and barriers."""

    def __init__(self, kind: KvFormat, head_dim: int, page_size: int, plan: Any) -> None:
        self.kind, count, length = kind, plan.code_stages, plan.kv_tile
        chunk = min(page_size, length)
        self.codes = tilus.shared(int16, [count, length, head_dim * kind.code.nbits // int16.nbits])
        self.factors = tilus.shared(f16, [count, length // chunk, kind.kinds, chunk])
        self.full, self.empty = tilus.mbarrier(count), tilus.mbarrier(count)

    def codes_of(self) -> Codes:
        """For one role, which counts on its own."""
        return Codes(self.kind, Ring(self.codes, self.full, self.empty), self.factors)


class Codes:
    """Tiles of codes, of keys and of values in turns, in a ring, and their factors [stages, chunks, kinds, tokens of a chunk]."""

    def __init__(self, kind: KvFormat, ring: Ring, factors: Any) -> None:
        self.kind, self.ring, self.factors = kind, ring, factors

    def fill(self, kv_cache: Any, factors: Any, table: Any, tile: Tile) -> None:
        """Copy what `Stages.fill` would. Zeros come for pages behind the end, with the factors of some page."""
        length, (nowhere, _, page_size, _, _) = self.ring.tiles.shape[1], kv_cache.shape
        count, chunk = max(length // page_size, 1), min(page_size, length)
        at = (tile.end - 1) * length  # a variable: computed once, not at each use
        pages = tilus.load(table, [at // page_size], [count])
        for _ in tilus.range(tile.steps):
            following = tilus.load(table, [(at - length) // page_size], [count])
            there = tilus.where(tilus.arange(count) * chunk < tile.length - at, pages, nowhere)
            slot = 0 if page_size <= length else at % page_size // length * length
            for which in range(2):
                self.fill_one(which, there, kv_cache, factors, slot, tile.kv_head)
            pages = following
            at -= length

    def fill_one(self, which: int, pages: Any, kv_cache: Any, factors: Any, slot: Any, head: Any) -> None:
        """Keys (0) or values (1) of these pages."""
        ring, nowhere = self.ring, kv_cache.shape[0]
        ring.wait_empty()
        ring.announce(ring.tiles[0].nbytes + self.factors[0].nbytes)
        full = ring.full[ring.stage]
        tilus.gather_tensor(
            ring.tiles[ring.stage], kv_cache, pages, [0, which, slot, head, 0], dims=[2, 4], barrier=full
        )
        inside = tilus.where(pages < nowhere, tilus.maximum(pages, 0), 0)  # bulk copies have no bounds
        tilus.gather_bulk(
            self.factors[ring.stage], factors, inside, [0, head, which, 0, slot], dims=[3, 4], barrier=full
        )
        ring.advance()

    def convert(self, stages: Stages, tile: Tile) -> None:
        """All tiles of the cache that some row sees, from codes into the rings of keys and of values."""
        length = self.ring.tiles.shape[1]
        at = (tile.end - 1) * length
        for _ in tilus.range(tile.steps):
            self.convert_one(stages.keys, None)
            if at + length > tile.length:
                self.convert_one(stages.values, tile.length - at)
            else:
                self.convert_one(stages.values, None)
            at -= length

    def convert_one(self, ring: Ring, count: Any) -> None:
        """The next tile. Elements of tokens from `count` on are zeros: a weight of zero does not undo what is no number."""
        _, length, head_dim = ring.tiles.shape
        rows = min(ELEMENTS // power_of_two(head_dim), length)
        self.ring.wait_full()
        ring.wait_empty()
        for first in range(0, length, rows):
            elements = self.elements(first, rows, head_dim)
            if count is not None:
                inside = tilus.arange(rows, start=first, shape=[rows, 1]) < count
                elements = tilus.where(inside, elements, tilus.zeros([rows, head_dim], f16))
            tilus.store_shared(ring.tiles[ring.stage], elements, [first, 0])
        tilus.fence_async()
        tilus.arrive(ring.full[ring.stage])
        ring.advance()
        self.ring.leave()

    def elements(self, first: int, rows: int, head_dim: int) -> Any:
        """f16 [rows, head_dim] of the tokens of the present stage from `first` on."""
        stage, units = self.ring.stage, self.ring.tiles.shape[2]
        raw_layout = by_vector(rows, units, VECTOR * self.kind.code.nbits // int16.nbits, CONVERTERS)
        raw = tilus.load_shared(self.ring.tiles, [stage, first, 0], [rows, units], dims=[1, 2], layout=raw_layout)
        layout = by_vector(rows, head_dim, VECTOR, CONVERTERS)
        found = tilus.cast(tilus.view(raw, self.kind.code, [rows, head_dim], layout), f16)
        factors = [self.factor(kind, first, rows) for kind in range(self.kind.kinds)]
        return tilus.fma(found, *factors) if self.kind.has_minimum else found * factors[0]

    def factor(self, kind: int, first: int, rows: int) -> Any:
        """Scales (0) or minimums (1), f16 [rows, 1]."""
        chunk = self.factors.shape[3]
        where, shape = [self.ring.stage, first // chunk, kind, first % chunk], [max(1, rows // chunk), min(rows, chunk)]
        return tilus.load_shared(self.factors, where, shape, dims=[1, 3]).reshape([rows, 1])
