"""What a specialisation knows of its tensor arguments, and the IR parameters that follow from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilus.dtypes import DataType, int32, int64
from tilus.errors import TilusError
from tilus.ir.expr import Expr, Var, as_expr, binary
from tilus.ir.tensor import GlobalTensor
from tilus.lang.annotations import Signature, TensorParameter

MAX_EXTENT = 2**31 - 1
MAX_DIVISOR = 16


def largest_divisor(dtype: DataType) -> int:
    """The largest power of two that is looked for in the sizes of a tensor: more of its elements never move at once."""
    return MAX_DIVISOR if dtype.nbits >= 8 else 128 // (dtype.nbits & -dtype.nbits)


def power_of_two_part(value: int, largest: int = MAX_DIVISOR) -> int:
    """The largest power of two up to `largest` that divides a number (`largest` for 0)."""
    return (value | largest) & -(value | largest)


@dataclass(frozen=True)
class Size:
    """An extent or stride: exactly `value`, or (value None) any multiple of `multiple_of`."""

    value: int | None = None
    multiple_of: int = 1

    @staticmethod
    def of(value: int, largest: int) -> Size:
        return Size(1) if value == 1 else Size(None, power_of_two_part(value, largest))


@dataclass(frozen=True)
class TensorFacts:
    """alignment: of the pointer, in bytes, at most 16. strides: None where the stride is the product of the inner dim's
    extent and stride (1 for the last dim), so that it needs no parameter."""

    dtype: DataType
    alignment: int
    dims: tuple[Size, ...]
    strides: tuple[Size | None, ...]


def facts_of(
    dtype: DataType, shape: Sequence[int], strides: Sequence[int], pointer: int, *, vectors: bool = True
) -> TensorFacts:
    """The facts of one argument; strides are in elements. The stride of a dim of extent 1 does not matter.

    vectors: whether accesses may become wider by what alignment and divisors say, as on a GPU; else these are not looked at, so
    that one specialisation serves all of them.
    """
    packed, largest = list[Size | None](), largest_divisor(dtype) if vectors else 1
    inner = 1  # what the stride of the next outer dim must be to need no parameter
    for extent, stride in zip(reversed(shape), reversed(strides)):
        if extent == 1 or stride == inner:
            packed.append(None)
            stride = inner
        else:
            packed.append(Size.of(stride, largest))
        inner = extent * stride
    dims = tuple(Size.of(extent, largest) for extent in shape)
    alignment = power_of_two_part(pointer) if vectors else 1
    return TensorFacts(dtype, alignment, dims, tuple(reversed(packed)))


def without_extents(facts: TensorFacts, dims: Sequence[str | int], varying: Collection[str]) -> TensorFacts:
    """The same facts, but nothing of the extents of varying dims. dims: of the parameter's type."""
    return replace(facts, dims=tuple(Size() if dim in varying else size for dim, size in zip(dims, facts.dims)))


@dataclass(frozen=True)
class Specification:
    """What one specialisation of a kernel is compiled for, compared by value.

    tensors: facts by tensor parameter, None for an optional one that is absent. consts: (type, value) by Const parameter:
    Python takes 1, 1.0 and True for equal, a kernel does not.
    """

    tensors: tuple[TensorFacts | None, ...]
    consts: tuple[Any, ...]


def typed(value: Any) -> Any:
    """A key that tells equal values of different types apart: numbers, and tuples of them."""
    if isinstance(value, tuple):
        return type(value), tuple(typed(item) for item in value)
    return (type(value), value) if isinstance(value, int | float) else value


class Sizes:
    """The variables of a specialisation: one for each named dim, unnamed extent and stride that is not a constant.

    Of a dim that several tensors have, the most is known that one of them says.
    """

    def __init__(self, tensors: Iterable[tuple[TensorParameter, TensorFacts]]) -> None:
        self._named: dict[str, Expr] = {}
        self._known: dict[str, Size] = {}
        for parameter, facts in tensors:
            for dim, size in zip(parameter.type.dims, facts.dims):
                known = self._known.get(str(dim))
                if known is None or size.multiple_of > known.multiple_of:
                    self._known[str(dim)] = size

    def tensor(self, parameter: TensorParameter, facts: TensorFacts, consts: Mapping[str, Any]) -> GlobalTensor:
        """The view that stands for a tensor argument."""
        name = parameter.name
        shape = tuple(self._dim(dim, consts) for dim in parameter.type.dims)
        strides: list[Expr] = []
        inner: Expr = as_expr(1)
        for dim in reversed(range(len(shape))):
            known = facts.strides[dim]
            stride = inner if known is None else _variable(f"{name}_stride{dim}", known)
            strides.append(stride)
            inner = binary("*", shape[dim], stride)
        base = Var(f"{name}_ptr", int64, multiple_of=facts.alignment)
        return GlobalTensor(facts.dtype, shape, tuple(reversed(strides)), base, alignment=facts.alignment, name=name)

    def _dim(self, dim: str | int, consts: Mapping[str, Any]) -> Expr:
        if isinstance(dim, int):
            return as_expr(dim)
        if dim not in self._named:
            self._named[dim] = as_expr(consts[dim]) if dim in consts else _variable(dim, self._known[dim])
        return self._named[dim]


def _variable(name: str, size: Size) -> Expr:
    if size.value is not None:
        return as_expr(size.value)
    return Var(name, int32, 0, MAX_EXTENT, size.multiple_of)


def assumed_facts(
    signature: Signature, dtypes: Mapping[str, Any], sizes: Mapping[str, Any]
) -> tuple[TensorFacts | None, ...]:
    """Facts for looking at a kernel without arguments: aligned, contiguous, and all sizes multiples of 16 (of as many elements
    as fill whole vectors, for types below a byte) except those given.

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
        dims = tuple(Size(sizes.get(str(dim)), largest_divisor(dtype)) for dim in parameter.type.dims)
        facts = TensorFacts(dtype, MAX_DIVISOR, dims, (None,) * len(dims))
        unknown = signature.varying.difference(sizes)
        result.append(None if parameter.optional else without_extents(facts, parameter.type.dims, unknown))
    return tuple(result)
