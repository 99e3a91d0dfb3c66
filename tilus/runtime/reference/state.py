"""The state of the blocks that run together: what instructions see as `Evaluation`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tilus.errors import TilusError
from tilus.ir.expr import Expr, Var
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.runtime.reference.access import Tile, View, read, update, write
from tilus.runtime.reference.affine import Array, BoolArray, Extents, Scalar, block_index, settle, to_array
from tilus.runtime.reference.arguments import Binding
from tilus.runtime.reference.barriers import Barrier, Barriers
from tilus.runtime.reference.mask import Mask
from tilus.runtime.reference.roles import Turn
from tilus.runtime.reference.scalars import Compiled, compile_scalar
from tilus.runtime.reference.shared import SharedMemory

if TYPE_CHECKING:
    from tilus.runtime.reference.cluster import Cluster

TileType = tuple[tuple[int, ...], np.dtype[Any]]


class Compilation(Protocol):
    """What the state needs to know of the function (see `launch.Program`)."""

    @property
    def num_threads(self) -> int: ...

    @property
    def scalars(self) -> Mapping[int, tuple[Expr, Compiled]]: ...

    @property
    def tiles(self) -> Mapping[RegisterTensor, TileType]: ...

    @property
    def fixed(self) -> frozenset[GlobalTensor]: ...

    @property
    def written(self) -> frozenset[Var]: ...


class BlockState:
    """Blocks `first` to `first + extents` of a grid in lock step; one that has barriers runs alone.

    num_threads: of the block, or of the role that runs. cluster: of the block, where it is not alone. turn: of the role, or of
    the block in its cluster. mask: which of the blocks are active. broken,
    continued: those that left the innermost loop, or its current iteration.
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
        self._barriers = Barriers()
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
        self.num_threads = program.num_threads
        self.cluster: Cluster | None = None
        self.turn: Turn | None = None

    def of_role(self, num_threads: int, turn: Turn) -> BlockState:
        """The block as a role sees it: the same memory, and variables of its own that start as they are now."""
        state = copy.copy(self)
        state.num_threads, state.turn = num_threads, turn
        state.scalars, state.tiles = dict(self.scalars), dict(self.tiles)
        return state

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
            return self._block(block)._shared_memory(tensor).load(tile)
        return read(self._view(tensor), tile)

    def store(
        self, tensor: GlobalTensor | SharedTensor, offsets: Sequence[Expr], dims: tuple[int, ...], value: Array, *,
        checked: bool, block: Expr | None = None,
    ) -> None:  # fmt: skip
        tile = self._tile(offsets, value.shape[3:], dims, checked)
        if isinstance(tensor, SharedTensor):
            self._block(block)._shared_memory(tensor).store(tile, value)
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

    def barrier_init(self, barrier: SharedTensor, arrivals: int) -> None:
        self._barriers.make(barrier, arrivals)

    def barrier_arrive(
        self, barrier: SharedTensor, index: Expr, *, count: int = 1, nbytes: Expr | None = None,
        block: Expr | None = None,
    ) -> None:  # fmt: skip
        self._barrier(barrier, index, block).arrive(count, 0 if nbytes is None else int(self.value(nbytes)))

    def barrier_complete_bytes(
        self, barrier: SharedTensor, index: Expr, nbytes: Expr, *, block: Expr | None = None
    ) -> None:
        self._barrier(barrier, index, block).land(int(self.value(nbytes)))

    def barrier_wait(self, barrier: SharedTensor, index: Expr, phase: Expr) -> None:
        place, parity = int(self.value(index)), int(self.value(phase))
        if parity not in (0, 1):
            raise TilusError(f"wait for phase {parity} of {barrier.name}[{place}], expected its parity, 0 or 1")
        found = self._barriers.at(barrier, place)

        def what() -> str:
            return f"waits for phase {parity} of {barrier.name}[{place}], whose {found}"

        if found.is_complete(parity):
            return
        if self.turn is None:
            raise TilusError(
                f"the block {what()}, and nobody else runs", hint="put the two sides into roles: with tilus.warps(...)"
            )
        self.turn.wait(lambda: found.is_complete(parity), what)

    def cluster_sync(self) -> None:
        if self.cluster is None or self.turn is None:
            raise TilusError("cluster_sync of a block that is alone, expected one of a cluster")
        self.cluster.sync(self.turn)

    def _barrier(self, barrier: SharedTensor, index: Expr, block: Expr | None) -> Barrier:
        return self._block(block)._barriers.at(barrier, int(self.value(index)))

    def _block(self, rank: Expr | None) -> BlockState:
        """The block of that rank in the cluster; without a rank, this one."""
        if rank is None:
            return self
        if self.cluster is None:
            raise TilusError(f"access to block {rank} of the cluster of a block that is alone")
        return self.cluster.block(int(self.value(rank)))

    def print(self, text: str) -> None:
        print(text)

    def _tile(self, offsets: Sequence[Expr], shape: tuple[int, ...], dims: tuple[int, ...], checked: bool) -> Tile:
        return Tile([self.value(offset) for offset in offsets], shape, dims, checked, self.mask, self._first)

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
