"""Products of experts against float64, with the bound of `test_linear`, which shares nothing with the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from rounding import ABSOLUTE, RELATIVE, float64
from weights import exact, matrix_of, random_matrix

import tilus
from tilus import TilusError
from tilus.kernels import grouped_linear
from tilus.kernels.grouped_linear import GroupedPlan, launch, plans
from tilus.kernels.quantize import QuantizedMatrix, WeightHeader, pack, stack, unpack
from tilus.kernels.schedule import Schedule
from tilus.kernels.warpgroup_plan import WarpgroupPlan


def check(
    device: str,
    matrices: Sequence[QuantizedMatrix],
    counts: Sequence[int],
    act: torch.dtype = torch.float16,
    out: torch.dtype = torch.float32,
    with_bias: bool = False,
    plan: GroupedPlan | Schedule | None = None,
) -> None:
    """`counts`: rows of each expert. Rows behind the last expert's are not written."""
    n, k = matrices[0].shape
    offsets, m = np.concatenate([[0], np.cumsum(counts)]), sum(counts) + 2
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(act)
    bias = torch.randn(len(counts), n, generator=generator).to(act) if with_bias else None
    weight, y = stack([pack(matrix) for matrix in matrices]), torch.full((m, n), torch.nan, dtype=out)
    given = torch.from_numpy(offsets.astype(np.int32))
    if device == "cpu":
        weight = weight if plan is not None else stack([pack(matrix, "cpu") for matrix in matrices])
    if plan is None:
        assert grouped_linear(x, weight, given, bias=bias, out=y, device=device) is y
    else:
        launch(x, weight, y, given, bias, plan, device)
    for expert, matrix in enumerate(matrices):
        own, values = slice(offsets[expert], offsets[expert + 1]), exact(matrix)
        offset = 0.0 if bias is None else float64(bias[expert])
        wanted, size = float64(x[own]) @ values.values.T + offset, np.abs(float64(x[own]))
        work = (k + 8) * 2.0**-23 * (size @ values.sizes.T + np.abs(offset))
        if matrix.table is not None:
            work = work + (RELATIVE[act] * np.abs(matrix.table).max() + ABSOLUTE[act]) * size @ values.from_table.T
        bound = work * (1 + RELATIVE[out]) + RELATIVE[out] * np.abs(wanted) + ABSOLUTE[out]
        wrong = ~(np.abs(float64(y[own]) - wanted) <= bound)
        assert not wrong.any(), f"expert {expert}: {wrong.sum()} are wrong, the first at {np.argwhere(wrong)[0]}"
    assert torch.isnan(y[offsets[-1] :]).all()


