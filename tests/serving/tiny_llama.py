"""A tiny Llama with random weights, in Hugging Face's format, over a vocabulary of single bytes.

Its weights are multiples of float16 scales by integers up to 127, so quantising them to int8 loses nothing: every
implementation of the same computation must agree on it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from serving_fakes import ManualClock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serving.config import EngineConfig
from serving.engine import Engine
from serving.loader import Checkpoint
from serving.model import Model
from serving.runner import TorchRunner

CPU = torch.device("cpu")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 160,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "torch_dtype": "float32",
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def lossless_weight(rng: np.random.Generator, rows: int, width: int, spread: float) -> torch.Tensor:
    """float32 [rows, width] that int8 in groups of 32 represents exactly."""
    codes = np.clip(np.rint(rng.normal(0, 40, (rows, width // 32, 32))), -127, 127)
    codes[..., 0] = 127 * rng.choice([-1, 1], codes.shape[:2])
    scales = (rng.uniform(0.5, 1.5, codes.shape[:2]) * spread / 40).astype(np.float16).astype(np.float32)
    return torch.from_numpy((codes * scales[..., None]).astype(np.float32).reshape(rows, width))


def tiny_tensors() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(7)
    hidden, ffn, kv = TINY["hidden_size"], TINY["intermediate_size"], TINY["num_key_value_heads"] * TINY["head_dim"]
    tensors = {"model.embed_tokens.weight": lossless_weight(rng, TINY["vocab_size"], hidden, 0.5)}
    tensors["model.norm.weight"] = torch.from_numpy(rng.uniform(0.5, 1.5, hidden).astype(np.float32))
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for layer in range(TINY["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (rows, width) in shapes.items():
            tensors[f"{prefix}{name}.weight"] = lossless_weight(rng, rows, width, 0.15)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.from_numpy(rng.uniform(0.5, 1.5, hidden).astype(np.float32))
    return tensors


def byte_tokenizer() -> Tokenizer:
    """256 bytes, then <unk>, <|im_start|>, <|im_end|>: every character beyond ASCII takes several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer


def write_tiny(directory: Path, **changes: object) -> Path:
    """The tiny model in `directory`, with some keys of config.json changed (None removes one)."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in (TINY | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": TEMPLATE})
    )
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    save_file(tiny_tensors(), directory / "model.safetensors", {"format": "pt"})
    return directory


def tiny_engine(model: Model, checkpoint: Checkpoint, **limits: int) -> Engine:
    config = EngineConfig(**({"num_pages": 64, "max_model_len": 256, "page_size": 4, "max_step_tokens": 32} | limits))
    runner = TorchRunner(model, config.num_pages, config.page_size, CPU)
    return Engine(runner, checkpoint.tokenizer, config, ManualClock())
