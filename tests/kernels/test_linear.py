"""Quantised linear layers against float64, for every code type.

The law: each weight `scale * code + minimum` is rounded once to the activations' type (for bfloat16 the f16 scale and minimum
are, too), products of such numbers are exact in f32, their sum is f32, and the result is rounded once. So

    |y - exact| <= sum_k |x_k| * r * (|scale_k * code_k| + |minimum_k|) * (1 + f32 work) + rounding of y.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import ABSOLUTE, RELATIVE, Array, float64
from weights import CODE_TYPES, Weight, random_weight

import tilus
from tilus import TilusError
from tilus.dtypes import DataType
from tilus.kernels import linear
from tilus.kernels.linear import quantized_linear
from tilus.kernels.quantize import unpack

GROUPS = [16, 32, 64, 128, 0]


def activations(m: int, k: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_and_bound(x: torch.Tensor, weight: Weight, out: torch.dtype) -> tuple[Array, Array]:
    products, offsets = weight.products, weight.offsets
    exact = float64(x) @ (products + offsets).T
    roundings = 1 if x.dtype == torch.float16 else 2.1
    unit = roundings * RELATIVE[x.dtype] + x.shape[1] * 2.0**-23
    size = np.abs(float64(x)) @ (np.abs(products) + np.abs(offsets)).T
    underflow = ABSOLUTE[x.dtype] * np.abs(float64(x)).sum(-1, keepdims=True)
    return exact, (unit * size + underflow) * (1 + RELATIVE[out]) + RELATIVE[out] * np.abs(exact) + ABSOLUTE[out]


def check(
    device: str, x: torch.Tensor, weight: Weight, out: torch.dtype = torch.float32, packed_for: DataType = tilus.f16
) -> None:
    exact, bound = exact_and_bound(x, weight, out)
    y = linear(x, weight.packed(packed_for), out_dtype=out, device=device)
    assert y.dtype == out
    wrong = ~(np.abs(float64(y) - exact) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} are wrong, the first at {np.argwhere(wrong)[0]}"


@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_every_type(device: str, dtype: DataType) -> None:
    """Ragged in M, N and K; integers with minimums, floats without; groups in turn."""
    index = CODE_TYPES.index(dtype)
    k, group = [(96, 16), (160, 32), (192, 64), (128, 128), (72, 72)][index % 5]
    weight = random_weight(dtype, 70, k, group, mins=dtype.is_integer, seed=index)
    check(device, activations(3, k), weight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("act", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_every_type_with_every_group(device: str, dtype: DataType, group: int, act: torch.dtype) -> None:
    k = 3 * group if group else 200
    weight = random_weight(dtype, 65, k, group or k, mins=True, seed=group)
    check(device, activations(9, k, act), weight, act)


@pytest.mark.parametrize("dtype", [tilus.int4, tilus.uint3, tilus.float6_e3m2, tilus.float5_e4m0], ids=str)
@pytest.mark.parametrize(("out", "packed_for"), [(torch.bfloat16, tilus.f16), (torch.float32, tilus.bf16)], ids=str)
def test_bfloat16_activations(device: str, dtype: DataType, out: torch.dtype, packed_for: DataType) -> None:
    weight = random_weight(dtype, 64, 96, 32, mins=True)
    check(device, activations(5, 96, torch.bfloat16), weight, out, packed_for)
    np.testing.assert_array_equal(unpack(weight.packed(packed_for))[0], weight.codes)


@pytest.mark.parametrize("act", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("largest", [0.0, 2.0**-24, 3.98, 3.998, 4.0, 30000.0])
def test_scales_that_take_the_exponent_bias_and_those_that_would_overflow(
    device: str, largest: float, act: torch.dtype
) -> None:
    """float4_e2m1 leaves 2^14 (bf16: 2^126) to its scales, which the last three could not bear: 3.998 is 4 in bfloat16."""
    weight = random_weight(tilus.float4_e2m1, 64, 64, 32)
    scales = np.full(weight.scales.shape, largest, np.float16)
    scales[::2] = -scales[::2] / 2
    weight = Weight(weight.dtype, np.where(weight.codes % 8 == 1, weight.codes, 0).astype(np.uint8), scales, None)
    assert weight.packed().folded == (largest < 3.99)
    check(device, activations(3, 64, act) * 2.0**-8, weight)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17, 65])
def test_numbers_of_tokens(device: str, tokens: int) -> None:
    """Around the tiles of 8, 16, 32 and 64 tokens."""
    check(device, activations(tokens, 64), random_weight(tilus.int4, 64, 64, 32), torch.float16)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_numbers_of_rows(device: str, n: int) -> None:
    check(device, activations(2, 64), random_weight(tilus.uint4, n, 64, 32, mins=True), torch.float16)


@pytest.mark.parametrize(
    ("k", "group"), [(1, 1), (8, 8), (20, 20), (48, 48), (63, 63), (64, 16), (65, 65), (576, 64), (1100, 1100)]
)
def test_sizes_of_k(device: str, k: int, group: int) -> None:
    """Less than a tile of 64 columns, whole tiles, and a rest; more tiles than the warps of a block, too."""
    check(device, activations(2, k), random_weight(tilus.uint4, 64, k, group, mins=True))


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_splits_of_k(device: str, warps: int, splits: int) -> None:
    """Blocks that share a tile of the result: the last one adds up, and the counters are zero again, so a second launch works."""
    weight, x = random_weight(tilus.uint4, 70, 320, 32, mins=True), activations(9, 320)
    packed = weight.packed()
    y = torch.full((9, 70), torch.nan)
    partial, tickets = torch.full((splits, 9, 70), torch.nan), torch.zeros(8, dtype=torch.int32)
    shared = (partial, tickets) if splits > 1 else (None, None)
    exact, bound = exact_and_bound(x, weight, torch.float32)
    for _ in range(2):
        quantized_linear.on(device)(
            x, packed.codes, packed.scales, y, packed.minimums, *shared,
            wdtype=packed.dtype, groups=packed.groups_per_tile, tokens=8, warps=warps,
        )  # fmt: skip
        assert (np.abs(float64(y) - exact) <= bound).all()
        assert not tickets.any()
        y.fill_(torch.nan)


def test_strided_activations(device: str) -> None:
    """A slice of wider rows, with NaN beside it."""
    wide = torch.full((3, 100), torch.nan, dtype=torch.float16)
    wide[:, 10:74] = activations(3, 64)
    check(device, wide[:, 10:74], random_weight(tilus.int4, 64, 64, 32))


def test_output_in_place(device: str) -> None:
    weight, x = random_weight(tilus.int4, 64, 64, 32), activations(3, 64)
    out = torch.empty(3, 64, dtype=torch.float16)
    assert linear(x, weight.packed(), out=out, device=device) is out
    assert torch.equal(out, linear(x, weight.packed(), device=device))


def test_no_tokens(device: str) -> None:
    assert linear(activations(0, 64), random_weight(tilus.int4, 64, 64, 32).packed(), device=device).shape == (0, 64)


def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    """As long as both batches get the same schedule."""
    weight, x = random_weight(tilus.float4_e2m1, 64, 128, 32).packed(), activations(5, 128)
    together = linear(x, weight, device=device)
    assert torch.equal(torch.cat([linear(row[None], weight, device=device) for row in x]), together)


def test_misfits_are_named_with_both_values() -> None:
    weight = random_weight(tilus.int4, 64, 96, 32).packed()
    with pytest.raises(
        TilusError, match=r"linear: x has shape \[2, 64\], the weight is \[64, 96\]\n  hint: x must be \[M, 96\]"
    ):
        linear(activations(2, 64), weight)
    with pytest.raises(TilusError, match=r"linear: x has dtype torch.float32, expected float16 or bfloat16"):
        linear(activations(2, 96, torch.float32), weight)
