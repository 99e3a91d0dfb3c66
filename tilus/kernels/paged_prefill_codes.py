"""Quantised keys and values on their way to the products of the prefill kernel: copied as codes, turned into f16 by warpgroups.

One warpgroup has the keys, another one the values, or one has both where there are no registers for two. It asks for tiles of
codes some steps ahead, each with its scales, and centres where the format has them, and makes elements of those that have come:
f16(code * scale + centre), rounded once. They lie in the rings that the products read, as those of a cache of 16 bits would. So
the warps that compute do not know of codes.

Budget of a tile of 128 tokens of 128 elements on an H100, keys and values, beside that of `paged_prefill`, in cycles: the copies
write 32 KB of codes of 8 bits, which are read once, and 64 KB of elements are written: 1024 of 128 bytes. The products read 1280
at the same time, together more than the 2048 of the products. A scheduler issues about 550 instructions to turn 8192 codes of
fp8, 900 of int8 and int4, most of which wait for each other: one warp on each took 4000 and 5000 cycles, so there are two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tilus
from tilus import f16, int16
from tilus.kernels.kv_cache import KvFormat
from tilus.kernels.paged_prefill_stages import Ring, Stages
from tilus.kernels.paged_prefill_tiles import Tables, Tile
from tilus.kernels.vectors import by_vector, power_of_two

VECTOR = 8  # elements that a thread stores together
FEWEST_ELEMENTS = 256  # of a warp, on their way together, where registers suffice for no more: of codes of 2 bits


@dataclass(frozen=True)
class Converters:
    """warps: that have keys, and as many that have values. elements: of a warp, on their way through registers together, about.
    whole: whether tiles of the cache have no end of a sequence in them."""

    warps: int = 4
    elements: int = 1024
    whole: bool = False


class CodeMemory:
    """Of a block, for keys (0) and values (1): tiles of codes [stages, tokens, 16-bit units of a row], their factors [keys and
    values, stages, chunks, kinds, tokens of a chunk], and barriers of both."""

    def __init__(self, kind: KvFormat, head_dim: int, page_size: int, plan: Any, converters: Converters) -> None:
        self.kind, self.converters, count, length = kind, converters, plan.code_stages, plan.kv_tile
        chunk = min(page_size, length)
        units = head_dim * kind.code.nbits // int16.nbits
        self.tiles = [tilus.shared(int16, [count, length, units]) for _ in range(2)]
        self.factors = tilus.shared(f16, [2, count, length // chunk, kind.kinds, chunk])
        self.full = tilus.mbarrier(2 * count)

    def of(self, having: tuple[int, ...]) -> Codes:
        """For a role that has keys (0), values (1) or both."""
        return Codes(self.kind, having, self.tiles, self.factors, self.full, self.converters)


class Filling:
    """The work of a role that has keys (0), values (1) or both: it makes their elements, and the one that has keys copies
    queries."""

    def __init__(self, stages: Stages, codes: Codes, sources: Any, tables: Tables, heads: int) -> None:
        """sources: queries, codes and factors in global memory. heads: of a tile of rows."""
        self.stages, self.codes = stages, codes
        self.sources, self.tables, self.heads = sources, tables, heads

    def work(self, index: Any, tile: Tile) -> None:
        """For the index-th tile of the block."""
        q, kv_cache, factors = self.sources
        if 0 in self.codes.having:
            self.stages.fill_queries(q, tile, index, self.heads)
        rings = (self.stages.keys, self.stages.values)
        self.codes.fill(rings, kv_cache, factors, self.tables.of(tile), tile)


class Codes:
    """Tiles of keys (0), values (1) or both as codes, and which stage is next. As soon as its tiles have been read it is filled
    again."""

    def __init__(
        self, kind: KvFormat, having: tuple[int, ...], tiles: Any, factors: Any, full: Any, converters: Converters
    ) -> None:  # fmt: skip
        self.converters = converters
        self.kind, self.having, self.tiles, self.factors, self.full = kind, having, tiles, factors, full
        self.stage, self.turn = 0, 0

    def fill(self, rings: tuple[Ring, Ring], kv_cache: Any, factors: Any, table: Any, tile: Tile) -> None:
        """All tiles of the cache that some row sees, from the last to the first one, into rings of elements."""
        stages, length, _ = self.tiles[0].shape
        at, first = (tile.end - 1) * length, (tile.end - tile.steps) * length
        stage = self.stage
        for _ in tilus.range(min(stages, tile.steps)):
            self.copy_all(stage, kv_cache, factors, table, tile, at)
            stage = 0 if stage == stages - 1 else stage + 1
            at -= length
        for step in tilus.range(tile.steps):
            for which in self.having:
                tilus.wait_barrier(self.full[which * stages + self.stage], self.turn)
                rings[which].wait_empty()
                self.convert_one(which, rings[which], tile.length - (tile.end - 1 - step) * length)
            tilus.sync()
            if at >= first:
                self.copy_all(self.stage, kv_cache, factors, table, tile, at)
                at -= length
            last = self.stage == stages - 1
            self.turn = 1 - self.turn if last else self.turn
            self.stage = 0 if last else self.stage + 1

    def copy_all(self, stage: Any, kv_cache: Any, factors: Any, table: Any, tile: Tile, at: Any) -> None:
        for which in self.having:
            self.copy(which, stage, kv_cache, factors, table, tile, at)

    def copy(self, which: int, stage: Any, kv_cache: Any, factors: Any, table: Any, tile: Tile, at: Any) -> None:
        """The tile of the cache that starts at token `at`. For pages behind the end zeros come, with the factors of some page."""
        length, (nowhere, _, page_size, _, _) = self.tiles[which].shape[1], kv_cache.shape
        count, chunk = max(length // page_size, 1), min(page_size, length)
        pages = tilus.load(table, [at // page_size], [count])
        inside = pages
        if not self.converters.whole:
            pages = tilus.where(tilus.arange(count) * chunk < tile.length - at, pages, nowhere)
            inside = tilus.where(pages < nowhere, tilus.maximum(pages, 0), 0)  # bulk copies have no bounds
        slot = 0 if page_size <= length else at % page_size // length * length
        tiles, own = self.tiles[which], self.factors[which]
        full = self.full[which * tiles.shape[0] + stage]
        tilus.arrive(full, nbytes=tiles[0].nbytes + own[0].nbytes)
        tilus.gather_tensor(
            tiles[stage], kv_cache, pages, [0, which, slot, tile.kv_head, 0], dims=[2, 4], barrier=full
        )  # fmt: skip
        tilus.gather_bulk(
            own[stage], factors, inside, [0, tile.kv_head, which, 0, slot], dims=[3, 4], barrier=full
        )  # fmt: skip

    def convert_one(self, which: int, ring: Ring, count: Any) -> None:
        """The present tile, of which `count` tokens and more are not behind the end. Values behind it are zeros: a weight of zero
        does not undo what is no number."""
        length = self.tiles[which].shape[1]
        if which == 1 and not self.converters.whole:
            if count < length:
                self.store(which, ring, count)
            else:
                self.store(which, ring, None)
        else:
            self.store(which, ring, None)
        tilus.fence_async()
        tilus.arrive(ring.full[ring.stage])
        ring.advance()

    def store(self, which: int, ring: Ring, count: Any) -> None:
        """Elements of the present tile, zeros from the token `count` on."""
        _, length, head_dim = ring.tiles.shape
        together = self.converters.elements if self.kind.code.nbits > 2 else FEWEST_ELEMENTS
        rows = min(together * self.converters.warps // power_of_two(head_dim), length)
        for first in range(0, length, rows):
            elements = self.elements(which, first, rows, head_dim)
            if count is not None:
                inside = tilus.arange(rows, start=first, shape=[rows, 1]) < count
                elements = tilus.where(inside, elements, tilus.zeros([rows, head_dim], f16))
            tilus.store_shared(ring.tiles[ring.stage], elements, [first, 0])

    def elements(self, which: int, first: int, rows: int, head_dim: int) -> Any:
        """f16 [rows, head_dim] of the tokens of the present stage from `first` on."""
        tiles, stage, units = self.tiles[which], self.stage, self.tiles[which].shape[2]
        raw_layout = by_vector(rows, units, VECTOR * self.kind.code.nbits // int16.nbits, self.converters.warps)
        raw = tilus.load_shared(tiles, [stage, first, 0], [rows, units], dims=[1, 2], layout=raw_layout)
        layout = by_vector(rows, head_dim, VECTOR, self.converters.warps)
        found = tilus.cast(tilus.view(raw, self.kind.code, [rows, head_dim], layout), f16)
        factors = [self.factor(which, kind, first, rows) for kind in range(self.kind.kinds)]
        return tilus.fma(found, *factors) if self.kind.has_centre else found * factors[0]

    def factor(self, which: int, kind: int, first: int, rows: int) -> Any:
        """Scales (0) or centres (1), f16 [rows, 1]."""
        chunk = self.factors.shape[4]
        where, shape = (
            [which, self.stage, first // chunk, kind, first % chunk],
            [max(1, rows // chunk), min(rows, chunk)],
        )
        return tilus.load_shared(self.factors, where, shape, dims=[2, 4]).reshape([rows, 1])
