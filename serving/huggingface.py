"""Models in Hugging Face's directory format: config.json, tokenizer.json, and *.safetensors, whole or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from serving import tokenizer
from serving.config import ModelConfig
from serving.loader import Checkpoint
from serving.quantize import quantize
from serving.tokenizer import read_json
from tilus.dtypes import DataType, int8
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_directory(directory: Path, weight_dtype: DataType) -> Checkpoint:
    """The model in a directory; raises TilusError for what is missing or not supported."""
    settings = read_json(directory / "config.json")
    if not settings:
        raise TilusError(f"{directory} has no config.json, so it is no model in Hugging Face's format")
    config = _model_config(directory, settings)
    weights = SafetensorsWeights(directory, weight_dtype, tied=bool(settings.get("tie_word_embeddings", False)))
    return Checkpoint(directory.resolve().name, config, tokenizer.from_huggingface(directory), weights)


def _model_config(directory: Path, settings: dict[str, Any]) -> ModelConfig:
    architectures = settings.get("architectures") or ["(none)"]
    if architectures[0] not in _ARCHITECTURES:
        raise TilusError(
            f"{directory} has architecture {architectures[0]}, but supported are {' and '.join(_ARCHITECTURES)}"
        )
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    refused = {
        "quantization_config": settings.get("quantization_config") is not None,
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


class SafetensorsWeights:
    """The float tensors of a directory, quantised one at a time as they are asked for."""

    def __init__(self, directory: Path, weight_dtype: DataType, *, tied: bool) -> None:
        self._directory = directory
        self._weight_dtype = weight_dtype
        self._tied = tied
        self._file_of = _index(directory)

    def has(self, name: str) -> bool:
        # Tied models may still store a head, a copy of the embedding.
        return _full_name(name) in self._file_of and not (self._tied and name == "output")

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        return self._floats(name)

    def matrix(self, name: str) -> QuantizedMatrix:
        return quantize(self._floats(name), self._weight_dtype, name)

    def table(self) -> QuantizedMatrix:
        return quantize(self._floats("token_embd"), int8, "token_embd")

    def _floats(self, name: str) -> npt.NDArray[np.float32]:
        full_name = _full_name(name)
        if full_name not in self._file_of:
            raise TilusError(f"{self._directory} has no tensor {full_name}; it has {len(self._file_of)} others")
        with _open(self._file_of[full_name]) as file:
            tensor = file.get_tensor(full_name)
        if tensor.dtype not in _DTYPES:
            raise TilusError(f"{full_name} has dtype {tensor.dtype}, supported are {', '.join(map(str, _DTYPES))}")
        return tensor.to(torch.float32).numpy()


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise TilusError(f"{path} cannot be read as safetensors: {error}") from error


def _index(directory: Path) -> dict[str, Path]:
    """The file of each tensor."""
    shards = read_json(directory / "model.safetensors.index.json").get("weight_map")
    if shards:
        return {name: directory / file for name, file in shards.items()}
    path = directory / "model.safetensors"
    if not path.is_file():
        raise TilusError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _full_name(name: str) -> str:
    """Hugging Face's name of a tensor: `blk.3.attn_q` is `model.layers.3.self_attn.q_proj.weight`."""
    if not name.startswith("blk."):
        return f"{_NAMES[name]}.weight"
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
