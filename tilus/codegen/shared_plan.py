"""Where each shared tensor lives in the block's shared memory, and how large the common scratch region is."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.ir.function import Function
from tilus.ir.tensor import SharedTensor
from tilus.ir.visit import instructions

ALIGNMENT = 128  # a full swizzle row; TMA and ldmatrix need 128 and 16


@dataclass(frozen=True)
class SharedPlan:
    offsets: dict[SharedTensor, int]
    scratch_offset: int
    nbytes: int


def plan_shared(function: Function) -> SharedPlan:
    """Tensors in program order, then one region that instructions with their own barriers take turns in."""
    offsets: dict[SharedTensor, int] = {}
    end = scratch = 0
    for stmt in instructions(function.body):
        for tensor in stmt.inst.operands:
            if isinstance(tensor, SharedTensor) and tensor not in offsets:
                offsets[tensor] = end
                end += _aligned(tensor.nbytes)
        scratch = max(scratch, stmt.inst.scratch_nbytes(function.num_threads))
    return SharedPlan(offsets, end, end + _aligned(scratch))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
