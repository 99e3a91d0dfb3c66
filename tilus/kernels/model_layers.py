"""The linear layers of a Llama-like model as kernels meet them: from a config.json or a GGUF file, no weight is read.

Query, key and value are one layer, and so are gate and up, as in the server (`serving.packing`); in a GGUF file only neighbours
that are quantised alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tilus.dtypes import f16, f32
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile, QuantizedMatrix, Recipe, WeightHeader, pack, recipe

ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM",
    "Qwen3MoeForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
)  # fmt: skip
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
HEAD = "lm_head"
# The layers of a block in a GGUF file, and the matrices that each is made of.
_GGUF_LAYERS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "attention output": ("attn_output",),
    "gate and up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}


@dataclass(frozen=True)
class Layer:
    """Linear layers of one shape. weight: how they are packed; None: they are not quantised."""

    name: str
    n: int
    k: int
    weight: WeightHeader | None

    def __str__(self) -> str:
        return f"{self.name} {self.n} x {self.k}"


def model_layers(path: Path, weight: Recipe | None, head: Recipe | None) -> list[Layer]:
    """The different linear layers of a model.

    path: a config.json in Hugging Face's format, a directory with one, or a GGUF file, whose quantised matrices stay as they are.
    weight, head: how matrices that are stored as floats are quantised, those of the last layer apart; None: not at all.
    Raises: TilusError, with what is missing or unknown, for what is no Llama-like model.
    """
    if path.suffix == ".gguf":
        layers = _gguf_layers(GGUFFile(_existing(path)), weight, head)
    else:
        shapes = config_shapes(_settings(path), str(path))
        layers = [_layer(name, n, k, head if name == HEAD else weight) for name, n, k in shapes]
    return list(dict.fromkeys(layers))


def weight_recipe(name: str, act: str, group: int | None = None, scheme: str | None = None) -> Recipe | None:
    """How weights of the type `name` are quantised (see `recipe`); None where that is `act`, the type of activations: not at all.

    Raises: TilusError for an unknown type or scheme.
    """
    if name != act:
        return recipe(name, group, scheme)
    if scheme is not None:
        raise TilusError(f"scheme {scheme!r} for weights of {act}, which are not quantised")
    return None


def config_shapes(settings: Mapping[str, Any], source: str) -> list[tuple[str, int, int]]:
    """(name, N, K) of every linear layer of the model that a config.json describes. source: what errors call it."""
    architecture = (settings.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        raise TilusError(
            f"{source} has architecture {architecture}, expected one of {', '.join(ARCHITECTURES)}",
            hint="tune the shapes by themselves: tilus.kernels.tuning.tune_all",
        )
    config = _Config(settings, source)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden // heads)
    kv_heads = config.integer("num_key_value_heads", heads)
    return [
        ("qkv", (heads + 2 * kv_heads) * head_dim, hidden),
        ("attention output", hidden, heads * head_dim),
        *_feed_forward(config, hidden),
        (HEAD, config.integer("vocab_size"), hidden),
    ]


def _feed_forward(config: _Config, hidden: int) -> Iterator[tuple[str, int, int]]:
    """Dense layers, experts, or both where some blocks have the ones and some the others."""
    experts = config.integer("num_local_experts", config.integer("num_experts", 0))
    sparse_step, only_dense = config.integer("decoder_sparse_step", 1), config.settings.get("mlp_only_layers")
    if experts:
        width = config.integer("moe_intermediate_size", config.integer("intermediate_size", 0))
        yield "gate and up of an expert", 2 * width, hidden
        yield "down of an expert", hidden, width
    if not experts or sparse_step > 1 or only_dense:
        width = config.integer("intermediate_size")
        yield "gate and up", 2 * width, hidden
        yield "down", hidden, width


@dataclass(frozen=True)
class _Config:
    settings: Mapping[str, Any]
    source: str

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive number, or the default where it is missing or null. Raises: TilusError."""
        value = self.settings.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = f"no {name}" if value is None else f"{name} = {value!r}"
            raise TilusError(f"{self.source} has {found}, expected a positive whole number")
        return value


def _settings(path: Path) -> Mapping[str, Any]:
    file = _existing(path / "config.json" if path.is_dir() else path)
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise TilusError(
            f"{file} is not read as JSON: {error}", hint="expected a config.json or a .gguf file"
        ) from error
    if not isinstance(settings, dict):
        raise TilusError(f"{file} holds a {type(settings).__name__}, expected an object")
    return settings


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise TilusError(
            f"there is no file {path}", hint="expected a config.json, a directory with one, or a .gguf file"
        )
    return path


def _layer(name: str, n: int, k: int, weight: Recipe | None) -> Layer:
    if weight is None:
        return Layer(name, n, k, None)
    row = weight.quantize(np.linspace(-1, 1, k, dtype=np.float32)[None, :], search=False, name=name)
    return Layer(name, n, k, _header(row, n))


def _header(row: QuantizedMatrix, n: int) -> WeightHeader:
    """Of a weight of n rows like this one, packed for GPUs; scales of 32 bits become float16, as the server packs them."""
    if row.scale_dtype == f32:
        scales, mins = (part if part is None else np.float32(f16.round(part)) for part in (row.scales, row.mins))
        row = replace(row, scales=row.scales if scales is None else scales, mins=mins, scale_dtype=f16)
    return replace(pack(row).header, shape=(n, row.shape[1]))


def _gguf_layers(file: GGUFFile, weight: Recipe | None, head: Recipe | None) -> list[Layer]:
    architecture = file.text("general.architecture")
    if architecture not in GGUF_ARCHITECTURES or file.integer(f"{architecture}.expert_count", 0):
        kind = "a mixture of experts" if architecture in GGUF_ARCHITECTURES else f"of architecture {architecture!r}"
        known = ", ".join(GGUF_ARCHITECTURES)
        raise TilusError(f"{file.path} is {kind}, expected a dense model of architecture {known}")
    layers: list[Layer] = []
    for block in range(file.integer(f"{architecture}.block_count")):
        for name, parts in _GGUF_LAYERS.items():
            layers += _stacked(file, name, [f"blk.{block}.{part}.weight" for part in parts], weight)
    output = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    return layers + _stacked(file, HEAD, [output], head)


def _stacked(file: GGUFFile, name: str, parts: Sequence[str], weight: Recipe | None) -> list[Layer]:
    """The parts of a layer, neighbours that are packed alike as one."""
    found: list[Layer] = []
    for part in parts:
        row, (n, k) = file.first_row(part), file.tensor(part).shape
        layer = Layer(name, n, k, _header(row, n)) if isinstance(row, QuantizedMatrix) else _layer(name, n, k, weight)
        before = found[-1] if found else None
        if before is not None and _alike(before, layer):
            n += before.n
            header = None if layer.weight is None else replace(layer.weight, shape=(n, k))
            found[-1] = Layer(name, n, k, header)
        else:
            found.append(layer)
    return found


def _alike(a: Layer, b: Layer) -> bool:
    if a.weight is None or b.weight is None:
        return a.weight is b.weight and a.k == b.k
    return replace(a.weight, shape=b.weight.shape) == b.weight and a.k == b.k
