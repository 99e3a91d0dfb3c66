"""Unsigned codes with zero points, as GPTQ, AWQ and compressed-tensors have them, and how they lie in 32-bit words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DTYPES, DataType, pack_bits, unpack_bits
from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint.safetensors import Array
from tilus.kernels.quantize.matrix import Codes, Floats, QuantizedMatrix


def unpack_words(words: npt.NDArray[np.int32], nbits: int, count: int) -> Codes:
    """Codes [..., count] from int32 words [..., ceil(count * nbits / 32)], a stream of bits from the lowest one up."""
    return unpack_bits(np.ascontiguousarray(words).view(np.uint8), DTYPES[f"uint{nbits}"], count)


def pack_words(codes: Codes, nbits: int) -> npt.NDArray[np.int32]:
    """The inverse of `unpack_words`; unused bits are 0."""
    data = pack_bits(codes, DTYPES[f"uint{nbits}"])
    padded = np.zeros((*data.shape[:-1], -(-data.shape[-1] // 4) * 4), np.uint8)
    padded[..., : data.shape[-1]] = data
    return padded.view("<i4")


def words_for(count: int, nbits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * nbits // 32)


def integer_matrix(
    codes: Codes,
    zeros: npt.NDArray[np.int16] | None,
    scales: Floats,
    nbits: int,
    scale_dtype: DataType,
    columns: npt.NDArray[np.int32] | None = None,
) -> QuantizedMatrix:
    """scale * (code - zero) for unsigned codes [N, K] and zero points [N, G]; None and only middle ones give signed codes."""
    middle = 1 << (nbits - 1)
    if zeros is None or bool((zeros == middle).all()):
        # q - middle is the two's complement number that q with its top bit flipped stands for.
        signed = DTYPES[f"int{nbits}"]
        return QuantizedMatrix(codes ^ np.uint8(middle), scales, None, signed, columns=columns, scale_dtype=scale_dtype)
    unsigned = DTYPES[f"uint{nbits}"]
    return QuantizedMatrix(codes, scales, None, unsigned, zeros=zeros, columns=columns, scale_dtype=scale_dtype)


def stored_order(groups: Array, num_groups: int, name: str) -> npt.NDArray[np.int32] | None:
    """The activation order in which columns that belong to `groups` [K] lie group by group; None when they do already.

    Raises TilusError, with the tensor's name, where groups are not all of the same size.
    """
    k = len(groups)
    group = k // num_groups
    if np.array_equal(groups, np.arange(k) // group):
        return None
    inside = (groups >= 0) & (groups < num_groups)
    if not inside.all():
        raise TilusError(f"{name} has a group {int(groups[~inside][0])}, expected 0 to {num_groups - 1}")
    counts = np.bincount(groups, minlength=num_groups)
    if (counts != group).any():
        odd = int(np.argmax(counts != group))
        raise TilusError(f"{name} puts {int(counts[odd])} columns into group {odd}, expected {group} in each")
    return np.argsort(groups, kind="stable").astype(np.int32)
