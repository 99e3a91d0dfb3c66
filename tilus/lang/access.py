"""Attributes and subscripts: `x.shape`, `tile.to(f16)`, `x[i]`, `shared[stage]`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import cast

from tilus.errors import TilusError
from tilus.ir.builder import Builtin
from tilus.ir.expr import Expr, as_expr, binary
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor, SharedView
from tilus.lang.frame import Frame
from tilus.lang.operators import python_value
from tilus.lang.values import BoundBuiltin, Value, close_matches, describe, is_number, is_runtime, simplified

_PROPERTIES = ("shape", "dtype", "rank")
_STRIDED_PROPERTIES = (*_PROPERTIES, "strides")

# Methods of tensors that are called otherwise as functions.
_METHODS = {"to": "cast"}
_TILE_METHODS = (
    "to", "reshape", "transpose", "permute", "view", "sum", "max", "min", "any", "all", "broadcast_to", "expand_dims", "squeeze",
)  # fmt: skip


def attribute(frame: Frame, value: Value, name: str) -> Value:
    """`value.name`.

    Raises: TilusError when there is none, with similar names.
    """
    match value:
        case RegisterTensor() | SharedTensor() | SharedView() if name in _PROPERTIES:
            return getattr(value, name)
        case SharedTensor() | SharedView() if name == "nbytes":
            return (math.prod(value.shape) * value.dtype.nbits + 7) // 8  # of the elements: padding moves no data
        case RegisterTensor() if name in _TILE_METHODS:
            return BoundBuiltin(_tile_method(name), value)
        case RegisterTensor() if name == "T":
            return _tile_method("transpose").build(frame.builder, value)
        case GlobalTensor() if name in _STRIDED_PROPERTIES:
            found = getattr(value, name)
            return tuple(simplified(e) for e in found) if name in ("shape", "strides") else found
        case Expr() if name == "dtype":
            return value.dtype
        case Expr() if name == "to":
            return BoundBuiltin(_tile_method(name), value)
        case _ if is_runtime(value) and not isinstance(value, (tuple, list, dict)):
            raise TilusError(f"{describe(value)} has no attribute {name}", hint=_attribute_hint(value, name))
        case _:
            return _python_attribute(frame, value, name)


def _attribute_hint(value: Value, name: str) -> str:
    match value:
        case RegisterTensor():
            known: tuple[str, ...] = (*_PROPERTIES, "T", *_TILE_METHODS)
        case GlobalTensor():
            known = _STRIDED_PROPERTIES
        case Expr():
            known = ("dtype", "to")
        case _:
            known = (*_PROPERTIES, "nbytes")
    return close_matches(name, known) or f"it has {', '.join(known)}"


def _tile_method(name: str) -> Builtin:
    import tilus

    function = getattr(tilus, _METHODS.get(name, name), None)
    if not isinstance(function, Builtin):
        raise TilusError(f"tiles have no method {name} yet")
    return function


def _python_attribute(frame: Frame, value: Value, name: str) -> Value:
    static = inspect.getattr_static(type(value), name, None)
    if isinstance(static, property) and frame.translation.owner_level(value) is not None:
        getter = static.fget
        if inspect.isfunction(getter):
            return frame.inline(getter, (value,), {})
    if not hasattr(value, name):
        kind = f"module {value.__name__}" if inspect.ismodule(value) else describe(value)
        hint = close_matches(name, dir(value)) or (
            "docs/instructions.md lists its functions" if kind == "module tilus" else None
        )
        raise TilusError(f"{kind} has no attribute {name}", hint=hint)
    return python_value(lambda: getattr(value, name))


def subscript(frame: Frame, value: Value, index: Value) -> Value:
    """`value[index]`: elements of containers, a scalar or a view of a global tensor, a view of a shared one.

    Raises: TilusError for everything else, with what to write instead.
    """
    if isinstance(value, (GlobalTensor, SharedTensor, SharedView, RegisterTensor)):
        items = cast("tuple[Value, ...]", index if isinstance(index, tuple) else (index,))
        match value:
            case GlobalTensor():
                return _global(frame, value, items)
            case RegisterTensor():
                return _tile(frame, value, items)
            case _:
                return _shared(value, items)
    if is_runtime(index):
        raise TilusError(
            f"{describe(value)} is indexed by {describe(index)}, expected a compile-time value",
            hint="index tensors at run time; unroll the loop with tilus.static_range to index a tuple or list",
        )
    if isinstance(value, Expr):
        raise TilusError(f"{describe(value)} cannot be indexed")
    getter = inspect.getattr_static(type(value), "__getitem__", None)
    if inspect.isfunction(getter) and frame.translation.owner_level(value) is not None:
        return frame.inline(getter, (value, index), {})
    return python_value(lambda: value[index])


def _is_full(item: Value) -> bool:
    return isinstance(item, slice) and item.start is None and item.stop is None and item.step is None


def _check_index(what: str, items: tuple[Value, ...], rank: int, instead: str, *, bounds: bool = False) -> None:
    """bounds: whether slices may have a start and a stop."""
    if len(items) > rank:
        raise TilusError(f"{len(items)} indices for {what}, which has rank {rank}", hint=instead)
    for item in items:
        if isinstance(item, slice) and not _is_full(item):
            if not bounds:
                raise TilusError(f"a slice with bounds of {what} is not supported", hint=instead)
            _check_slice(what, item)
        if not isinstance(item, slice) and not _is_integer(item):
            raise TilusError(f"{what} is indexed by {describe(item)}, expected an integer", hint=instead)


def _check_slice(what: str, item: slice) -> None:
    if item.step is not None and item.step != 1:
        raise TilusError(f"a slice of {what} has step {describe(item.step)}, expected 1", hint="leave the step out")
    for bound in (item.start, item.stop):
        if bound is not None and not _is_integer(bound):
            raise TilusError(f"a slice of {what} is bounded by {describe(bound)}, expected an integer")


def _is_integer(item: Value) -> bool:
    if isinstance(item, Expr):
        return item.dtype.is_integer
    return isinstance(item, int) and not isinstance(item, bool)


def _position(item: Value, extent: Expr | int, what: str) -> Expr:
    """An index as Python means it: a negative constant counts from the end."""
    if not is_number(item):
        return as_expr(item)
    size = simplified(as_expr(extent))
    if isinstance(size, int) and not -size <= item < size:
        raise TilusError(f"index {item} of {what} is out of range, expected {-size} to {size - 1}")
    return binary("+", item, extent) if item < 0 else as_expr(item)


def _bound(item: Value, extent: Expr) -> Expr:
    """A bound of a slice, cut to 0 .. extent; a negative constant counts from the end."""
    bound = as_expr(item)
    if is_number(item) and item < 0:
        return binary("max", binary("+", bound, extent), 0)
    return binary("min", bound, extent)


def _sliced(tensor: GlobalTensor, items: tuple[Value, ...]) -> GlobalTensor:
    """The view of the part that the slices with bounds take; indices are left for later."""
    for dim, item in enumerate(items):
        if isinstance(item, slice) and not _is_full(item):
            extent = tensor.shape[dim]
            start = as_expr(0) if item.start is None else _bound(item.start, extent)
            stop = extent if item.stop is None else _bound(item.stop, extent)
            tensor = tensor.narrow(dim, start, binary("max", binary("-", stop, start), 0))
    return tensor


def _global(frame: Frame, tensor: GlobalTensor, items: tuple[Value, ...]) -> Value:
    what = f"global tensor {tensor.name}"
    _check_index(what, items, tensor.rank, "load a tile: tilus.load(x, [start, ...], shape=[size, ...])", bounds=True)
    tensor = _sliced(tensor, items)
    if len(items) == tensor.rank and not any(isinstance(item, slice) for item in items):
        import tilus

        index = [_position(item, extent, what) for item, extent in zip(items, tensor.shape, strict=True)]
        return tilus.load_scalar.build(frame.builder, tensor, *index)
    if all(not isinstance(item, slice) for item in items):
        for item in items:
            tensor = tensor.select(_position(item, tensor.shape[0], what))
        return tensor
    return _select(tensor, items, what)


def _select(tensor: GlobalTensor, items: tuple[Value, ...], what: str) -> GlobalTensor:
    """The view without the dims that have an index; `:` keeps a dim."""
    offset = tensor.offset
    kept = list(range(tensor.rank))
    for dim, item in enumerate(items):
        if not isinstance(item, slice):
            position = _position(item, tensor.shape[dim], what)
            offset = binary("+", offset, binary("*", position, tensor.strides[dim]))
            kept.remove(dim)
    shape, strides = tuple(tensor.shape[d] for d in kept), tuple(tensor.strides[d] for d in kept)
    return dataclasses.replace(tensor, shape=shape, strides=strides, offset=offset)


def _shared(value: SharedTensor | SharedView, items: tuple[Value, ...]) -> SharedView:
    tensor, prefix = (value.tensor, value.prefix) if isinstance(value, SharedView) else (value, ())
    what = f"shared tensor {tensor.name}"
    _check_index(what, items, value.rank, "load a part: tilus.load_shared(s, [start, ...], shape=[size, ...])")
    while items and _is_full(items[-1]):
        items = items[:-1]
    if any(isinstance(item, slice) for item in items):
        raise TilusError(
            f"{what} is indexed behind a `:`, expected indices of the first dims",
            hint="order the dims so that the indexed ones come first",
        )
    positions = [_position(item, extent, what) for item, extent in zip(items, value.shape)]
    return SharedView(tensor, (*prefix, *positions))


def _tile(frame: Frame, tile: RegisterTensor, items: tuple[Value, ...]) -> Value:
    """Only `:` and None, which add dims of size 1: elements of a tile live in different threads."""
    if not all(item is None or _is_full(item) for item in items):
        raise TilusError(
            f"{describe(tile)} cannot be indexed or sliced: its elements live in the registers of different threads",
            hint="load only that part from memory, reduce the tile, or select elements with tilus.where",
        )
    if sum(item is not None for item in items) > tile.rank:
        raise TilusError(f"{len(items)} indices for {describe(tile)}")
    rest = iter(tile.shape)
    shape = [1 if item is None else next(rest) for item in items]
    return _tile_method("reshape").build(frame.builder, tile, (*shape, *rest))
