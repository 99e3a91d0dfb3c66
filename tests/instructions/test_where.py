"""Selection by a condition: numpy's, for elements that share a register with others and for those that do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, bf16, f16, f32, float6_e3m2, float8_e4m3, int8, int32, uint4
from tilus.dtypes import DataType, pack_bits
from tilus.layout import RegisterLayout, local

COUNT = 512


@tilus.kernel
def chosen(
    c: Tensor[int32, 512], x: Tensor["T", 512], y: Tensor["T", 512], z: Tensor["T", 512], few: Tensor["T", 512], *,
    layout: Const,
):  # fmt: skip
    """z: x where c is 1, else y. few: x where c of the first of four is 1, else y of the first one."""
    tilus.grid(1, warps=1)
    take = tilus.load(c, [0], [512], layout=layout) == 1
    tilus.store(z, [0], tilus.where(take, tilus.load(x, [0], [512]), tilus.load(y, [0], [512])))
    first = tilus.load(c, [0], [1]) == 1
    tilus.store(few, [0], tilus.where(first, tilus.load(x, [0], [512]), tilus.load(y, [0], [512])))


@pytest.mark.parametrize("dtype", [uint4, float6_e3m2, int8, float8_e4m3, f16, bf16, f32], ids=str)
@pytest.mark.parametrize(
    "layout", [local(2).spatial(32).local(8), local(4).replicated(2).spatial(16).local(8)], ids=str
)
@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_element_goes_by_its_own_condition(device: str, layout: RegisterLayout, dtype: DataType) -> None:
    """Conditions in every combination within a word; one condition for all; all codes but NaN, which has many."""
    rng = np.random.default_rng(0)
    take = rng.integers(0, 2, COUNT)
    x, y = (rng.integers(0, 1 << min(dtype.nbits, 31), COUNT) for _ in range(2))
    x, y = (np.where(np.isnan(dtype.decode(codes.astype(dtype.storage))), 0, codes) for codes in (x, y))

    def packed(codes: Any) -> Any:
        return tilus.packed(pack_bits(codes.astype(dtype.storage), dtype), dtype, (COUNT,))

    z, few = packed(np.zeros(COUNT)), packed(np.zeros(COUNT))
    chosen.on(device)(take.astype(np.int32), packed(x), packed(y), z, few, layout=layout)
    np.testing.assert_array_equal(z.storage, pack_bits(np.where(take == 1, x, y).astype(dtype.storage), dtype))
    np.testing.assert_array_equal(few.storage, pack_bits((x if take[0] else y).astype(dtype.storage), dtype))
