"""Products of 4-bit weights and 8-bit activations against float64.

Group sums are exact: of int8 always, of float8_e4m3 here, where activations are small integers. So what is left is one fma for
each group, the factors and the last rounding, all in f32:

    |y - exact| <= (groups + 4) * 2^-23 * sum_k |x_k * weight_k| + rounding of y.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ml_dtypes import float8_e4m3fn
from rounding import ABSOLUTE, RELATIVE, float64
from weights import CODE_TYPES, exact, finite_codes, matrix_of, random_matrix, with_bfloat16_scales, with_wide_factors

import tilus
from tilus import TilusError
from tilus.kernels import quantize_tokens, w4a8_linear
from tilus.kernels.byte_operands import exponent_of
from tilus.kernels.quantize import QuantizedMatrix, WeightHeader, pack
from tilus.kernels.w4a8_linear import launch, plans
from tilus.kernels.warpgroup_plan import WarpgroupPlan

TYPES = [torch.int8, torch.float8_e4m3fn]


def paired(codes: torch.Tensor) -> torch.Tensor:
    """Place 4 t + 2 c + h has column 8 h + 2 t + c of each 16."""
    order = [8 * h + 2 * t + c for t in range(4) for c in range(2) for h in range(2)]
    whole = codes.view(torch.uint8).reshape(codes.shape[0], -1, 16)
    return whole[:, :, order].reshape(codes.shape).contiguous().view(codes.dtype)


def check(
    device: str,
    matrix: QuantizedMatrix,
    m: int,
    dtype: torch.dtype,
    out: torch.dtype = torch.float32,
    plan: WarpgroupPlan | None = None,
    most: int = 4,
) -> None:
    n, k = matrix.shape
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(-most, most + 1, (m, k), generator=generator).float().to(dtype)
    x_scale, bias = torch.rand(m, generator=generator), torch.randn(n, generator=generator)
    weight, y = pack(matrix), torch.full((m, n), torch.nan, dtype=out)
    if device == "cpu":
        with pytest.raises(TilusError, match="which needs a GPU"):
            w4a8_linear(paired(codes), x_scale, weight, bias=bias, out=y, device=device)
        return
    if plan is None:
        assert w4a8_linear(paired(codes), x_scale, weight, bias=bias, out=y, device=device) is y
    else:
        launch(paired(codes), x_scale, weight, y, bias, plan, device)
    x, weights = float64(codes.float()) * float64(x_scale)[:, None], exact(matrix)
    wanted = x @ weights.values.T + float64(bias)
    sums = matrix.scales.shape[1] * (1 if matrix.mins is None else 2)
    work = (sums + 4) * 2.0**-23 * (np.abs(x) @ weights.sizes.T + np.abs(float64(bias)))
    bound = work * (1 + RELATIVE[out]) + RELATIVE[out] * np.abs(wanted) + ABSOLUTE[out]
    wrong = ~(np.abs(float64(y) - wanted) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} are wrong, the first at {np.argwhere(wrong)[0]}"


@pytest.mark.sampled(9)
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, 768])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_groups(device: str, dtype: torch.dtype, group: int) -> None:
    check(device, random_matrix(tilus.int4, 128, 768, group, seed=group), 5, dtype)


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("scheme", "dtype", "group"),
    [
        ("symmetric", tilus.uint4, 128),
        ("minimums", tilus.uint4, 32),
        ("zero points", tilus.uint4, 96),
        ("symmetric", tilus.int2, 64),
        ("wide factors", tilus.int5, 192),
        ("two levels", tilus.float4_e2m1, 32),
    ],
)
@pytest.mark.parametrize("act", TYPES, ids=str)
def test_schemes(device: str, act: torch.dtype, scheme: str, dtype: tilus.DataType, group: int) -> None:
    """What both types of activations take. Products of these have so few bits that float8 adds them up exactly."""
    check(device, matrix_of(scheme, dtype, 64, 384, group), 5, act)


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("symmetric", tilus.int8),
        ("minimums", tilus.uint6),
        ("zero points", tilus.uint7),
        ("symmetric", tilus.float6_e2m3),
    ],
)
def test_schemes_for_integers(device: str, scheme: str, dtype: tilus.DataType) -> None:
    check(device, matrix_of(scheme, dtype, 64, 384, 64), 5, torch.int8, most=127)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("tokens", [1, 8, 9, 17, 70])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_numbers_of_tokens(device: str, dtype: torch.dtype, tokens: int) -> None:
    check(device, random_matrix(tilus.int4, 64, 192, 64), tokens, dtype, torch.bfloat16)


@pytest.mark.parametrize("scale_dtype", [tilus.f32, tilus.bf16], ids=str)
def test_types_of_scales(device: str, scale_dtype: tilus.DataType) -> None:
    change = with_wide_factors if scale_dtype == tilus.f32 else with_bfloat16_scales
    matrix = change(random_matrix(tilus.int4, 64, 128, 64), np.random.default_rng(0))
    check(device, replace(matrix, mins=None), 3, torch.int8, torch.float16)


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("plan", "group"),
    [
        (WarpgroupPlan(8, 1, 1, 1, 1, 2), 128),
        (WarpgroupPlan(8, 1, 2, 2, 4, 4), 32),
        (WarpgroupPlan(16, 2, 1, 4, 2, 2, overlap="step"), 64),
        (WarpgroupPlan(32, 1, 3, 1, 2, 6, overlap="steps"), 512),
        (WarpgroupPlan(8, 1, 2, 1, 2, 4, unit="mma"), 32),
        (WarpgroupPlan(128, 2, 1, 1, 2, 3, 232, overlap="steps"), 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_plans(device: str, dtype: torch.dtype, plan: WarpgroupPlan, group: int) -> None:
    """Warpgroups and blocks along K, and more tokens than a block has; groups within steps and across them."""
    if device != "cpu":
        check(device, random_matrix(tilus.int4, 192, 512, group), 20, dtype, plan=plan)


@pytest.mark.parametrize("x", [-128, 127])
def test_the_largest_sums(device: str, x: int) -> None:
    """Groups of as many columns as sums are exact for; the products of all have the same sign and the largest size."""
    if device != "cpu":
        matrix = QuantizedMatrix(np.full((64, 512), 8, np.uint8), np.ones((64, 2), np.float32), None, tilus.int4)
        y, plan = torch.full((8, 64), torch.nan), WarpgroupPlan(8, 1, 1, 1, 4, 2, overlap="steps")
        launch(torch.full((8, 512), x, dtype=torch.int8), torch.ones(8), pack(matrix), y, None, plan, device)
        assert (y == -8 * x * 512).all()


def test_large_codes_add_up_exactly(device: str) -> None:
    """All of K in one group: sums of 16 * code * x beyond what f32 holds exactly."""
    check(device, random_matrix(tilus.int4, 64, 8192, 8192), 4, torch.int8, most=127)


def holds(act: torch.dtype, values: npt.NDArray[np.float64]) -> bool:
    """Whether a type of 8 bits has all these numbers."""
    kept = (
        np.clip(np.round(values), -128, 127) if act == torch.int8 else values.astype(float8_e4m3fn).astype(np.float64)
    )
    return bool((kept == values).all())


@pytest.mark.parametrize("act", TYPES, ids=str)
def test_weights_are_taken_where_some_power_of_two_makes_all_exact(act: torch.dtype) -> None:
    """All types, and all differences of codes and zero points."""
    ours = tilus.int8 if act == torch.int8 else tilus.float8_e4m3
    for dtype in CODE_TYPES:
        values = np.float64(dtype.decode(finite_codes(dtype)))
        cases = [(False, values)]
        if dtype.is_integer:
            zeros = np.arange(dtype.min_value, dtype.max_value + 2)
            cases.append((True, (values[:, None] - zeros).ravel()))
        for has_zeros, numbers in cases:
            exact_for = [e for e in range(-20, 20) if holds(act, numbers / 2.0**e)]
            if exact_for:
                assert exponent_of(dtype, ours, has_zeros) in exact_for, (dtype, has_zeros)
            else:
                with pytest.raises(TilusError, match=f"{ours.name} and a weight of {dtype.name}"):
                    exponent_of(dtype, ours, has_zeros)


def exact_pairs() -> Iterator[Any]:
    for act in TYPES:
        for dtype in CODE_TYPES:
            values = np.float64(dtype.decode(finite_codes(dtype)))
            if any(holds(act, values / 2.0**e) for e in range(-20, 20)):
                often = dtype in (tilus.int4, tilus.uint4, tilus.float6_e2m3)
                yield pytest.param(dtype, act, marks=[] if often else pytest.mark.exhaustive, id=f"{dtype} {act}")


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("dtype", "act"), list(exact_pairs()))
def test_every_code_is_what_it_stands_for(device: str, dtype: tilus.DataType, act: torch.dtype) -> None:
    """A one in each column finds that column's codes: every code in every place of a packed word, every column in its place."""
    if device == "cpu":
        return
    usable = finite_codes(dtype)
    n = 64 * -(-len(usable) // 64)
    codes = usable[(np.arange(n)[:, None] + np.arange(64)) % len(usable)]
    matrix = QuantizedMatrix(codes, np.ones((n, 1), np.float32), None, dtype)
    x = torch.eye(64).to(act)
    y = w4a8_linear(paired(x), torch.ones(64), pack(matrix), out_dtype=torch.float32, device=device)
    np.testing.assert_array_equal(y.numpy(), np.float64(dtype.decode(codes)).T)


@pytest.mark.parametrize("dtype", [tilus.int8, tilus.float8_e4m3], ids=str)
def test_with_codes_of_quantize_tokens(device: str, dtype: tilus.DataType) -> None:
    """x of -7 to 7 with a 7 in each row: codes of float8_e4m3 are 64 times x, so all is exact, and of int8 nearly."""
    if device == "cpu":
        return
    x = torch.randint(-7, 8, (6, 128), generator=torch.Generator().manual_seed(0)).half()
    x[:, 9] = 7
    matrix = random_matrix(tilus.int4, 64, 128, 128)
    codes, scales = quantize_tokens(x, dtype, paired=True, device=device)
    y = w4a8_linear(codes, scales, pack(matrix), out_dtype=torch.float32, device=device)
    values = exact(matrix).values
    size = np.abs(float64(x)) @ np.abs(values).T
    step = 0.5 * 7 / 127 if dtype == tilus.int8 else 0.0
    bound = step * np.abs(values).sum(1) + 2.0**-21 * size
    assert (np.abs(float64(y) - float64(x) @ values.T) <= bound).all()


@pytest.mark.parametrize(
    ("m", "tokens"), [(1, 8), (16, 16), (24, 24), (40, 48), (64, 64), (100, 112), (128, 128), (300, 112)]
)
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (192, 64)])
@pytest.mark.parametrize(("dtype", "act"), [(tilus.int4, tilus.float8_e4m3), (tilus.int8, tilus.int8)], ids=str)
def test_plans_fit(
    m: int, tokens: int, shape: tuple[int, int], dtype: tilus.DataType, act: tilus.DataType
) -> None:  # fmt: skip
    """Steps are parts of K, stages are in shared memory, and up to 128 tokens one block has all."""
    header = WeightHeader(dtype, shape, min(128, shape[1]), "f16")
    found = list(plans(m, act, header, 132))
    for plan in found:
        assert shape[1] % (64 * plan.depth) == 0 and 64 * plan.depth <= 256 and not plan.scaled
        nbytes = plan.stages * (plan.rows * plan.depth * 512 * dtype.nbits + plan.tokens * plan.depth * 64)
        nbytes += (plan.splits + plan.blocks - 2) * plan.rows * 64 * plan.tokens * 4
        assert (nbytes + 1024) * plan.blocks_per_sm < 228 * 1024
    assert found[0].tokens == tokens
    assert found[-1].tokens == 8 and found[-1].splits == 1
    assert all(plan.unit == "wgmma" for plan in found) or (act == tilus.int8 and m == 1)


