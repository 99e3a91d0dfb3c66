"""Checkpoints of compressed-tensors (llm-compressor, vLLM), whose configuration says how the weights of which modules are stored.

Formats, with G groups along K (G = 1 for one scale a row):

- pack-quantized: weight_packed int32 [N, ceil(K * bits / 32)], a stream of bits along K, each q + 2^(bits - 1); weight_scale
  [N, G]; weight_zero_point int32 [ceil(N * bits / 32), G], packed along N in the same way; weight_g_idx int32 [K] or all -1.
- int-quantized, float-quantized, naive-quantized: weight int8 or float8_e4m3 [N, K]; weight_scale [N, G], [1], or one for each
  block of rows and columns; weight_zero_point int8 [N, G].
- nvfp4-pack-quantized: weight_packed uint8 [N, K / 2], low nibble first; weight_scale float8_e4m3 [N, K / 16];
  weight_global_scale float32 [1], which is divided by.
- mxfp4-pack-quantized, mxfp6-pack-quantized (E2M3), mxfp8-quantized: weight_packed uint8, a stream of bits (mxfp8: weight
  float8_e4m3); weight_scale uint8 [N, K / 32], exponents with bias 127.

Quantisation of activations is ignored: products with unrounded activations are only more exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from tilus.dtypes import DataType, float4_e2m1, float6_e2m3, float8_e4m3, float8_e8m0, unpack_bits
from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint.blocks import spread
from tilus.kernels.quantize.checkpoint.integer import integer_matrix, stored_order, unpack_words, words_for
from tilus.kernels.quantize.checkpoint.safetensors import FLOAT_DTYPES
from tilus.kernels.quantize.checkpoint.tensors import Module, Settings, Tensors, integer_setting
from tilus.kernels.quantize.matrix import Floats, QuantizedMatrix

_SCALES = ("F16", "BF16", "F32")
_LINEAR = ("Linear", "LinearBase")


def modules(tensors: Tensors, settings: Settings) -> dict[str, Module]:
    """Every module with a weight_scale, which must be one that the configuration quantises."""
    for key in ("sparsity_config", "transform_config"):
        value = settings.get(key)
        if value and cast(dict[str, Any], value).get("format") != "dense":
            raise TilusError(f"compressed-tensors with {key} = {value!r}, which is not supported")
    return {name: _module(tensors, name, settings) for name in tensors.modules(".weight_scale")}


def _module(tensors: Tensors, name: str, settings: Settings) -> Module:
    if any(matches(name, pattern) for pattern in cast(list[str], settings.get("ignore") or [])):
        raise TilusError(f"{name} is in the ignore list of the quantization_config, but is stored quantised")
    group = _config_group(name, cast(dict[str, Any], settings.get("config_groups") or {}))
    format = group.get("format") or settings.get("format")
    weights = cast(dict[str, Any], group.get("weights") or {})
    if format not in _READERS:
        raise TilusError(
            f"{name} is stored in compressed-tensors' format {format!r}, but supported are {', '.join(_READERS)}"
        )
    if weights.get("type", "int") != _TYPES.get(format, weights.get("type", "int")):
        raise TilusError(
            f"{name} has weights of type {weights.get('type')!r} in format {format}, expected {_TYPES[format]!r}"
        )
    names = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
    )
    parts = frozenset(f"{name}.{part}" for part in names if f"{name}.{part}" in tensors)
    return Module(parts, partial(_READERS[format], tensors, f"{name}.weight", weights))


def matches(module: str, pattern: str) -> bool:
    """Whether a target or an entry of `ignore` means this module: its name, `re:` and a pattern, or the class of all."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module or pattern in _LINEAR


def _config_group(module: str, groups: dict[str, Any]) -> dict[str, Any]:
    """The group that applies to a module; names and patterns go before classes."""
    targets = [(target, group) for group in groups.values() for target in cast(list[str], group.get("targets") or [])]
    for is_class in (False, True):
        for target, group in targets:
            if (target in _LINEAR) == is_class and matches(module, target):
                return group
    raise TilusError(
        f"{module} is stored quantised, but no target of the quantization_config means it: "
        f"{', '.join(target for target, _ in targets) or 'there is none'}"
    )


