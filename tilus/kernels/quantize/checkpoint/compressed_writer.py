"""Writing matrices as compressed-tensors, so that other engines read them. The format is described where it is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilus.dtypes import bf16, f16, f32, float4_e2m1, float6_e2m3, float8_e4m3, float8_e8m0, pack_bits
from tilus.kernels.quantize.checkpoint.integer import pack_words
from tilus.kernels.quantize.checkpoint.native import as_bytes, store_floats
from tilus.kernels.quantize.checkpoint.safetensors import Array, StoredTensor
from tilus.kernels.quantize.matrix import QuantizedMatrix

# Releases of compressed-tensors disagree on how numbers that do not divide 32 bits are packed.
_PACKED_NBITS = (2, 4, 8)
_BLOCKS = {
    (float4_e2m1, float8_e4m3, 16): "nvfp4-pack-quantized",
    (float4_e2m1, float8_e8m0, 32): "mxfp4-pack-quantized",
    (float6_e2m3, float8_e8m0, 32): "mxfp6-pack-quantized",
    (float8_e4m3, float8_e8m0, 32): "mxfp8-quantized",
}


def format_of(matrix: QuantizedMatrix) -> str | None:
    """The format that expresses a matrix exactly, or None."""
    if matrix.mins is not None or matrix.table is not None or matrix.columns is not None:
        return None
    block = _BLOCKS.get((matrix.dtype, matrix.scale_dtype, matrix.group))
    if block is not None and matrix.zeros is None:
        return block if block.startswith("nvfp4") or matrix.global_scale == 1 else None
    if matrix.scale_dtype not in (f16, bf16, f32) or matrix.global_scale != 1:
        return None
    if (
        matrix.dtype.is_integer
        and matrix.dtype.nbits in _PACKED_NBITS
        and matrix.dtype.is_signed == (matrix.zeros is None)
    ):
        return "pack-quantized"
    return "float-quantized" if matrix.dtype == float8_e4m3 and matrix.zeros is None else None


def weights_of(matrix: QuantizedMatrix) -> dict[str, Any]:
    """The configuration's description of weights like this one."""
    format = format_of(matrix) or ""
    # The formats of block scales have one group size, whatever K is.
    is_row = matrix.group == matrix.shape[1] and format in ("pack-quantized", "float-quantized")
    described: dict[str, Any] = {
        "num_bits": matrix.dtype.nbits,
        "type": "float" if matrix.dtype.is_float else "int",
        "symmetric": matrix.zeros is None,
        "strategy": "channel" if is_row else "tensor_group" if format.startswith("nvfp4") else "group",
        "dynamic": False,
    }
    if not is_row:
        described["group_size"] = matrix.group
    if format.startswith("mx"):
        described["scale_dtype"] = "torch.uint8"
    return described


def store(name: str, matrix: QuantizedMatrix) -> list[StoredTensor]:
    """The tensors of a module whose matrix has a format."""
    match format_of(matrix):
        case "pack-quantized":
            return _packed(f"{name}.weight", matrix)
        case "float-quantized" | "mxfp8-quantized":
            codes = StoredTensor(f"{name}.weight", "F8_E4M3", matrix.shape, as_bytes(matrix.codes))
        case _:
            stream = pack_bits(matrix.codes, matrix.dtype)
            codes = StoredTensor(f"{name}.weight_packed", "U8", stream.shape, as_bytes(stream))
    found = [codes, store_floats(f"{name}.weight_scale", matrix.scales, matrix.scale_dtype)]
    if matrix.scale_dtype == float8_e4m3:
        divisor = np.array([1 / matrix.global_scale], np.float32)
        found.append(StoredTensor(f"{name}.weight_global_scale", "F32", (1,), as_bytes(divisor)))
    return found


def _packed(weight: str, matrix: QuantizedMatrix) -> list[StoredTensor]:
    nbits = matrix.dtype.nbits
    flip = np.uint8(1 << (nbits - 1) if matrix.dtype.is_signed else 0)  # stored is the number + 2^(nbits - 1)
    found = [
        _store_int32(f"{weight}_packed", pack_words(matrix.codes ^ flip, nbits)),
        store_floats(f"{weight}_scale", matrix.scales, matrix.scale_dtype),
        StoredTensor(f"{weight}_shape", "I64", (2,), as_bytes(np.array(matrix.shape, np.int64))),
    ]
    if matrix.zeros is not None:
        zeros = np.ascontiguousarray(matrix.zeros.T.astype(np.uint8))
        found.append(_store_int32(f"{weight}_zero_point", np.ascontiguousarray(pack_words(zeros, nbits).T)))
    return found


def _store_int32(name: str, words: Array) -> StoredTensor:
    return StoredTensor(name, "I32", words.shape, as_bytes(words))
