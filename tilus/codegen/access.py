"""How a register tile meets memory: contiguous runs of local slots, and the widest vector that alignment and masks allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tilus.dtypes import DataType
from tilus.ir.expr import Const, Expr
from tilus.ir.ranges import divisor
from tilus.ir.tensor import GlobalTensor
from tilus.layout import RegisterLayout, SharedLayout

MAX_VECTOR_NBITS = 128


@dataclass(frozen=True)
class Vector:
    """One access per thread: local slots `slot .. slot + size` at consecutive elements of memory."""

    slot: int
    size: int


def run_length(layout: RegisterLayout, dim: int) -> int:
    """How many local slots from slot 0 on walk along `dim` in steps of one element."""
    terms = [term for term in layout.local_terms if term.stride == 1 and term.size > 1]
    if not terms or terms[0].dim != dim or terms[0].weight != 1:
        return 1
    return terms[0].size


def vector_size(
    layout: RegisterLayout, dtype: DataType, contiguous: int | None, start_divisor: int, byte_alignment: int
) -> int:
    """Elements one access may move: the run along the contiguous dim, cut to the alignment of every start.

    start_divisor: divides the element offset of every access whose run is taken whole. byte_alignment: of the buffer.
    """
    if contiguous is None or dtype.kind == "bool":  # a boolean becomes one predicate, so each byte moves by itself
        return 1
    run = run_length(layout, contiguous)
    limit = math.gcd(run, start_divisor) if start_divisor else run
    size = limit & -limit
    if dtype.nbits & (dtype.nbits - 1):
        return min(size, 8)  # 3-, 5-, 6- and 7-bit types move byte by byte: eight of them fill whole bytes
    while size > 1 and (size * dtype.nbits > min(MAX_VECTOR_NBITS, 8 * byte_alignment)):
        size //= 2
    return size


def vectors(layout: RegisterLayout, size: int) -> list[Vector]:
    return [Vector(slot, size) for slot in range(0, layout.num_locals, size)]


def thread_and_slot_divisor(layout: RegisterLayout, dim: int, run: int) -> int:
    """Largest d dividing the tile index along `dim` of the first slot of every run of `run` slots, over all threads."""
    weights = [t.weight for t in layout.thread_terms if t.dim == dim]
    for term in layout.local_terms:
        if term.dim == dim:
            weights.append(term.weight * run if term.stride == 1 and term.weight == 1 else term.weight)
    return math.gcd(*weights) if weights else 0


def global_vector_size(
    tensor: GlobalTensor, layout: RegisterLayout, offsets: Sequence[Expr], dims: Sequence[int], checked: bool
) -> int:
    """The widest vector for a tile of `tensor`; a mask must hold for a whole vector at once."""
    strides = [s.value if isinstance(s, Const) else None for s in tensor.strides]
    contiguous = next((i for i, d in enumerate(dims) if strides[d] == 1), None)
    if contiguous is None:
        return 1
    run = run_length(layout, contiguous)
    if checked and run > 1:
        edge = math.gcd(divisor(tensor.shape[dims[contiguous]]), divisor(offsets[dims[contiguous]]))
        run = math.gcd(run, edge)
    start = divisor(tensor.offset)
    for d, stride in enumerate(tensor.strides):
        start = math.gcd(start, divisor(offsets[d]) * divisor(stride))
    for i, d in enumerate(dims):
        start = math.gcd(start, thread_and_slot_divisor(layout, i, run) * divisor(tensor.strides[d]))
    return vector_size(layout, tensor.dtype, contiguous, math.gcd(start, run) if start else run, tensor.alignment)


def shared_vector_size(
    memory: SharedLayout, dtype: DataType, layout: RegisterLayout, start_divisors: Sequence[int], dims: Sequence[int]
) -> int:
    """The widest vector for a tile of a shared tensor with this layout, from its strides and swizzle.

    start_divisors: for each dim of the tensor, what divides every index at which the tile may start (0: it starts at 0).
    """
    unit = [any(term.weight == term.stride == 1 for term in memory.terms[d]) for d in dims]
    if True not in unit:
        return 1
    contiguous = unit.index(True)
    run = run_length(layout, contiguous)
    start = 0
    for d, start_divisor in enumerate(start_divisors):
        start = math.gcd(start, _offset_divisor(memory, d, start_divisor))
    for i, d in enumerate(dims):
        # This also cuts runs where a digit of the dim ends, and to what the swizzle keeps together.
        start = math.gcd(start, _offset_divisor(memory, d, thread_and_slot_divisor(layout, i, run)))
    size = math.gcd(run, start) if start else run
    return vector_size(layout, dtype, contiguous, size, MAX_VECTOR_NBITS // 8)


def _offset_divisor(memory: SharedLayout, dim: int, index_divisor: int) -> int:
    """What divides the address part of every index along `dim` that is a multiple of `index_divisor` (0 means only 0)."""
    if index_divisor == 0:
        return 0
    result = 0
    for term in memory.terms[dim]:
        # The value of a digit is that of the index, reduced modulo where the digit ends; the outermost one does not end.
        end = 0 if term.weight * term.size == memory.shape[dim] else term.weight * term.size
        steps, rest = divmod(math.gcd(index_divisor, end), term.weight)
        result = math.gcd(result, term.stride * (steps if rest == 0 else 1))
    if memory.swizzle is not None:
        result = math.gcd(result, 1 << memory.swizzle.base)
    return result
