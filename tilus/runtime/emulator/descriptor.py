"""Matrix descriptors of wgmma: a 64-bit register -> where the 16-byte pieces of a matrix lie in shared memory.

PTX ISA, "Matrix Descriptor Format" and "Canonical Layouts" of the asynchronous warpgroup instructions. Every operand is
32 bytes deep in k. A piece is 16 bytes along the contiguous dimension: `T` elements of one row (k-major) or of one k
(mn-major). The XOR of a swizzle mode acts on the bits of the address itself: bits 4.. with bits 7.. .
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pieces = npt.NDArray[np.int64]
PIECE_NBYTES = 16
_SWIZZLE_NBYTES = (0, 128, 64, 32)
_K_NBYTES = 32


@dataclass(frozen=True)
class Descriptor:
    """The fields of a descriptor. start, leading, stride: bytes; swizzle_nbytes: 0, 32, 64 or 128."""

    start: int
    leading: int
    stride: int
    base_offset: int
    swizzle_nbytes: int

    def __str__(self) -> str:
        swizzle = f"{self.swizzle_nbytes}-byte swizzle" if self.swizzle_nbytes else "no swizzle"
        return f"start {self.start:#x}, leading offset {self.leading}, stride offset {self.stride} bytes, {swizzle}"

    @property
    def period_nbytes(self) -> int:
        """The pattern of the swizzle mode starts at multiples of this address when the base offset is 0."""
        return max(PIECE_NBYTES, 8 * self.swizzle_nbytes)


def decode_descriptor(bits: int) -> Descriptor:
    """The fields of a 64-bit descriptor."""

    def field(low: int) -> int:
        return (bits >> low & 0x3FFF) << 4

    return Descriptor(field(0), field(16), field(32), bits >> 49 & 7, _SWIZZLE_NBYTES[bits >> 62 & 3])


def piece_addresses(descriptor: Descriptor, mn: int, element_nbytes: int, *, k_major: bool) -> Pieces:
    """Shared addresses of the pieces of a matrix of `mn` rows (of A) or columns (of B) that is 32 bytes deep in k.

    k-major: [mn, 2], piece j of a row holds the k of bytes 16 j .. 16 j + 15. mn-major: [mn / T, 32 / element_nbytes],
    the piece of (group, k) holds T = 16 / element_nbytes consecutive rows at one k.
    """
    if k_major:
        rows, columns = np.arange(mn)[:, None], np.arange(_K_NBYTES // PIECE_NBYTES)[None, :]
        row_nbytes = descriptor.swizzle_nbytes or PIECE_NBYTES
        column_nbytes = PIECE_NBYTES if descriptor.swizzle_nbytes else descriptor.leading
        offsets = rows % 8 * row_nbytes + rows // 8 * descriptor.stride + columns * column_nbytes
    else:
        groups = np.arange(mn * element_nbytes // PIECE_NBYTES)[:, None]
        ks = np.arange(_K_NBYTES // element_nbytes)[None, :]
        if descriptor.swizzle_nbytes:
            width = descriptor.swizzle_nbytes // PIECE_NBYTES
            along_mn = groups % width * PIECE_NBYTES + groups // width * descriptor.leading
            offsets = along_mn + ks % 8 * descriptor.swizzle_nbytes + ks // 8 * descriptor.stride
        else:
            offsets = groups * descriptor.stride + ks % 8 * PIECE_NBYTES + ks // 8 * descriptor.leading
    addresses = descriptor.start + offsets
    mask = max(1, descriptor.swizzle_nbytes // PIECE_NBYTES) - 1
    return addresses ^ (addresses >> 7 & mask) << 4
