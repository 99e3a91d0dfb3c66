"""A Llama-like decoder on paged key-value memory: RMS norm, rotary embedding, grouped-query attention, SwiGLU.

Activations are float16; the residual stream is float32, so that it does not lose small updates over many layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.config import ModelConfig
from serving.kernels import Kernels, PackedWeight
from serving.loader import Checkpoint
from serving.quantize import fit_float16, with_short_scales
from tilus.dtypes import int8
from tilus.kernels.quantize import QuantizedMatrix


@dataclass(frozen=True, eq=False)
class StepTensors:
    """A batch on the device. M tokens of S sequences, all int32.

    token_ids, positions, slots: [M]. block_tables: [S, max_pages]. q_start: [S + 1]. kv_lens: [S]. last: [L], the rows
    whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    q_start: Tensor
    kv_lens: Tensor
    last: Tensor


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer. Fused layers are a single weight where their parts are quantised alike, else several."""

    parts: tuple[PackedWeight, ...]

    def __call__(self, kernels: Kernels, x: Tensor) -> Tensor:
        outputs = [kernels.linear(x, part) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@dataclass(frozen=True, eq=False)
class Layer:
    attn_norm: Tensor
    qkv: Linear
    attn_output: Linear
    ffn_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class Embedding:
    """The token table: int8 codes with scales, or float16 values without."""

    table: Tensor
    scales: Tensor | None


@dataclass(frozen=True, eq=False)
class Model:
    """Weights on a device, and the computation. `forward` writes the keys and values of its tokens into the cache."""

    config: ModelConfig
    kernels: Kernels
    embedding: Embedding
    layers: tuple[Layer, ...]
    norm: Tensor
    head: PackedWeight
    cos_sin: Tensor

    def forward(self, step: StepTensors, kv_pool: Tensor) -> Tensor:
        """Logits float32 [L, vocabulary] of the rows `step.last`.

        kv_pool: float16 [pages, layers, 2, page_size, Hkv, D], so that a page of all layers is contiguous.
        """
        kernels, eps = self.kernels, self.config.rms_eps
        x = kernels.embedding(step.token_ids, self.embedding.table, self.embedding.scales)
        residual = x.float()
        x = kernels.rms_norm(x, self.layers[0].attn_norm, eps)
        next_norms = [*(layer.attn_norm for layer in self.layers[1:]), self.norm]
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms)):
            x = self._attention(layer, x, step, kv_pool[:, index])
            x = kernels.add_rms_norm(x, residual, layer.ffn_norm, eps)
            x = layer.down(kernels, kernels.silu_mul(layer.gate_up(kernels, x)))
            x = kernels.add_rms_norm(x, residual, next_norm, eps)
        if step.last.numel() == 0:  # only chunks inside prompts
            return torch.empty((0, self.config.vocab_size), dtype=torch.float32, device=x.device)
        return kernels.linear(x[step.last.long()], self.head, out_dtype=torch.float32)

    def _attention(self, layer: Layer, x: Tensor, step: StepTensors, kv_cache: Tensor) -> Tensor:
        kernels = self.kernels
        q = kernels.rope_append(layer.qkv(kernels, x), step.positions, self.cos_sin, step.slots, kv_cache)
        scale = self.config.head_dim**-0.5
        out = kernels.paged_attention(q, kv_cache, step.block_tables, step.q_start, step.kv_lens, scale)
        return layer.attn_output(kernels, out.reshape(out.shape[0], -1))


def rope_table(config: ModelConfig, num_positions: int) -> npt.NDArray[np.float32]:
    """float32 [positions, D]: cosines, then sines, of position / theta^(2 i / D) for i < D / 2."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    angles = np.outer(np.arange(num_positions), config.rope_theta**-exponents)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def load_model(
    checkpoint: Checkpoint, kernels: Kernels, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> Model:
    """Pack a checkpoint's weights on a device. progress is called with (layers done, layers in all)."""
    return _Loading(checkpoint, kernels, device).model(progress or (lambda done, total: None))


class _Loading:
    """Turns a checkpoint's arrays into packed weights."""

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels, device: torch.device) -> None:
        self._config = checkpoint.config
        self._weights = checkpoint.weights
        self._kernels = kernels
        self._device = device

    def model(self, progress: Callable[[int, int], None]) -> Model:
        table = self._weights.table()
        head = self._weights.matrix("output") if self._weights.has("output") else table
        layers: list[Layer] = []
        for index in range(self._config.num_layers):
            progress(index, self._config.num_layers)
            layers.append(self._layer(f"blk.{index}."))
        model = Model(
            config=self._config,
            kernels=self._kernels,
            embedding=self._embedding(table),
            layers=tuple(layers),
            norm=self._vector("output_norm"),
            head=self._pack(head, "output"),
            cos_sin=self._tensor(rope_table(self._config, self._config.max_positions)),
        )
        progress(self._config.num_layers, self._config.num_layers)
        return model

    def _layer(self, prefix: str) -> Layer:
        return Layer(
            attn_norm=self._vector(prefix + "attn_norm"),
            qkv=self._linear([prefix + name for name in ("attn_q", "attn_k", "attn_v")]),
            attn_output=self._linear([prefix + "attn_output"]),
            ffn_norm=self._vector(prefix + "ffn_norm"),
            gate_up=self._linear([prefix + "ffn_gate", prefix + "ffn_up"]),
            down=self._linear([prefix + "ffn_down"]),
        )

    def _linear(self, names: Sequence[str]) -> Linear:
        stacked: list[QuantizedMatrix] = []
        for name in names:
            matrix = self._weights.matrix(name)
            if stacked and stacked[-1].stacks_with(matrix):
                stacked[-1] = stacked[-1].stack(matrix)
            else:
                stacked.append(matrix)
        return Linear(tuple(self._pack(matrix, names[0]) for matrix in stacked))

    def _embedding(self, table: QuantizedMatrix) -> Embedding:
        if table.dtype == int8 and table.group == 32:
            return Embedding(self._tensor(table.codes.view(np.int8)), self._half(table.scales, "token_embd"))
        return Embedding(self._half(table.dequantize(), "token_embd"), None)

    def _pack(self, matrix: QuantizedMatrix, name: str) -> PackedWeight:
        return self._kernels.quantize.pack(with_short_scales(matrix, name), self._device)

    def _half(self, values: npt.NDArray[np.float32], name: str) -> Tensor:
        return self._tensor(fit_float16(values, name)).half()

    def _vector(self, name: str) -> Tensor:
        return self._tensor(self._weights.vector(name))

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.tensor(array, device=self._device)
