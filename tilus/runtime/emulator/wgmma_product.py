"""The product of wgmma.mma_async for one warpgroup: from registers and shared memory to accumulators.

Fragments are those of the figures of PTX ISA, "Register Fragments" of the asynchronous warpgroup instructions: warp w of
the warpgroup holds rows 16 w .. 16 w + 15; in it g = lane >> 2, t = lane % 4. All are transpositions of axes
(w 4, h 2: row 8 h + g, g 8, t 4, p: the pieces of t, c: the repetitions along the columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.matrix_elements import DECODERS, NBITS, Array, encode

M = 64
WARPGROUP = 128
Indices = npt.NDArray[np.int64]
_K_NBITS = 256


@dataclass(frozen=True, eq=False)
class SharedMatrix:
    """A matrix in the shared data: indices of its 16-byte pieces, arranged as by `descriptor.piece_addresses`, the
    granules (of `SharedShadow`) that they cover, each once, and its swizzle."""

    pieces: Indices
    granules: Indices
    swizzle_nbytes: int


@dataclass(frozen=True, eq=False)
class Multiply:
    """What one wgmma.mma_async instruction computes. d, a: indices of 32-bit registers; a is None when A is in memory."""

    pc: int
    n: int
    d_type: str
    a_type: str
    b_type: str
    d: Indices
    a: Indices
    k_major_a: bool
    k_major_b: bool
    sign: int
    saturate: bool

    @property
    def k(self) -> int:
        return _K_NBITS // NBITS[self.a_type]


def multiply(
    op: Multiply, registers: Array, lanes: slice, memory: Array, a: SharedMatrix | None, b: SharedMatrix, *, add: bool
) -> None:
    """d = a b, plus d when `add`, in the registers [count, lanes] of the 128 lanes of a warpgroup.

    memory: shared memory as uint32 words. a: None when A is in registers. Products are summed in float64 (a GPU keeps
    fewer bits) and rounded once.
    """
    left = _fragment(op, registers[op.a, lanes]) if a is None else _matrix(memory, a, op.a_type, op.k_major_a)
    product = left @ _matrix(memory, b, op.b_type, op.k_major_b).T
    product = (product if op.sign > 0 else -product).reshape(4, 2, 8, op.n // 8, 4, 2)  # w h g c t p
    order = (3, 1, 0, 2, 4, 5) if op.d_type == "f16" else (3, 1, 5, 0, 2, 4)
    fragment = product.transpose(order).reshape(len(op.d), -1)
    if add:
        fragment = fragment + DECODERS[op.d_type](registers[op.d, lanes])
    registers[op.d, lanes] = encode(fragment, op.d_type, saturate=op.saturate)


def _fragment(op: Multiply, words: Array) -> Array:
    """[64, k] from the words [4, 128] of A: register 2 c + h holds rows 8 h + g, columns (4 c + t) per + p."""
    elements = DECODERS[op.a_type](np.ascontiguousarray(words))
    return elements.reshape(2, 2, 4, 8, 4, -1).transpose(2, 1, 3, 0, 4, 5).reshape(M, op.k)


def _matrix(memory: Array, matrix: SharedMatrix, type_name: str, k_major: bool) -> Array:
    """[mn, k] from its pieces."""
    elements = DECODERS[type_name](memory.reshape(-1, 4)[matrix.pieces])
    if k_major:
        return elements.reshape(len(matrix.pieces), -1)
    return elements.transpose(0, 2, 1).reshape(-1, matrix.pieces.shape[1])
