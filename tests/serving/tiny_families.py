"""Tiny models of every architecture with random weights, described as on the hub, also as GGUF files; and transformers' answers.

Names and shapes of tensors are those of transformers' own modules, which must find every tensor that they have in the file.
Weights are multiples of float16 scales by integers up to 127, as `tiny_llama` explains.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from safetensors.torch import load_file, save_file
from test_serving_loader import interleave
from tiny_llama import byte_tokenizer, lossless_weight

_SHARED: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
_SCALED = {"factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama 3": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED},
    },
    "llama with biases": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8},
    "qwen 2": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None, "num_attention_heads": 4,
        "use_sliding_window": False, "sliding_window": 8, "tie_word_embeddings": True,
    },
    "qwen 2 with windows": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None, "use_sliding_window": True,
        "sliding_window": 8, "max_window_layers": 1, "rope_scaling": {"type": "yarn", **_SCALED},
    },
    "qwen 3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": None},
    "gemma 2": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": None, "sliding_window": 8,
        "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
    },
    "gemma 3": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": None, "sliding_window": 8,
        "query_pre_attn_scalar": 24, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 100.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2,
        "sliding_window": None, "intermediate_size": 64,
    },
    "qwen 3 with experts": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 64, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


# Of random weights with which no expert is chosen by a hair.
_SEEDS = {"mixtral": 3, "qwen 3 with experts": 8}


def write_family(directory: Path, family: str, **changes: object) -> Path:
    """A model of a family as a directory, in the format of the hub, with some keys of config.json changed (None removes one)."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in (_SHARED | FAMILIES[family] | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    )
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    save_file(tensors_of(directory, _SEEDS.get(family, 5)), directory / "model.safetensors", {"format": "pt"})
    return directory


def tensors_of(directory: Path, seed: int) -> dict[str, torch.Tensor]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    rng = np.random.default_rng(seed)
    mixtral = model.config.model_type == "mixtral"
    offset = 0.0 if "gemma" in model.config.model_type else 1.0
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in [
        entry for key, value in model.state_dict().items() for entry in stored(key, tuple(value.shape), mixtral=mixtral)
    ]:
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("bias"):
            values = torch.from_numpy(rng.normal(0, 0.5, shape).astype(np.float32))
        elif "norm" in name:
            values = torch.from_numpy(rng.uniform(offset - 0.5, offset + 0.5, shape).astype(np.float32))
        else:
            values = lossless_weight(rng, *shape, 0.5 if "embed" in name else 0.15)
        tensors[name] = values
    return tensors


def stored(name: str, shape: tuple[int, ...], *, mixtral: bool) -> list[tuple[str, tuple[int, ...]]]:
    """A module's tensor as files hold it: of experts, one for each, gates and factors apart."""
    if "experts" not in name:
        return [(name.replace("mlp.gate.", "block_sparse_moe.gate.") if mixtral else name, shape)]
    prefix, _, kind = name.partition("mlp.experts.")
    count, rows, width = shape
    own = f"{prefix}block_sparse_moe.experts" if mixtral else f"{prefix}mlp.experts"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    if kind == "down_proj":
        return [(f"{own}.{e}.{names[2]}.weight", (rows, width)) for e in range(count)]
    return [(f"{own}.{e}.{part}.weight", (rows // 2, width)) for e in range(count) for part in names[:2]]


def transformers_logits(directory: Path, prompt: list[int]) -> torch.Tensor:
    """In float32, [tokens, vocabulary], of the model that is in a directory as a whole."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.inference_mode():
        return model.eval()(torch.tensor([prompt])).logits[0]


def write_gguf_family(path: Path, directory: Path, architecture: str) -> Path:
    """The model of a directory as a GGUF file, with the names that the package gguf gives to tensors."""
    settings, writer = json.loads((directory / "config.json").read_text()), GGUFWriter(str(path), architecture)
    add_sizes(writer, settings)
    add_vocabulary(writer)
    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, settings["num_hidden_layers"])
    experts: dict[str, list[np.ndarray]] = {}
    tensors = load_file(directory / "model.safetensors")
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        values = tensors[name].numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = interleave(values, settings[f"num_{'attention' if 'q_proj' in name else 'key_value'}_heads"])
        if "gemma" in architecture and "norm" in name:
            values = values + 1
        if ".experts." in name:
            module, _, part = re.sub(r"experts\.\d+", "experts", name).removesuffix(".weight").rpartition(".")
            experts.setdefault(f"{module}.{part}.weight", []).append(values)
            continue
        add_tensor(writer, names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    for name, matrices in experts.items():
        add_tensor(writer, names.get_name(name, try_suffixes=(".weight",)), np.stack(matrices))
    if settings.get("rope_scaling", {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", slowed(directory))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sizes(writer: GGUFWriter, settings: dict[str, Any]) -> None:
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    if "head_dim" in settings:
        writer.add_key_length(settings["head_dim"])
        writer.add_value_length(settings["head_dim"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])
    if "sliding_window" in settings:
        writer.add_sliding_window(settings["sliding_window"])
    if "attn_logit_softcapping" in settings:
        writer.add_attn_logit_softcapping(settings["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(settings["final_logit_softcapping"])
    if "num_experts_per_tok" in settings:
        writer.add_expert_count(settings.get("num_local_experts") or settings["num_experts"])
        writer.add_expert_used_count(settings["num_experts_per_tok"])
    if "moe_intermediate_size" in settings:
        writer.add_expert_feed_forward_length(settings["moe_intermediate_size"])


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray) -> None:
    """Matrices in Q8_0, in which the tiny weights lose nothing."""
    stored_as = GGMLQuantizationType.Q8_0 if values.ndim > 1 else GGMLQuantizationType.F32
    writer.add_tensor(name, quants.quantize(values, stored_as), raw_dtype=stored_as)


def add_vocabulary(writer: GGUFWriter) -> None:
    """Bytes, as `tiny_llama` has them."""
    vocabulary = sorted(byte_tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(token for token, _ in vocabulary), "Ġt"])
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["Ġ t"])  # the library writes no empty arrays
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)


def slowed(directory: Path) -> np.ndarray:
    """By how much each pair of a head turns slower than without scaling, from transformers."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(directory)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dim = 2 * len(scaled)
    plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    return (plain / scaled.numpy()).astype(np.float32)
