"""Binds the arguments of a launch: pointers to flat memory; dims, strides and scalars to numbers, and checks them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.ir.expr import Const, Expr, Var, evaluate
from tilus.ir.function import Function, ScalarParam, TensorParam
from tilus.runtime.reference.affine import Array, Scalar
from tilus.runtime.reference.buffer import Buffer, packed_nbytes, storage_dtype, strided_buffer


@dataclass
class Binding:
    """scalars: the value of each parameter variable. pointers: for each base its memory, and its index therein."""

    scalars: dict[Expr, Scalar] = field(default_factory=dict[Expr, Scalar])
    pointers: dict[Var, tuple[Buffer, int]] = field(default_factory=dict[Var, tuple[Buffer, int]])


def bind(fn: Function, args: Mapping[str, Any], written: frozenset[Var]) -> Binding:
    """Match arguments by parameter name; `written` are the pointers through which the kernel writes.

    Tensors are arrays in `storage_dtype`. A tensor of a packed type is a contiguous uint8 array of its bytes; those of
    its dims that no other parameter gives are read off an array of the tensor's rank with whole bytes per row.

    Raises: TilusError for missing, superfluous or unfit arguments.
    """
    names = {param.name for param in fn.params}
    if names != set(args):
        raise TilusError(
            f"{fn.name} got the arguments {', '.join(sorted(args))}, expected {', '.join(p.name for p in fn.params)}"
        )
    binding = Binding()
    tensors = [param for param in fn.params if isinstance(param, TensorParam)]
    for param in fn.params:
        if isinstance(param, ScalarParam):
            _set(binding, param.var, _scalar(param, args[param.name]), param.name)
    for param in tensors:
        array = _array(param, args[param.name])
        if param.tensor.dtype.nbits >= 8:
            _bind_dims(binding, param, array.shape, tuple(s // array.itemsize for s in array.strides))
    for param in tensors:
        if param.tensor.dtype.nbits < 8:
            shape = _packed_shape(binding, param, args[param.name])
            _bind_dims(binding, param, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))
    outputs = [args[param.name] for param in tensors if param.tensor.base in written]
    for param in tensors:
        array, base = args[param.name], param.tensor.base
        frozen = base not in written and not any(np.may_share_memory(array, output) for output in outputs)
        binding.pointers[base] = strided_buffer(param.tensor.dtype, array, frozen=frozen)
    return binding


def _array(param: TensorParam, value: Any) -> Array:
    dtype, rank = param.tensor.dtype, param.tensor.rank
    if not isinstance(value, np.ndarray):
        raise TilusError(f"argument {param.name} is {type(value).__name__}, expected a numpy array")
    array: Array = value
    if array.dtype != storage_dtype(dtype):
        raise TilusError(
            f"argument {param.name} has dtype {array.dtype}, expected {storage_dtype(dtype)} for {dtype}",
            hint="types without a numpy equivalent are passed as codes: array.view(...), or pack_bits below 8 bits",
        )
    if dtype.nbits >= 8 and array.ndim != rank:
        raise TilusError(f"argument {param.name} has {array.ndim} dimensions, expected {rank}")
    if dtype.nbits < 8 and not array.flags.c_contiguous:
        raise TilusError(f"argument {param.name} is not contiguous, expected the packed bytes of {dtype} in a row")
    if any(stride % array.itemsize for stride in array.strides):
        raise TilusError(f"argument {param.name} has strides {array.strides}, expected multiples of {array.itemsize}")
    return array


def _scalar(param: ScalarParam, value: Any) -> Scalar:
    dtype = param.var.type
    if dtype.is_float:
        if not isinstance(value, (int, float, np.floating)):
            raise TilusError(f"argument {param.name} is {type(value).__name__}, expected a number for {dtype}")
        return dtype.round(np.array([value], np.float64))[0]
    if not isinstance(value, (int, np.integer, np.bool_)):
        raise TilusError(f"argument {param.name} is {type(value).__name__}, expected an integer for {dtype}")
    number = value.item() if isinstance(value, np.generic) else value
    if not dtype.min_value <= number <= dtype.max_value:
        raise TilusError(
            f"argument {param.name} is {number}, expected {dtype.min_value} to {dtype.max_value} for {dtype}"
        )
    return bool(number) if dtype.kind == "bool" else int(number)


def _bind_dims(binding: Binding, param: TensorParam, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    for dim, (expr, size) in enumerate(zip(param.tensor.shape, shape, strict=True)):
        _match(binding, expr, size, f"dimension {dim} of {param.name}")
    by_dim = list(enumerate(zip(param.tensor.strides, strides, strict=True)))
    for dim, (expr, stride) in reversed(by_dim):  # an outer stride may be a multiple of an inner one
        # Numpy leaves strides that are never used undefined: of dimensions of one element, and of empty arrays.
        if shape[dim] > 1 and 0 not in shape:
            _match(binding, expr, stride, f"stride {dim} of {param.name}")
        elif isinstance(expr, Var):
            binding.scalars.setdefault(expr, stride)


def _match(binding: Binding, expr: Expr, found: int, what: str) -> None:
    if isinstance(expr, Var):
        _set(binding, expr, found, what)
        return
    expected = expr.value if isinstance(expr, Const) else evaluate(expr, binding.scalars)
    if found != expected:
        raise TilusError(f"{what} is {found}, expected {expected}" + ("" if isinstance(expr, Const) else f" = {expr}"))


def _set(binding: Binding, var: Var, value: Scalar, what: str) -> None:
    known = binding.scalars.get(var)
    if known is not None and known != value:
        raise TilusError(f"{what} is {value}, but {var} is {known} in another argument, expected the same")
    if var.lower is not None and value < var.lower:
        raise TilusError(f"{what} is {value}, expected at least {var.lower}")
    if var.upper is not None and value > var.upper:
        raise TilusError(f"{what} is {value}, expected at most {var.upper}")
    if var.multiple_of > 1 and value % var.multiple_of:
        raise TilusError(f"{what} is {value}, expected a multiple of {var.multiple_of}")
    binding.scalars[var] = value


def _packed_shape(binding: Binding, param: TensorParam, array: Array) -> tuple[int, ...]:
    """The logical shape of a packed tensor."""
    dtype, shape = param.tensor.dtype, param.tensor.shape
    given = _elements_per_row(dtype, array) if array.ndim == len(shape) else None
    sizes: list[int] = []
    for dim, expr in enumerate(shape):
        if isinstance(expr, Var) and expr not in binding.scalars:
            if given is None:
                raise TilusError(
                    f"dimension {expr} of {param.name} is unknown: its {array.nbytes} bytes hold packed {dtype}, "
                    f"expected an array of rank {len(shape)} with whole bytes per row",
                    hint="reshape the bytes, or use the dim in another parameter too",
                )
            sizes.append(given[dim])
        else:
            sizes.append(int(evaluate(expr, binding.scalars)))
    expected = packed_nbytes(dtype, tuple(sizes))
    if array.nbytes != expected:
        raise TilusError(f"argument {param.name} has {array.nbytes} bytes, expected {expected} for {dtype}{sizes}")
    return tuple(sizes)


def _elements_per_row(dtype: DataType, array: Array) -> tuple[int, ...] | None:
    count, rest = divmod(array.shape[-1] * 8, dtype.nbits)
    return None if rest else (*array.shape[:-1], count)
