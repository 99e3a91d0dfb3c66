"""gpt-oss's MXFP4: the experts of a layer as stacked 4-bit floats with one power of two for each 32 of them.

`X_blocks` uint8 [E, N, K / 32, 16] holds two codes a byte, the low nibble first; `X_scales` uint8 [E, N, K / 32] exponents with
bias 127. Expert e of `a.experts.gate_up_proj` becomes the weight `a.experts.e.gate_up_proj`; its rows are as stored: gate and
up projections alternate.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from tilus.dtypes import float4_e2m1, float8_e8m0, unpack_bits
from tilus.kernels.quantize.checkpoint.tensors import Module, Settings, Tensors
from tilus.kernels.quantize.matrix import QuantizedMatrix


def modules(tensors: Tensors, settings: Settings) -> dict[str, Module]:
    """A module for each expert."""
    found: dict[str, Module] = {}
    for name in tensors.modules("_blocks"):
        parent, _, part = name.rpartition(".")
        parts = frozenset({f"{name}_blocks", f"{name}_scales"})
        num_experts = tensors.take(f"{name}_blocks", ("U8",), (None, None, None, 16)).shape[0]
        found |= {f"{parent}.{e}.{part}": Module(parts, partial(_read, tensors, name, e)) for e in range(num_experts)}
    return found


def _read(tensors: Tensors, name: str, expert: int) -> QuantizedMatrix:
    blocks = tensors.take(f"{name}_blocks", ("U8",), (None, None, None, 16)).codes()
    n, num_groups = blocks.shape[1:3]
    exponents = tensors.take(f"{name}_scales", ("U8",), blocks.shape[:3]).codes()[expert]
    codes = unpack_bits(blocks[expert].reshape(n, num_groups * 16), float4_e2m1, num_groups * 32)
    scales = np.ascontiguousarray(float8_e8m0.decode(exponents))
    return QuantizedMatrix(codes, scales, None, float4_e2m1, scale_dtype=float8_e8m0)
