"""Keys and values of one sequence and head in shared memory, a ring of tiles: elements of 16 bits, or codes that become f16.

Elements are copied asynchronously. Codes go through registers: those of the next tile are loaded before a tile is multiplied
and stored behind it. Codes of 8 bits and less are exact in f16, so factors are left to the scores and weights that they multiply.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f16, f32
from tilus.kernels.kv_cache import KvFormat
from tilus.kernels.vectors import by_vector

WARPS = 4
VECTOR_NBYTES = 16


class Tiles:
    """cache: [pages, 2, page_size, row]. table: its pages in order. length: in tokens. ring: stages, parts of a tile, keys of a
    part, and elements of a key."""

    has_centre = False

    def __init__(self, cache: Any, table: Any, length: Any, ring: Any) -> None:
        self.cache, self.table, self.length = cache, table, length
        self.stages, self.parts, self.part, self.head_dim = ring
        self.page_size = cache.shape[2]
        self.chunk = min(self.page_size, self.part)  # tokens of one page in one part
        self.tile = self.parts * self.part

    def starts(self) -> Any:
        """Of the chunks of a tile."""
        return range(0, self.tile, self.chunk)

    def pages(self, tile: Any) -> Any:
        """The page of each chunk of a tile; behind the sequence's end, its last one."""
        last = self.length - 1
        return [self.table[min(tile * self.tile + at, last) // self.page_size] for at in self.starts()]

    def tokens(self, pages: Any, dim: int, page: Any, token: Any) -> Any:
        """What a page has of the chunk that starts at a token; pages: of the cache or of factors, dim: its tokens.

        Tokens behind the sequence's end read as zeros, whatever the page holds there.
        """
        slot = 0 if self.page_size == self.chunk else token % self.page_size
        return tilus.narrow(pages[page], dim, slot, max(0, min(self.length - token, self.chunk)))

    def place(self, tile: Any, at: int) -> Any:
        """Where a chunk is in the buffer."""
        return [tile % self.stages, at // self.part, 0, at % self.part, 0]

    def keys(self, tile: Any) -> Any:
        """[parts, head_dim, keys of a part]"""
        shape = [self.parts, self.head_dim, self.part]
        return tilus.load_shared(self.buffer, [tile % self.stages, 0, 0, 0, 0], shape, dims=[1, 4, 3])

    def values(self, tile: Any) -> Any:
        """[parts, keys of a part, head_dim]"""
        shape = [self.parts, self.part, self.head_dim]
        return tilus.load_shared(self.buffer, [tile % self.stages, 0, 1, 0, 0], shape, dims=[1, 3, 4])


class ElementTiles(Tiles):
    """Elements of the cache as they are."""

    def __init__(self, cache: Any, table: Any, length: Any, ring: Any) -> None:
        Tiles.__init__(self, cache, table, length, ring)
        self.dtype = cache.dtype
        self.buffer = tilus.shared(cache.dtype, [self.stages, self.parts, 2, self.part, self.head_dim])

    def begin(self, start: Any, tiles: Any) -> None:
        """Ask for the first tiles, from the number `start` on."""
        for ahead in range(self.stages - 1):
            tile = start + ahead
            if tile < tiles:
                self.fetch(tile, self.pages(tile))
            tilus.commit()

    def arrive(self, tile: Any, tiles: Any) -> None:
        """Wait for a tile, and ask for another one."""
        following = tile + (self.stages - 1)
        pages = self.pages(following)  # before the wait: the copies need them
        tilus.wait(max(self.stages - 2, 0))
        tilus.sync()
        if following < tiles:
            self.fetch(following, pages)
        tilus.commit()

    def fetch(self, tile: Any, pages: Any) -> None:
        for at, page in zip(self.starts(), pages):
            source = self.tokens(self.cache, 1, page, tile * self.tile + at)
            shape = [2, self.chunk, self.head_dim]
            tilus.copy_async(source, [0, 0, 0], self.buffer, shape=shape, dst_offsets=self.place(tile, at))

    def leave(self, tile: Any, ahead: None) -> None:
        """Nothing is left to do for the next tile."""

    def end(self) -> None:
        tilus.wait(0)

    def scores(self, products: Any, tile: Any, query_sums: None) -> Any:
        return products

    def weights(self, weights: Any, tile: Any) -> Any:
        return weights


class CodeTiles(Tiles):
    """Codes of a format, with factors [pages, 2, kinds, page_size]: element = code * factor 0, plus factor 1 if there is one."""

    def __init__(self, cache: Any, table: Any, length: Any, ring: Any, factors: Any, kind: KvFormat) -> None:
        Tiles.__init__(self, cache, table, length, ring)
        self.dtype, self.kind, self.factors = f16, kind, factors
        self.has_centre = kind.has_centre
        self.nbytes = self.head_dim * kind.code.nbits // 8
        self.vector = min(VECTOR_NBYTES, self.nbytes & -self.nbytes)  # bytes of a thread
        self.buffer = tilus.shared(f16, [self.stages, self.parts, 2, self.part, self.head_dim])
        self.numbers = tilus.shared(f16, [self.stages, self.parts, 2, kind.kinds, self.part])

    def begin(self, start: Any, tiles: Any) -> None:
        if self.stages > 1 and start < tiles:
            self.put(start, self.load(start))

    def arrive(self, tile: Any, tiles: Any) -> Any:
        """Make a tile visible; of the next one, what `leave` stores."""
        if self.stages > 1:
            tilus.sync()
            return self.load(tile + 1)
        tilus.sync()  # the tile before has been read
        self.put(tile, self.load(tile))
        tilus.sync()
        return None

    def leave(self, tile: Any, ahead: Any) -> None:
        if ahead is not None:
            self.put(tile + 1, ahead)

    def end(self) -> None:
        """No copies are under way."""

    def load(self, tile: Any) -> Any:
        """(codes, factors) of each chunk, in registers."""
        shape = (2, self.chunk, self.nbytes)
        layout = by_vector(2 * self.chunk, self.nbytes, self.vector, WARPS).reshape(shape)
        found = []
        for at, page in zip(self.starts(), self.pages(tile)):
            token = tile * self.tile + at
            codes = tilus.load(self.tokens(self.cache, 1, page, token), [0, 0, 0], shape, layout=layout)
            own = self.tokens(self.factors, 2, page, token)
            found.append((codes, tilus.load(own, [0, 0, 0], [2, self.kind.kinds, self.chunk])))
        return found

    def put(self, tile: Any, loaded: Any) -> None:
        shape, vector = (2, self.chunk, self.head_dim), self.vector * 8 // self.kind.code.nbits
        layout = by_vector(2 * self.chunk, self.head_dim, vector, WARPS).reshape(shape)
        for at, (codes, factors) in zip(self.starts(), loaded):
            elements = tilus.cast(tilus.view(codes, self.kind.code, shape, layout), f16)
            tilus.store_shared(self.buffer, elements, self.place(tile, at), dims=[2, 3, 4])
            place = [tile % self.stages, at // self.part, 0, 0, at % self.part]
            tilus.store_shared(self.numbers, factors, place, dims=[2, 3, 4])

    def factor(self, tile: Any, which: int, kind: int) -> Any:
        """Of keys (0) or values (1): [parts, 1, keys of a part]"""
        first = [tile % self.stages, 0, which, kind, 0]
        found = tilus.load_shared(self.numbers, first, [self.parts, self.part], dims=[1, 4])
        return found.to(f32).reshape([self.parts, 1, self.part])

    def scores(self, products: Any, tile: Any, query_sums: Any) -> Any:
        scaled = products * self.factor(tile, 0, 0)
        return scaled + self.factor(tile, 0, 1) * query_sums if self.has_centre else scaled

    def weights(self, weights: Any, tile: Any) -> Any:
        return weights * self.factor(tile, 1, 0)


def tiles_of(
    cache: Any, table: Any, length: Any, ring: Any, factors: Any, kind: KvFormat | None
) -> ElementTiles | CodeTiles:
    """Of a cache of elements, or of codes with these factors."""
    return (
        ElementTiles(cache, table, length, ring)
        if kind is None
        else CodeTiles(cache, table, length, ring, factors, kind)
    )
