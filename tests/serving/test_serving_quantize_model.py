"""`tilus quantize`: what it writes is the model with each matrix rounded, in any format; failures leave nothing behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from test_serving_loader import write_gguf
from test_serving_quantized import DenseKernels, dense_model, expected_logits, logits_of, write_quantized
from tiny_llama import TINY, tiny_tensors, write_tiny

import serving.offline.calibrate
from serving.loader import open_checkpoint
from serving.offline.model_source import open_source
from serving.offline.quantize_model import quantize_model
from tilus.cli import main
from tilus.errors import TilusError
from tilus.kernels.quantize import CheckpointWriter, QuantizedMatrix, load, recipe

MATRICES = 14  # seven in each of two layers
FORMATS = {
    ("int4", 32, None): "pack-quantized",
    ("uint4", 32, "zero"): "pack-quantized",
    ("int8", 0, None): "pack-quantized",
    ("float8_e4m3", 0, None): "float-quantized",
    ("nvfp4", None, None): "nvfp4-pack-quantized",
    ("mxfp4", None, None): "mxfp4-pack-quantized",
    ("int3", 32, None): "tilus",
    ("uint4", 32, "minimum"): "tilus",
    ("nf4", 32, None): "tilus",
    ("float6_e3m2", 32, None): "tilus",
}
IDS = ["-".join(str(part) for part in key) for key in FORMATS]


@pytest.mark.parametrize(("name", "group", "scheme"), FORMATS, ids=IDS)
def test_every_matrix_is_rounded_and_the_rest_stays(
    tmp_path: Path, tiny_directory: Path, name: str, group: int | None, scheme: str | None
) -> None:
    chosen = recipe(name, group, scheme)
    report = quantize_model(tiny_directory, tmp_path / "out", chosen)
    assert (report.format, report.num_matrices) == (FORMATS[name, group, scheme], MATRICES)
    found, dense = load(tmp_path / "out"), tiny_tensors()
    assert set(found) == set(dense)
    squares = [0.0, 0.0]
    for key, tensor in dense.items():
        if "_proj" not in key:
            np.testing.assert_array_equal(found[key], tensor)
            continue
        matrix = found[key]
        assert isinstance(matrix, QuantizedMatrix)
        np.testing.assert_array_equal(matrix.dequantize(), chosen.quantize(tensor.numpy()).dequantize())
        squares[0] += float(np.square(matrix.dequantize() - tensor.numpy()).sum())
        squares[1] += float(tensor.square().sum())
    assert report.error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert report.nbytes == sum(
        t.numel() * t.element_size() for t in load_file(tmp_path / "out/model.safetensors").values()
    )


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_the_server_reads_it(tmp_path: Path, tiny_directory: Path, name: str) -> None:
    quantize_model(tiny_directory, tmp_path / "out", recipe(name, 32))
    dense = tiny_tensors()
    for key, matrix in load(tmp_path / "out").items():
        if isinstance(matrix, QuantizedMatrix):
            dense[key] = torch.from_numpy(matrix.dequantize())
    expected = expected_logits(dense)
    found = logits_of(tmp_path / "out", DenseKernels(), torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    original, copy = (open_checkpoint(path) for path in (tiny_directory, tmp_path / "out"))
    messages = [{"role": "user", "content": "größer 12 ☃"}]
    assert copy.tokenizer.encode_chat(messages) == original.tokenizer.encode_chat(messages)
    assert copy.config == original.config


def test_a_gguf_file_becomes_the_directory_that_it_came_from(tmp_path: Path, tiny_directory: Path) -> None:
    """Rows of q and k are back in order; configuration, tokenizer and template are the same; float16 holds the embedding less
    exactly."""
    source = write_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    quantize_model(source, tmp_path / "out", recipe("int8", 32))
    found, dense = load(tmp_path / "out"), tiny_tensors()
    assert set(found) == set(dense)
    for key, tensor in dense.items():
        values = found[key]
        values = values.dequantize() if isinstance(values, QuantizedMatrix) else values
        rounding = 2**-11 if "embed" in key else 0
        np.testing.assert_allclose(values, tensor, rtol=rounding, atol=0)
    original, copy = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    messages = [{"role": "user", "content": "größer 12 ☃"}]
    assert copy.tokenizer.encode_chat(messages) == original.tokenizer.encode_chat(messages)
    assert copy.tokenizer.eos_ids == original.tokenizer.eos_ids
    assert replace(copy.config, rms_eps=0.0) == replace(original.config, rms_eps=0.0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in TINY if key not in ("rms_norm_eps", "torch_dtype")} == {
        key: value for key, value in TINY.items() if key not in ("rms_norm_eps", "torch_dtype")
    }


def test_a_quantised_model_may_be_quantised_again(tmp_path: Path) -> None:
    dense = write_quantized(tmp_path / "awq", "awq")
    quantize_model(tmp_path / "awq", tmp_path / "out", recipe("int8", 32))
    found = load(tmp_path / "out")
    for key, tensor in dense.items():
        matrix = found[key]
        if "_proj" in key:
            assert isinstance(matrix, QuantizedMatrix)
            np.testing.assert_array_equal(matrix.dequantize(), recipe("int8", 32).quantize(tensor).dequantize())
        else:
            np.testing.assert_array_equal(matrix, tensor)


def test_ignored_modules_and_other_files(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    (source / "README.txt").write_text("a model")
    (source / "pytorch_model.bin").write_text("other weights")
    (source / "quantize_config.json").write_text("{}")
    (source / "onnx").mkdir()
    ignore = ["model.layers.0.mlp.down_proj", r"re:.*layers\.1\.self_attn.*"]
    report = quantize_model(source, tmp_path / "out", recipe("int4", 32), ignore=ignore)
    assert report.num_matrices == MATRICES - 5
    plain = {
        name
        for name, value in load(tmp_path / "out").items()
        if not isinstance(value, QuantizedMatrix) and value.ndim == 2
    }
    attention = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}
    assert plain == {"model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", *attention}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {name.removesuffix(".weight") for name in plain} | {"lm_head"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.txt", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("shard_nbytes", [1, 20_000, 10**9])
def test_shards_hold_every_tensor_once(tmp_path: Path, shard_nbytes: int) -> None:
    rng = np.random.default_rng(0)
    matrices = {f"m.{i}": recipe("int4", 32).quantize(rng.normal(0, 1, (32 + i, 64))) for i in range(9)}
    with CheckpointWriter(tmp_path / "out", shard_nbytes) as writer:
        for name, matrix in matrices.items():
            writer.add_matrix(name, matrix)
        writer.finish({})
    for name, matrix in matrices.items():
        found = load(tmp_path / "out")[f"{name}.weight"]
        assert isinstance(found, QuantizedMatrix)
        np.testing.assert_array_equal(found.dequantize(), matrix.dequantize())
    shards = list((tmp_path / "out").glob("*.safetensors"))
    sizes = [sum(t.numel() * t.element_size() for t in load_file(path).values()) for path in shards]
    assert sum(sizes) == writer.nbytes
    assert len(shards) == {1: 9, 20_000: 1, 10**9: 1}[shard_nbytes] or max(sizes) <= shard_nbytes
    assert all(size <= max(shard_nbytes, 32 * 64) for size in sizes)


def test_groups_of_whole_rows_and_of_parts_are_told_apart(tmp_path: Path) -> None:
    """A matrix whose only group is its row, beside others with several: each keeps its description."""
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, width in (("wide", 128), ("narrow", 64)):
            writer.add_matrix(name, recipe("int4", 64).quantize(np.random.default_rng(1).normal(0, 1, (8, width))))
        writer.finish({})
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["wide"], ["narrow"]]
    assert [group["weights"]["strategy"] for group in groups.values()] == ["group", "channel"]
    assert {name: matrix.group for name, matrix in load(tmp_path / "out").items()} == {
        "wide.weight": 64,
        "narrow.weight": 64,
    }


TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so every day. " * 20


def test_calibration_changes_outputs_less(tmp_path: Path, tiny_directory: Path) -> None:
    """On the text itself, over the whole model."""
    (tmp_path / "text").write_text(TEXT)
    tokens = open_source(tiny_directory).tokenizer().encode(TEXT)[:200]
    calls: list[tuple[int, int]] = []

    def error(name: str, text: Path | None) -> float:
        def progress(done: int, total: int) -> None:
            calls.append((done, total))

        quantize_model(tiny_directory, tmp_path / name, recipe("int4", 32), calibration=text, progress=progress)
        dense = tiny_tensors()
        for key, matrix in load(tmp_path / name).items():
            if isinstance(matrix, QuantizedMatrix):
                dense[key] = torch.from_numpy(matrix.dequantize())
        return float((expected_logits(dense, tokens) - expected_logits(tiny_tensors(), tokens)).square().mean())

    assert error("calibrated", tmp_path / "text") < 0.7 * error("plain", None)
    assert calls == [(i + 1, MATRICES) for i in range(MATRICES)] * 2


def test_calibration_sees_the_inputs_of_rounded_layers(tmp_path: Path, tiny_directory: Path, monkeypatch) -> None:
    """The moments of each layer's q are those of its normed inputs in a model whose layers before are rounded."""
    seen: dict[str, np.ndarray] = {}
    plain = serving.offline.calibrate._moments

    def spy(layer, modules, states, arguments):
        found = plain(layer, modules, states, arguments)
        seen.update(found)
        return found

    monkeypatch.setattr(serving.offline.calibrate, "_moments", spy)
    (tmp_path / "text").write_text(TEXT)
    source = open_source(tiny_directory)
    names = [name for name in source.names() if "_proj" in name]
    rounded = serving.offline.calibrate.calibrate(
        source, names, recipe("int3", 32), tmp_path / "text", lambda done, total: None
    )
    tokens = source.tokenizer().encode(TEXT)
    dense = {
        name: torch.from_numpy(rounded[name].dequantize()) if name in rounded else t
        for name, t in tiny_tensors().items()
    }
    windows = torch.tensor(tokens[: len(tokens) // 512 * 512]).view(-1, 512)
    with torch.inference_mode():
        states = dense_model(dense)(windows, output_hidden_states=True).hidden_states
    assert set(seen) == set(names) == set(rounded)
    for layer in range(TINY["num_hidden_layers"]):
        x = states[layer].flatten(0, 1).double()
        norm = dense[f"model.layers.{layer}.input_layernorm.weight"]
        x = x / (x.square().mean(-1, keepdim=True) + TINY["rms_norm_eps"]).sqrt() * norm
        expected = (x.T @ x).numpy()
        found = seen[f"model.layers.{layer}.self_attn.q_proj.weight"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, args)])


