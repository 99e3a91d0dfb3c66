"""A Llama-like decoder on paged key-value memory: RMS norm, rotary embedding, grouped-query attention, SwiGLU.

Activations are float16; the residual stream is float32, so that it does not lose small updates over many layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.config import ModelConfig
from serving.kernels import Kernels, KvCache, PackedWeight
from serving.loader import Checkpoint
from serving.packing import HEAD, NORM, ROPE, TABLE, TABLE_SCALES, PackedWeights, pack_weights


@dataclass(frozen=True, eq=False)
class StepTensors:
    """A batch on the device. M tokens of S sequences, all int32.

    token_ids, positions, slots: [M]. block_tables: [S, max_pages]. kv_lens: [S]. last: [L], the rows whose logits are wanted;
    None for all. The first `decodes` sequences have one token each. q_start: [S - decodes + 1], where the tokens of the others
    start, counted from the first of them.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    q_start: Tensor
    kv_lens: Tensor
    last: Tensor | None
    decodes: int


Combine = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer. Fused layers are a single weight where their parts are quantised alike, else several."""

    parts: tuple[PackedWeight, ...]

    def __call__(self, kernels: Kernels, x: Tensor, combine: Combine | None = None) -> Tensor:
        """combine: of parts that several devices compute of the sums."""
        if len(self.parts) == 1 and combine is None:
            return kernels.linear(x, self.parts[0])
        if combine is not None:  # rounded once, as on one device
            return combine(kernels.linear(x, self.parts[0], out_dtype=torch.float32)).to(x.dtype)
        widths = [int(part.shape[0]) for part in self.parts]
        out = torch.empty((x.shape[0], sum(widths)), dtype=x.dtype, device=x.device)
        for part, columns in zip(self.parts, out.split(widths, dim=1)):
            kernels.linear(x, part, out=columns)
        return out


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
    """Weights on a device, and the computation. `forward` writes the keys and values of its tokens into the cache. combine: adds
    up what several devices have computed of the same rows, where each has a part of the weights.
    """

    config: ModelConfig
    kernels: Kernels
    embedding: Embedding
    layers: tuple[Layer, ...]
    norm: Tensor
    head: PackedWeight
    cos_sin: Tensor
    combine: Combine | None = None

    def forward(self, step: StepTensors, layers: Sequence[KvCache], out: Tensor | None = None) -> Tensor:
        """Logits float32 [L, vocabulary] of the rows `step.last`. Where these are all rows, only kernels compute, so that the
        step may be captured. layers: each one's cache. out: where the logits go.
        """
        kernels, eps = self.kernels, self.config.rms_eps
        x = kernels.embedding(step.token_ids, self.embedding.table, self.embedding.scales)
        x, residual = kernels.start_rms_norm(x, self.layers[0].attn_norm, eps)
        next_norms = [*(layer.attn_norm for layer in self.layers[1:]), self.norm]
        for layer, next_norm, kv_cache in zip(self.layers, next_norms, layers, strict=True):
            x = self._attention(layer, x, step, kv_cache)
            x = kernels.add_rms_norm(x, residual, layer.ffn_norm, eps)
            x = layer.down(kernels, kernels.silu_mul(layer.gate_up(kernels, x)), self.combine)
            x = kernels.add_rms_norm(x, residual, next_norm, eps)
        if step.last is not None:
            x = x[step.last.long()]
        if x.shape[0] == 0:  # only chunks inside prompts
            return torch.empty((0, self.config.vocab_size), dtype=torch.float32, device=x.device)
        return kernels.linear(x, self.head, out_dtype=torch.float32, **({} if out is None else {"out": out}))

    def _attention(self, layer: Layer, x: Tensor, step: StepTensors, kv_cache: KvCache) -> Tensor:
        kernels = self.kernels
        q = kernels.rope_append(layer.qkv(kernels, x), step.positions, self.cos_sin, step.slots, kv_cache)
        scale = self.config.head_dim**-0.5
        out = kernels.paged_attention(
            q, kv_cache, step.block_tables, step.q_start, step.kv_lens, scale,
            decodes=step.decodes, out_dtype=x.dtype, constant_tables=True,
        )  # fmt: skip
        return layer.attn_output(kernels, out.reshape(out.shape[0], -1), self.combine)


def build_model(config: ModelConfig, kernels: Kernels, packed: PackedWeights, combine: Combine | None = None) -> Model:
    """The model of packed weights, which it shares."""

    def layer(prefix: str) -> Layer:
        return Layer(
            attn_norm=packed.tensors[prefix + "attn_norm"],
            qkv=Linear(packed.linears[prefix + "attn_qkv"]),
            attn_output=Linear(packed.linears[prefix + "attn_output"]),
            ffn_norm=packed.tensors[prefix + "ffn_norm"],
            gate_up=Linear(packed.linears[prefix + "ffn_gate_up"]),
            down=Linear(packed.linears[prefix + "ffn_down"]),
        )

    return Model(
        config=config,
        kernels=kernels,
        embedding=Embedding(packed.tensors[TABLE], packed.tensors.get(TABLE_SCALES)),
        layers=tuple(layer(f"blk.{index}.") for index in range(config.num_layers)),
        norm=packed.tensors[NORM],
        head=packed.linears[HEAD][0],
        cos_sin=packed.tensors[ROPE],
        combine=combine,
    )


def load_model(checkpoint: Checkpoint, kernels: Kernels, device: torch.device) -> Model:
    """A checkpoint's model, its weights packed on a device."""
    return build_model(checkpoint.config, kernels, pack_weights(checkpoint, kernels, device))
