"""Readers of quantised checkpoints against the packages that define the formats, or against packers written for the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoint_files as files
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tilus.kernels.quantize import QuantizedMatrix, load, open_tensors

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
WRITTEN = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def matrix_of(directory: Path, name: str = "layer.weight") -> QuantizedMatrix:
    found = load(directory)[name]
    assert isinstance(found, QuantizedMatrix)
    return found


@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_real_writers_wrote(name: str) -> None:
    """compressed-tensors and bitsandbytes decode these files to the same numbers, bit for bit.

    For nvfp4 the package computes in bfloat16: two factors and a product, each rounded by at most 2^-9.
    """
    tensors = load(DATA / name)
    assert set(tensors) == {"layer.weight", "norm.weight"}
    expected = load_file(DATA / name / "expected.safetensors")["layer.weight"]
    rounding = 3 * 2.0**-9 if name == "ct-nvfp4" else 0
    np.testing.assert_allclose(matrix_of(DATA / name).dequantize(), expected, rtol=rounding, atol=0)
    norm = torch.linspace(0.5, 1.5, 8, dtype=torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(tensors["norm.weight"], norm)


def test_the_real_files_cover_every_format() -> None:
    assert len(WRITTEN) == 17
    found = {
        json.loads((DATA / name / "config.json").read_text())["quantization_config"].get("format") for name in WRITTEN
    }
    assert found == {
        None, "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
        "mxfp6-pack-quantized", "mxfp8-quantized",
    }  # fmt: skip


def test_nvfp4_exactly() -> None:
    stored = load_file_torch(DATA / "ct-nvfp4")
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat([table, -table])
    packed = stored["layer.weight_packed"].long()
    numbers = table[torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)]
    scales = stored["layer.weight_scale"].double() / stored["layer.weight_global_scale"].double()
    expected = numbers.view(40, -1, 16) * scales[..., None]
    matrix = matrix_of(DATA / "ct-nvfp4")
    np.testing.assert_allclose(matrix.dequantize(), expected.view(40, 96), rtol=2**-22)
    assert matrix.scale_dtype.name == "float8_e4m3" and matrix.group == 16


def load_file_torch(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load_torch

    return load_torch(directory / "model.safetensors")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["none", "sorted", "random"])
def test_gptq(tmp_path: Path, nbits: int, version: int, order: str) -> None:
    n, k, group = 64, 96, 32
    codes, zeros, scales = files.random_module(n, k, group, nbits, seed=nbits)
    groups = np.arange(k) // group
    if order == "random":
        groups = np.random.default_rng(3).permutation(groups)
    tensors = files.gptq_tensors(codes, zeros, scales, None if order == "none" else groups, nbits, version)
    settings = {"quant_method": "gptq", "bits": nbits, "group_size": group, "desc_act": order == "random"}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    path = files.write(tmp_path, {f"a.b.{part}": value for part, value in tensors.items()}, settings)
    matrix = matrix_of(path, "a.b.weight")
    np.testing.assert_allclose(matrix.dequantize(), files.decoded(codes, zeros, scales, groups), rtol=2**-22)
    assert (matrix.columns is None) == (order != "random")
    assert (matrix.dtype.name, matrix.group, matrix.scale_dtype.name) == (f"uint{nbits}", group, "f16")
    np.testing.assert_array_equal(matrix.scales, scales.astype(np.float32))


@pytest.mark.parametrize("group_size", [-1, 48])
def test_symmetric_gptq_has_signed_codes(tmp_path: Path, group_size: int) -> None:
    group = 96 if group_size == -1 else group_size
    codes, zeros, scales = files.random_module(32, 96, group, 4)
    zeros[:] = 8
    tensors = files.gptq_tensors(codes, zeros, scales, None, 4, 1)
    assert np.all(tensors["qzeros"] == 0x77777777)  # the constant that version 1 is known for
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True}
    matrix = matrix_of(files.write(tmp_path, {f"layer.{p}": v for p, v in tensors.items()}, settings))
    assert matrix.dtype.name == "int4" and matrix.zeros is None
    expected = files.decoded(codes, zeros, scales, np.arange(96) // group)
    np.testing.assert_allclose(matrix.dequantize(), expected, rtol=2**-22)


def test_gptq_zero_points_wrap_around() -> None:
    """Packers of version 1 store zero 0 as the largest code, and readers mask the sum."""
    codes, zeros, scales = files.random_module(32, 32, 32, 4)
    zeros[:] = 0
    assert np.all(files.gptq_tensors(codes, zeros, scales, None, 4, 1)["qzeros"] == -1)


def test_gptq_zero_point_zero(tmp_path: Path) -> None:
    codes, zeros, scales = files.random_module(32, 32, 32, 4)
    zeros[:] = 0
    tensors = files.gptq_tensors(codes, zeros, scales, None, 4, 1)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    matrix = matrix_of(files.write(tmp_path, {f"layer.{p}": v for p, v in tensors.items()}, settings))
    expected = files.decoded(codes, zeros, scales, np.zeros(32, int))
    np.testing.assert_allclose(matrix.dequantize(), expected, rtol=2**-22)


def test_gptq_overrides_and_older_configurations(tmp_path: Path) -> None:
    """`dynamic` of GPTQModel changes settings of some modules; AutoGPTQ once wrote quantize_config.json."""
    parts: dict[str, Any] = {}
    expected: dict[str, np.ndarray] = {}
    for name, nbits, group in (("l.0.up", 4, 32), ("l.1.up", 8, 16), ("l.2.up", 2, 32)):
        codes, zeros, scales = files.random_module(32, 64, group, nbits)
        tensors = files.gptq_tensors(codes, zeros, scales, None, nbits, 1)
        parts |= {f"{name}.{part}": value for part, value in tensors.items()}
        expected[f"{name}.weight"] = files.decoded(codes, zeros, scales, np.arange(64) // group)
    parts |= {"l.3.up.weight": np.ones((2, 4), np.float16), "l.0.up.bias": np.ones(32, np.float32)}
    settings = {"bits": 4, "group_size": 32, "dynamic": {r"+:l\.1\..*": {"bits": 8, "group_size": 16}, r"l\.2": {"bits": 2},
                "-:l.3": {}}}  # fmt: skip
    path = files.write(tmp_path, parts, None)
    (path / "quantize_config.json").write_text(json.dumps(settings))
    tensors = load(path)
    assert set(tensors) == {*expected, "l.3.up.weight", "l.0.up.bias"}
    for name, values in expected.items():
        np.testing.assert_allclose(matrix_of(path, name).dequantize(), values, rtol=2**-22)
    np.testing.assert_array_equal(tensors["l.3.up.weight"], np.ones((2, 4)))


@pytest.mark.parametrize("old_names", [False, True])
def test_awq(tmp_path: Path, old_names: bool) -> None:
    codes, zeros, scales = files.random_module(48, 96, 32, 4)
    tensors = {f"layer.{part}": value for part, value in files.awq_tensors(codes, zeros, scales).items()}
    if old_names:
        path = files.write(tmp_path, tensors, None)
        (path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}))
    else:
        path = files.write(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
    matrix = matrix_of(path)
    expected = files.decoded(codes, zeros, scales, np.arange(96) // 32)
    np.testing.assert_allclose(matrix.dequantize(), expected, rtol=2**-22)
    assert matrix.dtype.name == "uint4" and matrix.zeros is not None
    np.testing.assert_array_equal(matrix.zeros, zeros)


@pytest.mark.parametrize(("n", "k", "group"), [(256, 256, 128), (200, 192, 64), (64, 100, 4)])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_blocks(tmp_path: Path, n: int, k: int, group: int, scale_fmt: str) -> None:
    """Blocks of 128 x 128, partial at the edges."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-n // 128), -(-k // 128), generator=generator) + 0.01
    if scale_fmt == "ue8m0":
        scales = torch.exp2(torch.log2(scales).round())
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": scale_fmt}
    path = files.write(tmp_path, {"layer.weight": weight, "layer.weight_scale_inv": scales}, settings)
    matrix = matrix_of(path)
    full = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    np.testing.assert_array_equal(matrix.dequantize(), weight.float() * full)
    assert matrix.group == group
    assert matrix.scale_dtype.name == ("f32" if scale_fmt == "float" else "float8_e8m0")


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """transformers' own decoder; it gives [E, K, N]."""
    rng = np.random.default_rng(4)
    blocks = rng.integers(0, 256, (3, 8, 2, 16), np.uint8)
    exponents = rng.integers(110, 140, (3, 8, 2), np.uint8)
    tensors = {
        "m.experts.up_blocks": blocks,
        "m.experts.up_scales": exponents,
        "m.experts.up_bias": np.zeros((3, 8), np.float32),
    }
    path = files.write(tmp_path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["m.router"]})
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(exponents), dtype=torch.float32)
    found = load(path)
    assert set(found) == {"m.experts.up_bias", *(f"m.experts.{e}.up.weight" for e in range(3))}
    for e in range(3):
        matrix = matrix_of(path, f"m.experts.{e}.up.weight")
        np.testing.assert_array_equal(matrix.dequantize(), expected[e].T)
        assert matrix.scale_dtype.name == "float8_e8m0" and matrix.group == 32


