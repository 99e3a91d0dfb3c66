"""The matrix instructions of a warp, as a table: `dot` can use what stands here, and nothing else needs to know.

An atom multiplies A [16, k] by B [k, 8] and adds C [16, 8]. Its fragments follow from k and the element widths, since a lane
holds whole 32-bit registers of every operand (`tilus.layout.atoms`), so a row of the table is the dtypes, k and the targets.

Source: PTX ISA, "Warp-level matrix instructions: mma". Not in the table although the ISA has them: .satfinite, single-bit
and f64 operands (there is no such tile), and 4-bit integers from sm_90 on, where the assembler calls a subroutine for them.
8-bit floats are QMMA instructions on sm_89; for sm_90a and sm_100a the assembler converts them and makes two of f16 of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tilus.dtypes import (
    DataType,
    bf16,
    f16,
    f32,
    float8_e4m3,
    float8_e5m2,
    int4,
    int8,
    int32,
    tf32,
    uint4,
    uint8,
)
from tilus.layout import RegisterLayout
from tilus.layout.atoms import mma_a, mma_b, mma_c
from tilus.target import Target

M, N = 16, 8


@dataclass(frozen=True)
class MmaAtom:
    """One mma.sync: `D = A @ B + C` with A [16, k] of dtype `a`, B [k, 8] of `b`, C and D [16, 8] of `c`.

    min_sm, max_sm: the compute capabilities (times ten) that have it in hardware; max_sm None: all later ones.
    """

    a: DataType
    b: DataType
    c: DataType
    k: int
    min_sm: int = 80
    max_sm: int | None = None

    @property
    def name(self) -> str:
        """As the dump writes it: shape and dtypes, `m16n8k16.f16.f16.f32`."""
        return f"m{M}n{N}k{self.k}.{self.a}.{self.b}.{self.c}"

    @property
    def opcode(self) -> str:
        a, b, c = (ptx_type(dtype) for dtype in (self.a, self.b, self.c))
        return f"mma.sync.aligned.m{M}n{N}k{self.k}.row.col.{c}.{a}.{b}.{c}"

    @property
    def num_macs(self) -> int:
        """Multiplications and additions of one instruction; of atoms with the same dtypes the larger one is better."""
        return M * N * self.k

    @property
    def cycles(self) -> int:
        """For which a warp occupies the tensor core of its quarter. On sm_80 a cycle takes 256 products of 16-bit operands, and
        of others as many as have as many bits (NVIDIA A100 Tensor Core GPU Architecture, whitepaper, 2020)."""
        return self.num_macs * self.a.nbits // (256 * 16)

    @cached_property
    def layouts(self) -> tuple[RegisterLayout, RegisterLayout, RegisterLayout]:
        """The fragments of A, B and C of one warp."""
        return mma_a(self.a.nbits, self.k), mma_b(self.b.nbits, self.k), mma_c()

    def runs_on(self, target: Target) -> bool:
        return self.min_sm <= target.sm and (self.max_sm is None or target.sm <= self.max_sm)

    @property
    def targets(self) -> str:
        """In words: `sm_80 and later`."""
        return f"sm_{self.min_sm} and later" if self.max_sm is None else f"sm_{self.min_sm} to sm_{self.max_sm}"


def ptx_type(dtype: DataType) -> str:
    match dtype.kind:
        case "int" | "uint":
            return f"{'s' if dtype.is_signed else 'u'}{dtype.nbits}"
        case _:
            return f"e{dtype.exponent_nbits}m{dtype.mantissa_nbits}" if dtype.is_small else dtype.name


_BYTES, _NIBBLES, _F8 = (int8, uint8), (int4, uint4), (float8_e4m3, float8_e5m2)

MMA_ATOMS: tuple[MmaAtom, ...] = (
    MmaAtom(f16, f16, f32, k=16),
    MmaAtom(f16, f16, f32, k=8),
    MmaAtom(f16, f16, f16, k=16),
    MmaAtom(f16, f16, f16, k=8),
    MmaAtom(bf16, bf16, f32, k=16),
    MmaAtom(bf16, bf16, f32, k=8),
    MmaAtom(tf32, tf32, f32, k=8),
    MmaAtom(tf32, tf32, f32, k=4),
    *(MmaAtom(a, b, int32, k=k) for k in (32, 16) for a in _BYTES for b in _BYTES),
    *(MmaAtom(a, b, int32, k=k, max_sm=89) for k in (64, 32) for a in _NIBBLES for b in _NIBBLES),
    *(MmaAtom(a, b, f32, k=32, min_sm=89) for a in _F8 for b in _F8),
)


def atoms_of(a: DataType, b: DataType, c: DataType) -> tuple[MmaAtom, ...]:
    """The atoms for operands and an accumulator of these dtypes, on any target, the largest first."""
    found = (atom for atom in MMA_ATOMS if (atom.a, atom.b, atom.c) == (a, b, c))
    return tuple(sorted(found, key=lambda atom: -atom.num_macs))
