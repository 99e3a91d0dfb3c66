"""The two names of a Llama-like model's tensors: GGUF's, which the server uses, and Hugging Face's."""

from __future__ import annotations

from tilus.errors import TilusError

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def full_name(name: str) -> str:
    """Hugging Face's name of a tensor: `blk.3.attn_q` is `model.layers.3.self_attn.q_proj.weight`.

    Raises TilusError for a name that no such model has.
    """
    match name.split("."):
        case [part] if part in _NAMES:
            return f"{_NAMES[part]}.weight"
        case ["blk", layer, part] if layer.isdigit() and part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
        case _:
            raise TilusError(f"tensor {name} is none of a Llama-like model's")
