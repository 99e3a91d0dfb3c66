"""Writes the checkpoints beside this file with the packages that define their formats: `python tests/data/checkpoints/write.py`.

Needs compressed-tensors 0.20 and bitsandbytes 0.50, which the tests do not: they only read the files. Each directory has a
module `layer` of 40 x 96 weights and a plain tensor, and `expected.safetensors` with what the package itself makes of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

HERE = Path(__file__).parent
N, K = 40, 96
MX = {"type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}

ARGUMENTS = {
    "ct-int4-group": ("pack-quantized", {"num_bits": 4, "group_size": 32}),
    "ct-int4-zero": ("pack-quantized", {"num_bits": 4, "group_size": 32, "symmetric": False}),
    "ct-int3-zero": ("pack-quantized", {"num_bits": 3, "group_size": 32, "symmetric": False}),
    "ct-int4-channel": ("pack-quantized", {"num_bits": 4, "group_size": -1}),
    "ct-int8-packed": ("pack-quantized", {"num_bits": 8, "group_size": -1, "symmetric": False}),
    "ct-int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "ct-int8-zero": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "ct-fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "ct-fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "ct-fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
    ),
    "ct-nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "ct-mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, **MX}),
    "ct-mxfp6": ("mxfp6-pack-quantized", {"num_bits": 6, **MX}),
    "ct-mxfp8": ("mxfp8-quantized", {"num_bits": 8, **MX}),
}


def save(name: str, tensors: dict[str, torch.Tensor], settings: dict[str, object], expected: torch.Tensor) -> None:
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"quantization_config": settings}, indent=1, default=str) + "\n")
    plain = {"norm.weight": torch.linspace(0.5, 1.5, 8, dtype=torch.bfloat16)}
    save_file({key: value.contiguous() for key, value in (tensors | plain).items()}, directory / "model.safetensors")
    save_file({"layer.weight": expected.float().contiguous()}, directory / "expected.safetensors")


def ranges(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of everything that shares a scale."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
        blocks = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.reshape(N, -1, args.group_size if args.strategy in ("group", "tensor_group") else K)
    return groups.amin(-1), groups.amax(-1)


def write_compressed(name: str, format: str, arguments: dict[str, object], weight: torch.Tensor) -> None:
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    state = {"weight": weight.clone()}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
    low, high = ranges(weight, args)
    scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state["weight_scale"] = scale.float() if format.startswith(("nv", "mx")) else scale.half().float()
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(format)
    compressed = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(compressed), scheme)["weight"]
    if not format.startswith(("nv", "mx")):
        compressed["weight_scale"] = compressed["weight_scale"].half()
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=format, quantization_status="compressed")
    settings = json.loads(config.model_dump_json())
    save(name, {f"layer.{key}": value for key, value in compressed.items()}, settings, expected)


def write_bitsandbytes(name: str, kind: str, nested: bool, weight: torch.Tensor) -> None:
    codes, state = bnb.quantize_4bit(weight, blocksize=32, quant_type=kind, compress_statistics=nested)
    parts = {f"layer.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    save(name, {"layer.weight": codes} | parts, settings, bnb.dequantize_4bit(codes, state))


def main() -> None:
    torch.manual_seed(1)
    weight = torch.randn(N, K) * 0.1
    for name, (format, arguments) in ARGUMENTS.items():
        write_compressed(name, format, arguments, weight)
    for name, kind, nested in (("bnb-nf4", "nf4", False), ("bnb-nf4-nested", "nf4", True), ("bnb-fp4", "fp4", False)):
        write_bitsandbytes(name, kind, nested, weight)


if __name__ == "__main__":
    main()