CT_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def ct_module(name: str, nbits: int, group: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes, zeros, scales = files.random_module(8, 64, group, nbits, seed)
    tensors = {
        f"{name}.weight_packed": files.words(codes, nbits),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": np.array([8, 64]),
    }
    return tensors, files.decoded(codes, np.full_like(zeros, 1 << (nbits - 1)), scales, np.arange(64) // group)


def test_compressed_tensors_groups_targets_and_ignore_list(tmp_path: Path) -> None:
    """Names and patterns go before classes; each group has its own format; ignored and other modules are plain."""
    first, expected_first = ct_module("l.0.up", 4, 32, 1)
    second, expected_second = ct_module("l.1.up", 8, 64, 2)
    third = {
        "l.2.up.weight": np.arange(-32, 32, dtype=np.int8).reshape(1, 64),
        "l.2.up.weight_scale": np.float16([[0.5]]),
    }
    plain = {"lm_head.weight": np.ones((2, 3), np.float16), "norm.weight": np.ones(3, np.float32)}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "ignore": ["lm_head", "re:.*router.*"],
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": CT_INT4, "format": "pack-quantized"},
            "b": {
                "targets": ["re:l[.]1.*"],
                "weights": {"num_bits": 8, "strategy": "channel"},
                "format": "pack-quantized",
            },
            "c": {"targets": ["l.2.up"], "weights": {"num_bits": 8, "strategy": "channel"}, "format": "int-quantized"},
        },
    }
    path = files.write(tmp_path, first | second | third | plain, settings)
    tensors = load(path)
    assert set(tensors) == {"l.0.up.weight", "l.1.up.weight", "l.2.up.weight", "lm_head.weight", "norm.weight"}
    np.testing.assert_allclose(matrix_of(path, "l.0.up.weight").dequantize(), expected_first, rtol=2**-22)
    np.testing.assert_allclose(matrix_of(path, "l.1.up.weight").dequantize(), expected_second, rtol=2**-22)
    np.testing.assert_array_equal(matrix_of(path, "l.2.up.weight").dequantize()[0], np.arange(-32, 32) / 2)
    assert [open_tensors(path).is_quantized(name) for name in ("l.0.up.weight", "lm_head.weight")] == [True, False]


@given(st.permutations(np.repeat(np.arange(2), 32).tolist()))
def test_compressed_tensors_activation_order(tmp_path_factory: pytest.TempPathFactory, groups: list[int]) -> None:
    codes, zeros, scales = files.random_module(4, 64, 32, 4)
    zeros[:] = 8
    tensors = {
        "layer.weight_packed": files.words(codes, 4), "layer.weight_scale": scales, "layer.weight_shape": np.array([4, 64]),
        "layer.weight_g_idx": np.array(groups, np.int32),
    }  # fmt: skip
    path = files.write(tmp_path_factory.mktemp("ct"), tensors, ct_settings())
    expected = files.decoded(codes, zeros, scales, np.array(groups))
    np.testing.assert_allclose(matrix_of(path).dequantize(), expected, rtol=2**-22)


def ct_settings(**changes: object) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": CT_INT4}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": group}} | changes


def test_unused_activation_order(tmp_path: Path) -> None:
    tensors, expected = ct_module("layer", 4, 32)
    path = files.write(tmp_path, tensors | {"layer.weight_g_idx": np.full(64, -1, np.int32)}, ct_settings())
    np.testing.assert_allclose(matrix_of(path).dequantize(), expected, rtol=2**-22)
