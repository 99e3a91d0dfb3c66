"""Checkpoints that are damaged, contradict themselves or are of other kinds are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoint_files as files
import numpy as np
import pytest
import torch
from test_checkpoint_formats import CT_INT4, DATA, ct_module, ct_settings, load_file_torch, matrix_of

from tilus.errors import TilusError
from tilus.kernels.quantize import load

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def gptq_module(**changes: np.ndarray) -> dict[str, np.ndarray]:
    tensors = files.gptq_tensors(*files.random_module(32, 64, 32, 4), np.arange(64) // 32, 4, 1)
    return {f"layer.{part}": value for part, value in (tensors | changes).items()}


def awq_module() -> dict[str, np.ndarray]:
    tensors = files.awq_tensors(*files.random_module(32, 64, 32, 4))
    return {f"layer.{part}": value for part, value in tensors.items()}


def ct_layer(**changes: Any) -> dict[str, Any]:
    return ct_module("layer", 4, 32)[0] | {f"layer.{name}": value for name, value in changes.items()}


G_IDX = np.arange(64) // 32
REFUSED = {
    "another method": ({}, {"quant_method": "hqq"}, "is quantised by 'hqq', but supported are gptq, awq, compressed-tensors"),
    "no method": ({}, {"bits": 4}, "is quantised by 'None', but supported are"),
    "no configuration": (
        gptq_module(), None, r"has a tensor layer\.\w+, but config.json has no quantization_config that says what it means",
    ),
    "gptq marlin": (gptq_module(), GPTQ | {"checkpoint_format": "marlin"}, "GPTQ checkpoint_format 'marlin', but supported"),
    "gptq 5 bits": (gptq_module(), GPTQ | {"bits": 5}, "layer has 5 bits, but supported in GPTQ are 2, 3, 4, 8"),
    "gptq no bits": (gptq_module(), {"quant_method": "gptq"}, "quantization_config: bits is missing, expected an integer"),
    "gptq text": (gptq_module(), GPTQ | {"bits": "4"}, "quantization_config: bits is '4', expected an integer"),
    "gptq group": (gptq_module(), GPTQ | {"group_size": 48}, "layer: groups of 48 do not divide K = 64"),
    "gptq wrong bits": (gptq_module(), GPTQ | {"bits": 8}, r"layer.qweight has shape \[8, 32\], expected \[16, 32\]"),
    "gptq scales": (
        gptq_module(scales=np.ones((1, 32), np.float16)), GPTQ, r"layer.scales has shape \[1, 32\], expected \[2, 32\]",
    ),
    "gptq zeros": (
        gptq_module(qzeros=np.ones((2, 4), np.float32)), GPTQ, "layer.qzeros has dtype F32, expected I32",
    ),
    "gptq order": (
        gptq_module(g_idx=np.where(G_IDX == 1, 9, 0).astype(np.int32)), GPTQ, "layer.g_idx has a group 9, expected 0 to 1",
    ),
    "gptq uneven": (
        gptq_module(g_idx=np.r_[np.zeros(31), np.ones(33)].astype(np.int32)), GPTQ,
        "layer.g_idx puts 31 columns into group 0, expected 32 in each",
    ),
    "gptq nan": (
        gptq_module(scales=np.full((2, 32), np.nan, np.float16)), GPTQ, "layer.weight has scales that are not finite",
    ),
    "gptq excluded": (
        gptq_module(), GPTQ | {"dynamic": {"-:lay": {}}}, r"layer is excluded by dynamic\['-:lay'\], but is stored quantised",
    ),
    "gptq twice": (
        gptq_module() | {"layer.weight": np.ones((32, 64), np.float16)}, GPTQ, "has layer.weight both as it is and quantised",
    ),
    "gptq no zeros": (
        {name: value for name, value in gptq_module().items() if "qzeros" not in name}, GPTQ, "has no tensor layer.qzeros",
    ),
    "awq gemv": (awq_module(), AWQ | {"version": "gemv"}, "AWQ version 'gemv', but supported is 'gemm'"),
    "awq bits": (awq_module(), AWQ | {"bits": 8}, "AWQ with 8 bits, but supported are 4"),
    "awq group": (awq_module(), AWQ | {"group_size": 24}, "layer: groups of 24 do not divide K = 64"),
    "awq wrong group": (awq_module(), AWQ | {"group_size": 16}, r"layer.qzeros has shape \[2, 4\], expected \[4, 4\]"),
    "ct sparse": (ct_layer(), ct_settings(sparsity_config={"format": "sparse-24-bitmask"}), "with sparsity_config = {"),
    "ct rotated": (ct_layer(), ct_settings(transform_config={"config_groups": {}}), "with transform_config = {"),
    "ct format": (
        ct_layer(), ct_settings(format="marlin-24"),
        "layer is stored in compressed-tensors' format 'marlin-24', but supported are pack-quantized, ",
    ),
    "ct ignored": (
        ct_layer(), ct_settings(ignore=["re:lay.*"]), "layer is in the ignore list of the quantization_config, but is stored",
    ),
    "ct no target": (
        ct_layer(), ct_settings(config_groups={"a": {"targets": ["other"], "weights": CT_INT4}}),
        "layer is stored quantised, but no target of the quantization_config means it: other",
    ),
    "ct type": (
        ct_layer(), ct_settings(config_groups={"a": {"targets": ["Linear"], "weights": CT_INT4 | {"type": "float"}}}),
        "layer has weights of type 'float' in format pack-quantized, expected 'int'",
    ),
    "ct bits": (
        ct_layer(), ct_settings(config_groups={"a": {"targets": ["Linear"], "weights": CT_INT4 | {"num_bits": 9}}}),
        "layer.weight has 9 bits, expected 1 to 8",
    ),
    "ct shape": (
        ct_layer(weight_shape=np.array([8, 128])), ct_settings(),
        r"layer.weight_packed has shape \[8, 8\], expected \[8, 16\]",
    ),
    "ct global scale": (
        {"layer.weight_packed": np.zeros((4, 8), np.uint8), "layer.weight_global_scale": np.zeros(1, np.float32),
         "layer.weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn)},
        ct_settings(format="nvfp4-pack-quantized", config_groups={"a": {"targets": ["Linear"], "weights": {"type": "float"}}}),
        "layer.weight_global_scale is 0, expected a positive number",
    ),
    "ct nan codes": (
        {"layer.weight": torch.full((4, 8), torch.nan).to(torch.float8_e4m3fn), "layer.weight_scale": np.ones(1, np.float16)},
        ct_settings(format="float-quantized", config_groups={"a": {"targets": ["Linear"], "weights": {"type": "float",
                    "strategy": "tensor"}}}),
        "layer.weight has codes of float8_e4m3 that stand for no finite number",
    ),
    "ct numbers": (
        {"layer.weight": np.full((4, 8), 9, np.int8), "layer.weight_scale": np.ones((4, 1), np.float16)},
        ct_settings(format="int-quantized", config_groups={"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}),
        "layer.weight has numbers that do not fit 4 bits",
    ),
    "fp8 without blocks": ({}, {"quant_method": "fp8"}, r"fp8 with weight_block_size None, expected two positive numbers"),
    "fp8 scales": (
        {"layer.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), "layer.weight_scale_inv": np.ones((2, 1), np.float32)}, FP8,
        r"layer.weight_scale_inv has shape \[2, 1\], expected \[1, 1\]",
    ),
    "fp8 bytes": (
        {"layer.weight": np.ones((4, 8), np.uint8), "layer.weight_scale_inv": np.ones((1, 1), np.float32)}, FP8,
        "layer.weight has dtype U8, expected F8_E4M3",
    ),
    "mxfp4 nan": (
        {"e.up_blocks": np.zeros((1, 2, 1, 16), np.uint8), "e.up_scales": np.full((1, 2, 1), 255, np.uint8)},
        {"quant_method": "mxfp4"}, "e.0.up.weight has scales that are not finite",
    ),
    "bitsandbytes 8": ({}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes with load_in_8bit, but"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    tensors, settings, message = REFUSED[name]
    path = files.write(tmp_path, tensors, settings)
    with pytest.raises(TilusError, match=message):
        for value in load(path).values():
            assert value is not None


def test_modelopt_is_named(tmp_path: Path) -> None:
    path = files.write(tmp_path, {"layer.weight": np.ones((2, 2), np.float16)}, None)
    (path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(TilusError, match="is quantised by 'modelopt', but supported are gptq"):
        load(path)


def bitsandbytes_file(directory: Path, **state: object) -> Path:
    """The real nf4 file with another quantisation state."""
    tensors = load_file_torch(DATA / "bnb-nf4-nested")
    key = "layer.weight.quant_state.bitsandbytes__nf4"
    found = json.loads(bytes(tensors[key].tolist())) | state
    tensors[key] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)
    return files.write(directory, tensors, {"quant_method": "bitsandbytes"})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"shape": [40]}, r"layer has shape \[40\] in its quantisation state, expected \[N, K\]"),
        ({"blocksize": 64}, "layer: blocks of 64 do not divide K = 96, so that they span rows, which is not supported"),
        ({"shape": [40, 128]}, r"layer.weight has shape \[1920, 1\], expected \[2560, 1\]"),
        ({"nested_offset": None}, "nested scales with blocksize 256 and offset None, expected numbers"),
        ({"blocksize": "x"}, "quantization_config: blocksize is 'x', expected an integer"),
    ],
)
def test_damaged_states_of_bitsandbytes(tmp_path: Path, state: dict[str, object], message: str) -> None:
    path = bitsandbytes_file(tmp_path, **state)
    with pytest.raises(TilusError, match=message):
        matrix_of(path)


def test_a_state_that_is_cut_short(tmp_path: Path) -> None:
    tensors = load_file_torch(DATA / "bnb-nf4")
    key = "layer.weight.quant_state.bitsandbytes__nf4"
    for size in (0, 1, 50, len(tensors[key]) - 1):
        cut = tensors | {key: tensors[key][:size]}
        path = files.write(tmp_path / str(size), cut, {"quant_method": "bitsandbytes"})
        with pytest.raises(TilusError, match=f"{key} is not a JSON object"):
            matrix_of(path)
