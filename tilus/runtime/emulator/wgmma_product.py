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
class Multiply:
    """What one wgmma.mma_async instruction computes. d, a: indices of 32-bit registers; a is None when A is in memory."""

    pc: int
    n: int
    d_type: str
    a_type: str
    b_type: str
    d: Indices
    a: Indices | None
    k_major_a: bool
    k_major_b: bool
    sign: int
    saturate: bool

    @property
    def k(self) -> int:
        return _K_NBITS // NBITS[self.a_type]


def multiply(
    op: Multiply, registers: Array, lanes: slice, memory: Array, a_pieces: Indices | None, b_pieces: Indices, add: bool
) -> None:
    """d = a b, plus d when `add`, in the registers [count, lanes] of the 128 lanes of a warpgroup.

    memory: shared memory as uint32 words; a_pieces, b_pieces: indices of 16-byte pieces in it. Products are summed in
    float64 (a GPU keeps fewer bits) and rounded once.
    """
    a = _a_fragment(op, registers[op.a, lanes]) if op.a is not None else None
    if a_pieces is not None:
        a = _matrix(memory, a_pieces, op.a_type, k_major=op.k_major_a)
    assert a is not None  # one of the two forms
    b = _matrix(memory, b_pieces, op.b_type, k_major=op.k_major_b)
    product = (a @ b.T if op.sign > 0 else -(a @ b.T)).reshape(4, 2, 8, op.n // 8, 4, 2)  # w h g c t p
    order = (3, 1, 0, 2, 4, 5) if op.d_type == "f16" else (3, 1, 5, 0, 2, 4)
    fragment = product.transpose(order).reshape(len(op.d), -1)
    if add:
        fragment = fragment + DECODERS[op.d_type](registers[op.d, lanes])
    registers[op.d, lanes] = encode(fragment, op.d_type, saturate=op.saturate)


def _a_fragment(op: Multiply, words: Array) -> Array:
    """[64, k] from the words [4, 128] of A: register 2 c + h holds rows 8 h + g, columns (4 c + t) per + p."""
    elements = DECODERS[op.a_type](np.ascontiguousarray(words))
    return elements.reshape(2, 2, 4, 8, 4, -1).transpose(2, 1, 3, 0, 4, 5).reshape(M, op.k)


def _matrix(memory: Array, pieces: Indices, type_name: str, *, k_major: bool) -> Array:
    """[mn, k] from its 16-byte pieces (see `descriptor.piece_addresses`)."""
    elements = DECODERS[type_name](memory.reshape(-1, 4)[pieces])
    if k_major:
        return elements.reshape(len(pieces), -1)
    return elements.transpose(0, 2, 1).reshape(-1, pieces.shape[1])
