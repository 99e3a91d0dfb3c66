"""The matrix instructions of a warpgroup, as a table: dtypes and extents of what `wgmma` can multiply.

An atom multiplies A [64, k] by B [k, n] for n up to 256 and adds D [64, n]. Warp w of the group holds rows 16 w to 16 w + 15 of
A (if A is in registers) and D, in the fragments that mma.sync has for one warp.

Source: PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate operation using wgmma.mma_async". Not in the table
although the ISA has them: tf32 and single-bit operands, .satfinite, sparse A.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilus.dtypes import DataType, bf16, f16, f32, float8_e4m3, float8_e5m2, int8, int32, uint8
from tilus.errors import TilusError
from tilus.instructions.mma_atoms import MmaAtom, ptx_type

ROWS = 64
WARPS = 4
MAX_COLUMNS = 256
INTEGER_WIDTHS = (8, 24, *range(16, MAX_COLUMNS + 1, 16))


@dataclass(frozen=True)
class WgmmaAtom:
    """`D = A @ B + D` with A [64, k] of dtype `a`, B [k, n] of `b`, D [64, n] of `d`, for every n in `widths`."""

    a: DataType
    b: DataType
    d: DataType

    @property
    def k(self) -> int:
        return 256 // self.a.nbits

    @property
    def widths(self) -> tuple[int, ...]:
        """The values of n."""
        return tuple(sorted(INTEGER_WIDTHS)) if self.a.is_integer else tuple(range(8, MAX_COLUMNS + 1, 8))

    @property
    def fragments(self) -> MmaAtom:
        """What a warp holds: 16 rows of A, 16 x 8 of D."""
        return MmaAtom(self.a, self.b, self.d, self.k)

    @property
    def may_transpose(self) -> bool:
        """Whether an operand in shared memory may have m or n contiguous in place of k."""
        return self.a.nbits == 16

    def opcode(self, n: int) -> str:
        d, a, b = (ptx_type(dtype) for dtype in (self.d, self.a, self.b))
        return f"wgmma.mma_async.sync.aligned.m{ROWS}n{n}k{self.k}.{d}.{a}.{b}"

    def cycles(self, n: int) -> int:
        """For which one instruction occupies the four tensor cores of a multiprocessor: a cycle of each takes 512 products of
        16-bit operands, and of others as many as have as many bits (NVIDIA H100 Tensor Core GPU Architecture, whitepaper, 2022).
        """
        return ROWS * n * self.k * self.a.nbits // (4 * 512 * 16)


_F8, _BYTES = (float8_e4m3, float8_e5m2), (int8, uint8)

WGMMA_ATOMS: tuple[WgmmaAtom, ...] = (
    WgmmaAtom(f16, f16, f32),
    WgmmaAtom(f16, f16, f16),
    WgmmaAtom(bf16, bf16, f32),
    *(WgmmaAtom(a, b, f32) for a in _F8 for b in _F8),
    *(WgmmaAtom(a, b, f16) for a in _F8 for b in _F8),
    *(WgmmaAtom(a, b, int32) for a in _BYTES for b in _BYTES),
)


def wgmma_atom(a: DataType, b: DataType, d: DataType) -> WgmmaAtom:
    """The atom for operands and a result of these dtypes.

    Raises: TilusError where there is none, with those that there are.
    """
    for atom in WGMMA_ATOMS:
        if (atom.a, atom.b, atom.d) == (a, b, d):
            return atom
    sums = dict.fromkeys(atom.d.name for atom in WGMMA_ATOMS if (atom.a, atom.b) == (a, b))
    if sums:
        raise TilusError(f"wgmma of {a.name} and {b.name} adds up in {' or '.join(sums)}, not in {d.name}")
    partners = dict.fromkeys(atom.b.name for atom in WGMMA_ATOMS if atom.a == a)
    every = dict.fromkeys(atom.a.name for atom in WGMMA_ATOMS)
    raise TilusError(
        f"wgmma of {a.name} and {b.name}, expected "
        + (f"{a.name} with {' or '.join(partners)}" if partners else f"operands of {', '.join(every)}"),
        hint="cast a tile in registers: tilus.cast(x, tilus.f16)",
    )
