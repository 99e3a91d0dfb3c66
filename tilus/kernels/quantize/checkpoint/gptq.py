"""GPTQ checkpoints of AutoGPTQ and GPTQModel: 2, 3, 4 or 8 bits, integer zero points, activation order.

A module has qweight int32 [K * bits / 32, N], packed along K; qzeros int32 [G, N * bits / 32], packed along N; scales [G, N];
and g_idx int32 [K], the group of each column. value[n, k] = scales[g, n] * (q[k, n] - zero[g, n]) with g = g_idx[k].
Version 1 of the format, the usual one, stores zero - 1.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, cast

import numpy as np

from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint.integer import integer_matrix, stored_order, unpack_words, words_for
from tilus.kernels.quantize.checkpoint.safetensors import FLOAT_DTYPES
from tilus.kernels.quantize.checkpoint.tensors import Module, Settings, Tensors, integer_setting
from tilus.kernels.quantize.matrix import QuantizedMatrix

_BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def modules(tensors: Tensors, settings: Settings) -> dict[str, Module]:
    """Every module with a qweight; those that the configuration excludes have none."""
    version = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if version not in _VERSIONS:
        raise TilusError(f"GPTQ checkpoint_format {version!r}, but supported are {' and '.join(_VERSIONS)}")
    return {
        name: _module(tensors, name, _module_settings(settings, name), _VERSIONS[version])
        for name in tensors.modules(".qweight")
    }


def _module_settings(settings: Settings, module: str) -> Settings:
    """`dynamic` holds settings for modules that a pattern matches: `+:pattern` or `pattern` changes, `-:pattern` excludes."""
    for key, changes in cast(dict[str, Any], settings.get("dynamic") or {}).items():
        if re.match(key.removeprefix("+:").removeprefix("-:"), module):
            if key.startswith("-:"):
                raise TilusError(f"{module} is excluded by dynamic[{key!r}], but is stored quantised")
            return {**settings, **changes}
    return settings


def _module(tensors: Tensors, name: str, settings: Settings, version: int) -> Module:
    nbits, group = integer_setting(settings, "bits"), integer_setting(settings, "group_size", -1)
    if nbits not in _BITS:
        raise TilusError(f"{name} has {nbits} bits, but supported in GPTQ are {', '.join(map(str, _BITS))}")
    parts = {f"{name}.{part}" for part in ("qweight", "qzeros", "scales")}
    if f"{name}.g_idx" in tensors:
        parts.add(f"{name}.g_idx")
    return Module(frozenset(parts), partial(_read, tensors, name, nbits, group, version))


def _read(tensors: Tensors, name: str, nbits: int, group: int, version: int) -> QuantizedMatrix:
    words = tensors.array(f"{name}.qweight", ("I32",), (None, None))
    n = words.shape[1]
    has_order = f"{name}.g_idx" in tensors
    groups = tensors.array(f"{name}.g_idx", ("I32",), (None,)) if has_order else None
    k = words.shape[0] * 32 // nbits if groups is None else len(groups)
    width = k if group == -1 else group
    if width < 1 or k % width:
        raise TilusError(f"{name}: groups of {width} do not divide K = {k}, which is not supported")
    tensors.take(f"{name}.qweight", ("I32",), (words_for(k, nbits), n))
    zero_words = tensors.array(f"{name}.qzeros", ("I32",), (k // width, words_for(n, nbits)))
    scales = tensors.take(f"{name}.scales", ("F16", "BF16", "F32"), (k // width, n))
    codes = unpack_words(words.T, nbits, k)
    # Packers of version 1 wrap around: zero 0 is stored as the largest code.
    zeros = (unpack_words(zero_words, nbits, n).T.astype(np.int16) + (version == 1)) & ((1 << nbits) - 1)
    order = None if groups is None else stored_order(groups, k // width, f"{name}.g_idx")
    return integer_matrix(
        codes if order is None else codes[:, order],
        zeros.astype(np.int16),
        np.ascontiguousarray(scales.array().T),
        nbits,
        FLOAT_DTYPES[scales.dtype],
        order,
    )
