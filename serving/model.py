"""A decoder on paged key-value memory: RMS norms, rotary embedding, grouped-query attention, gated feed-forward layers.

What models of an architecture have or have not is data: tensors that are None, and numbers of `ModelConfig`. Activations are
float16, or bfloat16 where they would not fit; the residual stream is float32, so that it does not lose small updates over many
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.kernels import Activations, Kernels, KvCache, PackedWeight
from serving.layers import Combine, Dense, Linear, Mixture, Norm, Stream
from serving.loader import Checkpoint
from serving.model_config import ModelConfig
from serving.packing import BIAS, HEAD, NORM, ROPE, TABLE, TABLE_SCALES, PackedWeights, pack_weights
from tilus.kernels import KvFrame


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


@dataclass(frozen=True, eq=False)
class Layer:
    """cos_sin: the table of its rotary embedding. window: how many tokens one sees at most. Norms that a model does not have are
    None. frame: the coordinates of its cache, where that has some (`serving.kv_frames`)."""

    attn_norm: Norm
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    cos_sin: Tensor
    window: int | None
    attn_output: Linear
    post_attention_norm: Tensor | None
    ffn_norm: Norm
    feed_forward: Dense | Mixture
    post_ffw_norm: Tensor | None
    frame: KvFrame | None = None


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
    combine: Combine | None = None

    def forward(self, step: StepTensors, layers: Sequence[KvCache], out: Tensor | None = None) -> Tensor:
        """Logits float32 [L, vocabulary] of the rows `step.last`. Where these are all rows, only kernels of the library compute.
        layers: each one's cache. out: where the logits go.
        """
        x = self.hidden(step, layers)
        return self.logits(x if step.last is None else x.index_select(0, step.last), out)

    def hidden(self, step: StepTensors, layers: Sequence[KvCache]) -> Tensor:
        """What the head gets: the norm of the residual stream, [M, H]."""
        kernels, config, eps = self.kernels, self.config, self.config.rms_eps
        x = kernels.embedding(step.token_ids, self.embedding.table, self.embedding.scales)
        x, residual = kernels.start_rms_norm(
            x, self.layers[0].attn_norm.weight, eps, scale=config.embedding_scale,
            out_dtype=torch.bfloat16 if config.architecture.wide else None,
        )  # fmt: skip
        stream = Stream(kernels, residual, eps, self.combine)
        following = [*((layer.attn_norm, layer.qkv.only) for layer in self.layers[1:]), (Norm(self.norm), None)]
        for layer, (norm, reader), kv_cache in zip(self.layers, following, layers, strict=True):
            feed_forward, x = layer.feed_forward, self._attention(layer, x, step, kv_cache)
            x = stream.add_linear(layer.attn_output, x, layer.ffn_norm, layer.post_attention_norm, feed_forward.reader)
            x = feed_forward.add_to(stream, x, norm, layer.post_ffw_norm, reader)
        return x

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Of rows of `hidden`, float32 [rows, vocabulary]."""
        config = self.config
        if x.shape[0] == 0:  # only chunks inside prompts
            return torch.empty((0, config.vocab_size), dtype=torch.float32, device=x.device)
        logits = self.kernels.linear(x, self.head, out_dtype=torch.float32, out=out)
        return logits if config.final_cap is None else self.kernels.soft_cap(logits, config.final_cap)

    def _attention(self, layer: Layer, x: Activations, step: StepTensors, kv_cache: KvCache) -> Tensor:
        """Of all heads [M, Hq D], in front of the output's layer."""
        kernels = self.kernels
        q = kernels.rope_append(
            layer.qkv(kernels, x), step.positions, layer.cos_sin, step.slots, kv_cache,
            q_norm=layer.q_norm, k_norm=layer.k_norm, eps=self.config.rms_eps, frame=layer.frame, constant=True,
        )  # fmt: skip
        out = kernels.paged_attention(
            q, kv_cache, step.block_tables, step.q_start, step.kv_lens, self.config.attention_scale, window=layer.window,
            soft_cap=self.config.attention_cap, decodes=step.decodes, out_dtype=x.dtype, constant_tables=True,
            constant_past=True,
        )  # fmt: skip
        if layer.frame is not None:
            out = kernels.restore_values(out, layer.frame)
        return out.reshape(out.shape[0], -1)


def build_model(
    config: ModelConfig, kernels: Kernels, packed: PackedWeights, combine: Combine | None = None,
    columns: Mapping[str, range] | None = None,
) -> Model:  # fmt: skip
    """The model of packed weights, which it shares. columns: of the layers that are whole on several devices (`Linear`)."""

    def linear(name: str) -> Linear:
        some = (columns or {}).get(name.rpartition(".")[2])
        return Linear(packed.linears[name], packed.tensors.get(name + BIAS), some)

    def feed_forward(prefix: str) -> Dense | Mixture:
        if config.experts is None:
            gate_up, down = linear(prefix + "ffn_gate_up"), linear(prefix + "ffn_down")
            return Dense(gate_up, down, config.architecture.activation)
        router, gate_up, down = (
            packed.linears[prefix + name][0] for name in ("ffn_gate_inp", "ffn_gate_up", "ffn_down")
        )
        return Mixture(router, gate_up, down, config.experts)

    def layer(index: int) -> Layer:
        prefix, attention = f"blk.{index}.", config.attention_of(index)
        return Layer(
            attn_norm=Norm.of(packed.tensors[prefix + "attn_norm"]),
            qkv=linear(prefix + "attn_qkv"),
            q_norm=packed.tensors.get(prefix + "attn_q_norm"),
            k_norm=packed.tensors.get(prefix + "attn_k_norm"),
            cos_sin=packed.tensors[f"{ROPE}.{config.ropes.index(attention.rope)}"],
            window=attention.window,
            attn_output=linear(prefix + "attn_output"),
            post_attention_norm=packed.tensors.get(prefix + "post_attention_norm"),
            ffn_norm=Norm.of(packed.tensors[prefix + "ffn_norm"]),
            feed_forward=feed_forward(prefix),
            post_ffw_norm=packed.tensors.get(prefix + "post_ffw_norm"),
        )

    return Model(
        config=config,
        kernels=kernels,
        embedding=Embedding(packed.tensors[TABLE], packed.tensors.get(TABLE_SCALES)),
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=packed.tensors[NORM],
        head=packed.linears[HEAD][0],
        combine=combine,
    )


def load_model(checkpoint: Checkpoint, kernels: Kernels, device: torch.device) -> Model:
    """A checkpoint's model, its weights packed on a device."""
    return build_model(checkpoint.config, kernels, pack_weights(checkpoint, kernels, device))
