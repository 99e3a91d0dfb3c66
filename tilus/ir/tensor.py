"""Tensors of a kernel: tiles in registers, buffers in shared memory, views of global memory.

They name things, so they compare by identity. A register or shared tensor without a layout gets one in `infer_layouts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from tilus.dtypes import DataType
from tilus.errors import Loc, TilusError
from tilus.ir.expr import Expr, Var, as_expr, binary
from tilus.layout import RegisterLayout, SharedLayout


@dataclass(frozen=True)
class LayoutOrigin:
    """Why a tile has its layout: the instruction that chose it (`pinned`: the program did), and where that stands."""

    choice: str
    loc: Loc | None

    def __str__(self) -> str:
        """`dot kernel.py:12`"""
        return self.choice if self.loc is None else f"{self.choice} {Path(self.loc.file).name}:{self.loc.line}"


@dataclass(frozen=True, eq=False)
class RegisterTensor:
    """A tile spread over the registers of a block; `shape` is static. `layout` says which thread holds which element.

    mutable: storage of a variable that is assigned in a loop or branch; otherwise the tile is written once.
    origin: set by `infer_layouts`; like source positions, it is no part of the text form.
    """

    dtype: DataType
    shape: tuple[int, ...]
    layout: RegisterLayout | None = None
    name: str = "t"
    mutable: bool = False
    origin: LayoutOrigin | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class SharedTensor:
    """A buffer in shared memory, private to the block."""

    dtype: DataType
    shape: tuple[int, ...]
    layout: SharedLayout | None = None
    name: str = "s"

    def __post_init__(self) -> None:
        if self.layout is not None and (self.layout.origin or not self.layout.is_injective()):
            found = (
                f"starts at address {self.layout.origin}" if self.layout.origin else "gives elements the same address"
            )
            raise TilusError(
                f"layout {self.layout} of {self.name} {found}; a buffer starts at 0 and holds every element once",
                hint="give the buffer the layout of all of its memory, and load or store the part",
            )

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        elements = self.layout.size if self.layout is not None else math.prod(self.shape)
        return (elements * self.dtype.nbits + 7) // 8


@dataclass(frozen=True, eq=False)
class SharedView:
    """`tensor[i, j]`: the part of a shared tensor at `prefix`, one index for each of the first dims."""

    tensor: SharedTensor
    prefix: tuple[Expr, ...]

    @property
    def dtype(self) -> DataType:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[len(self.prefix) :]

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class GlobalTensor:
    """A view of global memory: element (i0, i1, ...) is at `base + offset + sum(i_d * strides[d])`, all in elements.

    base: the pointer parameter. alignment: known alignment of `base` in bytes. Strides of sub-byte types count elements too.
    """

    dtype: DataType
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    base: Var
    offset: Expr = field(default_factory=lambda: as_expr(0))
    alignment: int = 16
    name: str = "g"

    @property
    def rank(self) -> int:
        return len(self.shape)

    def select(self, index: Expr) -> GlobalTensor:
        """The view of rank - 1 at `index` of the first dimension."""
        offset = binary("+", self.offset, binary("*", index, self.strides[0]))
        return GlobalTensor(
            self.dtype, self.shape[1:], self.strides[1:], self.base, offset, self.alignment, f"{self.name}[{index}]"
        )

    def narrow(self, dim: int, start: Expr, length: Expr) -> GlobalTensor:
        """The view of `length` indices of `dim` from `start` on; they must lie inside of the tensor."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        offset = binary("+", self.offset, binary("*", start, self.strides[dim]))
        return replace(self, shape=shape, offset=offset)


Tensor = RegisterTensor | SharedTensor | GlobalTensor
