"""Models as something to quantise: float weights by Hugging Face's names, one at a time, and the files that go with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from serving.gguf import GGUFWeights, gguf_settings
from serving.gguf_tokenizer import from_gguf
from serving.huggingface import read_settings
from serving.model_config import model_config
from serving.quantize import Rounding
from serving.tokenizer import Tokenizer, from_huggingface
from tilus.dtypes import f16, f32, int8
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
        self._config = read_settings(path)
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
        return from_huggingface(self._path)

    def write_files(self, directory: Path) -> None:
        for file in self._path.iterdir():
            if file.is_file() and file.name not in _NOT_COPIED and not file.name.endswith(_NOT_COPIED_SUFFIXES):
                shutil.copyfile(file, directory / file.name)


class GGUFSource:
    """A GGUF file of a dense model whose rotary embedding is not scaled. What stays unquantised is stored as float16, vectors as
    float32. Raises TilusError for others."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._settings = gguf_settings(self._file)
        config = model_config(self._settings, str(path))
        self._architecture = config.architecture
        is_plain = not config.experts and "rope_scaling" not in self._settings and config.attention[0].window is None
        if self._architecture.gguf not in _MODEL_TYPES or not is_plain:
            raise TilusError(
                f"{path} is a {self._architecture.huggingface} that would need more than sizes in its config.json",
                hint="quantise the same model in Hugging Face's format",
            )
        self._weights = GGUFWeights(self._file, config, Rounding(int8))
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
        own = {"model_type": _MODEL_TYPES[self._architecture.gguf], "torch_dtype": "float16"}
        ends = {f"{name}_token_id": self._file.integer(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        return self._settings | own | ends

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def write_files(self, directory: Path) -> None:
        self._tokenizer.fast.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._tokenizer.special}
        if self._tokenizer.chat_template is not None:
            settings["chat_template"] = self._tokenizer.chat_template
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
