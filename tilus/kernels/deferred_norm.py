"""Root-mean-square norms between two linear layers, without a kernel of their own.

The layer in front adds its results to the residual stream, and gives the sum times the norm's weight, not divided by its root
mean square, and sums of squares; the layer behind divides its own sums, as factors of rows go through a product (N. Graef et
al., "FlashNorm: fast normalization for LLMs", arXiv 2407.09577).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tilus
from tilus import f32
from tilus.kernels.quantize.tiles import TILE
from tilus.layout import local

VECTOR = 4  # sums of neighbours that a thread loads at once: 16 bytes
LANES = 4  # threads that add up the squares of a token, whatever the plan, so that sums have one order


@dataclass(frozen=True, eq=False)
class DeferredNorm:
    """The norm of a residual stream, [M, H]: `values / sqrt(squares.sum(1) / H + eps)`.

    values: [M, H], the stream times the norm's weight, float16 or bfloat16. squares: float32 [M, H / 64], sums of the stream's
    squares of 64 neighbours. Both are of the stream times a power of two, and so is the root of eps: `scale` of `Addend`.
    """

    values: Any
    squares: Any
    eps: float

    @property
    def shape(self) -> Any:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype


@dataclass(frozen=True, eq=False)
class Addend:
    """What a linear layer does with its results, beside storing them: it adds them to the residual stream, and stores the norm.

    stream: float32 [M, H], changed in place. weight: of the norm, float32 [H]. squares: of `DeferredNorm`. scale: a power of two,
    by which the stream is multiplied before its norm is taken, so that its products with the weight fit into 16 bits.
    """

    stream: Any
    weight: Any
    squares: Any
    scale: float


@dataclass(frozen=True, eq=False)
class Norms:
    """Those beside a linear layer that are parts of it. before: of its activations, whose values it gets."""

    before: DeferredNorm | None = None
    after: Addend | None = None


NO_NORMS = Norms()


class RootMeanSquares:
    """In a kernel: those of rows of a `DeferredNorm`. Warps of their own find them, while others multiply.

    squares: as there, None for activations that are no such norm. parts: of a row. turns: there is more than one tile.
    """

    def __init__(self, squares, tokens: int, parts, turns: bool):
        self.squares, self.tokens, self.parts = squares, tokens, parts
        self.taken = None
        if squares is not None:
            self.inverse = tilus.shared(f32, [tokens])
            self.found = tilus.mbarrier()
            self.taken = tilus.mbarrier() if turns else None

    def find(self, tiles, eps, warps: int):
        """Of the rows of all tiles, one after the other, by a role of so many warps."""
        several, count = 32 * warps // LANES, tilus.cdiv(self.parts, LANES * VECTOR)
        layout = local(1, count).spatial(several, LANES).local(1, VECTOR)
        for index in tiles.numbers():
            _, token = tiles.start(index)
            if self.taken is not None:
                tilus.wait_barrier(self.taken, (index + 1) % 2)
            for first in range(0, self.tokens, several):
                start, shape = [token + first, 0], [several, count * LANES * VECTOR]
                total = tilus.sum(tilus.load(self.squares, start, shape, layout=layout), 1)
                tilus.store_shared(self.inverse, tilus.rsqrt(total / (self.parts * TILE) + eps), offsets=[first])
            tilus.arrive(self.found)

    def wait(self, index):
        """Until those of a tile are there."""
        if self.squares is not None:
            tilus.wait_barrier(self.found, index % 2)

    def divided(self, sums):
        """Sums [rows, tokens] of products with the values, divided by the roots of the tokens."""
        return sums if self.squares is None else sums * tilus.load_shared(self.inverse)

    def free(self):
        """Those of the next tile may come."""
        if self.taken is not None:
            tilus.arrive(self.taken)
