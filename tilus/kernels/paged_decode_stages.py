"""Tiles of cached tokens on their way through shared memory: the warps that copy fill a ring, those that compute read it."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f32
from tilus.kernels.paged_decode_operands import ROWS
from tilus.kernels.paged_decode_split import Part
from tilus.layout import spatial

PAGES = 128  # entries of a block table that a copying warp holds


class Stages:
    """The ring of tiles [stages, chunks, keys and values, tokens of a chunk, row], and which stage is next.

    A chunk is what a page has of a tile. A turn is a round through all stages; barriers tell even and odd ones apart. factors: of
    a quantised cache [stages, chunks, keys and values, kinds, tokens of a chunk].
    """

    def __init__(self, ring: Any, factors: Any, full: Any, empty: Any) -> None:
        self.ring, self.factors, self.full, self.empty = ring, factors, full, empty
        self.stage, self.turn = 0, 0

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
    part: Part, stages: Stages, kv_cache: Any, factors: Any, block_tables: Any, passed: Any,
    constant: list[Any] | None,
) -> None:  # fmt: skip
    """Copy the tiles of a part into the ring. For pages behind the part's end zeros arrive, and no memory is read; their
    factors are those of some page. passed: tokens at the start of the sequence that do not count. constant: see
    "Dependent launch" (docs/language.md); None where nothing is to be waited for."""
    _, chunks, _, chunk, _ = stages.ring.shape
    page_size, nowhere = kv_cache.shape[2], kv_cache.shape[0]
    tile, token, end = chunks * chunk, part.token, part.end_token
    lanes = spatial(32).local(PAGES // 32)
    window = PAGES // chunks * chunks  # pages, so that a tile does not reach into the next one
    for pages in tilus.range(token // page_size, tilus.cdiv(end, page_size), window):
        table = tilus.load(block_tables, [part.sequence, pages + passed // page_size], [PAGES], layout=lanes)
        if constant is not None:  # the first time; nothing before has read or written what it waits for
            tilus.wait_dependencies(constant=constant)
        for first in tilus.range(max(token, pages * page_size), min(end, (pages + window) * page_size), tile):
            stages.wait_empty()
            full = stages.full[stages.stage]
            for index in range(chunks):
                at = first + index * chunk
                found = tilus.where(tilus.arange(PAGES, start=pages) == at // page_size, table, 0)
                page = tilus.item(tilus.sum(found))
                slot = at % page_size // chunk * chunk  # 0 where a chunk is a page
                tilus.copy_tensor(
                    stages.ring[stages.stage, index], kv_cache, [page if at < end else nowhere, 0, slot, part.head, 0],
                    barrier=full, dims=[1, 2, 4], evict="first",
                )  # fmt: skip
                if factors is not None:
                    inside = max(min(page if at < end else 0, nowhere - 1), 0)  # bulk copies have no bounds
                    start = [inside, part.head, 0, 0, slot]
                    tilus.copy_bulk(stages.factors[stages.stage, index], factors, start, barrier=full, evict="first")
            stages.advance()
