"""What a specialisation knows of its tensor arguments, and the IR parameters that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilus.dtypes import DataType, int32, int64
from tilus.errors import TilusError
from tilus.ir.expr import Expr, Var, as_expr, binary
from tilus.ir.tensor import GlobalTensor
from tilus.lang.annotations import Signature, TensorParameter

MAX_EXTENT = 2**31 - 1
MAX_DIVISOR = 16


def power_of_two_part(value: int) -> int:
    """The largest power of two up to 16 that divides a number (16 for 0)."""
    return (value | MAX_DIVISOR) & -(value | MAX_DIVISOR)


@dataclass(frozen=True)
class Size:
    """An extent or stride: exactly `value`, or (value None) any multiple of `multiple_of`."""

    value: int | None = None
    multiple_of: int = 1

    @staticmethod
    def of(value: int) -> Size:
        return Size(1) if value == 1 else Size(None, power_of_two_part(value))


@dataclass(frozen=True)
class TensorFacts:
    """alignment: of the pointer, in bytes, at most 16. strides: None where the stride is the product of the inner dim's
    extent and stride (1 for the last dim), so that it needs no parameter."""

    dtype: DataType
    alignment: int
    dims: tuple[Size, ...]
    strides: tuple[Size | None, ...]


def facts_of(dtype: DataType, shape: Sequence[int], strides: Sequence[int], pointer: int) -> TensorFacts:
    """The facts of one argument; strides are in elements. The stride of a dim of extent 1 does not matter."""
    packed: list[Size | None] = []
    inner = 1  # what the stride of the next outer dim must be to need no parameter
    for extent, stride in zip(reversed(shape), reversed(strides)):
        if extent == 1 or stride == inner:
            packed.append(None)
            stride = inner
        else:
            packed.append(Size.of(stride))
        inner = extent * stride
    dims = tuple(Size.of(extent) for extent in shape)
    return TensorFacts(dtype, power_of_two_part(pointer), dims, tuple(reversed(packed)))


@dataclass(frozen=True)
class Specification:
    """What one specialisation of a kernel is compiled for, compared by value.

    tensors: facts by tensor parameter, None for an optional one that is absent. consts: (type, value) by Const parameter:
    Python takes 1, 1.0 and True for equal, a kernel does not.
    """

    tensors: tuple[TensorFacts | None, ...]
    consts: tuple[Any, ...]


def typed(value: Any) -> Any:
    """A key that tells equal values of different types apart."""
    if isinstance(value, tuple):
        return type(value), tuple(typed(item) for item in value)
    return type(value), value


class Sizes:
    """The variables of a specialisation: one for each named dim, unnamed extent and stride that is not a constant."""

    def __init__(self) -> None:
        self._named: dict[str, Expr] = {}

    def tensor(self, parameter: TensorParameter, facts: TensorFacts, consts: Mapping[str, Any]) -> GlobalTensor:
        """The view that stands for a tensor argument."""
        name = parameter.name
        shape = tuple(self._dim(d, size, consts) for d, size in zip(parameter.type.dims, facts.dims))
        strides: list[Expr] = []
        inner: Expr = as_expr(1)
        for dim in reversed(range(len(shape))):
            known = facts.strides[dim]
            stride = inner if known is None else _variable(f"{name}_stride{dim}", known)
            strides.append(stride)
            inner = binary("*", shape[dim], stride)
        base = Var(f"{name}_ptr", int64, multiple_of=facts.alignment)
        return GlobalTensor(facts.dtype, shape, tuple(reversed(strides)), base, alignment=facts.alignment, name=name)

    def _dim(self, dim: str | int, size: Size, consts: Mapping[str, Any]) -> Expr:
        if isinstance(dim, int):
            return as_expr(dim)
        if dim not in self._named:
            self._named[dim] = as_expr(consts[dim]) if dim in consts else _variable(dim, size)
        return self._named[dim]


def _variable(name: str, size: Size) -> Expr:
    if size.value is not None:
        return as_expr(size.value)
    return Var(name, int32, 0, MAX_EXTENT, size.multiple_of)


def assumed_facts(
    signature: Signature, dtypes: Mapping[str, Any], sizes: Mapping[str, Any]
) -> tuple[TensorFacts | None, ...]:
    """Facts for looking at a kernel without arguments: aligned, contiguous, and all sizes multiples of 16 except those given.

    Raises: TilusError when a dtype name has no value, or a size is none.
    """
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= MAX_EXTENT:
            raise TilusError(f"the size of dim {name!r} is {size!r}, expected an int from 1 to {MAX_EXTENT}")
    result: list[TensorFacts | None] = []
    for parameter in signature.tensors:
        dtype = parameter.type.dtype
        if isinstance(dtype, str):
            if not isinstance(dtypes.get(dtype), DataType):
                raise TilusError(
                    f"the dtype {dtype!r} of parameter {parameter.name} is not known without arguments",
                    loc=signature.loc,
                    hint=f"give it by name: {dtype}=tilus.uint4",
                )
            dtype = dtypes[dtype]
        dims = tuple(Size(sizes.get(str(dim)), MAX_DIVISOR) for dim in parameter.type.dims)
        result.append(None if parameter.optional else TensorFacts(dtype, MAX_DIVISOR, dims, (None,) * len(dims)))
    return tuple(result)
