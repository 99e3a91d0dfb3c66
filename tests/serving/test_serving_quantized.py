"""The server on quantised checkpoints: a tiny Llama in every format against transformers on the dense weights.

Each format's tensors are made here from random codes, with the formula of its description beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quants
from safetensors.torch import load_file, save_file
from test_serving_loader import write_gguf
from tiny_llama import CPU, TINY, tiny_tensors, write_tiny
from torch_kernels import TorchKernels

import tilus.kernels
from serving.core import Batch, BatchItem, SamplingParams
from serving.loader import open_checkpoint
from serving.model import load_model
from serving.step_inputs import step_tensors
from tilus.errors import TilusError

PAGE = 16
TOKENS = np.random.default_rng(11).integers(0, 256, 21).tolist()
Parts = dict[str, torch.Tensor]
GROUP = 32


class DenseKernels(TorchKernels):
    """The oracle kernels on weights of any scheme, without rounding activations."""

    activations = (torch.float32,)

    def pack(self, matrix, device, *, gated=False):
        codes = torch.from_numpy(matrix.codes.astype(np.int64))
        table = (
            matrix.table
            if matrix.table is not None
            else matrix.dtype.decode(np.arange(matrix.dtype.num_codes, dtype=np.uint8))
        )
        numbers = torch.from_numpy(np.asarray(table, np.float64))[codes].view(*matrix.scales.shape, -1)
        if matrix.zeros is not None:
            numbers = numbers - torch.from_numpy(matrix.zeros.astype(np.float64))[..., None]
        dense = numbers * torch.from_numpy(matrix.scales.astype(np.float64) * matrix.global_scale)[..., None]
        if matrix.mins is not None:
            dense = dense + torch.from_numpy(matrix.mins.astype(np.float64))[..., None]
        dense = dense.view(codes.shape)
        if matrix.columns is not None:
            dense = torch.empty_like(dense).index_copy_(1, torch.from_numpy(matrix.columns.astype(np.int64)), dense)
        return dense

    def linear(self, x, weight, *, out_dtype=torch.float32, **options):
        return super().linear(x, weight, out_dtype=torch.float32, **options)

    def round(self, values, dtype=None):
        return values.float()


def half_scales(rng: np.random.Generator, *shape: int, size: float) -> torch.Tensor:
    """Positive numbers of float16, and of bfloat16 where size is a power of two."""
    return torch.from_numpy((rng.integers(64, 128, shape) * (size / 64)).astype(np.float16).astype(np.float32))


def expand(scales: torch.Tensor, width: int) -> torch.Tensor:
    return scales.repeat_interleave(width // scales.shape[1], 1)


def to_words(codes: torch.Tensor) -> torch.Tensor:
    """int32 words of eight 4-bit codes along the last axis, lowest bits first."""
    eights = codes.view(*codes.shape[:-1], -1, 8).long()
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def gptq(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    """With activation order: every column says which group it belongs to."""
    codes = torch.from_numpy(rng.integers(0, 16, (n, k)))
    zeros = torch.from_numpy(rng.integers(1, 16, (n, k // GROUP)))
    scales = half_scales(rng, n, k // GROUP, size=2**-6)
    groups = torch.from_numpy(
        np.random.default_rng(k).permutation(np.arange(k) // GROUP)
    )  # as the parts of a fused layer share
    parts = {"qweight": to_words(codes).T, "qzeros": to_words((zeros - 1).T.contiguous()), "scales": scales.T.half(),
             "g_idx": groups.int(), "bias": torch.zeros(n, dtype=torch.float16)}  # fmt: skip
    assert parts["qweight"].shape == (k // 8, n)
    return parts, scales[:, groups] * (codes - zeros[:, groups])


def awq(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    codes = torch.from_numpy(rng.integers(0, 16, (n, k)))
    zeros = torch.from_numpy(rng.integers(0, 16, (n, k // GROUP)))
    scales = half_scales(rng, n, k // GROUP, size=2**-6)

    def pack(values: torch.Tensor) -> torch.Tensor:
        rows = values.T.reshape(values.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return to_words(rows.reshape(values.shape[1], -1))

    parts = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales.T.half()}
    return parts, expand(scales, k) * (codes - expand(zeros, k))


def packed_int4(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    codes = torch.from_numpy(rng.integers(0, 16, (n, k)))
    scales = half_scales(rng, n, k // GROUP, size=2**-6)
    parts = {"weight_packed": to_words(codes), "weight_scale": scales.bfloat16(), "weight_shape": torch.tensor([n, k])}
    return parts, expand(scales, k) * (codes - 8)


def packed_int4_zero(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    parts, _ = packed_int4(rng, n, k)
    codes = torch.from_numpy(rng.integers(0, 16, (n, k)))
    zeros = torch.from_numpy(rng.integers(0, 16, (n, k // GROUP)))
    packed_zeros = to_words(zeros.T.contiguous()).T
    scales = expand(parts["weight_scale"].float(), k)
    return parts | {"weight_packed": to_words(codes), "weight_zero_point": packed_zeros}, scales * (
        codes - expand(zeros, k)
    )


def int8(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    codes = torch.from_numpy(rng.integers(-128, 128, (n, k), np.int8))
    scales = half_scales(rng, n, 1, size=2**-10)
    return {"weight": codes, "weight_scale": scales.half()}, scales * codes


def fp8(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    weight = torch.from_numpy(rng.normal(0, 1, (n, k))).to(torch.float8_e4m3fn)
    scales = half_scales(rng, n, 1, size=2**-4)
    return {"weight": weight, "weight_scale": scales.bfloat16()}, scales * weight.float()


def fp8_blocks(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    weight = torch.from_numpy(rng.normal(0, 1, (n, k))).to(torch.float8_e4m3fn)
    scales = half_scales(rng, -(-n // 64), k // GROUP, size=2**-4)
    parts = {"weight": weight, "weight_scale_inv": scales}
    return parts, scales.repeat_interleave(64, 0)[:n].repeat_interleave(GROUP, 1) * weight.float()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    codes = torch.from_numpy(rng.integers(0, 16, (n, k), np.uint8))
    scales = torch.from_numpy(rng.uniform(64, 448, (n, k // 16))).to(torch.float8_e4m3fn)
    parts = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scales,
             "weight_global_scale": torch.tensor([4096.0])}  # fmt: skip
    return parts, expand(scales.float(), k) / 4096 * E2M1[codes.long()]


def mxfp4(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    codes = torch.from_numpy(rng.integers(0, 16, (n, k), np.uint8))
    exponents = torch.from_numpy(rng.integers(121, 125, (n, k // 32), np.uint8))
    parts = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": exponents}
    return parts, torch.exp2(expand(exponents.float(), k) - 127) * E2M1[codes.long()]


def nf4(rng: np.random.Generator, n: int, k: int) -> tuple[Parts, torch.Tensor]:
    table = torch.from_numpy(np.sort(rng.uniform(-1, 1, 16)).astype(np.float16).astype(np.float32))
    codes = torch.from_numpy(rng.integers(0, 16, (n, k), np.uint8))
    absmax = half_scales(rng, n, k // GROUP, size=2**-3)
    flat = codes.flatten()
    state = {"quant_type": "nf4", "blocksize": GROUP, "dtype": "float16", "shape": [n, k]}
    parts = {
        "weight": (flat[::2] << 4 | flat[1::2])[:, None], "weight.absmax": absmax.flatten(), "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    return parts, expand(absmax, k) * table[codes.long()]


def compressed(format: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
FORMATS: dict[str, tuple[Callable[..., tuple[Parts, torch.Tensor]], dict[str, object]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "int4": (packed_int4, compressed("pack-quantized", **INT4)),
    "int4-zero": (packed_int4_zero, compressed("pack-quantized", **INT4 | {"symmetric": False})),
    "int8": (int8, compressed("int-quantized", num_bits=8, type="int", strategy="channel")),
    "fp8": (fp8, compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "fp8-blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [64, GROUP]}),
    "nvfp4": (
        nvfp4,
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
    "mxfp4": (mxfp4, compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}


def write_quantized(directory: Path, format: str) -> dict[str, torch.Tensor]:
    """The tiny model with all layers' matrices in a format; embedding, head and norms stay as they are. Its dense weights."""
    make, settings = FORMATS[format]
    write_tiny(directory, quantization_config=settings, tie_word_embeddings=False)
    stored, dense = {}, tiny_tensors()
    dense["lm_head.weight"] = dense["model.embed_tokens.weight"].flip(0)
    rng = np.random.default_rng(5)
    for name, tensor in dense.items():
        if "_proj" not in name:
            stored[name] = tensor.clone()
            continue
        parts, values = make(rng, *tensor.shape)
        stored |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in parts.items()}
        dense[name] = values.float()
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    return dense


