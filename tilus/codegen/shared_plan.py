"""Where each shared tensor lives in the block's shared memory, and how large the scratch regions are."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.ir.function import Function
from tilus.ir.tensor import SharedTensor
from tilus.ir.visit import by_warps

ALIGNMENT = 128  # TMA and ldmatrix need 128 and 16
MAX_ALIGNMENT = (
    1024  # the longest pattern of a swizzle that TMA and wgmma know: they apply it to addresses, not to offsets
)


@dataclass(frozen=True)
class SharedPlan:
    """Offsets in bytes. Behind the tensors: scratch memory of the block, and of each role, whose barriers are its own; then
    `warp_scratch_nbytes` for each warp. alignment: of offset 0."""

    offsets: dict[SharedTensor, int]
    scratch_offsets: dict[range, int]
    warp_scratch_offset: int
    warp_scratch_nbytes: int
    nbytes: int
    alignment: int


def plan_shared(function: Function) -> SharedPlan:
    """Tensors in program order, then regions that instructions with their own barriers take turns in: one of each group of
    warps that has a barrier, and one of each warp for those that only wait for their own warp."""
    offsets: dict[SharedTensor, int] = {}
    scratch: dict[range, int] = {}
    end = warp_scratch = 0
    for stmt, warps in by_warps(function.body, function.warps):
        for tensor in stmt.inst.operands:
            if isinstance(tensor, SharedTensor) and tensor not in offsets:
                offsets[tensor] = _aligned(end, _alignment(tensor))
                end = _aligned(offsets[tensor] + tensor.nbytes)
        scratch[warps] = max(scratch.get(warps, 0), stmt.inst.scratch_nbytes(32 * len(warps)))
        warp_scratch = max(warp_scratch, *(plan.warp_scratch_nbytes for plan in stmt.inst.conversions()), 0)
    scratch_offsets: dict[range, int] = {}
    for warps, nbytes in scratch.items():
        scratch_offsets[warps] = end
        end += _aligned(nbytes)
    warp_nbytes = _aligned(warp_scratch)
    alignment = max(map(_alignment, offsets), default=ALIGNMENT)
    return SharedPlan(offsets, scratch_offsets, end, warp_nbytes, end + warp_nbytes * function.num_warps, alignment)


def _alignment(tensor: SharedTensor) -> int:
    """In bytes: of a swizzled tensor, the pattern that repeats."""
    swizzle = None if tensor.layout is None else tensor.layout.swizzle
    period_nbytes = 0 if swizzle is None else swizzle.period * tensor.dtype.nbits // 8
    return max(ALIGNMENT, min(period_nbytes, MAX_ALIGNMENT))


def _aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment
