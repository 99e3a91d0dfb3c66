"""The families of models that are served: what each has beside a Llama, and the names of its tensors.

Tensors go by GGUF's names: `token_embd`, `blk.3.attn_q`, `output_norm`; those of expert 5 by `blk.3.ffn_up.5`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tilus.errors import TilusError

QKV = ("attn_q", "attn_k", "attn_v")
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL_NAMES = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate": "block_sparse_moe.experts.{}.w1",
    "ffn_up": "block_sparse_moe.experts.{}.w3",
    "ffn_down": "block_sparse_moe.experts.{}.w2",
}
_QWEN_MOE_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.experts.{}.gate_proj",
    "ffn_up": "mlp.experts.{}.up_proj",
    "ffn_down": "mlp.experts.{}.down_proj",
}


@dataclass(frozen=True)
class Architecture:
    """huggingface: the class that a config.json names. gguf: what GGUF files call it. names: Hugging Face's names of a layer's
    tensors where they are not a Llama's.

    biases: the linear layers that have one. qk_norm: heads of queries and keys are normed before they are rotated. post_norms:
    what attention and feed-forward give is normed before it is added to the residual stream. norm_offset: what is added to the
    weights of norms in Hugging Face's files. activation: of the gates, silu or gelu_tanh. scales_embedding: rows of the embedding
    are multiplied by the root of their length. tied: whether the embedding is the head where a config.json does not say.

    window_period: where layers have windows and nothing says which, all do but every so-manyth; 1: all, 0: none. local_theta: of
    the rotary embedding of layers with windows, where it is another one. interleaved: rows of q and k in GGUF files alternate
    between the halves of a head. experts: whether feed-forward layers are mixtures. wide: activations do not fit float16, whose
    largest number is 65504, and are bfloat16 instead.
    """

    huggingface: str
    gguf: str
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    scales_embedding: bool = False
    tied: bool = False
    window_period: int = 1
    local_theta: float | None = None
    interleaved: bool = False
    experts: bool = False
    wide: bool = False

    def full_name(self, name: str) -> str:
        """Hugging Face's name of a tensor: `blk.3.attn_q` is `model.layers.3.self_attn.q_proj.weight`.

        Raises TilusError for a name that no such model has.
        """
        names = _LAYER_NAMES | dict(self.names)
        match name.split("."):
            case [part] if part in _NAMES:
                return f"{_NAMES[part]}.weight"
            case ["blk", layer, part] if part in names and "{}" not in names[part]:
                return f"model.layers.{layer}.{names[part]}.weight"
            case ["blk", layer, part, expert] if "{}" in names.get(part, ""):
                return f"model.layers.{layer}.{names[part].format(expert)}.weight"
            case _:
                raise TilusError(f"tensor {name} is none of a model of architecture {self.huggingface}")


_GEMMA2 = Architecture(
    "Gemma2ForCausalLM", "gemma2", names=_GEMMA_NAMES, post_norms=True, norm_offset=1.0, activation="gelu_tanh",
    scales_embedding=True, tied=True, window_period=2, wide=True,
)  # fmt: skip
ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "llama", interleaved=True),
    Architecture("MistralForCausalLM", "llama", interleaved=True),
    Architecture("Qwen2ForCausalLM", "qwen2", biases=QKV, window_period=0),
    Architecture("Qwen3ForCausalLM", "qwen3", qk_norm=True, window_period=0),
    _GEMMA2,
    replace(
        _GEMMA2, huggingface="Gemma3ForCausalLM", gguf="gemma3", qk_norm=True, window_period=6, local_theta=10000.0
    ),
    Architecture("MixtralForCausalLM", "llama", names=_MIXTRAL_NAMES, interleaved=True, experts=True),
    Architecture("Qwen3MoeForCausalLM", "qwen3moe", names=_QWEN_MOE_NAMES, qk_norm=True, window_period=0, experts=True),
)


def by_huggingface(name: str, source: str) -> Architecture:
    """Raises: TilusError for a name that is none of theirs. source: what it calls the model."""
    return _find({a.huggingface: a for a in ARCHITECTURES}, name, source)


def by_gguf(name: str, source: str) -> Architecture:
    """The first one that GGUF files call so. Raises: TilusError for a name that is none of theirs."""
    return _find({a.gguf: a for a in reversed(ARCHITECTURES)}, name, source)


def _find(architectures: Mapping[str, Architecture], name: str, source: str) -> Architecture:
    if name not in architectures:
        raise TilusError(f"{source} has architecture {name!r}, but supported are " + ", ".join(sorted(architectures)))
    return architectures[name]
