"""What a model will take of the memory, known from shapes before anything is loaded; refused when it cannot fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from serving.config import ServerConfig
from serving.host_memory import available_nbytes
from serving.kernels import Kernels, PackedWeight
from serving.kv_pool import PageShape
from serving.loader import Checkpoint, Weights
from serving.model_config import ModelConfig
from serving.packing import HEAD, TABLE, TABLE_SCALES, PackedWeights, keeps_codes, layer_linears, layer_vectors
from serving.quantize import with_short_scales
from serving.step_shapes import LARGEST_BATCH
from tilus.errors import TilusError
from tilus.kernels.quantize import DenseMatrix, Matrix, QuantizedWeight

PAGE_SIZE = 16
_CPU_CACHE_NBYTES = 2**30
_CPU_CACHE_SHARE = 0.5
_GPU_CACHE_SHARE = 0.9
_LEAST_CONTEXT = 512  # tokens: with less, a server is of no use
_SAMPLING_NBYTES = 8  # a logit's in float32, and that of a copy in which requests have changed some


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's packed weights (norms and rotary table included) and of its token embedding."""

    weights: int
    embedding: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. available: what may be taken altogether. num_pages: of the key-value cache."""

    model: ModelSize
    activations: int
    num_pages: int
    page_nbytes: int
    available: int

    @property
    def cache(self) -> int:
        return self.num_pages * self.page_nbytes

    @property
    def total(self) -> int:
        return self.model.weights + self.model.embedding + self.cache + self.activations

    def table(self) -> str:
        """A line for each purpose, in MiB."""
        pages = f"{self.num_pages} pages of {PAGE_SIZE} tokens, {self.page_nbytes} bytes each"
        rows = (
            ("weights", self.model.weights, "packed"),
            ("embedding", self.model.embedding, ""),
            ("key-value cache", self.cache, pages),
            ("activations", self.activations, "at most, about"),
            ("total", self.total, f"of {self.available / 2**20:.1f} available"),
        )
        lines = (f"  {name:<16}{nbytes / 2**20:10.1f}  {note}".rstrip() for name, nbytes, note in rows)
        return "\n".join(["memory in MiB", *lines])


def size_of(packed: PackedWeights) -> ModelSize:
    """The size of weights that are there."""
    tensors = {name: tensor.nbytes for name, tensor in packed.tensors.items()}
    embedding = tensors.pop(TABLE) + tensors.pop(TABLE_SCALES, 0)
    linears = sum(int(part.nbytes) for parts in packed.linears.values() for part in parts)
    return ModelSize(sum(tensors.values()) + linears, embedding)


def expected_size(checkpoint: Checkpoint, kernels: Kernels, device: torch.device) -> ModelSize:
    """The size that a checkpoint's weights will have on a device. Exact, but for weights that are stored quantised in
    safetensors, which count as they are stored, and those whose scales turn out to be too small for float16."""
    config = checkpoint.config
    sizing = _Sizing(checkpoint.weights, kernels, device)
    linears = sum(
        sizing.packed_nbytes([f"blk.{index}.{part}" for part in parts])
        for index in range(config.num_layers)
        for parts in layer_linears(config).values()
    )
    head = sizing.packed_nbytes([HEAD if checkpoint.weights.has(HEAD) else TABLE])
    vectors = config.num_layers * sum(layer_vectors(config).values()) + config.hidden_size
    ropes = len(config.ropes) * config.max_positions * config.head_dim
    return ModelSize(linears + head + 4 * (vectors + ropes), sizing.embedding_nbytes(config))


def activation_nbytes(config: ModelConfig, max_step_tokens: int, max_rows: int, device: torch.device) -> int:
    """About what a step needs besides: float16 values of one layer's tensors, the float32 residual, logits and sampling; and what
    captured steps keep, which is the logits of the largest, and on a CPU also all layers' tensors of each. max_rows: that are
    sampled."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    experts = config.experts
    active, ffn = (0, config.ffn_size) if experts is None else (experts.active, experts.active * experts.ffn_size)
    of_token = 2 * ((3 + 2 * active) * config.hidden_size + 2 * heads + 3 * ffn) + 4 * config.hidden_size
    largest = min(LARGEST_BATCH, max_rows) if device.type == "cpu" else max_rows
    kept = largest * config.vocab_size * 4
    kept += sum(range(1, largest + 1)) * config.num_layers * of_token if device.type == "cpu" else 0
    return max_step_tokens * of_token + max_rows * config.vocab_size * _SAMPLING_NBYTES + kept


