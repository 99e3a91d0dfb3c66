"""The packed order of each code type: the one that weights are stored in."""

from __future__ import annotations

from functools import lru_cache

from tilus.codegen.cast_plan import preferred_chunk
from tilus.codegen.code_order import CodeOrder
from tilus.dtypes import DataType


@lru_cache
def packed_order(dtype: DataType) -> CodeOrder:
    """The order in which codes of a type are packed, whatever they are cast to and on which target."""
    half = preferred_chunk(dtype, 32) // 2
    codes = [2 * (slot % half) + slot // half + base for base in range(0, 32, 2 * half) for slot in range(2 * half)]
    return CodeOrder(dtype, tuple(code * dtype.nbits + bit for code in codes for bit in range(dtype.nbits)))
