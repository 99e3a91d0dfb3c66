"""tilus' own format, for what no other can express: any type of 1 to 8 bits with any scheme of `QuantizedMatrix`.

    "quantization_config": {"quant_method": "tilus", "version": 1, "modules": {"model.layers.0.mlp.up_proj":
        {"dtype": "uint3", "scale_dtype": "f16", "shape": [N, K], "global_scale": 1.0}, ...}}

A module X with G groups has X.weight_packed uint8 [N, ceil(K * bits / 8)], a row of codes as a stream of bits from the lowest up;
X.weight_scale [N, G] in scale_dtype (float8_e8m0 as uint8 exponents with bias 127); and, where the scheme has them,
X.weight_min like the scales, X.weight_zero_point int16 [N, G], X.weight_table float32 [2^bits], X.weight_columns int32 [K].
Their meaning is that of the fields of `QuantizedMatrix`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np

from tilus.dtypes import DTYPES, DataType, bf16, f16, f32, float8_e4m3, float8_e8m0, pack_bits, unpack_bits
from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint.safetensors import Array, Bytes, StoredTensor
from tilus.kernels.quantize.checkpoint.tensors import Module, Settings, Tensors, integer_setting
from tilus.kernels.quantize.matrix import Codes, Floats, QuantizedMatrix

METHOD, VERSION = "tilus", 1
_SCALE_DTYPES = {dtype.name: dtype for dtype in (f16, bf16, f32, float8_e4m3, float8_e8m0)}
_STORED_AS = {f16: "F16", bf16: "BF16", f32: "F32", float8_e4m3: "F8_E4M3", float8_e8m0: "U8"}
_OPTIONAL = ("min", "zero_point", "table", "columns")


def modules(tensors: Tensors, settings: Settings) -> dict[str, Module]:
    """The modules that the configuration lists."""
    version = integer_setting(settings, "version")
    if version != VERSION:
        raise TilusError(f"quantization_config has version {version} of {METHOD}'s format, expected {VERSION}")
    listed = cast(dict[str, Settings], settings.get("modules") or {})
    for name in tensors.modules(".weight_packed"):
        if name not in listed:
            raise TilusError(f"{name} is stored quantised, but the quantization_config does not list it")
    found: dict[str, Module] = {}
    for name, header in listed.items():
        names = [f"{name}.weight_{part}" for part in ("packed", "scale", *_OPTIONAL)]
        found[name] = Module(
            frozenset(part for part in names if part in tensors), partial(_read, tensors, name, header)
        )
    return found


def _read(tensors: Tensors, name: str, header: Settings) -> QuantizedMatrix:
    dtype, scale_dtype = DTYPES.get(str(header.get("dtype"))), _SCALE_DTYPES.get(str(header.get("scale_dtype")))
    match header.get("shape"), header.get("global_scale", 1.0):
        case [int(n), int(k)], (float() | int()) as global_scale if n > 0 < k and dtype is not None and dtype.is_small:
            pass
        case _:
            raise TilusError(f"the quantization_config's header of {name} is damaged: {dict(header)!r}")
    if scale_dtype is None:
        raise TilusError(f"{name} has scale_dtype {header.get('scale_dtype')!r}, expected {', '.join(_SCALE_DTYPES)}")
    data = tensors.array(f"{name}.weight_packed", ("U8",), (n, -(-k * dtype.nbits // 8)))
    scales = _floats(tensors, f"{name}.weight_scale", scale_dtype, (n, None))
    shape = scales.shape

    def optional(part: str, stored: str, size: tuple[int, ...]) -> Array | None:
        full_name = f"{name}.weight_{part}"
        return tensors.array(full_name, (stored,), size) if full_name in tensors else None

    has_min = f"{name}.weight_min" in tensors
    return QuantizedMatrix(
        unpack_bits(data, dtype, k),
        scales,
        _floats(tensors, f"{name}.weight_min", scale_dtype, shape) if has_min else None,
        dtype,
        zeros=optional("zero_point", "I16", shape),
        table=optional("table", "F32", (dtype.num_codes,)),
        columns=_permutation(optional("columns", "I32", (k,)), f"{name}.weight_columns"),
        global_scale=float(global_scale),
        scale_dtype=scale_dtype,
    )


def _permutation(columns: Array | None, name: str) -> Array | None:
    if columns is not None and not np.array_equal(np.sort(columns), np.arange(len(columns))):
        raise TilusError(f"{name} is no permutation of 0 to {len(columns) - 1}")
    return columns


def _floats(tensors: Tensors, name: str, dtype: DataType, shape: tuple[int | None, ...]) -> Floats:
    stored = tensors.take(name, (_STORED_AS[dtype],), shape)
    return float8_e8m0.decode(stored.codes()) if dtype == float8_e8m0 else stored.array()


def store_floats(name: str, values: Floats, dtype: DataType) -> StoredTensor:
    """Numbers of `dtype` (f16, bf16, f32, float8_e4m3, float8_e8m0) as a tensor to write."""
    encoded: Array = dtype.encode(values)
    return StoredTensor(name, _STORED_AS[dtype], values.shape, as_bytes(encoded))


def as_bytes(array: Array) -> Bytes:
    """The bytes of an array, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def store(name: str, matrix: QuantizedMatrix) -> tuple[list[StoredTensor], dict[str, Any]]:
    """The tensors of a module and its header in the configuration."""
    packed: Codes = pack_bits(matrix.codes, matrix.dtype)
    found = [
        StoredTensor(f"{name}.weight_packed", "U8", packed.shape, as_bytes(packed)),
        store_floats(f"{name}.weight_scale", matrix.scales, matrix.scale_dtype),
    ]
    if matrix.mins is not None:
        found.append(store_floats(f"{name}.weight_min", matrix.mins, matrix.scale_dtype))
    for part, array, stored in (
        ("zero_point", matrix.zeros, "I16"),
        ("table", matrix.table, "F32"),
        ("columns", matrix.columns, "I32"),
    ):
        if array is not None:
            found.append(StoredTensor(f"{name}.weight_{part}", stored, array.shape, as_bytes(array)))
    header: dict[str, Any] = {
        "dtype": matrix.dtype.name,
        "scale_dtype": matrix.scale_dtype.name,
        "shape": list(matrix.shape),
    }
    if matrix.global_scale != 1:
        header["global_scale"] = matrix.global_scale
    return found, header
