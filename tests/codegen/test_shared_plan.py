"""Where shared tensors start: the hardware swizzles addresses, so the pattern must begin at a multiple of its length."""

from __future__ import annotations

import pytest

import tilus
from tilus import Const, Tensor, f16
from tilus.codegen.lower import lower
from tilus.codegen.shared_plan import plan_shared
from tilus.layout import SharedLayout, row_major, wgmma_operand
from tilus.target import DEFAULT_TARGET
from tilus.transforms import run_pipeline


@tilus.kernel
def two_tensors(x: Tensor[f16, 64, 64], *, memory: Const):
    tilus.grid(1, warps=4)
    small = tilus.shared(f16, [8, 8])
    large = tilus.shared(f16, [64, 64], layout=memory)
    tilus.store_shared(small, tilus.load(x, [0, 0], shape=[8, 8]))
    tilus.store_shared(large, tilus.load(x, [0, 0], shape=[64, 64]))
    tilus.sync()
    tilus.store(x, [0, 0], tilus.load_shared(large))
    tilus.store(x, [0, 0], tilus.load_shared(small))


@pytest.mark.parametrize(
    ("memory", "pattern"),
    [
        (row_major((64, 64)), 128),
        *((wgmma_operand((64, 64), 2, nbytes, "k"), 8 * nbytes) for nbytes in (32, 64, 128)),
        (row_major((64, 64)).swizzled(3, 3, 6), 1024),
    ],
    ids=str,
)
def test_swizzled_tensors_start_at_their_pattern(memory: SharedLayout, pattern: int) -> None:
    function = run_pipeline(two_tensors.specialize(memory=memory).function, DEFAULT_TARGET)
    plan = plan_shared(function)
    assert [(tensor.shape, offset) for tensor, offset in plan.offsets.items()] == [((8, 8), 0), ((64, 64), pattern)]
    assert plan.alignment == pattern
    (array,) = lower(function, DEFAULT_TARGET).module.kernels[0].shared
    assert (array.align, array.nbytes) == (pattern, plan.nbytes) and plan.nbytes == pattern + 64 * 64 * 2