def test_the_command(tmp_path: Path, tiny_directory: Path) -> None:
    result = run(tiny_directory, "-o", tmp_path / "out", "--dtype", "uint3", "--group", 32, "--ignore", "re:.*k_proj")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path}/out: 12 matrices as tilus, 4.00 bits a weight, ")
    assert "quantising" in result.stderr


def with_weight(directory: Path, name: str, value: torch.Tensor) -> Path:
    path = write_tiny(directory)
    save_file(tiny_tensors() | {name: value}, path / "model.safetensors")
    return path


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.full((160, 96), torch.nan), [], f"{UP} has 15360 weights that are not finite, the first nan at [0, 0]"),
        (torch.ones(160, 100), [], f"{UP}: groups of 32 do not divide K = 100"),
        (
            torch.ones(160, 96, dtype=torch.float64),
            [],
            f"{UP} has dtype float64, expected float32, float16 or bfloat16",
        ),
        (torch.full((160, 96), 1e9), [], f"{UP} needs a quantisation scale of "),
        (None, ["--dtype", "int12"], "unknown weight type 'int12'"),
        (
            None,
            ["--dtype", "int4", "--scheme", "zero"],
            "scheme 'zero' with codes of int4, expected symmetric, mx or nv",
        ),
        (None, ["--ignore", "re:.*"], "has no weight that is not ignored, so there is nothing to quantise"),
    ],
)
def test_failures_leave_nothing(tmp_path: Path, weight: torch.Tensor | None, options: list[str], message: str) -> None:
    source = write_tiny(tmp_path / "in") if weight is None else with_weight(tmp_path / "in", UP, weight)
    result = run(source, "-o", tmp_path / "out", "--group", 32, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, tiny_directory: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            assert len(list(tmp_path.iterdir())) == 1  # hidden, beside its place
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny_directory, tmp_path / "out", recipe("int4", 32), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path, tiny_directory: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    for target, message in (
        (tmp_path / "there", "there exists already\n  hint: choose another place, or remove it first"),
        (tmp_path / "file" / "out", "cannot write into "),
    ):
        with pytest.raises(TilusError) as caught:
            quantize_model(tiny_directory, target, recipe("int4", 32))
        assert message in str(caught.value)


def test_sources_and_texts_that_are_none(tmp_path: Path, tiny_directory: Path) -> None:
    with pytest.raises(TilusError, match=r"absent does not exist\n  hint: expected a directory or a \.gguf file"):
        quantize_model(tmp_path / "absent", tmp_path / "out", recipe("int4", 32))
    with pytest.raises(TilusError, match=r"has no config\.json, so it is no model in Hugging Face's format"):
        quantize_model(tmp_path, tmp_path / "out", recipe("int4", 32))
    (tmp_path / "text").write_text("too short")
    with pytest.raises(TilusError, match="has 9 tokens, expected at least 512"):
        quantize_model(tiny_directory, tmp_path / "out", recipe("int4", 32), calibration=tmp_path / "text")
    kind = write_tiny(tmp_path / "kind", model_type="flying")
    (tmp_path / "text").write_text(TEXT)
    with pytest.raises(TilusError, match="transformers does not know models of type 'flying'"):
        quantize_model(kind, tmp_path / "out", recipe("int4", 32), calibration=tmp_path / "text")
