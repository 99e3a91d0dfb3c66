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
from tilus.layout import local, replicated

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
    """In a kernel: of rows of a `DeferredNorm`, found while the first step comes, and kept in shared memory until sums are there.

    squares: as there, None for activations that are no such norm. parts: of a row.
    """

    def __init__(self, squares, tokens: int, parts, threads: int):
        self.squares = squares
        if squares is not None:
            self.tokens, self.parts = tokens, parts
            self.inverse = tilus.shared(f32, [tokens])
            self.count = tilus.cdiv(parts, LANES * VECTOR)  # vectors of a thread
            several, together = max(1, tokens * LANES // threads), min(tokens, threads // LANES)
            lanes = local(several, self.count).spatial(together, LANES).local(1, VECTOR)
            self.layout = replicated(max(1, threads // (tokens * LANES)), 2) * lanes

    def find(self, token, eps):
        """Of the rows from `token` on."""
        if self.squares is not None:
            width = self.count * LANES * VECTOR
            squares = tilus.load(self.squares, [token, 0], [self.tokens, width], layout=self.layout)
            inverse = tilus.rsqrt(tilus.sum(squares, 1) / (self.parts * TILE) + eps)
            tilus.sync()  # nobody reads those of the rows before
            tilus.store_shared(self.inverse, inverse)
            tilus.sync()

    def divided(self, sums):
        """Sums [rows, tokens] of products with the values, divided by the roots of the tokens."""
        return sums if self.squares is None else sums * tilus.load_shared(self.inverse)