def test_mistakes() -> None:
    weight, scale = pack(random_matrix(tilus.int4, 64, 128, 64)), torch.ones(2)
    x = torch.zeros(2, 128, dtype=torch.int8)

    def refused(match: str, x: torch.Tensor = x, scale: torch.Tensor = scale, **options: Any) -> None:
        with pytest.raises(TilusError, match=match):
            w4a8_linear(x, scale, options.pop("weight", weight), device="reference", **options)

    unsigned = pack(random_matrix(tilus.uint8, 64, 128, 64))
    refused("activations of int8 and a weight of uint8, expected", weight=unsigned)
    with_zeros = pack(matrix_of("zero points", tilus.uint8, 64, 128, 64))
    refused("activations of int8 and a weight of uint8 with zero points", weight=with_zeros)
    refused("of table uint4", weight=pack(matrix_of("table", tilus.uint4, 64, 128, 64)))
    refused("zero points in activation order int4", weight=pack(matrix_of("activation order", tilus.int4, 64, 128, 64)))
    float8, bytes_ = x.to(torch.float8_e4m3fn), pack(random_matrix(tilus.int8, 64, 128, 64))
    refused("activations of float8_e4m3 and a weight of int8", x=float8, weight=bytes_)
    refused("in groups of 16, expected", weight=pack(random_matrix(tilus.int4, 64, 128, 16)))
    refused(r"a weight \[65, 128\] in the order mma", weight=pack(random_matrix(tilus.int4, 65, 128, 64)))
    refused("in the order rows", weight=pack(random_matrix(tilus.int4, 64, 128, 64), "cpu"))
    refused(r"x is float16\[2, 128\], expected int8 or float8_e4m3fn \[M, 128\]", x=x.half())
    refused(r"x_scale has shape \[3\], expected \[2\]", scale=torch.ones(3))
    refused(r"bias has shape \[63\], expected \[64\]", bias=torch.zeros(63))
    refused("without out_dtype")
