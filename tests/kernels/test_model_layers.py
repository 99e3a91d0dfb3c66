"""The linear layers of models: shapes of well-known ones, files as the server packs them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tilus
from serving.loader import default_model, open_checkpoint
from serving.packing import FUSED, stack_alike
from serving.quantize import with_short_scales
from tilus.errors import TilusError
from tilus.kernels.model_layers import Layer, config_shapes, model_layers, weight_recipe
from tilus.kernels.quantize import WeightHeader, pack, recipe

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
}  # fmt: skip
# As their authors publish them.
MODELS: dict[str, tuple[dict[str, Any], set[tuple[int, int]]]] = {
    "Llama-3-8B": (LLAMA_3_8B, {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)}),
    "Llama-2-7B, no grouped queries": (
        LLAMA_3_8B | {"num_key_value_heads": None, "intermediate_size": 11008, "vocab_size": 32000},
        {(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)},
    ),
    "Qwen3-0.6B, heads wider than the model": (
        {
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
            "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
        },
        {(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)},
    ),
    "Mixtral-8x7B": (
        LLAMA_3_8B | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "vocab_size": 32000},
        {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32000, 4096)},
    ),
    "Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
            "moe_intermediate_size": 768, "num_experts": 128, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
        },
        {(5120, 2048), (2048, 4096), (1536, 2048), (2048, 768), (151936, 2048)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_known_models(name: str) -> None:
    settings, shapes = MODELS[name]
    found = config_shapes(settings, name)
    assert {(n, k) for _, n, k in found} == shapes and len(found) == 5


def test_blocks_without_experts_have_their_own_shapes() -> None:
    settings = MODELS["Qwen3-30B-A3B"][0] | {"mlp_only_layers": [0]}
    assert {(12288, 2048), (2048, 6144), (1536, 2048)} < {(n, k) for _, n, k in config_shapes(settings, "")}


def write_config(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B | changes))
    return path


def test_weights_are_packed_as_asked(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    layers = model_layers(path, weight_recipe("int4", "f16", 128), weight_recipe("int8", "f16", 32))
    assert layers == model_layers(tmp_path, recipe("int4", 128), recipe("int8", 32))
    assert layers[0] == Layer("qkv", 6144, 4096, WeightHeader(tilus.int4, (6144, 4096), 128, "f16"))
    assert layers[-1] == Layer("lm_head", 128256, 4096, WeightHeader(tilus.int8, (128256, 4096), 32, "f16"))
    dense = model_layers(path, weight_recipe("bf16", "bf16"), None)
    assert {layer.weight for layer in dense} == {None} and len(dense) == 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uint4", WeightHeader(tilus.uint4, (6144, 4096), 128, "f16", "f16")),
        ("nf4", WeightHeader(tilus.uint4, (6144, 4096), 64, "f16", has_table=True)),
        ("mxfp4", WeightHeader(tilus.float4_e2m1, (6144, 4096), 32, "float8_e8m0", exact_in_f16=True)),
    ],
)
def test_schemes(tmp_path: Path, name: str, expected: WeightHeader) -> None:
    assert model_layers(write_config(tmp_path), weight_recipe(name, "f16"), None)[0].weight == expected


def test_a_gguf_file_is_as_the_server_packs_it() -> None:
    """SmolLM2-135M: headers of whole weights that are fused and packed, blocks and head; none besides."""
    path = default_model()
    weights = open_checkpoint(path).weights
    expected: set[WeightHeader] = set()
    for block in range(30):
        for parts in FUSED.values():
            rows = [weights.stored(f"blk.{block}.{part}").first_row for part in parts]
            kinds = {(row.dtype, row.group, row.mins is None) for row in rows if row is not None}
            if block and len(kinds) == 1:  # one block is enough for those
                continue
            for matrix in stack_alike([weights.matrix(f"blk.{block}.{part}") for part in parts]):
                expected.add(pack(with_short_scales(matrix, "")).header)
    expected.add(pack(with_short_scales(weights.matrix("token_embd"), "")).header)
    layers = model_layers(path, None, None)
    assert {layer.weight for layer in layers} == expected
    assert {layer.weight.shape for layer in layers if layer.weight} == {
        (960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "has architecture MambaForCausalLM, expected one of LlamaForCausalLM, ",
        ),
        ({"architectures": None}, "has architecture (none), expected one of LlamaForCausalLM, "),
        ({"hidden_size": None}, "has no hidden_size, expected a positive whole number"),
        ({"intermediate_size": -1}, "has intermediate_size = -1, expected a positive whole number"),
        ({"vocab_size": "many"}, "has vocab_size = 'many', expected a positive whole number"),
        ({"num_attention_heads": True}, "has num_attention_heads = True, expected a positive whole number"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_config(tmp_path, **changes)
    with pytest.raises(TilusError) as raised:
        model_layers(path, recipe("int4"), None)
    assert raised.value.message.startswith(f"{path} {message}")


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TilusError, match=r"there is no file .*config\.json"):
        model_layers(tmp_path, None, None)
    with pytest.raises(TilusError, match=r"there is no file .*absent\.gguf"):
        model_layers(tmp_path / "absent.gguf", None, None)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(TilusError, match="is not read as JSON"):
        model_layers(tmp_path, None, None)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(TilusError, match="holds a list, expected an object"):
        model_layers(tmp_path, None, None)
    with pytest.raises(TilusError, match="unknown weight type 'int9'"):
        weight_recipe("int9", "f16")
    with pytest.raises(TilusError, match="scheme 'zero' for weights of f16, which are not quantised"):
        weight_recipe("f16", "f16", None, "zero")