def logits_of(path: Path, kernels: object, dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """Logits of all of TOKENS, float32 [tokens, vocabulary], on the CPU."""
    model = load_model(open_checkpoint(path), kernels, device)  # pyright: ignore[reportArgumentType]
    heads, layers = TINY["num_key_value_heads"], TINY["num_hidden_layers"]
    pool = torch.full((2, layers, 2, PAGE, heads, TINY["head_dim"]), torch.nan, dtype=dtype, device=device)
    item = BatchItem("r", tuple(TOKENS), 0, (0, 1), SamplingParams(temperature=0), 0)
    step = step_tensors(Batch((item,)), PAGE, device)
    every_row = replace(step, last=torch.arange(len(TOKENS), dtype=torch.int32, device=device))
    return model.forward(every_row, pool.unbind(1)).cpu()


def dense_model(dense: dict[str, torch.Tensor]):
    """transformers' model in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**settings | {"tie_word_embeddings": "lm_head.weight" not in dense})).eval()
    missing = model.load_state_dict(dense, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    model.tie_weights()
    return model


def expected_logits(dense: dict[str, torch.Tensor], tokens: Sequence[int] = TOKENS) -> torch.Tensor:
    """transformers' logits, float32 [tokens, vocabulary]."""
    with torch.inference_mode():
        return dense_model(dense)(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("format", FORMATS)
def test_logits_are_those_of_the_dense_weights(tmp_path: Path, format: str) -> None:
    expected = expected_logits(write_quantized(tmp_path / "model", format))
    assert expected.std() > 0.5
    found = logits_of(tmp_path / "model", DenseKernels(), torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_files(tmp_path: Path, kind: str) -> None:
    """The embedding is rounded to float16, whose relative error of 2^-11 norms and layers hand on."""
    quantization = GGMLQuantizationType[kind]
    dense = tiny_tensors()
    for name, tensor in dense.items():
        if tensor.ndim == 2:
            dense[name] = torch.from_numpy(dequantize(quants.quantize(tensor.numpy(), quantization), quantization))
    found = logits_of(write_gguf(tmp_path / "tiny.gguf", quantization), DenseKernels(), torch.float32)
    expected = expected_logits(dense)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 2**-11 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "device"),
    [(format, "cpu") for format in ("gptq", "nvfp4", "nf4")]
    + [pytest.param(format, "cuda", marks=pytest.mark.gpu) for format in FORMATS],
)
def test_real_kernels(tmp_path: Path, format: str, device: str) -> None:
    """float16 activations round 8 tensors a layer, the embedding and the last norm, each value by at most 2^-11 of itself; the
    table of nf4 is rounded to float16 as well."""
    expected = expected_logits(write_quantized(tmp_path / "model", format))
    found = logits_of(tmp_path / "model", tilus.kernels, torch.float16, torch.device(device))
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < (8 * TINY["num_hidden_layers"] + 2) * 2**-11


def test_shards(tmp_path: Path) -> None:
    """The parts of a weight may lie in different files."""
    path = tmp_path / "model"
    dense = write_quantized(path, "awq")
    stored, weight_map = load_file(path / "model.safetensors"), {}
    for index in range(3):
        part = {name: stored[name] for name in sorted(stored)[index::3]}
        save_file(part, path / f"part-{index}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{index}.safetensors")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = expected_logits(dense)
    found = logits_of(path, DenseKernels(), torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_bias_that_matters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_quantized(path, "gptq")
    stored = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    stored[f"{name}.bias"][3] = 1
    save_file(stored, path / "model.safetensors")
    with pytest.raises(TilusError, match=rf"{name}\.bias is not zero, but LlamaForCausalLM has no such bias"):
        load_model(open_checkpoint(path), DenseKernels(), CPU)
