"""bitsandbytes' 4-bit checkpoints (QLoRA): nf4 and fp4, with plain or again quantised scales.

`weight` uint8 [N * K / 2, 1] holds the codes of the flattened matrix, the high nibble first; `weight.quant_map` float32 [16] what
they stand for; `weight.absmax` a scale for each 64 (blocksize); `weight.quant_state.bitsandbytes__nf4` a JSON object as bytes.
Nested: absmax are uint8 [j] for nested_quant_map[absmax[j]] * nested_absmax[j // 256] + nested_offset.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, cast

import numpy as np

from tilus.dtypes import f32, uint4
from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint.tensors import Module, Settings, Tensors, integer_setting
from tilus.kernels.quantize.matrix import Floats, QuantizedMatrix

_STATE = ".weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")


def modules(tensors: Tensors, settings: Settings) -> dict[str, Module]:
    """Every module with a quantisation state; those in `llm_int8_skip_modules` have none."""
    if settings.get("load_in_8bit"):
        raise TilusError("bitsandbytes with load_in_8bit, but supported are its 4-bit types nf4 and fp4")
    found: dict[str, Module] = {}
    for kind in _KINDS:
        for name in tensors.modules(_STATE + kind):
            parts = {part for part in tensors if part == f"{name}.weight" or part.startswith(f"{name}.weight.")}
            found[name] = Module(frozenset(parts), partial(_read, tensors, name, kind))
    return found


def _read(tensors: Tensors, name: str, kind: str) -> QuantizedMatrix:
    state = _state(tensors, name + _STATE + kind)
    match state.get("shape"):
        case [int(n), int(k)] if n > 0 and k > 0:
            pass
        case shape:
            raise TilusError(f"{name} has shape {shape!r} in its quantisation state, expected [N, K]")
    block = integer_setting(state, "blocksize")
    if block < 1 or k % block:
        raise TilusError(
            f"{name}: blocks of {block} do not divide K = {k}, so that they span rows, which is not supported"
        )
    data = tensors.take(f"{name}.weight", ("U8",), (n * k // 2, 1)).codes()
    codes = np.concatenate([data >> np.uint8(4), data & np.uint8(15)], axis=1).reshape(n, k)
    table = tensors.array(f"{name}.weight.quant_map", ("F32",), (16,))
    scales = _scales(tensors, f"{name}.weight", state, n * k // block).reshape(n, k // block)
    return QuantizedMatrix(codes, scales, None, uint4, table=table, scale_dtype=f32)


def _state(tensors: Tensors, name: str) -> Settings:
    data = tensors.take(name, ("U8",), (None,)).codes()
    try:
        found = cast(object, json.loads(data.tobytes()))
    except (ValueError, RecursionError) as error:
        raise TilusError(f"{name} is not a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise TilusError(f"{name} is not a JSON object")
    return cast(dict[str, Any], found)


def _scales(tensors: Tensors, weight: str, state: Settings, count: int) -> Floats:
    if f"{weight}.nested_absmax" not in tensors:
        return tensors.array(f"{weight}.absmax", ("F32",), (count,))
    block = integer_setting(state, "nested_blocksize")
    offset = state.get("nested_offset")
    if block < 1 or not isinstance(offset, float):
        raise TilusError(f"{weight}: nested scales with blocksize {block} and offset {offset!r}, expected numbers")
    codes = tensors.array(f"{weight}.absmax", ("U8",), (count,))
    outer = tensors.array(f"{weight}.nested_absmax", ("F32",), (-(-count // block),))
    table = tensors.array(f"{weight}.nested_quant_map", ("F32",), (256,))
    return table[codes] * np.repeat(outer, block)[:count] + np.float32(offset)
