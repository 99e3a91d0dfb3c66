"""Models in Hugging Face's directory format: config.json, tokenizer.json, and *.safetensors, whole or in shards.

How weights are quantised, and what their tensors mean, is the matter of `tilus.kernels.quantize.load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving import tokenizer
from serving.config import ModelConfig
from serving.loader import Checkpoint
from serving.names import full_name
from serving.quantize import quantize_on_load
from serving.tokenizer import read_json
from tilus.dtypes import DataType, int8
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix, open_tensors

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def open_directory(directory: Path, weight_dtype: DataType) -> Checkpoint:
    """The model in a directory; raises TilusError for what is missing or not supported."""
    settings = read_json(directory / "config.json")
    if not settings:
        raise TilusError(f"{directory} has no config.json, so it is no model in Hugging Face's format")
    config = model_config(directory, settings)
    weights = DirectoryWeights(directory, weight_dtype, tied=bool(settings.get("tie_word_embeddings", False)))
    return Checkpoint(directory.resolve().name, config, tokenizer.from_huggingface(directory), weights)


def model_config(directory: Path, settings: dict[str, Any]) -> ModelConfig:
    """The shape of the model that a config.json describes; raises TilusError, by name, for what is not supported."""
    architectures = settings.get("architectures") or ["(none)"]
    if architectures[0] not in _ARCHITECTURES:
        raise TilusError(
            f"{directory} has architecture {architectures[0]}, but supported are {' and '.join(_ARCHITECTURES)}"
        )
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    refused = {
        "sliding_window": settings.get("sliding_window") is not None,
        "attention_bias": bool(settings.get("attention_bias")),
        "mlp_bias": bool(settings.get("mlp_bias")),
        "hidden_act": settings.get("hidden_act", "silu") != "silu",
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
    }
    for key, is_refused in refused.items():
        if is_refused:
            found = rope if key == "rope_scaling" else settings[key]
            raise TilusError(f"{directory}/config.json has {key} = {found!r}, which is not supported")
    try:
        heads = int(settings["num_attention_heads"])
        return ModelConfig(
            hidden_size=settings["hidden_size"],
            num_layers=settings["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
            ffn_size=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            max_positions=settings["max_position_embeddings"],
            rms_eps=settings["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0),
        )
    except KeyError as error:
        raise TilusError(f"{directory}/config.json has no key {error}, which a Llama-like model needs") from error


class DirectoryWeights:
    """The tensors of a directory, read one at a time as they are asked for.

    Quantised ones keep their codes; floats are quantised to `weight_dtype`.
    """

    def __init__(self, directory: Path, weight_dtype: DataType, *, tied: bool) -> None:
        self._tensors = open_tensors(directory)
        self._weight_dtype = weight_dtype
        self._tied = tied

    def has(self, name: str) -> bool:
        # Tied models may still store a head, a copy of the embedding.
        return full_name(name) in self._tensors and not (self._tied and name == "output")

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        found = self._tensors[full_name(name)]
        if isinstance(found, QuantizedMatrix):
            raise TilusError(f"{full_name(name)} is stored quantised, expected floats")
        return _floats(found, name)

    def matrix(self, name: str) -> QuantizedMatrix:
        return self._quantized(name, self._weight_dtype)

    def table(self) -> QuantizedMatrix:
        return self._quantized("token_embd", int8)

    def is_float(self, name: str) -> bool:
        return not self._tensors.is_quantized(full_name(name))

    def first_row(self, name: str) -> QuantizedMatrix | None:
        if not self.is_float(name):
            return None
        row = np.zeros((1, self._tensors.stored(full_name(name)).shape[-1]), np.float32)
        return quantize_on_load(row, int8 if name == "token_embd" else self._weight_dtype, full_name(name))

    def num_rows(self, name: str) -> int:
        return self._tensors.stored(full_name(name)).shape[0]

    def stored_nbytes(self, name: str) -> int:
        return self._tensors.stored_nbytes(full_name(name))

    def _quantized(self, name: str, dtype: DataType) -> QuantizedMatrix:
        stored_name = full_name(name)
        bias = stored_name.removesuffix("weight") + "bias"
        if bias in self._tensors and np.asarray(self._tensors[bias]).any():  # some GPTQ writers add zeros
            raise TilusError(f"{bias} is not zero, but biases are not supported")
        found = self._tensors[stored_name]
        if isinstance(found, QuantizedMatrix):
            return found
        return quantize_on_load(_floats(found, name), dtype, stored_name)


def _floats(array: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.float32]:
    if array.dtype != np.float32:
        raise TilusError(
            f"{full_name(name)} has dtype {array.dtype}, supported are float32, float16, bfloat16 and quantised weights"
        )
    return np.asarray(array, np.float32)
