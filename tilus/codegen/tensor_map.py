"""Tensor maps: how tensor copies see a tensor in global memory (PTX ISA, "Tensor maps").

The compiler describes a map over the parameters of the kernel; the launcher evaluates the description for the arguments of a
call, encodes it for the device, and passes it as a parameter of 128 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.ir.expr import BlockId, Expr, GridDim, Number, Var, evaluate, walk

MAP_NBYTES = 128
MAP_ALIGNMENT = 64
MAX_RANK = 5
MAX_BOX = 256
UNIT_NBYTES = 16  # addresses, strides and rows of boxes are multiples of it
_MAX_EXTENT = (1 << 32) - 1


@dataclass(frozen=True)
class TensorMap:
    """A view of a tensor parameter in boxes, all in elements and with the innermost dim last, as in a GlobalTensor.

    name: of the tensor, for messages. offset, shape, strides: expressions over the parameters of the kernel. box: what is
    copied at once. swizzle_nbytes: 0, 32, 64 or 128.
    """

    name: str
    base: Var
    dtype: DataType
    offset: Expr
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    box: tuple[int, ...]
    swizzle_nbytes: int

    def variables(self) -> frozenset[Expr]:
        """What decides about the map at run time, but for the pointer."""
        exprs = (self.offset, *self.shape, *self.strides)
        return frozenset(e for expr in exprs for e in walk(expr) if isinstance(e, (Var, BlockId, GridDim)))

    def at(self, address: int, known: Mapping[Expr, Number]) -> PlacedMap:
        """The map of an argument at this address, given the parameters of the kernel.

        Raises: TilusError naming the tensor where the hardware cannot copy boxes of it.
        """
        shape = [int(evaluate(extent, known)) for extent in self.shape]
        strides = [int(evaluate(stride, known)) * self.dtype.nbytes for stride in self.strides[:-1]]
        start = address + int(evaluate(self.offset, known)) * self.dtype.nbytes
        self._check_multiple("its address", start)
        for dim, extent in enumerate(shape):
            if not 1 <= extent <= _MAX_EXTENT:
                raise TilusError(
                    f"a tensor copy of {self.name}: dim {dim} has {extent} elements, expected 1 to {_MAX_EXTENT}",
                    hint="launch no blocks for an empty tensor",
                )
        for dim, stride in enumerate(strides):
            if shape[dim] == 1:
                strides[dim] = UNIT_NBYTES  # there is no second element
            else:
                self._check_multiple(f"the stride of dim {dim}", stride)
        return PlacedMap(
            start, self.dtype.nbytes, tuple(shape[::-1]), tuple(strides[::-1]), self.box[::-1], self.swizzle_nbytes
        )

    def _check_multiple(self, what: str, nbytes: int) -> None:
        if nbytes % UNIT_NBYTES:
            raise TilusError(
                f"a tensor copy of {self.name}: {what} is {nbytes} bytes, expected a multiple of {UNIT_NBYTES}",
                hint="pad the rows of the tensor, or copy with tilus.copy_async",
            )


@dataclass(frozen=True)
class PlacedMap:
    """The numbers of a tensor map, in the order of the hardware: the innermost dim first.

    address: of element 0, in bytes. element_nbytes: 1, 2, 4 or 8. shape: elements of each dim. strides_nbytes: of all dims
    but the innermost, whose elements follow each other. box: elements of each dim.
    """

    address: int
    element_nbytes: int
    shape: tuple[int, ...]
    strides_nbytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_nbytes: int
