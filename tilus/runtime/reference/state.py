"""The state of the blocks that run together: what instructions see as `Evaluation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tilus.errors import TilusError
from tilus.ir.expr import Expr, Var
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.runtime.reference.access import Tile, View, read, update, write
from tilus.runtime.reference.affine import Array, BoolArray, Extents, Scalar, block_index, settle, to_array
from tilus.runtime.reference.arguments import Binding
from tilus.runtime.reference.mask import Mask
from tilus.runtime.reference.scalars import Compiled, compile_scalar
from tilus.runtime.reference.shared import SharedMemory

TileType = tuple[tuple[int, ...], np.dtype[Any]]


class Compilation(Protocol):
    """What the state needs to know of the function (see `launch.Program`)."""

    @property
    def num_threads(self) -> int: ...

    @property
    def cluster(self) -> int: ...

    @property
    def scalars(self) -> Mapping[int, tuple[Expr, Compiled]]: ...

    @property
    def tiles(self) -> Mapping[RegisterTensor, TileType]: ...

    @property
    def fixed(self) -> frozenset[GlobalTensor]: ...

    @property
    def written(self) -> frozenset[Var]: ...


class BlockState:
    """Blocks `first` to `first + extents` of a grid in lock step.

    mask: which of them are active. broken, continued: those that left the innermost loop, or its current iteration.
    """

    def __init__(
        self,
        program: Compilation,
        binding: Binding,
        views: dict[GlobalTensor, View],
        grid: Extents,
        first: Extents,
        extents: Extents,
    ) -> None:
        self._program = program
        self._binding = binding
        self._views = views
        self._shared: dict[SharedTensor, SharedMemory] = {}
        self._first = first
        self.grid = grid
        self.extents = extents
        self.block_ids = tuple(block_index(axis, first[axis], extents) for axis in range(3))
        self.scalars: dict[Expr, Scalar] = dict(binding.scalars)
        self.tiles: dict[RegisterTensor, Array] = {}
        self.mask: Mask = True
        self.broken: Mask = False
        self.continued: Mask = False

    @property
    def num_threads(self) -> int:
        return self._program.num_threads

    def tile(self, tensor: RegisterTensor) -> Array:
        try:
            return self.tiles[tensor]
        except KeyError:
            raise TilusError(
                f"the tile {tensor.name} is read before it has a value", hint="assign it before the branch or loop"
            ) from None

    def set_tile(self, tensor: RegisterTensor, value: Array) -> None:
        shape, dtype = self._program.tiles[tensor]
        if value.shape[3:] != shape or value.ndim < 3 or value.dtype != dtype:
            raise TilusError(
                f"tile {tensor.name} got {value.dtype}{list(value.shape)}, expected {dtype}[gx, gy, gz, *{list(shape)}]"
            )
        if tensor.mutable and not isinstance(self.mask, bool) and tensor in self.tiles:
            mask = self.mask.reshape(self.mask.shape + (1,) * tensor.rank)
            value = np.where(mask, value, self.tiles[tensor])
        self.tiles[tensor] = value

    def scalar(self, expr: Expr) -> Array:
        return to_array(self.value(expr)).astype(expr.dtype.compute, copy=False)

    def set_scalar(self, var: Var, value: Array) -> None:
        self.assign(var, settle(value, self.extents))

    def active(self) -> BoolArray | None:
        return None if isinstance(self.mask, bool) else self.mask

    def value(self, expr: Expr) -> Scalar:
        """The value of a scalar in its simplest form."""
        known = self._program.scalars.get(id(expr))
        compiled = known[1] if known is not None and known[0] is expr else compile_scalar(expr)
        return compiled(self)

    def assign(self, var: Var, value: Scalar) -> None:
        """Give a scalar its value; that of a mutable one changes only in active blocks."""
        if var.mutable and not isinstance(self.mask, bool) and var in self.scalars:
            value = settle(np.where(self.mask, to_array(value), to_array(self.scalars[var])), self.extents)
        self.scalars[var] = value

    def load(
        self, tensor: GlobalTensor | SharedTensor, offsets: Sequence[Expr], shape: tuple[int, ...],
        dims: tuple[int, ...], *, checked: bool, block: Expr | None = None,
    ) -> Array:  # fmt: skip
        tile = self._tile(offsets, shape, dims, checked)
        if isinstance(tensor, SharedTensor):
            return self._shared_memory(tensor).load(tile, self._owner(block))
        return read(self._view(tensor), tile)

    def store(
        self, tensor: GlobalTensor | SharedTensor, offsets: Sequence[Expr], dims: tuple[int, ...], value: Array, *,
        checked: bool, block: Expr | None = None,
    ) -> None:  # fmt: skip
        tile = self._tile(offsets, value.shape[3:], dims, checked)
        if isinstance(tensor, SharedTensor):
            self._shared_memory(tensor).store(tile, value, self._owner(block))
        else:
            write(self._writable_view(tensor), tile, value)

    def update(
        self, tensor: GlobalTensor | SharedTensor, offsets: Sequence[Expr], dims: tuple[int, ...], value: Array,
        op: str, *, checked: bool,
    ) -> Array:  # fmt: skip
        tile = self._tile(offsets, value.shape[3:], dims, checked)
        if isinstance(tensor, SharedTensor):
            return self._shared_memory(tensor).update(tile, value, op)
        return update(self._writable_view(tensor), tile, value, op, self.extents, tensor.dtype)

    def print(self, text: str) -> None:
        print(text)

    def _tile(self, offsets: Sequence[Expr], shape: tuple[int, ...], dims: tuple[int, ...], checked: bool) -> Tile:
        return Tile([self.value(offset) for offset in offsets], shape, dims, checked, self.mask, self._first)

    def _owner(self, block: Expr | None) -> Array | None:
        """Which of the blocks along x has the shared memory of rank `block` in each one's cluster; None for the own memory."""
        if block is None:
            return None
        rank, size = to_array(self.value(block)), self._program.cluster
        outside = ((rank < 0) | (rank >= size)) & to_array(self.mask)
        if outside.any():
            bad = np.broadcast_to(rank, outside.shape)[outside][0]
            raise TilusError(f"block {bad} of a cluster of {size} blocks, expected 0 to {size - 1}")
        x = to_array(self.block_ids[0])
        return np.clip(rank, 0, size - 1) + (x // size * size - self._first[0])

    def _shared_memory(self, tensor: SharedTensor) -> SharedMemory:
        memory = self._shared.get(tensor)
        if memory is None:
            memory = self._shared[tensor] = SharedMemory(tensor, self.extents)
        return memory

    def _view(self, tensor: GlobalTensor) -> View:
        view = self._views.get(tensor)
        if view is None:
            if tensor.base not in self._binding.pointers:
                raise TilusError(
                    f"the pointer {tensor.base} of {tensor.name} is no parameter, expected a tensor parameter's"
                )
            buffer, origin = self._binding.pointers[tensor.base]
            shape = tuple(self.value(expr) for expr in tensor.shape)
            strides = tuple(self.value(expr) for expr in tensor.strides)
            view = View(tensor.name, buffer, origin + self.value(tensor.offset), shape, strides)
            if tensor in self._program.fixed:
                self._views[tensor] = view
        return view

    def _writable_view(self, tensor: GlobalTensor) -> View:
        if tensor.base not in self._program.written:
            raise TilusError(
                f"{tensor.name} is written by an instruction that does not say so, expected it in effects().writes"
            )
        return self._view(tensor)
