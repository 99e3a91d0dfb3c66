"""AWQ checkpoints of AutoAWQ, version gemm: 4 bits with integer zero points.

A module has qweight int32 [K, N / 8], qzeros int32 [G, N / 8] and scales [G, N]. Both are packed along N, and nibble i of a word
is its column (0, 2, 4, 6, 1, 3, 5, 7)[i]. value[n, k] = scales[g, n] * (q[k, n] - zero[g, n]) with g = k // group_size.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint.integer import integer_matrix, unpack_words
from tilus.kernels.quantize.checkpoint.safetensors import FLOAT_DTYPES
from tilus.kernels.quantize.checkpoint.tensors import Module, Settings, Tensors, integer_setting
from tilus.kernels.quantize.matrix import Codes, QuantizedMatrix

_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def modules(tensors: Tensors, settings: Settings) -> dict[str, Module]:
    """Every module with a qweight; those in `modules_to_not_convert` have none."""
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise TilusError(f"AWQ version {version!r}, but supported is 'gemm'")
    nbits = integer_setting(settings, "w_bit" if "w_bit" in settings else "bits")
    if nbits != 4:
        raise TilusError(f"AWQ with {nbits} bits, but supported are 4")
    group = integer_setting(settings, "q_group_size" if "q_group_size" in settings else "group_size")
    return {
        name: Module(
            frozenset(f"{name}.{part}" for part in ("qweight", "qzeros", "scales")),
            partial(_read, tensors, name, group),
        )
        for name in tensors.modules(".qweight")
    }


def _read(tensors: Tensors, name: str, group: int) -> QuantizedMatrix:
    words = tensors.array(f"{name}.qweight", ("I32",), (None, None))
    k, n = words.shape[0], words.shape[1] * 8
    width = k if group == -1 else group
    if width < 1 or k % width:
        raise TilusError(f"{name}: groups of {width} do not divide K = {k}")
    zero_words = tensors.array(f"{name}.qzeros", ("I32",), (k // width, n // 8))
    scales = tensors.take(f"{name}.scales", ("F16", "BF16", "F32"), (k // width, n))
    return integer_matrix(
        np.ascontiguousarray(_columns(words).T),
        _columns(zero_words).T.astype(np.int16),
        np.ascontiguousarray(scales.array().T),
        4,
        FLOAT_DTYPES[scales.dtype],
    )


def _columns(words: npt.NDArray[np.int32]) -> Codes:
    """Codes [rows, N] of words [rows, N / 8]."""
    rows = words.shape[0]
    return unpack_words(words, 4, words.shape[1] * 8).reshape(rows, -1, 8)[..., _NIBBLE_OF_COLUMN].reshape(rows, -1)
