"""Models as something to quantise: float weights by Hugging Face's names, one at a time, and the files that go with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from serving import tokenizer
from serving.config import LayerAttention
from serving.gguf_tokenizer import from_gguf
from serving.loader import GGUFWeights, gguf_config
from serving.rope import rope_of
from serving.tokenizer import Tokenizer, read_json
from tilus.dtypes import f16, f32
from tilus.errors import TilusError
from tilus.kernels.quantize import CheckpointWriter, GGUFFile, QuantizedMatrix, open_tensors

_Floats = npt.NDArray[np.float32]

# GGUF's architectures whose config.json is written here, and what transformers calls them.
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Weights in other formats, and what belongs to the weights as they were.
_NOT_COPIED_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")


class ModelSource(Protocol):
    """A model that is read tensor by tensor."""

    def names(self) -> Iterator[str]:
        """All tensors."""
        ...

    def is_matrix(self, name: str) -> bool: ...

    def floats(self, name: str) -> _Floats:
        """A tensor's values; those of a quantised one are what its codes stand for."""
        ...

    def copy(self, name: str, writer: CheckpointWriter) -> None:
        """Add a tensor that is not to be quantised."""
        ...

    def config(self) -> dict[str, Any]:
        """config.json, without what it says about quantisation."""
        ...

    def tokenizer(self) -> Tokenizer: ...

    def write_files(self, directory: Path) -> None:
        """The tokenizer and whatever else a model's directory has."""
        ...


def open_source(path: Path) -> ModelSource:
    """A Hugging Face directory or a GGUF file. Raises TilusError for anything else."""
    if path.is_dir():
        return DirectorySource(path)
    if not path.exists():
        raise TilusError(f"the model {path} does not exist", hint="expected a directory or a .gguf file")
    return GGUFSource(path)


class DirectorySource:
    """A directory in Hugging Face's format, of any architecture; quantised or not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._config = read_json(path / "config.json")
        if not self._config:
            raise TilusError(f"{path} has no config.json, so it is no model in Hugging Face's format")
        self._tensors = open_tensors(path)

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def is_matrix(self, name: str) -> bool:
        return self._tensors.is_quantized(name) or len(self._tensors.stored(name).shape) == 2

    def floats(self, name: str) -> _Floats:
        found = self._tensors[name]
        if isinstance(found, QuantizedMatrix):
            return found.dequantize()
        if found.dtype != np.float32:
            raise TilusError(f"{name} has dtype {found.dtype}, expected float32, float16 or bfloat16 weights")
        return found

    def copy(self, name: str, writer: CheckpointWriter) -> None:
        if self._tensors.is_quantized(name):
            writer.add_floats(name, self.floats(name), f16)
        else:
            writer.add(self._tensors.stored(name))

    def config(self) -> dict[str, Any]:
        dropped = ("quantization_config", "compression_config")
        return {key: value for key, value in self._config.items() if key not in dropped}

    def tokenizer(self) -> Tokenizer:
        return tokenizer.from_huggingface(self._path)

    def write_files(self, directory: Path) -> None:
        for file in self._path.iterdir():
            if file.is_file() and file.name not in _NOT_COPIED and not file.name.endswith(_NOT_COPIED_SUFFIXES):
                shutil.copyfile(file, directory / file.name)


class GGUFSource:
    """A GGUF file of a dense model whose rotary embedding is not scaled. What stays unquantised is stored as float16, vectors as
    float32. Raises TilusError for others."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._config = gguf_config(self._file)
        self._architecture = self._config.architecture
        self._theta = self._file.number(f"{self._architecture.gguf}.rope.freq_base", 10000.0)
        plain = LayerAttention(rope_of({"rope_theta": self._theta}, self._config.head_dim, 1, str(path)))
        if self._architecture.gguf not in _MODEL_TYPES or self._config.experts or self._config.attention != (plain,):
            raise TilusError(
                f"{path} is a {self._architecture.huggingface} that would need more than sizes in its config.json",
                hint="quantise the same model in Hugging Face's format",
            )
        self._weights = GGUFWeights(self._file, self._config)
        self._tokenizer = from_gguf(self._file)
        self._own_name = {self._full_name(name): name for name in self._file.tensors}

    def _full_name(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        return self._architecture.full_name(module).removesuffix("weight") + kind

    def names(self) -> Iterator[str]:
        return iter(self._own_name)

    def is_matrix(self, name: str) -> bool:
        return len(self._file.tensor(self._own_name[name]).shape) == 2

    def floats(self, name: str) -> _Floats:
        module, _, kind = self._own_name[name].rpartition(".")
        return self._weights.floats(module, kind)

    def copy(self, name: str, writer: CheckpointWriter) -> None:
        values = self.floats(name)
        writer.add_floats(name, values, f16 if values.ndim == 2 else f32)

    def config(self) -> dict[str, Any]:
        config = self._config
        return {
            "architectures": [self._architecture.huggingface],
            "model_type": _MODEL_TYPES[self._architecture.gguf],
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.ffn_size,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.rms_eps,
            "rope_theta": self._theta,
            "hidden_act": "silu",
            "tie_word_embeddings": not self._weights.has("output"),
            "bos_token_id": self._file.integer("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._file.integer("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "float16",
        }

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def write_files(self, directory: Path) -> None:
        self._tokenizer.fast.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._tokenizer.special}
        if self._tokenizer.chat_template is not None:
            settings["chat_template"] = self._tokenizer.chat_template
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
