"""What is written is read back the same: as compressed-tensors where that expresses a matrix, in tilus' own format always."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tilus.dtypes import bf16, f32, float4_e2m1, float6_e2m3, float8_e4m3, int2, int4, int5, int8, uint3, uint4
from tilus.errors import TilusError
from tilus.kernels.quantize import RECIPE_NAMES, QuantizedMatrix, load, quantize, recipe
from tilus.kernels.quantize.checkpoint import compressed_writer, native
from tilus.kernels.quantize.checkpoint.writer import write_safetensors

WEIGHT = np.random.default_rng(0).normal(0, 0.1, (40, 96)).astype(np.float32)
COLUMNS = np.random.default_rng(1).permutation(96).astype(np.int32)
MATRICES = {name: recipe(name, None if name in ("nvfp4",) else 32).quantize(WEIGHT) for name in RECIPE_NAMES}
MATRICES |= {
    "int4 row": quantize(WEIGHT, int4),
    "int8 bf16": quantize(WEIGHT, int8, 48, scale_dtype=bf16),
    "int2 f32": quantize(WEIGHT, int2, 32, scale_dtype=f32),
    "float8_e4m3 row": quantize(WEIGHT, float8_e4m3),
    "uint4 zero": quantize(WEIGHT, uint4, 32, "zero"),
    "uint3 zero": quantize(WEIGHT, uint3, 32, "zero"),
    "int8 mx": quantize(WEIGHT, int8, 32, "mx"),
    "mxfp4 of 96": quantize(WEIGHT, float4_e2m1, 96, "mx"),
    "int4 ordered": replace(quantize(WEIGHT, int4, 32), columns=COLUMNS),
    "nvfp4 with 6 bits": quantize(WEIGHT, float6_e2m3, 16, "nv"),
}
COMPRESSED = {
    "int2": "pack-quantized", "int2 f32": "pack-quantized", "int4": "pack-quantized", "int8": "pack-quantized",
    "int4 row": "pack-quantized", "int8 bf16": "pack-quantized", "uint4 zero": "pack-quantized",
    "float8_e4m3": "float-quantized", "float8_e4m3 row": "float-quantized", "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized", "mxfp6_e2m3": "mxfp6-pack-quantized", "mxfp8_e4m3": "mxfp8-quantized",
}  # fmt: skip


def assert_same(found: object, expected: QuantizedMatrix) -> None:
    assert isinstance(found, QuantizedMatrix)
    for name in ("codes", "scales", "mins", "zeros", "table", "columns"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        if getattr(expected, name) is not None:
            assert getattr(found, name).dtype == getattr(expected, name).dtype, name
    for name in ("dtype", "global_scale", "scale_dtype"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("name", MATRICES)
def test_our_own_format_keeps_everything(tmp_path: Path, name: str) -> None:
    tensors, header = native.store("a.b", MATRICES[name])
    write_safetensors(tmp_path / "model.safetensors", tensors)
    settings = {"quant_method": "tilus", "version": 1, "modules": {"a.b": header}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert list(load(tmp_path)) == ["a.b.weight"]
    assert_same(load(tmp_path)["a.b.weight"], MATRICES[name])


def test_which_matrices_compressed_tensors_expresses() -> None:
    assert {name: f for name, matrix in MATRICES.items() if (f := compressed_writer.format_of(matrix))} == COMPRESSED


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_keeps_everything(tmp_path: Path, name: str) -> None:
    matrix = MATRICES[name]
    write_safetensors(tmp_path / "model.safetensors", compressed_writer.store("a.b", matrix))
    group = {"targets": ["Linear"], "weights": compressed_writer.weights_of(matrix), "format": COMPRESSED[name]}
    settings = {"quant_method": "compressed-tensors", "format": COMPRESSED[name], "config_groups": {"group_0": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert_same(load(tmp_path)["a.b.weight"], matrix)


LIKE = {
    "int4": "ct-int4-group", "uint4 zero": "ct-int4-zero", "int4 row": "ct-int4-channel", "float8_e4m3 row": "ct-fp8-channel",
    "nvfp4": "ct-nvfp4", "mxfp4": "ct-mxfp4", "mxfp6_e2m3": "ct-mxfp6", "mxfp8_e4m3": "ct-mxfp8",
}  # fmt: skip


@pytest.mark.parametrize(("name", "directory"), LIKE.items())
def test_tensors_and_configuration_are_like_the_real_writers(tmp_path: Path, name: str, directory: str) -> None:
    """Names, types and shapes equal those in files that compressed-tensors wrote for a weight of the same shape."""
    write_safetensors(tmp_path / "model.safetensors", compressed_writer.store("layer", MATRICES[name]))
    data = Path(__file__).parents[1] / "data" / "checkpoints" / directory
    expected, found = load_file(data / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    kinds = [
        {key: (t.dtype, t.shape) for key, t in part.items() if key.startswith("layer.")} for part in (found, expected)
    ]
    assert kinds[0] == kinds[1]
    described = json.loads((data / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ]
    ours = compressed_writer.weights_of(MATRICES[name])
    assert {key: described[key] for key in ours} == ours


def test_packed_words_are_the_published_ones(tmp_path: Path) -> None:
    matrix = MATRICES["uint4 zero"]
    write_safetensors(tmp_path / "model.safetensors", compressed_writer.store("a", matrix))
    stored = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(stored["a.weight_packed"], files.words(matrix.codes, 4))
    assert matrix.zeros is not None
    np.testing.assert_array_equal(stored["a.weight_zero_point"].T, files.words(matrix.zeros.T, 4))
    np.testing.assert_array_equal(stored["a.weight_scale"].to(torch.float32), matrix.scales)
    assert stored["a.weight_shape"].tolist() == [40, 96]


HEADER = {"dtype": "int5", "scale_dtype": "f16", "shape": [40, 96]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": 2}, "quantization_config has version 2 of tilus's format, expected 1"),
        ({"modules": {}}, "a is stored quantised, but the quantization_config does not list it"),
        ({"modules": {"a": HEADER, "b": HEADER}}, "has no tensor b.weight_packed"),
        (
            {"modules": {"a": HEADER | {"dtype": "int9"}}},
            "the quantization_config's header of a is damaged: {'dtype': 'int9'",
        ),
        ({"modules": {"a": HEADER | {"shape": [40]}}}, "the quantization_config's header of a is damaged"),
        ({"modules": {"a": HEADER | {"shape": [40, 0]}}}, "the quantization_config's header of a is damaged"),
        (
            {"modules": {"a": HEADER | {"scale_dtype": "int8"}}},
            "a has scale_dtype 'int8', expected f16, bf16, f32, float8_e4m3",
        ),
        (
            {"modules": {"a": HEADER | {"shape": [40, 100]}}},
            r"a.weight_packed has shape \[40, 60\], expected \[40, 63\]",
        ),
        ({"modules": {"a": HEADER | {"scale_dtype": "bf16"}}}, "a.weight_scale has dtype F16, expected BF16"),
    ],
)
def test_damaged_headers_are_named(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    tensors, header = native.store("a", quantize(WEIGHT, int5, 32))
    assert header == HEADER
    write_safetensors(tmp_path / "model.safetensors", tensors)
    full = {"quant_method": "tilus", "version": 1, "modules": {"a": HEADER}} | settings
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": full}))
    with pytest.raises(TilusError, match=message):
        for value in load(tmp_path).values():
            assert value is not None


def test_an_order_that_is_no_permutation_is_refused(tmp_path: Path) -> None:
    tensors, header = native.store("a", replace(quantize(WEIGHT, int5, 32), columns=np.zeros(96, np.int32)))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    settings = {"quant_method": "tilus", "version": 1, "modules": {"a": header}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(TilusError, match=r"a\.weight_columns is no permutation of 0 to 95"):
        load(tmp_path)["a.weight"]
