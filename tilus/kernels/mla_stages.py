"""Queries and tiles of a cache of latents on their way through shared memory, and what the roles of a block tell each other.

Blocks of a cluster have different rows of the same sequences. Each brings a share of every tile for all of them.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f32, int32

LATENT, ROPE = 512, 64  # elements of a token; all are its key, the latent ones its value
WIDTH = LATENT + ROPE
OUTPUT_WARPS, SCORE_WARPS, COPY_WARPS = 8, 4, 4
WARPS = OUTPUT_WARPS + SCORE_WARPS + COPY_WARPS
ROWS = 64  # of a block: query tokens and heads
EXCHANGED = 4096  # weights in all slots of an exchange
NUMBERS = 5  # of a message
PIECE = 16  # tokens: every page is a multiple


class Queries:
    """The rows of a block [64, width], and their barriers."""

    def __init__(self, tile: Any, full: Any, empty: Any) -> None:
        self.tile, self.full, self.empty = tile, full, empty
        self.turn = 0

    def fill(self, q: Any, row: Any) -> None:
        """From row `row` of q on. What is behind the block's last row may be other rows, whose results nobody stores."""
        tilus.wait_barrier(self.empty[0], 1 - self.turn)
        tilus.arrive(self.full[0], nbytes=self.tile.nbytes)
        tilus.copy_tensor(self.tile, q, [row, 0], barrier=self.full[0])
        self.turn = 1 - self.turn

    def wait_full(self) -> None:
        tilus.wait_barrier(self.full[0], self.turn)

    def give_back(self) -> None:
        tilus.arrive(self.empty[0])
        self.turn = 1 - self.turn


