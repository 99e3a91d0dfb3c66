"""float8 weights with one scale for each rectangle, as DeepSeek and Qwen publish them (`quant_method` fp8).

A module has weight float8_e4m3 [N, K] and weight_scale_inv float32 [ceil(N / bn), ceil(K / bk)]; despite its name it is
multiplied by. Blocks at the edges may be partial.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from tilus.dtypes import float8_e4m3, float8_e8m0
from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint.safetensors import FLOAT_DTYPES
from tilus.kernels.quantize.checkpoint.tensors import Module, Settings, Tensors
from tilus.kernels.quantize.matrix import Floats, QuantizedMatrix

_SUFFIX = ".weight_scale_inv"


def modules(tensors: Tensors, settings: Settings) -> dict[str, Module]:
    """Every module with a weight_scale_inv; those in `modules_to_not_convert` have none."""
    block = settings.get("weight_block_size")
    match block:
        case [int(bn), int(bk)] if bn > 0 and bk > 0:
            pass
        case _:
            raise TilusError(f"fp8 with weight_block_size {block!r}, expected two positive numbers such as [128, 128]")
    powers = settings.get("scale_fmt") == "ue8m0"
    return {
        name: Module(frozenset({f"{name}.weight", name + _SUFFIX}), partial(_read, tensors, name, (bn, bk), powers))
        for name in tensors.modules(_SUFFIX)
    }


def _read(tensors: Tensors, name: str, block: tuple[int, int], powers: bool) -> QuantizedMatrix:
    weight = tensors.take(f"{name}.weight", ("F8_E4M3",), (None, None))
    n, k = weight.shape
    stored = tensors.take(name + _SUFFIX, ("F32", "BF16", "F8_E8M0"), (-(-n // block[0]), -(-k // block[1])))
    exact_in = float8_e8m0 if powers else FLOAT_DTYPES[stored.dtype]
    return QuantizedMatrix(
        weight.codes(), spread(stored.array(), (n, k), block), None, float8_e4m3, scale_dtype=exact_in
    )


def spread(scales: Floats, shape: tuple[int, int], block: tuple[int, int]) -> Floats:
    """Scales of blocks as those of rows: [N, K / group] with the widest group that divides K and lies inside of blocks."""
    (n, k), (bn, bk) = shape, block
    group = math.gcd(k, bk)
    columns = np.arange(k // group) * group // bk
    return scales[np.arange(n)[:, None] // bn, columns]