def _scales(tensors: Tensors, weight: str, args: Settings, shape: tuple[int, int]) -> tuple[Floats, DataType]:
    """float32 [N, G], and the type in which they are exact."""
    stored = tensors[f"{weight}_scale"]
    if stored.dtype not in _SCALES:
        raise TilusError(f"{weight}_scale has dtype {stored.dtype}, expected {' or '.join(_SCALES)}")
    (n, k), strategy = shape, args.get("strategy")
    values, exact_in = stored.array(), FLOAT_DTYPES[stored.dtype]
    if strategy == "block":
        match args.get("block_structure"):
            case [int(bn), int(bk)] if bn > 0 and bk > 0:
                tensors.take(f"{weight}_scale", _SCALES, (-(-n // bn), -(-k // bk)))
                return spread(values, shape, (bn, bk)), exact_in
            case block:
                raise TilusError(f"{weight} has block_structure {block!r}, expected two positive numbers")
    if strategy == "tensor" or (strategy is None and values.size == 1):
        tensors.take(f"{weight}_scale", _SCALES, (1,) if values.ndim else ())
        return np.full((n, 1), values.ravel()[0], np.float32), exact_in
    group = integer_setting(args, "group_size", k) if strategy != "channel" else k
    if group < 1 or k % group:
        raise TilusError(f"{weight}: groups of {group} do not divide K = {k}")
    return tensors.array(f"{weight}_scale", _SCALES, (n, k // group)), exact_in


def _packed(tensors: Tensors, weight: str, args: Settings) -> QuantizedMatrix:
    nbits = _nbits(weight, args)
    n, k = (int(size) for size in tensors.array(f"{weight}_shape", ("I64", "I32"), (2,)))
    words = tensors.array(f"{weight}_packed", ("I32",), (n, words_for(k, nbits)))
    scales, exact_in = _scales(tensors, weight, args, (n, k))
    num_groups, zeros, order = scales.shape[1], None, None
    if not args.get("symmetric", True):
        zero_words = tensors.array(f"{weight}_zero_point", ("I32",), (words_for(n, nbits), num_groups))
        zeros = unpack_words(zero_words.T, nbits, n).T.astype(np.int16)
    codes = unpack_words(words, nbits, k)
    if f"{weight}_g_idx" in tensors:
        groups = tensors.array(f"{weight}_g_idx", ("I32",), (k,))
        order = None if (groups == -1).all() else stored_order(groups, num_groups, f"{weight}_g_idx")
    return integer_matrix(codes if order is None else codes[:, order], zeros, scales, nbits, exact_in, order)


def _bytes(tensors: Tensors, weight: str, args: Settings) -> QuantizedMatrix:
    if args.get("type", "int") == "float":
        codes = tensors.take(weight, ("F8_E4M3",), (None, None)).codes()
        scales, exact_in = _scales(tensors, weight, args, (codes.shape[0], codes.shape[1]))
        return QuantizedMatrix(codes, scales, None, float8_e4m3, scale_dtype=exact_in)
    nbits = _nbits(weight, args)
    middle = 1 << (nbits - 1)
    numbers = tensors.array(weight, ("I8",), (None, None)).astype(np.int16) + middle
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << nbits:
        raise TilusError(f"{weight} has numbers that do not fit {nbits} bits")
    scales, exact_in = _scales(tensors, weight, args, (numbers.shape[0], numbers.shape[1]))
    zeros = None
    if not args.get("symmetric", True):
        zeros = tensors.array(f"{weight}_zero_point", ("I8",), scales.shape).astype(np.int16) + np.int16(middle)
    return integer_matrix(numbers.astype(np.uint8), zeros, scales, nbits, exact_in)


def _nbits(weight: str, args: Settings) -> int:
    nbits = integer_setting(args, "num_bits")
    if not 1 <= nbits <= 8:
        raise TilusError(f"{weight} has {nbits} bits, expected 1 to 8")
    return nbits


def _nvfp4(tensors: Tensors, weight: str, args: Settings) -> QuantizedMatrix:
    codes = _bit_stream(tensors, weight, float4_e2m1)
    scales = tensors.array(f"{weight}_scale", ("F8_E4M3",), (codes.shape[0], codes.shape[1] // 16))
    divisor = float(tensors.array(f"{weight}_global_scale", ("F32",), (1,))[0])
    if not 0 < divisor < np.inf:
        raise TilusError(f"{weight}_global_scale is {divisor:g}, expected a positive number")
    return QuantizedMatrix(codes, scales, None, float4_e2m1, global_scale=1 / divisor, scale_dtype=float8_e4m3)


def _microscaling(dtype: DataType, tensors: Tensors, weight: str, args: Settings) -> QuantizedMatrix:
    is_plain = dtype == float8_e4m3
    codes = (
        tensors.take(weight, ("F8_E4M3",), (None, None)).codes() if is_plain else _bit_stream(tensors, weight, dtype)
    )
    exponents = tensors.take(f"{weight}_scale", ("U8",), (codes.shape[0], codes.shape[1] // 32)).codes()
    return QuantizedMatrix(codes, float8_e8m0.decode(exponents), None, dtype, scale_dtype=float8_e8m0)


def _bit_stream(tensors: Tensors, weight: str, dtype: DataType) -> Any:
    data = tensors.take(f"{weight}_packed", ("U8",), (None, None)).codes()
    return unpack_bits(np.ascontiguousarray(data), dtype, data.shape[1] * 8 // dtype.nbits)


_READERS: dict[str, Callable[[Tensors, str, Settings], QuantizedMatrix]] = {
    "pack-quantized": _packed,
    "int-quantized": _bytes,
    "float-quantized": _bytes,
    "naive-quantized": _bytes,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": partial(_microscaling, float4_e2m1),
    "mxfp6-pack-quantized": partial(_microscaling, float6_e2m3),
    "mxfp8-quantized": partial(_microscaling, float8_e4m3),
}
# The type of weights that a format holds; naive-quantized holds both.
_TYPES = {
    "pack-quantized": "int", "int-quantized": "int", "float-quantized": "float", "nvfp4-pack-quantized": "float",
    "mxfp4-pack-quantized": "float", "mxfp6-pack-quantized": "float", "mxfp8-quantized": "float",
}  # fmt: skip
