"""Models in GGUF files: their settings in the words of a config.json, and their tensors. `gguf_tokenizer` reads the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from serving.architectures import by_gguf, by_huggingface
from serving.model_config import ACTIVATIONS, ModelConfig
from serving.quantize import Rounding, StoredMatrix
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile, Matrix, QuantizedMatrix

# Layers of the Gemma models of 27B, whose scale of scores follows from another length than that of a head; files do not say it.
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}


def gguf_settings(file: GGUFFile) -> dict[str, Any]:
    """What a config.json would say of the model in a file; raises TilusError, by name, for what is not supported."""
    source, kind = str(file.path), file.text("general.architecture")
    architecture = by_gguf(kind, source)
    num_experts = file.integer(f"{kind}.expert_count", 0)
    if num_experts and kind == "llama":
        architecture = by_huggingface("MixtralForCausalLM", source)
    heads, hidden = file.integer(f"{kind}.attention.head_count"), file.integer(f"{kind}.embedding_length")
    layers, ffn_size = file.integer(f"{kind}.block_count"), file.integer(f"{kind}.feed_forward_length", 0)
    head_dim = file.integer(f"{kind}.attention.key_length", hidden // heads)
    for key, verb in (("attention.value_length", "has values of"), ("rope.dimension_count", "rotates")):
        found = file.integer(f"{kind}.{key}", head_dim)
        if found != head_dim:
            raise TilusError(f"{source} {verb} {found} of {head_dim} dimensions of a head, but must be all")
    settings = {
        "architectures": [architecture.huggingface],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": ffn_size,
        "vocab_size": file.tensor("token_embd.weight").shape[0],
        "max_position_embeddings": file.integer(f"{kind}.context_length"),
        "rms_norm_eps": file.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == architecture.activation),
        "attention_multiplier": file.number(f"{kind}.attention.scale", 0.0) or None,
        "query_pre_attn_scalar": hidden // heads if _SCALED_BY_HIDDEN.get(kind) == layers else None,
        "attn_logit_softcapping": file.number(f"{kind}.attn_logit_softcapping", 0.0) or None,
        "final_logit_softcapping": file.number(f"{kind}.final_logit_softcapping", 0.0) or None,
        "sliding_window": file.integer(f"{kind}.attention.sliding_window", 0) or None,
        "rope_theta": file.number(f"{kind}.rope.freq_base", 10000.0),
        "rope_local_base_freq": file.number(f"{kind}.rope.freq_base_swa", architecture.local_theta or 0.0) or None,
        "rope_scaling": _rope_scaling(file, f"{kind}.rope.scaling"),
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "biases": [name.split(".")[2] for name in file.tensors if name.startswith("blk.0.") and name.endswith(".bias")],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if num_experts:
        settings |= {
            "num_local_experts" if kind == "llama" else "num_experts": num_experts,
            "num_experts_per_tok": file.integer(f"{kind}.expert_used_count"),
            "moe_intermediate_size": file.integer(f"{kind}.expert_feed_forward_length", ffn_size),
            "norm_topk_prob": True,
        }
    return {key: value for key, value in settings.items() if value is not None}


def _rope_scaling(file: GGUFFile, prefix: str) -> dict[str, Any] | None:
    """factors: of each frequency, by which files say what "llama3" does to them."""
    scaling: dict[str, Any] = {}
    kind = file.text(f"{prefix}.type", "none")
    if kind != "none":
        scaling = {"rope_type": kind, "factor": file.number(f"{prefix}.factor")}
        if original := file.integer(f"{prefix}.original_context_length", 0):
            scaling["original_max_position_embeddings"] = original
    if "rope_freqs.weight" in file.tensors:
        scaling["factors"] = np.asarray(file.read("rope_freqs.weight")).tolist()
    return scaling or None


class GGUFWeights:
    """The tensors of a GGUF file. Quantised ones keep their codes; floats are rounded."""

    def __init__(self, file: GGUFFile, config: ModelConfig, rounding: Rounding) -> None:
        self._file = file
        self._config = config
        self._rounding = rounding

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self._file.tensors

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        return self.floats(name).reshape(-1)

    def bias(self, name: str) -> npt.NDArray[np.float32]:
        return self.floats(name, "bias").reshape(-1)

    def matrix(self, name: str) -> Matrix:
        matrix = self._quantized(name, self._file.read(*_stored(name)))
        order = self._halves(name, matrix.shape[0])
        return matrix if order is None else matrix.take_rows(order)

    def stored(self, name: str) -> StoredMatrix:
        tensor = self._file.tensor(_stored(name)[0])
        row, num_rows = self._quantized(name, self._file.first_row(tensor.name)), tensor.shape[-2]
        return StoredMatrix(tensor.format.is_float, row, num_rows, tensor.rows[:num_rows].nbytes)

    def floats(self, name: str, kind: str = "weight") -> npt.NDArray[np.float32]:
        """Any tensor's values, rows in Hugging Face's order."""
        found = self._file.read(*_stored(name, kind))
        values = found.dequantize() if isinstance(found, QuantizedMatrix) else found
        order = self._halves(name, values.shape[0])
        return values if order is None else values[order]

    def _quantized(self, name: str, found: QuantizedMatrix | npt.NDArray[np.float32]) -> Matrix:
        if isinstance(found, QuantizedMatrix):
            return found
        return self._rounding.of(name)(found, name)

    def _halves(self, name: str, num_rows: int) -> npt.NDArray[np.int64] | None:
        """Files of some architectures interleave the two halves of each head of q and k: the order that undoes it."""
        heads = {"attn_q": self._config.num_heads, "attn_k": self._config.num_kv_heads}.get(name.rpartition(".")[2])
        if heads is None or not self._config.architecture.interleaved:
            return None
        return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _stored(name: str, kind: str = "weight") -> tuple[str, int | None]:
    """The name in the file, and which matrix of a stack it is: those of all experts of a layer are one tensor."""
    match name.split("."):
        case ["blk", layer, part, expert]:
            return f"blk.{layer}.{part}_exps.{kind}", int(expert)
        case _:
            return f"{name}.{kind}", None