def free_nbytes(device: torch.device) -> int:
    """What may be taken of the memory of a device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_nbytes()


def plan(
    config: ModelConfig, size: ModelSize, wishes: ServerConfig, available: int, device: torch.device
) -> MemoryPlan:
    """Share the memory out. By default the cache holds every request at full length as far as the memory goes, and at least
    one request: of `max_model_len` tokens where that was asked for, else of 512.

    Raises: TilusError with the numbers when that does not fit.
    """
    page_nbytes = PageShape(config, PAGE_SIZE, wishes.kv_dtype).nbytes
    max_rows = wishes.max_batch * (1 + wishes.drafts)
    activations = activation_nbytes(config, wishes.max_step_tokens, max_rows, device)
    left = available - size.weights - size.embedding - activations
    full = -(-(wishes.max_model_len or config.max_positions) // PAGE_SIZE)
    least = full if wishes.max_model_len else min(full, _LEAST_CONTEXT // PAGE_SIZE)
    if device.type == "cuda":
        share = int(left * _GPU_CACHE_SHARE)
    else:
        share = min(_CPU_CACHE_NBYTES, int(left * _CPU_CACHE_SHARE))
    num_pages = wishes.num_pages or max(least, min(wishes.max_batch * full, share // page_nbytes))
    found = MemoryPlan(size, activations, num_pages, page_nbytes, available)
    if found.total > available:
        raise TilusError(
            f"the model needs {found.total / 2**20:.0f} MiB, but {available / 2**20:.0f} MiB are available\n{found.table()}",
            hint="take fewer bits with --weight-dtype (weights that are stored as floats) and --kv-dtype, a smaller cache with "
            "--num-pages or --max-model-len, smaller steps with --max-step-tokens and --max-batch, or end other programs",
        )
    return found


class _Sizing:
    """Packs single rows, once for each kind, to see what a whole matrix will take."""

    def __init__(self, weights: Weights, kernels: Kernels, device: torch.device) -> None:
        self._weights = weights
        self._kernels = kernels
        self._device = device
        self._known: dict[tuple[object, ...], int] = {}

    def packed_nbytes(self, names: Sequence[str]) -> int:
        """Bytes of matrices that are fused where they are quantised alike."""
        total, previous, num_rows = 0, None, 0
        for name in names:
            stored = self._weights.stored(name)
            if (row := stored.first_row) is None:
                total += stored.nbytes
                continue
            if previous is not None and not previous.stacks_with(row):
                total += self._nbytes(previous, num_rows)
                num_rows = 0
            previous, num_rows = row, num_rows + stored.num_rows
        return total + (self._nbytes(previous, num_rows) if previous is not None else 0)

    def embedding_nbytes(self, config: ModelConfig) -> int:
        row = self._weights.stored(TABLE).first_row
        if row is not None and keeps_codes(row):
            return config.vocab_size * (config.hidden_size + 2 * row.scales.shape[1])
        return config.vocab_size * config.hidden_size * 2

    def _nbytes(self, row: Matrix, num_rows: int) -> int:
        if isinstance(row, DenseMatrix):
            return row.values.nbytes * num_rows
        parts = (row.mins, row.zeros, row.table, row.columns)
        kind = (num_rows, row.shape[1], row.dtype, row.group, row.scale_dtype, *(part is None for part in parts))
        if kind not in self._known:
            packed = self._kernels.quantize.pack(with_short_scales(row, "a row"), self._device)
            self._known[kind] = _scaled_nbytes(packed, num_rows)
        return self._known[kind]


def _scaled_nbytes(packed: PackedWeight, num_rows: int) -> int:
    """Bytes of a weight of many rows, given one of a single row."""
    if not isinstance(packed, QuantizedWeight):
        return int(packed.nbytes) * num_rows
    arrays = replace(packed.header, shape=(num_rows, packed.shape[1])).arrays
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in arrays.values())