class Ring:
    """Stages of tiles [stages, tokens, width]; roles count on their own. rank: of the block in its cluster."""

    def __init__(self, tiles: Any, full: Any, empty: Any, cluster: int, rank: Any) -> None:
        self.tiles, self.full, self.empty = tiles, full, empty
        self.cluster, self.rank = cluster, rank
        self.stage, self.turn = 0, 0

    def wait_full(self) -> Any:
        """The present tile, once it is there."""
        tilus.wait_barrier(self.full[self.stage], self.turn)
        return self.tiles[self.stage]

    def give_back(self, written: Any) -> None:
        """All blocks that bring parts of this stage may fill it again. written: whether this block has changed the tile, as one
        that a part ends inside of; their copies must then not be overtaken by what it wrote."""
        if self.cluster == 1:
            tilus.arrive(self.empty[self.stage])
        elif written:
            for other in range(self.cluster):
                tilus.arrive(self.empty[self.stage], block=other)
        else:
            for other in range(self.cluster):
                tilus.arrive(self.empty[self.stage], block=other, reads_only=True)

    def advance(self) -> None:
        last = self.stage == self.tiles.shape[0] - 1
        self.turn = 1 - self.turn if last else self.turn
        self.stage = 0 if last else self.stage + 1

    def fill(self, cache: Any, table: Any, token: Any, end_token: Any, evict: str | None) -> None:
        """Tiles from `token` to before `end_token`. A piece behind the end is copied from a page that does not exist: zeros.

        The pages of a tile are looked up before its stage is free. evict: a hint for the L2 cache.
        """
        _, tile, width = self.tiles.shape
        page_size = cache.shape[1]
        piece = min(page_size, tile // self.cluster)
        everyone = None if self.cluster == 1 else (1 << self.cluster) - 1
        for first in tilus.range(token, end_token, tile):
            starts = [at + self.rank * piece for at in range(0, tile, piece * self.cluster)]
            pages = [table[min(first + at, end_token - 1) // page_size] for at in starts]
            tilus.wait_barrier(self.empty[self.stage], 1 - self.turn)
            tilus.arrive(self.full[self.stage], nbytes=self.tiles[0].nbytes)
            for at, page in zip(starts, pages):
                slot = (first + at) % page_size // piece * piece
                tilus.copy_tensor(
                    self.tiles[self.stage], cache, [page if first + at < end_token else cache.shape[0], slot, 0],
                    shape=[piece, width], dst_offsets=[at, 0], barrier=self.full[self.stage], dims=[1, 2],
                    multicast=everyone, evict=evict,
                )  # fmt: skip
            self.advance()


class Exchange:
    """What the warps with scores tell those with results, in order; each message has a slot, and waits until it is free.

    Of a part first the numbers of its tiles and of whole ones; of each tile its weights [64, tokens] and the factors [64] of
    what was added up before; then where the result goes, what it is multiplied by and its logarithm. Behind the last part a
    number below zero.
    weights: [slots, 64, tokens]. factors: f32 [slots, 2, 64]. numbers: int32 [slots, NUMBERS].
    """

    def __init__(self, weights: Any, factors: Any, numbers: Any, ready: Any, taken: Any) -> None:
        self.weights, self.factors, self.numbers = weights, factors, numbers
        self.ready, self.taken = ready, taken
        self.slot, self.turn = 0, 0

    def wait_taken(self) -> None:
        tilus.wait_barrier(self.taken[self.slot], 1 - self.turn)

    def give(self, factors: tuple[Any, ...] = (), numbers: tuple[Any, ...] = ()) -> None:
        """Factors, each [64, 1], and numbers, beside the weights that are there."""
        for index, factor in enumerate(factors):
            tilus.store_shared(self.factors[self.slot, index], factor.reshape([ROWS]))
        for index, number in enumerate(numbers):
            tilus.store_shared(self.numbers[self.slot], tilus.zeros([1], int32) + number, [index])
        tilus.fence_async()
        tilus.arrive(self.ready[self.slot])
        self.advance()

    def end(self) -> None:
        """There are no more parts."""
        self.wait_taken()
        self.give(numbers=(-1,))

    def wait_ready(self) -> None:
        tilus.wait_barrier(self.ready[self.slot], self.turn)

    def factor(self, index: int) -> Any:
        """[64, 1]"""
        return tilus.load_shared(self.factors[self.slot, index]).reshape([ROWS, 1])

    def number(self, index: int) -> Any:
        return tilus.item(tilus.load_shared(self.numbers[self.slot], [index], [1]))

    def take(self) -> None:
        tilus.arrive(self.taken[self.slot])
        self.advance()

    def advance(self) -> None:
        last = self.slot == self.weights.shape[0] - 1
        self.turn = 1 - self.turn if last else self.turn
        self.slot = 0 if last else self.slot + 1


class BlockMemory:
    """Shared memory and barriers of a block, made in front of its roles, each of which counts with objects of its own."""

    def __init__(self, dtype: Any, width: int, plan: Any) -> None:
        self.cluster = plan.cluster
        tile = tilus.shared(dtype, [ROWS, width])
        self.tiles = tilus.shared(dtype, [plan.stages, plan.tile, width])
        slots = exchange_slots(plan.tile)
        weights, factors = tilus.shared(dtype, [slots, ROWS, plan.tile]), tilus.shared(f32, [slots, 2, ROWS])
        numbers = tilus.shared(int32, [slots, NUMBERS])
        self.full, self.empty = tilus.mbarrier(plan.stages), tilus.mbarrier(plan.stages, arrivals=self.cluster)
        self.exchanged = weights, factors, numbers, tilus.mbarrier(slots), tilus.mbarrier(slots)
        self.asked = tile, tilus.mbarrier(), tilus.mbarrier()

    def queries(self) -> Queries:
        return Queries(*self.asked)

    def ring(self, rank: Any) -> Ring:
        return Ring(self.tiles, self.full, self.empty, self.cluster, rank)

    def exchange(self) -> Exchange:
        return Exchange(*self.exchanged)


def exchange_slots(tile: int) -> int:
    """For tiles of so many tokens."""
    return EXCHANGED // (ROWS * tile)
