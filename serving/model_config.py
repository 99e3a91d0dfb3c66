"""What a decoder computes, as numbers, and how a config.json says it; what GGUF files say is put into the same words (`gguf`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.architectures import QKV, Architecture, by_huggingface
from serving.rope import Rope, rope_of
from tilus.errors import TilusError

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# What a config.json may say that would change the computation, and the only value that is computed.
_ONLY: dict[str, tuple[object, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
}


@dataclass(frozen=True)
class LayerAttention:
    """Of one layer. window: how many tokens one sees at most, the last ones, itself included; None: all."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True)
class Experts:
    """Of layers whose feed-forward is a mixture. active: those that compute a token. ffn_size: of one expert. normalized: whether
    the weights of a token's experts are divided by their sum."""

    count: int
    active: int
    ffn_size: int
    normalized: bool


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder computes, beside its architecture. Raises TilusError when the numbers contradict each other.

    attention: of the layers, over and over. attention_scale: what scores are multiplied with. attention_cap, final_cap: scores
    (logits) x become cap * tanh(x / cap). biases: the matrices of a layer that have one. experts: None for dense layers.
    """

    architecture: Architecture
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    attention: tuple[LayerAttention, ...]
    attention_scale: float
    attention_cap: float | None = None
    final_cap: float | None = None
    biases: tuple[str, ...] = ()
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise TilusError(
                f"the model has {self.num_heads} query heads and {self.num_kv_heads} key-value heads, "
                "but the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise TilusError(f"the model's head_dim is {self.head_dim}, but rotary embedding needs an even one")
        if self.experts is not None and not 1 <= self.experts.active <= self.experts.count:
            raise TilusError(
                f"{self.experts.active} of {self.experts.count} experts compute a token, but must be at least one of them"
            )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different ones."""
        return tuple(dict.fromkeys(layer.rope for layer in self.attention))

    @property
    def embedding_scale(self) -> float:
        """What rows of the embedding are multiplied with."""
        return self.hidden_size**0.5 if self.architecture.scales_embedding else 1.0

    def attention_of(self, layer: int) -> LayerAttention:
        return self.attention[layer % len(self.attention)]

    @property
    def kv_values_per_token(self) -> int:
        """Elements that one token keeps in the cache, over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim


def model_config(settings: dict[str, Any], source: str) -> ModelConfig:
    """What the model computes that a config.json describes; raises TilusError, by name, for what is not supported. source: what
    errors call the model."""
    architecture = by_huggingface((settings.get("architectures") or ["(none)"])[0], source)
    for key, supported in _ONLY.items():
        if settings.get(key) is not None and settings[key] not in supported:
            raise TilusError(f"{source} has {key} = {settings[key]!r}, which is not supported")
    activation = settings.get("hidden_activation") or settings.get("hidden_act") or "silu"
    if ACTIVATIONS.get(activation) != architecture.activation:
        raise TilusError(f"{source} has hidden_act = {activation!r}, which is not supported")
    try:
        heads = int(settings["num_attention_heads"])
        head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
        return ModelConfig(
            architecture=architecture,
            hidden_size=settings["hidden_size"],
            num_layers=settings["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            ffn_size=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            max_positions=settings["max_position_embeddings"],
            rms_eps=settings["rms_norm_eps"],
            attention=_attention(architecture, settings, head_dim, source),
            attention_scale=settings.get("attention_multiplier")
            or (settings.get("query_pre_attn_scalar") or head_dim) ** -0.5,
            attention_cap=settings.get("attn_logit_softcapping"),
            final_cap=settings.get("final_logit_softcapping"),
            biases=_biases(architecture, settings),
            experts=_experts(settings) if architecture.experts else None,
        )
    except KeyError as error:
        raise TilusError(f"{source} has no key {error}, which a {architecture.huggingface} needs") from error


def _attention(
    architecture: Architecture, settings: dict[str, Any], head_dim: int, source: str
) -> tuple[LayerAttention, ...]:
    """Of as many layers as differ."""
    max_positions = settings["max_position_embeddings"]

    def rope(kind: str) -> Rope:
        return rope_of(_rope_parameters(architecture, settings, kind), head_dim, max_positions, source)

    full = LayerAttention(rope("full_attention"))
    kinds = _layer_kinds(architecture, settings)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise TilusError(f"{source} has layers of type {', '.join(sorted(unknown))}, which are not supported")
    if "sliding_attention" not in kinds:
        return (full,)
    sliding = LayerAttention(rope("sliding_attention"), settings["sliding_window"])
    return tuple(sliding if kind == "sliding_attention" else full for kind in kinds)


def _layer_kinds(architecture: Architecture, settings: dict[str, Any]) -> Sequence[str]:
    """Full or sliding attention, of as many layers as differ."""
    period = settings.get("sliding_window_pattern") or architecture.window_period
    if settings.get("sliding_window") is None or not settings.get("use_sliding_window", period > 0):
        return ["full_attention"]
    if settings.get("layer_types") is not None:
        return settings["layer_types"]
    if not period:
        first = settings["max_window_layers"]
        return ["full_attention"] * first + ["sliding_attention"] * (settings["num_hidden_layers"] - first)
    return ["sliding_attention"] if period == 1 else ["sliding_attention"] * (period - 1) + ["full_attention"]


def _rope_parameters(architecture: Architecture, settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """As transformers 5 writes them, for all layers or for each kind; or as older versions did."""
    parameters = settings.get("rope_parameters")
    if parameters is not None:
        parameters = parameters.get(kind, parameters)
        return {"rope_theta": settings.get("rope_theta", 10000.0), **parameters}
    if kind == "sliding_attention" and architecture.local_theta is not None:
        return {"rope_theta": settings.get("rope_local_base_freq", architecture.local_theta)}
    return {"rope_theta": settings.get("rope_theta", 10000.0), **(settings.get("rope_scaling") or {})}


def _biases(architecture: Architecture, settings: dict[str, Any]) -> tuple[str, ...]:
    if "biases" in settings:  # which GGUF files list
        return tuple(settings["biases"])
    attention = (*QKV, "attn_output") if settings.get("attention_bias") else architecture.biases
    return (*attention, *(("ffn_gate", "ffn_up", "ffn_down") if settings.get("mlp_bias") else ()))


def _experts(settings: dict[str, Any]) -> Experts:
    """Names are those of Mixtral or Qwen3."""
    is_mixtral = "num_local_experts" in settings
    return Experts(
        count=settings["num_local_experts" if is_mixtral else "num_experts"],
        active=settings["num_experts_per_tok"],
        ffn_size=settings["intermediate_size" if is_mixtral else "moe_intermediate_size"],
        normalized=is_mixtral or bool(settings.get("norm_topk_prob", False)),
    )
