"""The numpy meaning of `view`: each thread's bit string cut into elements of another type.

Slot i of an n-bit type has bits [i*n, (i+1)*n) of its thread's string. An element of the result is gathered from the one or
more source elements that its bits overlap; which ones, and how far they shift, depends on the layouts only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType
from tilus.ir.evaluation import Array
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout


@dataclass(frozen=True, eq=False)
class _Part:
    """One overlapped source element per result element: its flat index, and how far its code shifts right and left."""

    index: npt.NDArray[np.intp]
    right: npt.NDArray[np.uint8]
    left: npt.NDArray[np.uint8]


def reinterpret(value: Array, src: RegisterTensor, out: RegisterTensor) -> Array:
    """`value` [..., *src.shape] as a tile of `out`'s dtype and layout."""
    if src.layout is None or out.layout is None:
        raise ValueError("view without layouts passed the verifier")
    codes = src.dtype.encode(value) if not _is_code(src.dtype) else value
    flat = codes.reshape(*codes.shape[:3], -1)
    parts = _parts(src.layout, src.dtype.nbits, out.layout, out.dtype.nbits)
    storage = out.dtype.storage
    wide = np.promote_types(flat.dtype, storage)
    mask = wide.type((1 << out.dtype.nbits) - 1)
    result: Array = flat
    for position, part in enumerate(parts):
        piece = np.take(flat, part.index, axis=-1).astype(wide, copy=False)
        if part.right.any():
            piece = piece >> part.right.astype(wide)
        if part.left.any():
            piece = piece << part.left.astype(wide)
        result = result | piece if position else piece
    result = (result & mask).astype(storage, copy=False).reshape(*flat.shape[:3], *out.shape)
    return result if _is_code(out.dtype) else out.dtype.decode(result)


def _is_code(dtype: DataType) -> bool:
    """Whether values are their own codes: unsigned integers."""
    return dtype.kind == "uint"


@lru_cache(maxsize=64)
def _parts(src: RegisterLayout, src_nbits: int, out: RegisterLayout, out_nbits: int) -> tuple[_Part, ...]:
    table_out, table_src = out.table(), src.table()
    out_flat = np.ravel_multi_index(tuple(np.moveaxis(table_out, -1, 0)), out.shape) if out.rank else table_out[..., 0]
    src_flat = np.ravel_multi_index(tuple(np.moveaxis(table_src, -1, 0)), src.shape) if src.rank else table_src[..., 0]
    size = int(np.prod(out.shape))
    thread, slot = np.empty(size, np.intp), np.empty(size, np.intp)
    threads, slots = np.meshgrid(np.arange(out.num_threads), np.arange(out.num_locals), indexing="ij")
    thread[out_flat.ravel()], slot[out_flat.ravel()] = threads.ravel(), slots.ravel()
    first_bit = slot * out_nbits
    count = int(((first_bit % src_nbits) + out_nbits - 1).max()) // src_nbits + 1
    parts: list[_Part] = []
    for k in range(count):
        src_slot = first_bit // src_nbits + k
        shift = first_bit % src_nbits - k * src_nbits

        inside = np.minimum(src_slot, src.num_locals - 1)
        left = np.where(shift < 0, -shift, 0)
        beyond = left >= out_nbits  # this source element lies behind the result element
        left = np.where(beyond, 63, left)
        parts.append(
            _Part(np.asarray(src_flat)[thread, inside], np.maximum(shift, 0).astype(np.uint8), left.astype(np.uint8))
        )
    return tuple(parts)
