"""What an instruction's numpy meaning may ask of the reference execution.

All blocks of a grid (or of a part of it) run at once. A tile value is an array of shape `[gx, gy, gz, *tile.shape]` and a
scalar value one of shape `[gx, gy, gz]`; a leading axis has size 1 where the value is the same for all blocks along that
grid axis, so that numpy's broadcasting does each distinct piece of work once. Arrays hold `DataType.compute` values and
must not be modified in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tilus.ir.expr import Expr, Var
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor

Array = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


class Evaluation(Protocol):
    @property
    def num_threads(self) -> int:
        """Of the block, or of the role that runs."""
        ...

    def tile(self, tensor: RegisterTensor) -> Array:
        """The value of a tile."""
        ...

    def set_tile(self, tensor: RegisterTensor, value: Array) -> None:
        """Give a tile its value. Inside a divergent branch only the active blocks of a mutable tile change."""
        ...

    def scalar(self, expr: Expr) -> Array:
        """The value of a scalar expression, shape [gx, gy, gz] (axes of size 1 where uniform)."""
        ...

    def set_scalar(self, var: Var, value: Array) -> None: ...

    def active(self) -> BoolArray | None:
        """Which blocks execute this instruction, shape [gx, gy, gz] (broadcastable); None when all do."""
        ...

    def load(
        self,
        tensor: GlobalTensor | SharedTensor,
        offsets: Sequence[Expr],
        shape: tuple[int, ...],
        dims: tuple[int, ...],
        *,
        checked: bool,
        block: Expr | None = None,
    ) -> Array:
        """The tile of `shape` that starts at `offsets` (one per dim of the tensor) and extends along `dims`.

        checked: elements outside of the tensor read as zero; otherwise such an access is an error. Inactive blocks read nothing.
        block: of the cluster, in whose shared memory the tile is; None is each block's own.
        """
        ...

    def store(
        self,
        tensor: GlobalTensor | SharedTensor,
        offsets: Sequence[Expr],
        dims: tuple[int, ...],
        value: Array,
        *,
        checked: bool,
        block: Expr | None = None,
    ) -> None:
        """Write a tile; elements outside of the tensor are dropped when `checked`. Later blocks win over earlier ones.

        block: as in `load`.
        """
        ...

    def update(
        self,
        tensor: GlobalTensor | SharedTensor,
        offsets: Sequence[Expr],
        dims: tuple[int, ...],
        value: Array,
        op: str,
        *,
        checked: bool,
    ) -> Array:
        """Atomic read-modify-write by `op` (add, min, max, and, or, xor, exch) block after block; returns the old values."""
        ...

    def barrier_init(self, barrier: SharedTensor, arrivals: int) -> None:
        """Make the elements of a shared tensor barriers, whose phases wait for so many arrivals of groups."""
        ...

    def barrier_arrive(
        self,
        barrier: SharedTensor,
        index: Expr,
        *,
        count: int = 1,
        nbytes: Expr | None = None,
        block: Expr | None = None,
    ) -> None:
        """`count` groups arrive, and the open phase also waits for `nbytes` more bytes of copies. block: as in `load`."""
        ...

    def barrier_complete_bytes(
        self, barrier: SharedTensor, index: Expr, nbytes: Expr, *, block: Expr | None = None
    ) -> None:
        """Bytes of an asynchronous copy have landed. block: as in `load`."""
        ...

    def barrier_wait(self, barrier: SharedTensor, index: Expr, phase: Expr) -> None:
        """Let other roles run until the phase of this parity is complete."""
        ...

    def cluster_sync(self) -> None:
        """Let the other blocks of the cluster run until all have come here."""
        ...

    def print(self, text: str) -> None: ...