@pytest.mark.sampled(9)
@pytest.mark.parametrize("plan", [Schedule(8, 1, 2, 1), Schedule(16, 1, 1, 0), Schedule(4, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("counts", [(0, 5, 0, 1), (17, 0, 9)], ids=str)
def test_the_kernel_of_all_devices(device: str, plan: Schedule, counts: Sequence[int]) -> None:
    """Experts without rows, tiles of tokens that are full and not; 4 tokens are for CPUs."""
    if plan.tokens >= 8 or device in ("cpu", "reference"):
        check(device, int4(len(counts), n=128), counts, with_bias=True, plan=plan)


def int4(experts: int, n: int = 64, k: int = 128, group: int = 128) -> list[QuantizedMatrix]:
    return [random_matrix(tilus.int4, n, k, group, seed=seed) for seed in range(experts)]


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    "counts",
    [(1,), (0, 5, 0), (3, 0, 9, 1, 0, 0, 2), (0, 0, 0), (17, 0, 1), (0, 0, 21), (1,) * 9, (8, 16, 7, 9)],
    ids=str,
)
def test_counts(device: str, counts: Sequence[int]) -> None:
    """Experts without rows at the front, in between and at the end; one expert with all; more than one tile of tokens."""
    check(device, int4(len(counts)), counts)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "plan",
    [
        GroupedPlan(WarpgroupPlan(8, 1, 1, 1, 1, 2), 1),
        GroupedPlan(WarpgroupPlan(8, 2, 1, 1, 2, 3), 2),
        GroupedPlan(WarpgroupPlan(16, 1, 2, 1, 1, 4, overlap="step"), 3),
        GroupedPlan(WarpgroupPlan(128, 2, 1, 1, 2, 3, 232, overlap="steps"), 5),
        GroupedPlan(WarpgroupPlan(8, 1, 3, 1, 1, 6, blocks_per_sm=2), 7),
    ],
    ids=str,
)
def test_plans(device: str, plan: GroupedPlan) -> None:
    """More items than blocks and fewer; a ring, and sums of warpgroups along K, that go on from item to item."""
    if device != "cpu":
        check(device, int4(3, n=256, k=384), (11, 0, 4), plan=plan)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("scheme", "dtype", "group"),
    [
        ("minimums", tilus.uint4, 32),
        ("zero points", tilus.uint8, 64),
        ("powers of two", tilus.float4_e2m1, 32),
        ("wide factors", tilus.int3, 192),
        ("symmetric", tilus.float6_e3m2, 16),
        ("table", tilus.uint4, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("act", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_schemes(device: str, scheme: str, dtype: tilus.DataType, group: int, act: torch.dtype) -> None:
    """The last step of K may be a single tile. On a CPU it is the kernel of `test_linear`, which has the schemes."""
    if device == "cpu":
        return
    first = matrix_of(scheme, dtype, 64, 192, group)
    second = matrix_of(scheme, dtype, 64, 192, group, seed=4)
    if first.table is not None:
        second = QuantizedMatrix(second.codes, second.scales, None, dtype, table=first.table)
    check(device, [first, second], (3, 10), act, act, with_bias=True)


def test_all_of_k_has_one_scale_and_columns_are_shared(device: str) -> None:
    columns = np.random.default_rng(0).permutation(128).astype(np.int32)
    check(device, int4(2, group=128), (2, 3))
    check(device, [QuantizedMatrix(w.codes, w.scales, None, w.dtype, columns=columns) for w in int4(2)], (2, 3))


def test_no_rows_at_all(device: str) -> None:
    weight = stack([pack(matrix) for matrix in int4(2)])
    x = torch.zeros(0, 128, dtype=torch.float16)
    assert grouped_linear(x, weight, torch.zeros(3, dtype=torch.int32), device=device).shape == (0, 64)


@pytest.mark.parametrize("m", [1, 32, 128, 512, 2048, 16384])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (192, 64)])
@pytest.mark.parametrize("dtype", [tilus.int4, tilus.uint8])
def test_plans_fit(m: int, shape: tuple[int, int], dtype: tilus.DataType) -> None:
    """All tiles of an expert are whole, stages are in shared memory, and plans get easier."""
    header = WeightHeader(dtype, (64 * shape[0], shape[1]), shape[1] if shape[1] < 128 else 128, "f16")
    found = list(plans(m, 64, header, 132))
    for plan in found:
        item = plan.item
        assert shape[0] % (64 * item.rows) == 0 and shape[1] % (64 * item.depth * item.splits) == 0
        codes_nbytes = item.rows * item.depth * 512 * dtype.nbits
        nbytes = item.stages * (codes_nbytes + item.tokens * item.depth * 128)
        assert item.stages >= 2 and (nbytes + 1024) * item.blocks_per_sm < 228 * 1024
        assert 1 <= plan.blocks <= 132 * item.blocks_per_sm
    assert (
        found[0].item.tokens == {1: 8, 32: 8, 128: 8, 512: 16, 2048: 64, 16384: 128}[m] and found[-1].item.tokens == 8
    )


def test_stacked_weights_are_those_of_the_rows() -> None:
    matrices = int4(3, n=128)
    whole = unpack(stack([pack(matrix) for matrix in matrices]))
    np.testing.assert_array_equal(whole.codes, np.concatenate([matrix.codes for matrix in matrices]))
    np.testing.assert_array_equal(whole.scales, np.concatenate([matrix.scales for matrix in matrices]))
    on_torch = stack([pack(matrix, "cpu", "mma") for matrix in matrices])
    np.testing.assert_array_equal(unpack(on_torch).codes, whole.codes)


def test_mistakes() -> None:
    first, offsets = pack(int4(1)[0]), torch.tensor([0, 2], dtype=torch.int32)
    x = torch.zeros(2, 128, dtype=torch.float16)
    with pytest.raises(TilusError, match="weight 1 does not stack with the first"):
        stack([first, pack(random_matrix(tilus.uint4, 64, 128, 128))])
    with pytest.raises(TilusError, match="weight 0 has 65 rows, expected a multiple of 64"):
        stack([pack(matrix) for matrix in int4(2, n=65)])
    with pytest.raises(TilusError, match=r"offsets are int64\[2\], expected int32 \[experts \+ 1\]"):
        grouped_linear(x, first, offsets.long(), device="reference")
    with pytest.raises(
        TilusError, match=r"a weight of \[64, 128\] for 2 experts, expected N and K to be multiples of 64"
    ):
        grouped_linear(x, first, torch.zeros(3, dtype=torch.int32), device="reference")
    with pytest.raises(TilusError, match=r"x has shape \[2, 64\], expected \[M, 128\]"):
        grouped_linear(x[:, :64], first, offsets, device="reference")
    with pytest.raises(TilusError, match=r"x has dtype torch\.float32, expected float16 or bfloat16"):
        grouped_linear(x.float(), first, offsets, device="reference")
    with pytest.raises(TilusError, match=r"bias has shape \[64\], expected \[1, 64\]"):
        grouped_linear(x, first, offsets, bias=torch.zeros(64), device="reference")
