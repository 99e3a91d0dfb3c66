"""The softmax of a block's rows in the kernel of all devices, and the values weighted by it."""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import f32
from tilus.kernels.attention_tiles import WARPS
from tilus.kernels.online_softmax import OnlineSoftmax
from tilus.layout import RegisterLayout, local, spatial
from tilus.layout.atoms import mma_c

FRAGMENT_ROWS = 16  # rows of a tensor-core product, of which a warp takes one


class Rows(OnlineSoftmax):
    """Rows in as many parts (axis 0 of all tiles) as there are warps that read different keys; `result` merges them.

    kv: `ElementTiles` or `CodeTiles`. queries: [rows, head_dim]. limits: how many keys each row sees, [1, rows, 1].
    window, soft_cap: see `paged_attention`.
    """

    def __init__(
        self, kv: Any, queries: Any, limits: Any, scale_log2: Any, window: int | None, soft_cap: float | None
    ) -> None:
        rows, head_dim = queries.shape
        shape = [kv.parts, rows, head_dim]
        self.kv, self.limits, self.scale_log2, self.window, self.soft_cap = kv, limits, scale_log2, window, soft_cap
        part = tilus.arange(kv.parts, shape=[kv.parts, 1, 1])
        self.key = part * kv.part + tilus.arange(kv.part, shape=[1, 1, kv.part], axis=2)
        OnlineSoftmax.__init__(self, [kv.parts, rows, 1], 2)
        self.acc = tilus.zeros(shape, layout=rows_by_warp(*shape))
        self.added = tilus.zeros(self.shape)  # what centres of values add to all elements of a row
        queries = tilus.broadcast(queries.reshape([1, rows, head_dim]), shape)
        self.query_sums = tilus.sum(queries.to(f32), 2, keepdims=True) if kv.has_centre else None
        self.queries = queries.to(kv.dtype)

    def attend(self, tile: Any) -> None:
        """Add the values of a tile that has arrived."""
        kv = self.kv
        weights, shrink = self.weigh(self.seen(self.scores(tile), tile))
        if kv.has_centre:
            self.added = self.added * shrink + tilus.sum(weights * kv.factor(tile, 1, 1), 2, keepdims=True)
        self.acc = tilus.dot(kv.weights(weights, tile).to(kv.dtype), kv.values(tile), self.acc * shrink)

    def scores(self, tile: Any) -> Any:
        """[parts, rows, keys of a part], times log2(e)."""
        kv, (parts, rows, _) = self.kv, self.shape
        zeros = tilus.zeros([parts, rows, kv.part], layout=rows_by_warp(parts, rows, kv.part))
        scores = kv.scores(tilus.dot(self.queries, kv.keys(tile), zeros), tile, self.query_sums) * self.scale_log2
        if self.soft_cap is not None:
            scores = tilus.tanh(scores * (math.log(2.0) / self.soft_cap)) * (self.soft_cap * math.log2(math.e))
        return scores

    def seen(self, scores: Any, tile: Any) -> Any:
        """Minus infinity in place of the scores of keys that a row does not see."""
        behind = self.limits - tile * self.kv.tile
        scores = tilus.where(self.key < behind, scores, -math.inf)
        if self.window is not None:
            scores = tilus.where(self.key >= behind - self.window, scores, -math.inf)
        return scores

    def result(self) -> Any:
        """The softmax-weighted sum of all parts [rows, head_dim]; rows without any key are zero."""
        if self.kv.has_centre:
            self.acc = self.acc + self.added
        factor = tilus.exp2(self.highest - tilus.max(self.highest, 0, keepdims=True))
        total = tilus.sum(self.total * factor, 0)
        return tilus.sum(self.acc * factor, 0) / tilus.where(total > 0.0, total, 1.0)


def rows_by_warp(parts: int, rows: int, columns: int) -> RegisterLayout | None:
    """The accumulator of `parts` products [rows, columns] in which every row belongs to one warp; None for tiles of CPUs."""
    if parts * rows != FRAGMENT_ROWS * WARPS:
        return None
    fragments = local(1, 1, columns // 8) * mma_c().unsqueeze(0)
    return spatial(parts, 1, 1) * spatial(1, WARPS // parts, 1) * fragments
