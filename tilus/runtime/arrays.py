"""Foreign arrays as kernel arguments: DLPack and `__cuda_array_interface__`, read without importing who made them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tilus.errors import TilusError
from tilus.runtime import cuda

# DLDeviceType and DLDataTypeCode (dlpack.h, DLPack 1.0).
_DL_CPU, _DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 1, 2, 3, 13
_DL_PREFIXES = {0: "int", 1: "uint", 2: "f", 4: "bf", 6: "boolean", 10: "float8_e4m3", 12: "float8_e5m2"}
_TYPESTR_PREFIXES = {"i": "int", "u": "uint", "f": "f"}


@dataclass(frozen=True, eq=False)
class ArrayArgument:
    """An array that somebody else owns.

    address: of element [0, ..., 0]. shape, strides: in elements. dtype: its name in tilus (`f16`, `bf16`, `int32`,
    `uint8`, `boolean`, `float8_e4m3`, ...). device: `cpu` or `cuda`, with the index. owner: keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Literal["cpu", "cuda"]
    device_index: int
    writeable: bool
    owner: object


def array_argument(value: Any) -> ArrayArgument:
    """View an object with `__cuda_array_interface__` or `__dlpack__`; the caller's stream waits for its producer's.

    Raises: TilusError for other objects, and for element types and devices that kernels cannot take.
    """
    if hasattr(value, "__cuda_array_interface__"):
        return _from_cuda_array_interface(value)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return _from_dlpack(value)
    raise TilusError(
        f"{type(value).__name__} is not an array: expected a torch tensor, a numpy array, or an object with "
        "__dlpack__ or __cuda_array_interface__"
    )


def _from_cuda_array_interface(value: Any) -> ArrayArgument:
    interface: dict[str, Any] = value.__cuda_array_interface__
    typestr: str = interface["typestr"]
    itemsize = int(typestr[2:])
    dtype = "boolean" if typestr[1] == "b" else f"{_TYPESTR_PREFIXES.get(typestr[1], '?')}{8 * itemsize}"
    if "?" in dtype or typestr[0] == ">":
        raise TilusError(f"element type {typestr!r} is not supported, expected little-endian int, uint, float or bool")
    shape = tuple(interface["shape"])
    address, readonly = interface["data"]
    strides_nbytes: tuple[int, ...] | None = interface.get("strides")
    index = _device_of(address)
    producer = interface.get("stream")
    if producer is not None:  # 1 and 2 are the default streams' handles in the driver too
        cuda.order_after(cuda.current_stream(index), producer)
    return ArrayArgument(
        address=address,
        shape=shape,
        strides=_in_elements(strides_nbytes, itemsize) if strides_nbytes is not None else row_major(shape),
        dtype=dtype,
        device="cuda",
        device_index=index,
        writeable=not readonly,
        owner=value,
    )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous array, last dimension fastest."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)


def _in_elements(strides_nbytes: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    if any(stride % itemsize for stride in strides_nbytes):
        raise TilusError(f"strides {strides_nbytes} in bytes, expected multiples of the element size {itemsize}")
    return tuple(stride // itemsize for stride in strides_nbytes)


def _device_of(address: int) -> int:
    """The device that a device address lives on; an empty array has address 0 and belongs to the current one."""
    if address == 0:
        return cuda.current_device().index
    cuda.current_device()  # the query needs a context
    attribute = cuda.driver().CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(cuda.call("cuPointerGetAttribute", attribute, address))


class _DLTensor(ctypes.Structure):
    """`DLTensor` of dlpack.h: the first member of a managed tensor, so a pointer to that is a pointer to this."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("nbits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def _from_dlpack(value: Any) -> ArrayArgument:
    device_type, device_index = value.__dlpack_device__()
    kind = {_DL_CPU: "cpu", _DL_CUDA_HOST: "cpu", _DL_CUDA: "cuda", _DL_CUDA_MANAGED: "cuda"}.get(int(device_type))
    if kind is None:
        raise TilusError(f"array on DLPack device type {int(device_type)}, expected the CPU (1) or CUDA (2)")
    # In this protocol stream 0 is ambiguous and the legacy default stream is 1.
    options = {"stream": cuda.current_stream(device_index) or 1} if kind == "cuda" else {}
    try:
        capsule = value.__dlpack__(**options)
    except (BufferError, RuntimeError, TypeError) as error:  # read-only arrays, tensors that require grad, ...
        raise TilusError(f"{type(value).__name__} refuses to share its memory by DLPack: {error}") from error
    tensor = _DLTensor.from_address(_pointer_of_capsule(capsule))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    return ArrayArgument(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else row_major(shape),
        dtype=_dtype_of_dlpack(tensor),
        device="cuda" if kind == "cuda" else "cpu",
        device_index=device_index,
        writeable=True,  # DLPack before 1.0 cannot say otherwise
        owner=capsule,  # never consumed: its own destructor releases the tensor
    )


def _dtype_of_dlpack(tensor: _DLTensor) -> str:
    prefix = _DL_PREFIXES.get(tensor.code)
    if prefix is None or tensor.lanes != 1:
        raise TilusError(
            f"DLPack element type (code {tensor.code}, {tensor.nbits} bits, {tensor.lanes} lanes) is not supported",
            hint="view it as uint8 and name the type in the kernel",
        )
    return prefix if tensor.code in (6, 10, 12) else f"{prefix}{tensor.nbits}"


def _pointer_of_capsule(capsule: object) -> int:
    get_pointer: Callable[[object, bytes], int] = ctypes.pythonapi.PyCapsule_GetPointer
    ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
    ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return get_pointer(capsule, b"dltensor")
