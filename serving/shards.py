"""What each of several devices holds of a model: whole key-value heads with their query heads, a part of the feed-forward layer.

Of query, key, value, gate and up a device has rows, of the two layers behind them the columns for these, so that its results are
parts of sums; embedding, norms and output are whole everywhere (M. Shoeybi et al., "Megatron-LM", arXiv 1909.08053). Ranges are
as equal as whole heads and groups of scales allow. Mixtures of experts are whole everywhere, too. Where sums must have the bits
that one device gives them, the two layers are whole as well, and what they read is gathered (`columns_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from serving.loader import Checkpoint, Weights
from serving.model_config import ModelConfig
from serving.quantize import StoredMatrix
from tilus.errors import TilusError
from tilus.kernels.quantize import Matrix

_UNGROUPED = 64  # columns of a range where one scale serves a whole row


@dataclass(frozen=True)
class Share:
    """Device `index` of `count`."""

    index: int
    count: int

    def of(self, number: int) -> range:
        return range(self.index * number // self.count, (self.index + 1) * number // self.count)


def check_shares(checkpoint: Checkpoint, count: int) -> None:
    """Raise TilusError where there are fewer key-value heads than devices."""
    heads = checkpoint.config.num_kv_heads
    if heads < count:
        raise TilusError(
            f"{checkpoint.name} has {heads} key-value heads, which {count} devices cannot share",
            hint=f"use --tp {heads} or less",
        )


def shard(checkpoint: Checkpoint, share: Share, *, parts_of_sums: bool = True) -> Checkpoint:
    """The checkpoint that one device loads. parts_of_sums: whether it has only its columns of the layers that end with sums.

    Raises: TilusError where there are fewer key-value heads than devices.
    """
    config = checkpoint.config
    check_shares(checkpoint, share.count)
    ranges = _Ranges(checkpoint, share)
    heads, ffn = ranges.kv_heads, ranges.ffn if config.experts is None else range(config.ffn_size)
    local = replace(
        config,
        num_heads=len(heads) * (config.num_heads // config.num_kv_heads),
        num_kv_heads=len(heads),
        ffn_size=len(ffn),
    )
    weights = ShardedWeights(checkpoint.weights, ranges.rows, ranges.columns if parts_of_sums else {})
    return Checkpoint(checkpoint.name, local, checkpoint.tokenizer, weights)


def columns_of(checkpoint: Checkpoint, share: Share) -> Mapping[str, range]:
    """Of what the layers that end with sums read, the columns that one device computes; by the layer's name."""
    columns = _Ranges(checkpoint, share).columns
    return columns if checkpoint.config.experts is None else {"attn_output": columns["attn_output"]}


def _group(weights: Weights, config: ModelConfig) -> int:
    """Columns of the feed-forward layer that stay together."""
    row = weights.stored("blk.0.ffn_down").first_row or weights.matrix("blk.0.ffn_down")
    return row.group if row.group < config.ffn_size else _UNGROUPED


class _Ranges:
    """Of the rows or columns that a device has of each matrix."""

    def __init__(self, checkpoint: Checkpoint, share: Share) -> None:
        config = checkpoint.config
        group = config.ffn_size if config.experts is not None else _group(checkpoint.weights, config)
        ratio, dim = config.num_heads // config.num_kv_heads, config.head_dim
        self.kv_heads = share.of(config.num_kv_heads)
        blocks = share.of(-(-config.ffn_size // group))
        self.ffn = range(blocks.start * group, min(blocks.stop * group, config.ffn_size))
        kv = range(self.kv_heads.start * dim, self.kv_heads.stop * dim)
        q = range(kv.start * ratio, kv.stop * ratio)
        self.rows = {"attn_q": q, "attn_k": kv, "attn_v": kv, "ffn_gate": self.ffn, "ffn_up": self.ffn}
        self.columns = {"attn_output": q, "ffn_down": self.ffn}


class ShardedWeights:
    """`serving.loader.Weights` of one device. rows, columns: of the layers of which it has a part."""

    def __init__(self, weights: Weights, rows: Mapping[str, range], columns: Mapping[str, range]) -> None:
        self._weights = weights
        self._row_ranges = rows
        self._column_ranges = columns

    def has(self, name: str) -> bool:
        return self._weights.has(name)

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        return self._weights.vector(name)

    def bias(self, name: str) -> npt.NDArray[np.float32]:
        bias, rows = self._weights.bias(name), self._rows(name)
        return bias if rows is None else bias[rows.start : rows.stop]

    def matrix(self, name: str) -> Matrix:
        matrix, rows = self._columns(name, self._weights.matrix(name)), self._rows(name)
        return matrix if rows is None else matrix.take_rows(np.arange(rows.start, rows.stop))

    def stored(self, name: str) -> StoredMatrix:
        whole, rows = self._weights.stored(name), self._rows(name)
        row = None if whole.first_row is None else self._columns(name, whole.first_row)
        return replace(whole, first_row=row, num_rows=whole.num_rows if rows is None else len(rows))

    def _rows(self, name: str) -> range | None:
        return self._row_ranges.get(name.rpartition(".")[2])

    def _columns(self, name: str, matrix: Matrix) -> Matrix:
        columns = self._column_ranges.get(name.rpartition(".")[2])
        return matrix if columns is None else matrix.take_columns(columns.start, columns.stop)
