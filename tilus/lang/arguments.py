"""Arguments of a launch: arrays of several libraries described alike, and packed low-precision tensors.

Torch and numpy are read by their own attributes, which is quick; any other array by DLPack or `__cuda_array_interface__`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tilus.dtypes import DTYPES, DataType, boolean
from tilus.errors import TilusError

CPU = -1


class PackedTensor:
    """A tensor of any dtype in an array of bytes or codes: what sub-byte types and bf16 in numpy need.

    storage: a contiguous array of unsigned integers (numpy or torch) that holds the elements as a little-endian bit stream in
    row-major order. shape: in elements. Raises: TilusError when the array is too small or not contiguous.
    """

    __slots__ = ("_device", "_pointer", "_strides", "dtype", "shape", "storage")

    def __init__(self, storage: Any, dtype: DataType, shape: Sequence[int]) -> None:
        view = describe_argument(storage)
        if view is None:
            raise TilusError(f"packed storage is a {type(storage).__name__}, expected a numpy array or a torch tensor")
        needed, strides = dtype.nbits, list[int]()
        for extent in reversed(shape):
            strides.append(needed // dtype.nbits)
            needed *= extent
        held = view.dtype.nbits
        for extent in view.shape:
            held *= extent
        if held < needed or view.strides != contiguous_strides(view.shape):
            layout = "contiguous" if view.strides == contiguous_strides(view.shape) else "strided"
            raise TilusError(
                f"{held} bits in a {layout} array for {list(shape)} elements of {dtype}, "
                f"expected at least {needed} contiguous bits"
            )
        self.storage, self.dtype, self.shape = storage, dtype, tuple(shape)
        self._strides = tuple(reversed(strides))
        self._pointer, self._device = view.pointer, view.device

    def data_ptr(self) -> int:
        return self._pointer

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def get_device(self) -> int:
        return self._device

    def __repr__(self) -> str:
        return f"PackedTensor({self.dtype}, {list(self.shape)})"


def packed(storage: Any, dtype: DataType, shape: Sequence[int]) -> PackedTensor:
    """A tensor of `dtype` and `shape` whose elements are packed in an array of unsigned integers."""
    return PackedTensor(storage, dtype, shape)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Array:
    """What a launch needs of a tensor argument. strides in elements; device: the CUDA ordinal, or CPU; owner: keeps memory
    alive that was shared for this call only. Arrays that differ only in where they are serve the same prepared launch, so
    `pointer` is not compared; its alignment is part of the specialisation."""

    dtype: DataType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    pointer: int = field(compare=False)
    device: int
    owner: object = field(default=None, compare=False, repr=False)


_NAMES = {
    "float16": "f16", "bfloat16": "bf16", "float32": "f32", "bool": "boolean",
    "float8_e4m3fn": "float8_e4m3",
}  # fmt: skip


def dtype_of_name(name: str) -> DataType | None:
    """The data type that numpy, ml_dtypes or torch call by this name."""
    return DTYPES.get(_NAMES.get(name, name))


def describe_argument(value: Any) -> Array | None:
    """The description of a tensor argument; None when it is no array.

    Raises: TilusError for an array whose dtype or strides kernels cannot use.
    """
    if isinstance(value, PackedTensor):
        return Array(value.dtype, value.shape, value.stride(), value.data_ptr(), value.get_device())
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        dtype = _known_dtype(str(value.dtype).removeprefix("torch."))
        return Array(dtype, tuple(value.shape), tuple(value.stride()), value.data_ptr(), value.get_device())
    interface = getattr(value, "__array_interface__", None)
    if interface is not None and hasattr(value, "dtype"):
        strides = _elements(value.strides, value.dtype.itemsize)
        return Array(_known_dtype(value.dtype.name), tuple(value.shape), strides, interface["data"][0], CPU)
    if hasattr(value, "__cuda_array_interface__") or hasattr(value, "__dlpack__"):
        return _from_foreign(value)
    return None


def _from_foreign(value: Any) -> Array:
    from tilus.runtime.arrays import array_argument

    found = array_argument(value)
    device = found.device_index if found.device == "cuda" else CPU
    return Array(_known_dtype(found.dtype), found.shape, found.strides, found.address, device, found.owner)


def _known_dtype(name: str) -> DataType:
    dtype = dtype_of_name(name)
    if dtype is None:
        raise TilusError(
            f"an array of dtype {name}, which kernels do not have",
            hint=f"convert it, for example to float32; known: {boolean}, integers, f16, bf16, f32 and small floats",
        )
    return dtype


def _elements(strides: Sequence[int], itemsize: int) -> tuple[int, ...]:
    if any(stride % itemsize for stride in strides):
        raise TilusError(f"strides of {list(strides)} bytes are not multiples of the element size {itemsize}")
    return tuple(stride // itemsize for stride in strides)
