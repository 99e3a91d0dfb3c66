"""Tiles of cached tokens on their way through shared memory: the warps that copy fill a ring, those that compute read it."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f16, f32
from tilus.kernels.paged_decode_operands import ROWS, UNIT_NBITS
from tilus.kernels.paged_decode_split import Part
from tilus.layout import replicated, spatial

PAGES = 32  # entries of a block table that a warp looks up at once
LANES = 32


class TileMemory:
    """Shared memory and barriers of a block, made in front of its roles. code: of a quantised cache, whose rows are its codes."""

    def __init__(self, kv_cache: Any, head_dim: int, code: Any, plan: Any) -> None:
        chunk = min(plan.tile, kv_cache.shape[2])
        tiles, row = [plan.stages, plan.tile // chunk, 2], head_dim
        if code is not None:
            row = head_dim * code.nbits // UNIT_NBITS
        self.ring = tilus.shared(kv_cache.dtype, [*tiles, chunk, row])
        self.kinds = None if code is None else 1 if code.is_signed else 2  # of factors
        self.factors = None if code is None else tilus.shared(f16, [*tiles, self.kinds, chunk])
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


def fill_part(
    part: Part, stages: Stages, kv_cache: Any, factors: Any, table: Any, passed: Any,
    constant: list[Any] | None, most: int = PAGES, settled: Any = None,
) -> None:  # fmt: skip
    """Copy the tiles of a part into the ring. For pages behind the part's end zeros arrive, and no memory is read; their factors
    are those of some page. table: the pages of the sequence. passed: tokens at its start that do not count. constant: see
    "Dependent launch" (docs/language.md); None where nothing is to be waited for. most: entries of the table that are looked up
    at once, which take as many registers. settled: of the tokens that count, how many at the start are constant, too: their tiles
    are asked for while kernels in front still run; None: none of them."""
    count, chunks, _, chunk, row = stages.ring.shape
    page_size, nowhere = kv_cache.shape[2], kv_cache.shape[0]
    tile, end = chunks * chunk, part.end_token
    # Looked up together by the lanes of the warp, or the first tiles would wait for one access of the table after the other.
    together = most // chunks if most % chunks == 0 and page_size <= tile else 1
    lanes, everywhere = replicated(LANES // most, 1) * spatial(most), replicated(LANES, 1).local(together * chunks)

    def look_up(first: Any) -> Any:
        """The pages of the tiles from a token on."""
        layout = lanes if together > 1 else everywhere
        return tilus.load(table, [(first + passed) // page_size], [together * chunks], layout=layout)

    def pages_of(known: Any, index: int, first: Any) -> Any:
        """Those of a tile; behind the end of the part pages that do not exist, which are not read."""
        inside = tilus.arange(chunks) * chunk < end - first
        return tilus.where(inside, tilus.select(known.reshape([together, chunks]), 0, index), nowhere)

    def slot_of(first: Any) -> Any:
        return 0 if page_size <= tile else first % page_size // chunk * chunk

    def fill(pages: Any, first: Any) -> None:
        stages.wait_empty()
        full = stages.full[stages.stage]
        tilus.gather_tensor(
            stages.ring[stages.stage], kv_cache, pages, [0, 0, slot_of(first), part.head, 0], dims=[1, 2, 4],
            barrier=full, evict="first",
        )  # fmt: skip
        if factors is not None:  # bulk copies have no bounds
            there = tilus.where(pages < nowhere, tilus.maximum(pages, 0), 0)
            tilus.gather_bulk(
                stages.factors[stages.stage], factors, there, [0, part.head, 0, 0, slot_of(first)], dims=[2, 3, 4],
                barrier=full, evict="first",
            )  # fmt: skip
        stages.advance()

    known = tilus.with_layout(look_up(part.token), everywhere)
    if constant and settled is None and stages.used == 0:
        for index in range(min(together, count)):  # of the first stages, which the kernel in front may still write
            first = part.token + index * tile
            if first < end:
                pages = pages_of(known, index, first)
                where = [0, 0, slot_of(first), part.head, 0]
                tilus.prefetch_gathered(kv_cache, pages, where, [2, chunk, row], dims=[1, 2, 4])
    stages.used = 1
    if constant is not None and settled is None:  # the first time; nothing before has read or written what it waits for
        tilus.wait_dependencies(constant=constant)
    for first in tilus.range(part.token, end, together * tile):
        following = look_up(first + together * tile)
        for index in range(together):
            if first + index * tile < end:
                if settled is not None and first + (index + 1) * tile > settled:
                    tilus.wait_dependencies(constant=constant)
                fill(pages_of(known, index, first + index * tile), first + index * tile)
        known = tilus.with_layout(following, everywhere)
