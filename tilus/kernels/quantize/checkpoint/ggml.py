"""ggml's block formats: how rows of a GGUF tensor are packed, and their exact meaning.

A row is a sequence of blocks; see ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml. Quantised
formats are unpacked into codes and scales, never into floats: the kernels compute on the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, f16, f32, int4, int5, int6, int8, uint4, uint5
from tilus.errors import TilusError
from tilus.kernels.quantize.matrix import QuantizedMatrix

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockFormat:
    """block_size values take block_nbytes bytes. `is_float`: no blocks, the values themselves."""

    name: str
    block_size: int
    block_nbytes: int

    @property
    def is_float(self) -> bool:
        return self.block_size == 1


_FORMATS = {
    0: BlockFormat("F32", 1, 4),
    1: BlockFormat("F16", 1, 2),
    2: BlockFormat("Q4_0", 32, 18),
    3: BlockFormat("Q4_1", 32, 20),
    6: BlockFormat("Q5_0", 32, 22),
    7: BlockFormat("Q5_1", 32, 24),
    8: BlockFormat("Q8_0", 32, 34),
    12: BlockFormat("Q4_K", 256, 144),
    13: BlockFormat("Q5_K", 256, 176),
    14: BlockFormat("Q6_K", 256, 210),
    30: BlockFormat("BF16", 1, 2),
}
_OTHER_NAMES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def block_format(type_id: int, tensor: str) -> BlockFormat:
    """The format of a GGUF type id; raises TilusError, by name, for one that is not supported."""
    if type_id not in _FORMATS:
        supported = ", ".join(format.name for format in _FORMATS.values())
        raise TilusError(
            f"tensor {tensor} has GGUF type {_OTHER_NAMES.get(type_id, 'unknown')} (id {type_id}), "
            f"but supported are {supported}",
            hint="convert the model to one of these with llama-quantize",
        )
    return _FORMATS[type_id]


def to_floats(rows: _Bytes, format: BlockFormat) -> _Floats:
    """The values of any supported format, float32 [rows, values of a row]."""
    match format.name:
        case "F32":
            return rows.view("<f4").astype(np.float32)
        case "F16":
            return rows.view("<f2").astype(np.float32)
        case "BF16":
            return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
        case _:
            return unpack(rows, format).dequantize()


def unpack(rows: _Bytes, format: BlockFormat) -> QuantizedMatrix:
    """Codes and scales of a quantised format, exactly: `dequantize()` gives what ggml computes.

    The scales and minima of Q4_K, Q5_K and Q6_K are products that float16 does not hold: their type is f32.
    """
    blocks = rows.reshape(rows.shape[0], -1, format.block_nbytes)
    return _UNPACK[format.name](blocks)


def _half(data: _Bytes) -> _Floats:
    """float16 in the two bytes of the last axis, which vanishes."""
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float32)


def _matrix(
    codes: npt.NDArray[np.integer],
    scales: _Floats,
    mins: _Floats | None,
    dtype: DataType,
    scale_dtype: DataType = f16,
) -> QuantizedMatrix:
    """From [rows, blocks, values of a block] and [rows, blocks, groups of a block]."""
    num_rows = codes.shape[0]
    flat_mins = None if mins is None else mins.reshape(num_rows, -1)
    flat_codes = codes.astype(np.uint8).reshape(num_rows, -1)
    return QuantizedMatrix(flat_codes, scales.reshape(num_rows, -1), flat_mins, dtype, scale_dtype=scale_dtype)


def _nibbles(data: _Bytes) -> _Bytes:
    """All low nibbles of the last axis, then all high ones."""
    return np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=-1)


def _fifth_bits(data: _Bytes) -> _Bytes:
    """Bit i of four bytes, little endian, at the place of bit 4 of value i."""
    return np.unpackbits(data, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: _Bytes) -> QuantizedMatrix:
    # d * (q - 8): flipping the top bit of q gives q - 8 in two's complement. The same holds below for other widths.
    return _matrix(_nibbles(blocks[..., 2:]) ^ 8, _half(blocks[..., :2])[..., None], None, int4)


def _q4_1(blocks: _Bytes) -> QuantizedMatrix:
    scale, minimum = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    return _matrix(_nibbles(blocks[..., 4:]), scale[..., None], minimum[..., None], uint4)


def _q5_0(blocks: _Bytes) -> QuantizedMatrix:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return _matrix(codes ^ 16, _half(blocks[..., :2])[..., None], None, int5)


def _q5_1(blocks: _Bytes) -> QuantizedMatrix:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    scale, minimum = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    return _matrix(codes, scale[..., None], minimum[..., None], uint5)


def _q8_0(blocks: _Bytes) -> QuantizedMatrix:
    return _matrix(blocks[..., 2:], _half(blocks[..., :2])[..., None], None, int8)


def _k_scales(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """Scales and minima of the eight groups of 32: 6-bit factors, spread over 12 bytes, of two float16 numbers."""
    low, mid, top = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scale_codes = np.concatenate([low & 63, (top & 15) | ((low >> 6) << 4)], axis=-1)
    min_codes = np.concatenate([mid & 63, (top >> 4) | ((mid >> 6) << 4)], axis=-1)
    return _half(blocks[..., :2])[..., None] * scale_codes, -_half(blocks[..., 2:4])[..., None] * min_codes


def _q4_k(blocks: _Bytes) -> QuantizedMatrix:
    chunks = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    return _matrix(_nibbles(chunks), *_k_scales(blocks), uint4, f32)


def _q5_k(blocks: _Bytes) -> QuantizedMatrix:
    # Group i of 32 values has bit i of the 32 bytes before the nibbles as its fifth bits.
    nibbles = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 8, 32)
    fifth = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _matrix(nibbles | fifth << np.uint8(4), *_k_scales(blocks), uint5, f32)


def _q6_k(blocks: _Bytes) -> QuantizedMatrix:
    # Two halves of 128 values: four quarters of 32 share 64 bytes of low nibbles and 32 bytes of upper bit pairs.
    lower = _nibbles(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))
    pairs = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    upper = (pairs >> np.array([[0], [2], [4], [6]], np.uint8)).astype(np.uint8)
    codes = lower | ((upper & 3) << 4).reshape(lower.shape)
    scales = _half(blocks[..., 208:])[..., None] * blocks[..., 192:208].view(np.int8)
    return _matrix(codes ^ 32, scales, None, int6, f32)


_UNPACK: dict[str, Callable[[_Bytes], QuantizedMatrix]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
