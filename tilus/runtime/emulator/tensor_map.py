"""Tensor maps: which elements of a strided tensor a box at some coordinates is, and where each lies in shared memory.

A launch on the emulator gives a `TensorMap`; the kernel gets 128 bytes of this own format, little-endian, in place of
the opaque ones of the driver: u64 address, u32 rank, u32 bytes of an element, u32 bytes of the swizzle (0, 32, 64 or
128), u32 interleave (0), 5 x u64 dims in elements (innermost first), 4 x u64 strides in bytes (of dims 1 to 4), 5 x u32
box in elements (innermost first), zeros.

Swizzle (PTX ISA, "Swizzling Modes"): pieces of 16 bytes change places inside rows of as many bytes as the mode says;
the row's number, bits 7 and up of the address, is XORed onto the piece's number, bits 4 and up.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.errors import TilusError

if TYPE_CHECKING:
    from tilus.runtime.emulator.bulk_copy import Transfer

TENSOR_MAP_NBYTES = 128
_FORMAT = struct.Struct("<QIIII5Q4Q5I12x")
_SWIZZLE_MASK = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TensorMap:
    """A tensor for bulk tensor copies, as an argument of a launch on the emulator; everything innermost dim first.

    param: which of the launch's arguments is the array that the tensor lies in, `offset_nbytes` from its first byte.
    dims: extents in elements; strides_nbytes: of dims 1 and up; box: extents of one copy in elements.
    """

    param: int
    offset_nbytes: int
    rank: int
    element_nbytes: int
    swizzle_nbytes: int
    dims: tuple[int, ...]
    strides_nbytes: tuple[int, ...]
    box: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises: TilusError for what cuTensorMapEncodeTiled refuses."""
        lengths = (len(self.dims), len(self.strides_nbytes) + 1, len(self.box))
        if not 1 <= self.rank <= 5 or set(lengths) != {self.rank}:
            raise TilusError(
                f"{self}: expected a rank from 1 to 5, that many dims and boxes, and strides of all but one"
            )
        if self.element_nbytes not in (1, 2, 4, 8) or self.swizzle_nbytes not in _SWIZZLE_MASK:
            raise TilusError(f"{self}: expected elements of 1, 2, 4 or 8 bytes and a swizzle of 0, 32, 64 or 128")
        if not all(1 <= extent <= 256 for extent in self.box) or not all(1 <= n <= 1 << 32 for n in self.dims):
            raise TilusError(f"{self}: expected box extents from 1 to 256 and dims from 1 to 2^32")
        if any(stride % 16 or not 0 <= stride < 1 << 40 for stride in self.strides_nbytes):
            raise TilusError(f"{self}: expected strides that are multiples of 16 bytes, below 2^40")
        row = self.box[0] * self.element_nbytes
        if row % 16 or (self.swizzle_nbytes and row > self.swizzle_nbytes):
            raise TilusError(
                f"{self}: the innermost box extent is {row} bytes, expected a multiple of 16 and at most the swizzle"
            )

    def encode(self, address: int) -> bytes:
        """The 128 bytes of the kernel's parameter. address: of the first element, a multiple of 16."""
        if address % 16:
            raise TilusError(f"{self}: the tensor starts at address {address:#x}, expected a multiple of 16")
        missing = 5 - self.rank
        fields = (*self.dims, *[1] * missing, *self.strides_nbytes, *[0] * missing, *self.box, *[1] * missing)
        return _FORMAT.pack(address, self.rank, self.element_nbytes, self.swizzle_nbytes, 0, *fields)


@dataclass(frozen=True, eq=False)
class Box:
    """A decoded tensor map."""

    address: int
    rank: int
    element_nbytes: int
    swizzle_nbytes: int
    dims: tuple[int, ...]
    strides_nbytes: tuple[int, ...]
    box: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.box)) * self.element_nbytes

    def transfer(self, start: tuple[int, ...], place: int, address: int, origin: int) -> Transfer:
        """The copy of the box at these coordinates, of which the innermost one is a multiple of 16 bytes.

        place, address: of its first byte in the data of shared memory and in the address space. origin: of global
        memory, whose data begins at this address.
        """
        from tilus.runtime.emulator.bulk_copy import Transfer

        element, inner = self.element_nbytes, start[0] * self.element_nbytes
        row = self.dims[0] * element
        size = 8 if row % 8 == 0 else element
        within = inner + np.arange(0, self.box[0] * element, size)
        at, inside = within.copy(), (within >= 0) & (within < row)
        for dim in range(1, self.rank):
            index = start[dim] + np.arange(self.box[dim])
            at = (index[:, None] * self.strides_nbytes[dim - 1] + at).reshape(-1)
            inside = (((index >= 0) & (index < self.dims[dim]))[:, None] & inside).reshape(-1)
        linear = address + np.arange(0, self.nbytes, size)
        swizzled = linear ^ (linear >> 3 & _SWIZZLE_MASK[self.swizzle_nbytes])
        everywhere = None if inside.all() else inside
        return Transfer(
            place,
            self.nbytes,
            size,
            swizzled - address + place,
            at + self.address - origin,
            everywhere,
            self.swizzle_nbytes,
        )


def decode(data: bytes) -> Box:
    """The tensor map in the 128 bytes of a parameter."""
    address, rank, element_nbytes, swizzle, _, *rest = _FORMAT.unpack(data)
    dims, strides, box = (tuple(part[:count]) for part, count in ((rest, rank), (rest[5:], rank - 1), (rest[9:], rank)))
    return Box(address, rank, element_nbytes, swizzle, dims, strides, box)
