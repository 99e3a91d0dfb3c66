"""Models in Hugging Face's directory format: config.json, tokenizer.json, and *.safetensors, whole or in shards.

How weights are quantised, and what their tensors mean, is the matter of `tilus.kernels.quantize.load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving import tokenizer
from serving.architectures import QKV, Architecture, by_huggingface
from serving.config import Experts, LayerAttention, ModelConfig
from serving.loader import ALWAYS_INT8, Checkpoint
from serving.quantize import quantize_on_load
from serving.rope import Rope, rope_of
from serving.tokenizer import read_json
from tilus.dtypes import DataType, int8
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix, open_tensors

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# What a config.json may say that would change the computation, and the only value that is computed.
_ONLY: dict[str, tuple[object, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
}


def open_directory(directory: Path, weight_dtype: DataType) -> Checkpoint:
    """The model in a directory; raises TilusError for what is missing or not supported."""
    settings = read_json(directory / "config.json")
    if not settings:
        raise TilusError(f"{directory} has no config.json, so it is no model in Hugging Face's format")
    config = model_config(directory, settings)
    tied = bool(settings.get("tie_word_embeddings", config.architecture.tied))
    weights = DirectoryWeights(directory, weight_dtype, config, tied=tied)
    found = tokenizer.from_huggingface(directory)
    if found.fast.get_vocab_size(with_added_tokens=False) <= config.vocab_size < found.vocab_size:
        # Added tokens that this model has no rows for, such as one for images: prompts with them are refused.
        found = replace(found, vocab_size=config.vocab_size)
    return Checkpoint(directory.resolve().name, config, found, weights)


def model_config(directory: Path, settings: dict[str, Any]) -> ModelConfig:
    """What the model computes that a config.json describes; raises TilusError, by name, for what is not supported."""
    source = f"{directory}/config.json"
    architecture = by_huggingface((settings.get("architectures") or ["(none)"])[0], source)
    for key, supported in _ONLY.items():
        if settings.get(key) is not None and settings[key] not in supported:
            raise TilusError(f"{source} has {key} = {settings[key]!r}, which is not supported")
    activation = settings.get("hidden_activation") or settings.get("hidden_act") or "silu"
    if _ACTIVATIONS.get(activation) != architecture.activation:
        raise TilusError(f"{source} has hidden_act = {activation!r}, which is not supported")
    try:
        heads = int(settings["num_attention_heads"])
        head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
        return ModelConfig(
            architecture=architecture,
            hidden_size=settings["hidden_size"],
            num_layers=settings["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            ffn_size=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            max_positions=settings["max_position_embeddings"],
            rms_eps=settings["rms_norm_eps"],
            attention=_attention(architecture, settings, head_dim, source),
            attention_scale=(settings.get("query_pre_attn_scalar") or head_dim) ** -0.5,
            attention_cap=settings.get("attn_logit_softcapping"),
            final_cap=settings.get("final_logit_softcapping"),
            biases=_biases(architecture, settings),
            experts=_experts(settings) if architecture.experts else None,
        )
    except KeyError as error:
        raise TilusError(f"{source} has no key {error}, which a {architecture.huggingface} needs") from error


def _attention(
    architecture: Architecture, settings: dict[str, Any], head_dim: int, source: str
) -> tuple[LayerAttention, ...]:
    """Of as many layers as differ."""
    max_positions = settings["max_position_embeddings"]

    def rope(kind: str) -> Rope:
        return rope_of(_rope_parameters(architecture, settings, kind), head_dim, max_positions, source)

    full = LayerAttention(rope("full_attention"))
    kinds = _layer_kinds(architecture, settings)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise TilusError(f"{source} has layers of type {', '.join(sorted(unknown))}, which are not supported")
    if "sliding_attention" not in kinds:
        return (full,)
    sliding = LayerAttention(rope("sliding_attention"), settings["sliding_window"])
    return tuple(sliding if kind == "sliding_attention" else full for kind in kinds)


def _layer_kinds(architecture: Architecture, settings: dict[str, Any]) -> Sequence[str]:
    """Full or sliding attention, of as many layers as differ."""
    period = settings.get("sliding_window_pattern") or architecture.window_period
    if settings.get("sliding_window") is None or not settings.get("use_sliding_window", period > 0):
        return ["full_attention"]
    if settings.get("layer_types") is not None:
        return settings["layer_types"]
    if not period:
        first = settings["max_window_layers"]
        return ["full_attention"] * first + ["sliding_attention"] * (settings["num_hidden_layers"] - first)
    return ["sliding_attention"] if period == 1 else ["sliding_attention"] * (period - 1) + ["full_attention"]


def _rope_parameters(architecture: Architecture, settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """As transformers 5 writes them, for all layers or for each kind; or as older versions did."""
    parameters = settings.get("rope_parameters")
    if parameters is not None:
        parameters = parameters.get(kind, parameters)
        return {"rope_theta": settings.get("rope_theta", 10000.0), **parameters}
    if kind == "sliding_attention" and architecture.local_theta is not None:
        return {"rope_theta": settings.get("rope_local_base_freq", architecture.local_theta)}
    return {"rope_theta": settings.get("rope_theta", 10000.0), **(settings.get("rope_scaling") or {})}


def _biases(architecture: Architecture, settings: dict[str, Any]) -> tuple[str, ...]:
    attention = (*QKV, "attn_output") if settings.get("attention_bias") else architecture.biases
    return (*attention, *(("ffn_gate", "ffn_up", "ffn_down") if settings.get("mlp_bias") else ()))


def _experts(settings: dict[str, Any]) -> Experts:
    """Names are those of Mixtral or Qwen3."""
    is_mixtral = "num_local_experts" in settings
    return Experts(
        count=settings["num_local_experts" if is_mixtral else "num_experts"],
        active=settings["num_experts_per_tok"],
        ffn_size=settings["intermediate_size" if is_mixtral else "moe_intermediate_size"],
        normalized=is_mixtral or bool(settings.get("norm_topk_prob", False)),
    )


class DirectoryWeights:
    """The tensors of a directory, read one at a time as they are asked for.

    Quantised ones keep their codes; floats are quantised to `weight_dtype`.
    """

    def __init__(self, directory: Path, weight_dtype: DataType, config: ModelConfig, *, tied: bool) -> None:
        self._tensors = open_tensors(directory)
        self._weight_dtype = weight_dtype
        self._config = config
        self._rows: dict[tuple[int, DataType], QuantizedMatrix] = {}
        self._tied = tied

    def has(self, name: str) -> bool:
        # Tied models may still store a head, a copy of the embedding.
        return self._full_name(name) in self._tensors and not (self._tied and name == "output")

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        return self._floats(self._full_name(name)) + np.float32(self._config.architecture.norm_offset)

    def bias(self, name: str) -> npt.NDArray[np.float32]:
        return self._floats(_bias_of(self._full_name(name)))

    def matrix(self, name: str) -> QuantizedMatrix:
        return self._quantized(name)

    def table(self) -> QuantizedMatrix:
        return self._quantized("token_embd")

    def is_float(self, name: str) -> bool:
        return not self._tensors.is_quantized(self._full_name(name))

    def first_row(self, name: str) -> QuantizedMatrix | None:
        if not self.is_float(name):
            return None
        width, dtype = self._tensors.stored(self._full_name(name)).shape[-1], self._dtype(name)
        if (width, dtype) not in self._rows:  # a mixture has thousands of matrices
            self._rows[width, dtype] = quantize_on_load(np.zeros((1, width), np.float32), dtype, self._full_name(name))
        return self._rows[width, dtype]

    def num_rows(self, name: str) -> int:
        return self._tensors.stored(self._full_name(name)).shape[0]

    def stored_nbytes(self, name: str) -> int:
        return self._tensors.stored_nbytes(self._full_name(name))

    def _full_name(self, name: str) -> str:
        return self._config.architecture.full_name(name)

    def _dtype(self, name: str) -> DataType:
        return int8 if name.rpartition(".")[2] in ALWAYS_INT8 else self._weight_dtype

    def _quantized(self, name: str) -> QuantizedMatrix:
        stored_name = self._full_name(name)
        bias = _bias_of(stored_name)
        is_known = name.rpartition(".")[2] in self._config.biases
        if not is_known and bias in self._tensors and np.asarray(self._tensors[bias]).any():
            # Some GPTQ writers add zeros.
            raise TilusError(f"{bias} is not zero, but {self._config.architecture.huggingface} has no such bias")
        found = self._tensors[stored_name]
        if isinstance(found, QuantizedMatrix):
            return found
        return quantize_on_load(_checked(found, stored_name), self._dtype(name), stored_name)

    def _floats(self, stored_name: str) -> npt.NDArray[np.float32]:
        found = self._tensors[stored_name]
        if isinstance(found, QuantizedMatrix):
            raise TilusError(f"{stored_name} is stored quantised, expected floats")
        return _checked(found, stored_name)


def _bias_of(stored_name: str) -> str:
    return stored_name.removesuffix("weight") + "bias"


def _checked(array: npt.NDArray[np.generic], stored_name: str) -> npt.NDArray[np.float32]:
    if array.dtype != np.float32:
        raise TilusError(
            f"{stored_name} has dtype {array.dtype}, supported are float32, float16, bfloat16 and quantised weights"
        )
    return np.asarray(array, np.float32)
