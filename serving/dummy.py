"""Models of random weights in the shape of a config.json (`--dummy`): for measurements, which need no checkpoint."""

from __future__ import annotations

import functools
import itertools
import string
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from serving.loader import Checkpoint
from serving.model_config import ModelConfig, model_config
from serving.packing import layer_vectors
from serving.quantize import ALWAYS_INT8, GROUP, StoredMatrix
from serving.tokenizer import Tokenizer, read_json
from tilus.dtypes import DataType, f16, int8
from tilus.errors import TilusError
from tilus.kernels.quantize import DenseMatrix, Matrix, QuantizedMatrix

_BLOCK = 2**20 + 7  # random codes that repeat: an odd number, so that rows differ


def open_dummy(path: Path, weight_dtype: DataType, group: int = GROUP) -> Checkpoint:
    """The model of a config.json, or of a directory with one. Its texts are bytes, and no answer ends by itself.

    Raises: TilusError when there is none, and, by name, for what is not supported.
    """
    file = path / "config.json" if path.is_dir() else path
    settings = read_json(file)
    if not settings:
        raise TilusError(f"there is no {file}", hint="--dummy takes a config.json, or a directory with one, as --model")
    config = model_config(settings, str(file))
    weights = DummyWeights(config, weight_dtype, group, tied=bool(settings.get("tie_word_embeddings", False)))
    return Checkpoint(f"dummy-{file.resolve().parent.name}", config, _tokenizer(config.vocab_size), weights)


class DummyWeights:
    """Random codes in groups along K, of scales that keep activations of the order of one. The embedding is int8 in groups of 32.

    Layers have the same codes, each in memory of its own once it is packed.
    """

    def __init__(self, config: ModelConfig, dtype: DataType, group: int, *, tied: bool) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        ffn = config.ffn_size if config.experts is None else config.experts.ffn_size
        q, kv = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
        self._shapes = {
            "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, q),
            "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn), "token_embd": (vocab, hidden),
        }  # fmt: skip
        if config.experts is not None:
            self._shapes["ffn_gate_inp"] = (config.experts.count, hidden)
        if not tied:
            self._shapes["output"] = (vocab, hidden)
        self._hidden, self._dtype, self._group = hidden, dtype, group
        self._vectors = layer_vectors(config)

    def has(self, name: str) -> bool:
        return _part(name) in self._shapes

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        return np.ones(self._vectors.get(_part(name), self._hidden), np.float32)

    def bias(self, name: str) -> npt.NDArray[np.float32]:
        return np.zeros(self._shape(name)[0], np.float32)

    def matrix(self, name: str) -> Matrix:
        return self._random(name, *self._shape(name))

    def stored(self, name: str) -> StoredMatrix:
        num_rows, width = self._shape(name)
        return StoredMatrix(False, self._random(name, 1, width), num_rows, 0)

    def _shape(self, name: str) -> tuple[int, int]:
        return self._shapes[_part(name)]

    def _random(self, name: str, n: int, k: int) -> Matrix:
        dtype, group = (int8, 32) if _part(name) in ALWAYS_INT8 else (self._dtype, self._group)
        if dtype == f16:
            return DenseMatrix(np.resize(_random_values(), (n, k)) * np.float16(k**-0.5))
        if k % group:
            raise TilusError(f"rows of {k} weights in groups of {group}, expected a multiple")
        codes, spread = _random_codes(dtype)
        scale = np.float32(np.float16(1 / (spread * k**0.5)))
        return QuantizedMatrix(np.resize(codes, (n, k)), np.full((n, k // group), scale), None, dtype)


@functools.cache
def _random_values() -> npt.NDArray[np.float16]:
    """Of the order of one."""
    return np.random.default_rng(0).normal(size=_BLOCK).astype(np.float16)


@functools.cache
def _random_codes(dtype: DataType) -> tuple[npt.NDArray[np.uint8], float]:
    """And the size of the numbers that they stand for; a mixture asks for thousands of matrices."""
    numbers = dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8)).astype(np.float64)
    usable = np.flatnonzero(np.isfinite(numbers)).astype(np.uint8)
    chosen = np.random.default_rng(0).integers(0, 256, _BLOCK) % len(usable)
    return usable[chosen], float(np.sqrt(np.mean(numbers[usable] ** 2))) or 1.0


def _part(name: str) -> str:
    """`ffn_up` of `blk.3.ffn_up` and of `blk.3.ffn_up.5`."""
    parts = name.split(".")
    return parts[2] if len(parts) > 2 else parts[0]


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Of bytes; what the model may choose beside them are words, so that all of an answer is seen."""
    words = map("".join, itertools.product(string.ascii_lowercase, repeat=5))
    symbols = itertools.chain(sorted(pre_tokenizers.ByteLevel.alphabet()), words)
    vocabulary = {symbol: index for index, symbol in enumerate(itertools.islice(symbols, vocab_size))}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return Tokenizer(fast=fast, eos_ids=frozenset(), chat_template=None, special={}, vocab_size=vocab_size)
