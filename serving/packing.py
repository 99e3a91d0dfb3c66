"""From a checkpoint's arrays to the tensors of a model: linear layers fused and packed, the embedding, norms, rotary table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.architectures import QKV
from serving.kernels import Kernels, PackedWeight
from serving.loader import Checkpoint
from serving.model_config import ModelConfig
from serving.quantize import fit_float16, with_short_scales
from tilus.dtypes import int8
from tilus.errors import TilusError
from tilus.kernels.quantize import DenseMatrix, Matrix, QuantizedMatrix

TABLE, TABLE_SCALES, NORM, ROPE, HEAD, BIAS = (
    "token_embd", "token_embd.scales", "output_norm", "cos_sin", "output", ".bias",
)  # fmt: skip
# The linear layers of a dense block, and the matrices that each is made of.
FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv": QKV,
    "attn_output": ("attn_output",),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
    "ffn_down": ("ffn_down",),
}


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """All that a model's computation needs besides its configuration, by name.

    tensors: `token_embd` (int8 [V, H] with float16 `token_embd.scales` [V, H / 32], or float16 [V, H] without), norms
    (`blk.3.attn_norm`, ..., `output_norm`; float32 [H], of heads [D]), biases (`blk.3.attn_qkv.bias`, float32 [N]) and a table
    of each rotary embedding (`cos_sin.0`, ...; float32 [positions, D]). linears: `blk.3.attn_qkv`, ..., `output`; a fused layer
    is one weight where its parts are quantised alike, else several; gate and up are a gated one then.
    """

    tensors: Mapping[str, Tensor]
    linears: Mapping[str, tuple[PackedWeight, ...]]


def pack_weights(
    checkpoint: Checkpoint,
    kernels: Kernels,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackedWeights:
    """Pack a checkpoint's weights on a device. progress is called with (layers done, layers in all)."""
    packing = _Packing(checkpoint, kernels, device)
    count = checkpoint.config.num_layers
    for index in range(count):
        progress(index, count)
        packing.add_layer(f"blk.{index}.")
    packing.add_ends()
    progress(count, count)
    return PackedWeights(packing.tensors, packing.linears)


def layer_linears(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """The linear layers of a block, and the matrices that each is made of; those of all experts are one."""
    if config.experts is None:
        return FUSED
    experts = range(config.experts.count)
    dense = {name: FUSED[name] for name in ("attn_qkv", "attn_output")}
    return dense | {
        "ffn_gate_inp": ("ffn_gate_inp",),
        "ffn_gate_up": tuple(f"{part}.{expert}" for expert in experts for part in FUSED["ffn_gate_up"]),
        "ffn_down": tuple(f"ffn_down.{expert}" for expert in experts),
    }


def layer_vectors(config: ModelConfig) -> Mapping[str, int]:
    """The lengths of a block's norms and of the biases of its fused layers."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    post_norms = ("post_attention_norm", "post_ffw_norm") if config.architecture.post_norms else ()
    lengths = dict.fromkeys(["attn_norm", "ffn_norm", *post_norms], config.hidden_size)
    lengths |= dict.fromkeys(["attn_q_norm", "attn_k_norm"], dim) if config.architecture.qk_norm else {}
    widths = {
        "attn_qkv": (heads + 2 * kv_heads) * dim,
        "attn_output": config.hidden_size,
        "ffn_gate_up": 2 * config.ffn_size,
        "ffn_down": config.hidden_size,
    }
    biased = [name for name, parts in FUSED.items() if set(parts) & set(config.biases)]
    return lengths | {f"{name}{BIAS}": widths[name] for name in biased}


def stack_alike(matrices: Sequence[Matrix]) -> list[Matrix]:
    """The matrices, neighbours that are quantised alike stacked into one."""
    runs: list[list[Matrix]] = []
    for matrix in matrices:
        if runs and runs[-1][0].stacks_with(matrix):
            runs[-1].append(matrix)
        else:
            runs.append([matrix])
    return [_stacked(run) for run in runs]


def _stacked(run: Sequence[Matrix]) -> Matrix:
    dense = [matrix for matrix in run if isinstance(matrix, DenseMatrix)]
    if dense:
        return dense[0].stack(*dense[1:])
    quantized = [matrix for matrix in run if isinstance(matrix, QuantizedMatrix)]
    return quantized[0].stack(*quantized[1:])


def keeps_codes(table: Matrix) -> TypeGuard[QuantizedMatrix]:
    """Whether the embedding kernel reads the table's codes; else it gets float16 values."""
    return isinstance(table, QuantizedMatrix) and table.dtype == int8 and table.group == 32


class _Packing:
    def __init__(self, checkpoint: Checkpoint, kernels: Kernels, device: torch.device) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.linears: dict[str, tuple[PackedWeight, ...]] = {}
        self._config = checkpoint.config
        self._weights = checkpoint.weights
        self._kernels = kernels
        self._device = device

    def add_layer(self, prefix: str) -> None:
        linears = layer_linears(self._config)
        for name in layer_vectors(self._config):
            fused = name.removesuffix(BIAS)
            if fused == name:
                values = self._weights.vector(prefix + name)
            else:
                values = np.concatenate([self._bias(prefix, part) for part in linears[fused]])
            self.tensors[prefix + name] = self._tensor(values)
        for fused, parts in linears.items():
            matrices = [self._weights.matrix(prefix + part) for part in parts]
            gated = fused == "ffn_gate_up" and self._config.experts is None
            self.linears[prefix + fused] = self._packed(matrices, prefix + parts[0], gated)
            if len(self.linears[prefix + fused]) > 1 and fused.startswith("ffn") and self._config.experts:
                raise TilusError(
                    f"{prefix}{fused}: experts, or their gates and factors, are quantised in different ways, expected one",
                    hint="quantise the model again",
                )

    def add_ends(self) -> None:
        """What comes before and after the layers."""
        table = self._weights.matrix(TABLE)
        if keeps_codes(table):
            self.tensors[TABLE] = self._tensor(table.codes.view(np.int8))
            self.tensors[TABLE_SCALES] = self._half(table.scales)
        else:
            self.tensors[TABLE] = self._half(table.dequantize())
        head = self._weights.matrix(HEAD) if self._weights.has(HEAD) else table
        self.linears[HEAD] = self._packed([head], HEAD)
        self.tensors[NORM] = self._tensor(self._weights.vector(NORM))
        for index, rope in enumerate(self._config.ropes):
            self.tensors[f"{ROPE}.{index}"] = self._tensor(rope.table(self._config.max_positions))

    def _bias(self, prefix: str, part: str) -> npt.NDArray[np.float32]:
        """Of a part of a fused layer; zeros where it has none."""
        if part in self._config.biases:
            return self._weights.bias(prefix + part)
        return np.zeros(self._weights.stored(prefix + part).num_rows, np.float32)

    def _packed(self, matrices: Sequence[Matrix], name: str, gated: bool = False) -> tuple[PackedWeight, ...]:
        """gated: the two matrices are gates and factors."""
        stacked = stack_alike(matrices)
        return tuple(self._packed_one(matrix, name, gated and len(stacked) == 1) for matrix in stacked)

    def _packed_one(self, matrix: Matrix, name: str, gated: bool) -> PackedWeight:
        if isinstance(matrix, DenseMatrix):
            return self._kernels.pack_dense(self._tensor(matrix.values), gated=gated)
        return self._kernels.quantize.pack(with_short_scales(matrix, name), self._device, gated=gated)

    def _half(self, values: npt.NDArray[np.float32]) -> Tensor:
        return self._tensor(fit_float16(values, TABLE)).half()

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.tensor(array, device=self._device)
