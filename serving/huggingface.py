"""Models in Hugging Face's directory format: config.json, tokenizer.json, and *.safetensors, whole or in shards.

How weights are quantised, and what their tensors mean, is the matter of `tilus.kernels.quantize.load`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.model_config import ModelConfig, model_config
from serving.quantize import Rounding, StoredMatrix
from serving.tokenizer import Tokenizer, from_huggingface, read_json
from tilus.errors import TilusError
from tilus.kernels.quantize import Matrix, QuantizedMatrix, open_tensors


def read_settings(directory: Path) -> dict[str, Any]:
    """A directory's config.json."""
    settings = read_json(directory / "config.json")
    if not settings:
        raise TilusError(f"{directory} has no config.json, so it is no model in Hugging Face's format")
    return settings


def open_directory(directory: Path, rounding: Rounding) -> tuple[ModelConfig, Tokenizer, DirectoryWeights]:
    """The model in a directory; raises TilusError for what is missing or not supported."""
    settings = read_settings(directory)
    config = model_config(settings, f"{directory}/config.json")
    tied = bool(settings.get("tie_word_embeddings", config.architecture.tied))
    weights = DirectoryWeights(directory, rounding, config, tied=tied)
    found = from_huggingface(directory)
    if found.fast.get_vocab_size(with_added_tokens=False) <= config.vocab_size < found.vocab_size:
        # Added tokens that this model has no rows for, such as one for images: prompts with them are refused.
        found = replace(found, vocab_size=config.vocab_size)
    return config, found, weights


class DirectoryWeights:
    """The tensors of a directory, read one at a time as they are asked for.

    Quantised ones keep their codes; floats are rounded.
    """

    def __init__(self, directory: Path, rounding: Rounding, config: ModelConfig, *, tied: bool) -> None:
        self._tensors = open_tensors(directory)
        self._rounding = rounding
        self._config = config
        self._rows: dict[tuple[int, Rounding], Matrix] = {}
        self._tied = tied

    def has(self, name: str) -> bool:
        # Tied models may still store a head, a copy of the embedding.
        return self._full_name(name) in self._tensors and not (self._tied and name == "output")

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        return self._floats(self._full_name(name)) + np.float32(self._config.architecture.norm_offset)

    def bias(self, name: str) -> npt.NDArray[np.float32]:
        return self._floats(_bias_of(self._full_name(name)))

    def matrix(self, name: str) -> Matrix:
        stored_name = self._full_name(name)
        bias = _bias_of(stored_name)
        is_known = name.rpartition(".")[2] in self._config.biases
        if not is_known and bias in self._tensors and np.asarray(self._tensors[bias]).any():
            # Some GPTQ writers add zeros.
            raise TilusError(f"{bias} is not zero, but {self._config.architecture.huggingface} has no such bias")
        found = self._tensors[stored_name]
        if isinstance(found, QuantizedMatrix):
            return found
        return self._rounding.of(name)(_checked(found, stored_name), stored_name)

    def stored(self, name: str) -> StoredMatrix:
        stored_name = self._full_name(name)
        nbytes = self._tensors.stored_nbytes(stored_name)
        if self._tensors.is_quantized(stored_name):
            return StoredMatrix(False, None, 0, nbytes)
        num_rows, width = self._tensors.stored(stored_name).shape
        kind = width, self._rounding.of(name)
        if kind not in self._rows:  # a mixture has thousands of matrices
            self._rows[kind] = kind[1](np.zeros((1, width), np.float32), stored_name)
        return StoredMatrix(True, self._rows[kind], num_rows, nbytes)

    def _full_name(self, name: str) -> str:
        return self._config.architecture.full_name(name)

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
