"""Tiles of cached tokens on their way through shared memory: the warps that copy fill a ring, those that compute read it."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f16, f32
from tilus.kernels.kv_cache import KvFormat
from tilus.kernels.paged_decode_operands import ROWS, UNIT_NBITS
from tilus.kernels.paged_decode_split import Part
from tilus.layout import replicated, spatial

PAGES = 32  # entries of a block table that a warp looks up at once
LANES = 32


class TileMemory:
    """Shared memory and barriers of a block, made in front of its roles. kind: of a quantised cache, whose rows are its
    codes."""

    def __init__(self, kv_cache: Any, head_dim: int, kind: KvFormat | None, plan: Any) -> None:
        chunk = min(plan.tile, kv_cache.shape[2])
        tiles, row = [plan.stages, plan.tile // chunk, 2], head_dim
        if kind is not None:
            row = head_dim * kind.code.nbits // UNIT_NBITS
        self.ring = tilus.shared(kv_cache.dtype, [*tiles, chunk, row])
        self.kinds = None if kind is None else kind.kinds  # of factors
        self.factors = None if kind is None else tilus.shared(f16, [*tiles, kind.kinds, chunk])
        self.full, self.empty = tilus.mbarrier(plan.stages), tilus.mbarrier(plan.stages)

    def stages(self) -> Stages:
        """For one role, which counts on its own."""
        return Stages(self.ring, self.factors, self.full, self.empty)


class Stages:
    """The ring of tiles [stages, chunks, keys and values, tokens of a chunk, row], and which stage is next.

    A chunk is what a page has of a tile. A turn is a round through all stages; barriers tell even and odd ones apart. factors: of
    a quantised cache [stages, chunks, keys and values, kinds, tokens of a chunk].
    """

    def __init__(self, ring: Any, factors: Any, full: Any, empty: Any) -> None:
        self.ring, self.factors, self.full, self.empty = ring, factors, full, empty
        self.stage, self.turn = 0, 0
        self.used = 0  # whether any part has been copied

    def wait_empty(self) -> None:
        nbytes = self.ring[0].nbytes if self.factors is None else self.ring[0].nbytes + self.factors[0].nbytes
        tilus.wait_barrier(self.empty[self.stage], 1 - self.turn)
        tilus.arrive(self.full[self.stage], nbytes=nbytes)

    def wait_full(self) -> None:
        tilus.wait_barrier(self.full[self.stage], self.turn)

    def advance(self) -> None:
        last = self.stage == self.ring.shape[0] - 1
        self.turn = 1 - self.turn if last else self.turn
        self.stage = 0 if last else self.stage + 1

    def tokens(self, which: int, step: Any, count: int, layout: Any) -> Any:
        """Keys (0) or values (1) of the present stage, the step-th `count` tokens of it: [count / 16, 16, row]"""
        _, _, _, chunk, row = self.ring.shape
        first = [self.stage, step * count // chunk, which, step * count % chunk, 0]
        shape = [max(1, count // chunk), min(count, chunk), row]
        if layout is not None:
            layout = layout.reshape(shape)
        tile = tilus.load_shared(self.ring, first, shape, dims=[1, 3, 4], layout=layout)
        return tile.reshape([count // ROWS, ROWS, row])

    def factor(self, which: int, kind: int, step: Any, count: int) -> Any:
        """Scales (0) or what is added (1), of keys (0) or values (1): [count / 16, 16, 1] in f32"""
        chunk = self.factors.shape[4]
        first = [self.stage, step * count // chunk, which, kind, step * count % chunk]
        tile = tilus.load_shared(self.factors, first, [max(1, count // chunk), min(count, chunk)], dims=[1, 4])
        return tile.reshape([count // ROWS, ROWS, 1]).to(f32)


class Filling:
    """The warp that copies tiles of parts into the ring.

    For pages behind a part's end zeros arrive, and no memory is read; their factors are those of some page. constant: see
    "Dependent launch" (docs/language.md); None where nothing is to be waited for. own: if given, the queries' own tokens, so many
    at the end of a sequence, are all that is not constant: other tiles are asked for while kernels in front still run. most:
    entries of a block table that are looked up at once, which take as many registers.
    """

    def __init__(
        self, stages: Stages, kv_cache: Any, factors: Any, block_tables: Any, constant: list[Any] | None,
        own: int | None = None, most: int = PAGES,
    ) -> None:  # fmt: skip
        self.stages, self.kv_cache, self.factors, self.block_tables = stages, kv_cache, factors, block_tables
        self.constant, self.own = constant, own
        self.count, self.chunks, _, self.chunk, self.row = stages.ring.shape
        self.tile, self.page_size = self.chunks * self.chunk, kv_cache.shape[2]
        # Looked up together by the lanes of the warp, or the first tiles would wait for one access of the table after the other.
        self.together = most // self.chunks if most % self.chunks == 0 and self.page_size <= self.tile else 1
        self.everywhere = replicated(LANES, 1).local(self.together * self.chunks)
        spread = replicated(LANES // most, 1) * spatial(most)
        self.looking = spread if self.together > 1 else self.everywhere

    def fill(self, part: Part) -> None:
        """All tiles of a part."""
        table, end, span = self.block_tables[part.sequence], part.end_token, self.together * self.tile
        known = tilus.with_layout(self.look_up(table, part.token, part.passed), self.everywhere)
        if self.constant and self.own is None and self.stages.used == 0:
            self.prefetch(part, known)
        self.stages.used = 1
        if (
            self.constant is not None and self.own is None
        ):  # the first time; nothing before has read or written what it waits for
            tilus.wait_dependencies(constant=self.constant)
        for first in tilus.range(part.token, end, span):
            following = self.look_up(table, first + span, part.passed)
            for index in range(self.together):
                if first + index * self.tile < end:
                    if self.own is not None and first + (index + 1) * self.tile > part.length - self.own:
                        tilus.wait_dependencies(constant=self.constant)
                    at = first + index * self.tile
                    self.copy(part, self.pages_of(known, index, at, end), at)
            known = tilus.with_layout(following, self.everywhere)

    def look_up(self, table: Any, first: Any, passed: Any) -> Any:
        """The pages of the tiles from a token on."""
        return tilus.load(
            table, [(first + passed) // self.page_size], [self.together * self.chunks], layout=self.looking
        )

    def pages_of(self, known: Any, index: int, first: Any, end: Any) -> Any:
        """Those of a tile; behind the end of the part pages that do not exist, which are not read."""
        inside = tilus.arange(self.chunks) * self.chunk < end - first
        pages = tilus.select(known.reshape([self.together, self.chunks]), 0, index)
        return tilus.where(inside, pages, self.kv_cache.shape[0])

    def slot_of(self, first: Any) -> Any:
        """Of a token, in its page."""
        return 0 if self.page_size <= self.tile else first % self.page_size // self.chunk * self.chunk

    def prefetch(self, part: Part, known: Any) -> None:
        """Bring the tiles of the first stages, which the kernel in front may still write, into the L2 cache."""
        for index in range(min(self.together, self.count)):
            first = part.token + index * self.tile
            if first < part.end_token:
                pages = self.pages_of(known, index, first, part.end_token)
                where = [0, 0, self.slot_of(first), part.head, 0]
                tilus.prefetch_gathered(self.kv_cache, pages, where, [2, self.chunk, self.row], dims=[1, 2, 4])

    def copy(self, part: Part, pages: Any, first: Any) -> None:
        """One tile."""
        stages = self.stages
        stages.wait_empty()
        full = stages.full[stages.stage]
        tilus.gather_tensor(
            stages.ring[stages.stage], self.kv_cache, pages, [0, 0, self.slot_of(first), part.head, 0], dims=[1, 2, 4],
            barrier=full, evict="first",
        )  # fmt: skip
        if self.factors is not None:  # bulk copies have no bounds
            there = tilus.where(pages < self.kv_cache.shape[0], tilus.maximum(pages, 0), 0)
            tilus.gather_bulk(
                stages.factors[stages.stage], self.factors, there, [0, part.head, 0, 0, self.slot_of(first)], dims=[2, 3, 4],
                barrier=full, evict="first",
            )  # fmt: skip
        stages.advance()
