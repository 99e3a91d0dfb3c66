"""Gated linear layers, `activation(gate) * factor` of the sums of one weight, against float64.

The law: the sums s are as exact as those of `linear`, nothing is rounded before the result, and that is rounded once. With e the
bound of a sum's error, which the activation (whose slope is below 1.13 everywhere) hands on:

    |y - exact| <= 1.13 e_gate (|up| + e_up) + |activation(gate)| e_up + error of the activation + rounding of y.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import ABSOLUTE, RELATIVE, Array, float64
from weights import SCHEMES, exact, matrix_of

import tilus
from tilus import TilusError
from tilus.kernels import linear, pack_dense, quantize_tokens
from tilus.kernels.activation import silu
from tilus.kernels.grouped_linear import grouped_linear
from tilus.kernels.linear import launch
from tilus.kernels.quantize import QuantizedMatrix, WeightHeader, pack, unpack
from tilus.kernels.quantize.gates import interleaved, separated
from tilus.kernels.schedule import Schedule
from tilus.kernels.w4a8_linear import w4a8_linear
from tilus.kernels.warpgroup_plan import WarpgroupPlan

HOPPER = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
STEEPEST = 1.13  # slope of gelu_tanh; that of silu is at most 1.1
WORK = 2.0**-15  # of the activation, as in test_activation.py


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activated(name: str, gate: Array) -> Array:
    u = gate if name == "silu" else 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    with np.errstate(over="ignore"):  # exp of what is far below zero, whose limit is right
        return gate / (1 + np.exp(-u))


def check(y: torch.Tensor, sums: Array, errors: Array, name: str) -> None:
    """sums: exact, [M, 2 F]; errors: bounds of those of the kernel."""
    (gate, up), (e_gate, e_up) = np.split(sums, 2, axis=1), np.split(errors, 2, axis=1)
    expected = activated(name, gate) * up
    error = STEEPEST * e_gate * (np.abs(up) + e_up) + np.abs(activated(name, gate)) * e_up + WORK * np.abs(expected)
    bound = error * (1 + RELATIVE[y.dtype]) + RELATIVE[y.dtype] * np.abs(expected) + ABSOLUTE[y.dtype]
    wrong = ~(np.abs(float64(y) - expected) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} are wrong, the first at {np.argwhere(wrong)[0]}"


def sums_of(
    x: torch.Tensor, matrix: QuantizedMatrix, bias: torch.Tensor | None, rounded: float = 0
) -> tuple[Array, Array]:
    """And bounds of their errors. rounded: the relative error of a weight."""
    weight, size = exact(matrix), np.abs(float64(x))
    offset = np.zeros(matrix.shape[0]) if bias is None else float64(bias)
    work = (x.shape[1] + 16) * 2.0**-23 + rounded
    return float64(x) @ weight.values.T + offset, work * (size @ weight.sizes.T + np.abs(offset))


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("activation", "scheme", "dtype", "n", "m", "act", "out"),
    [
        ("silu", "symmetric", tilus.int4, 144, 1, torch.float16, torch.float16),
        ("gelu_tanh", "minimums", tilus.uint4, 80, 9, torch.bfloat16, torch.float32),
        ("gelu_tanh", "activation order", tilus.uint4, 16, 3, torch.float16, torch.float16),
        ("silu", "two levels", tilus.float4_e2m1, 128, 17, torch.bfloat16, torch.bfloat16),
    ],
)
def test_every_device(
    device: str, activation: str, scheme: str, dtype: Any, n: int, m: int, act: torch.dtype, out: torch.dtype
) -> None:
    """Ragged in M and N, with a bias, whose order is that of the model."""
    matrix, x, bias = matrix_of(scheme, dtype, n, 96, 32, seed=n), normal(m, 96, seed=m).to(act), normal(n, seed=1)
    weight = pack(matrix, "cpu", "rows" if device == "cpu" else "mma", gated=True)
    y = linear(x, weight, bias=bias, activation=activation, out_dtype=out, device=device)
    assert y.shape == (m, n // 2)
    check(y, *sums_of(x, matrix, bias), activation)


def test_sums_of_blocks_along_k(device: str) -> None:
    matrix, x, bias = matrix_of("symmetric", tilus.int4, 80, 320, 64), normal(9, 320).half(), normal(80, seed=2).half()
    y = torch.full((9, 40), torch.nan)
    launch(x, pack(matrix, "cpu", "mma", gated=True), y, bias, Schedule(8, 1, 2, 1, splits=2), device, silu)
    check(y, *sums_of(x, matrix, bias), "silu")


PLANS = [
    WarpgroupPlan(8, 1, 3, 1, 1, 6),
    WarpgroupPlan(8, 1, 2, 2, 1, 4, overlap="step"),
    WarpgroupPlan(8, 1, 2, 1, 2, 4, unit="mma"),
    WarpgroupPlan(64, 2, 1, 1, 2, 3, 208, overlap="steps"),
    WarpgroupPlan(16, 2, 1, 1, 2, 3, launched=3, streamed=True),
    WarpgroupPlan(32, 2, 1, 1, 2, 3, scaled=True, launched=2, sharing=2),
    WarpgroupPlan(24, 1, 2, 1, 1, 4),
    WarpgroupPlan(56, 2, 1, 1, 2, 3, blocks_per_sm=2, overlap="others"),
    WarpgroupPlan(96, 1, 1, 1, 1, 2),
    WarpgroupPlan(224, 2, 1, 1, 2, 2, 232, scaled=True),
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", HOPPER)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_warpgroups(device: str, plan: WarpgroupPlan) -> None:
    """Rows that end inside of a tile and of a block, more tokens than one block has."""
    matrix, x, bias = matrix_of("symmetric", tilus.int4, 144, 256, 64), normal(plan.tokens + 1, 256).half(), normal(144)
    y = torch.full((plan.tokens + 1, 72), torch.nan)
    launch(x, pack(matrix, "cpu", "mma", gated=True), y, bias, plan, device, silu)
    check(y, *sums_of(x, matrix, bias, rounded=3 * 2.0**-11 if plan.scaled else 0), "silu")


@pytest.mark.parametrize("device", HOPPER)
@pytest.mark.parametrize(("m", "out"), [(5, torch.float32), (80, torch.float16)], ids=str)
def test_dense_weights(device: str, out: torch.dtype, m: int) -> None:
    values, x, bias = normal(144, 128, seed=3).half(), normal(m, 128).half(), normal(144, seed=4)
    y = linear(x, pack_dense(values, gated=True), bias=bias, activation="silu", out_dtype=out, device=device)
    errors = 144 * 2.0**-23 * (np.abs(float64(x)) @ np.abs(float64(values)).T + np.abs(float64(bias)))
    check(y, float64(x) @ float64(values).T + float64(bias), errors, "silu")


@pytest.mark.parametrize("device", HOPPER)
def test_activations_of_8_bits(device: str) -> None:
    matrix, bias = matrix_of("symmetric", tilus.int4, 128, 256, 128), normal(128)
    (codes, scales), (plain, _) = (
        quantize_tokens(normal(9, 256).half(), paired=paired, device=device) for paired in (True, False)
    )
    x = plain.double() * scales[:, None].double()
    weight = pack(matrix, "cpu", "mma", gated=True)
    y = w4a8_linear(codes, scales, weight, bias=bias, activation="silu", out_dtype=torch.float32, device=device)
    check(y, *sums_of(x, matrix, bias), "silu")


@pytest.mark.parametrize("device", HOPPER)
def test_gates_far_below_zero(device: str) -> None:
    """Their exponential overflows; and sums beyond f16 are no infinities, as they would be in a layer of their own."""
    values = np.ones((16, 16), np.uint8)
    values[:8] = 15  # -1
    matrix = QuantizedMatrix(values, np.full((16, 1), 1.0, np.float32), None, tilus.int4)
    x = torch.full((1, 16), 60000.0).half()
    y = linear(x, pack(matrix, "cpu", "mma", gated=True), activation="silu", out_dtype=torch.float32, device=device)
    assert not y.any()
    y = linear(-x, pack(matrix, "cpu", "mma", gated=True), activation="silu", out_dtype=torch.float32, device=device)
    assert torch.equal(y, torch.full((1, 8), -((16 * float(x[0, 0])) ** 2)))


@pytest.mark.parametrize("order", ["mma", "rows"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacking_gives_the_rows_back(scheme: str, order: str) -> None:
    """Also from the other order of tiles."""
    matrix = matrix_of(scheme, SCHEMES[scheme][1][0], 80, 64, 32)
    packed = pack(matrix, order=order, gated=True)
    assert packed.is_gated and packed.to("cpu").is_gated
    for found in (unpack(packed), unpack(packed.to("cpu"))):
        for field in dataclasses.fields(matrix):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(matrix, field.name))


@given(st.integers(1, 9))
def test_the_order(blocks: int) -> None:
    """Of each 16 rows 8 gates and the factors of the same outputs, for arrays and tensors."""
    rows = np.arange(16 * blocks)
    for index, row in enumerate(interleaved(rows)):
        half, output = divmod(int(row), 8 * blocks)
        assert index == output // 8 * 16 + half * 8 + output % 8
    np.testing.assert_array_equal(separated(interleaved(rows)), rows)
    np.testing.assert_array_equal(interleaved(torch.from_numpy(rows)), interleaved(rows))


def test_the_header() -> None:
    header = pack(matrix_of("symmetric", tilus.int4, 16, 64, 64), gated=True).header
    assert WeightHeader.from_json(json.loads(json.dumps(header.to_json()))) == header
    assert header != pack(matrix_of("symmetric", tilus.int4, 16, 64, 64)).header


def test_mistakes() -> None:
    matrix, x = matrix_of("symmetric", tilus.int4, 32, 64, 64), torch.zeros(1, 64).half()
    gated, plain = pack(matrix, gated=True), pack(matrix)
    with pytest.raises(TilusError, match="linear: a gated weight without activation, expected both or neither"):
        linear(x, gated)
    with pytest.raises(
        TilusError, match="linear: activation 'silu' of a weight without gates, expected both or neither"
    ):
        linear(x, plain, activation="silu")
    with pytest.raises(TilusError, match="linear: activation 'relu', expected silu or gelu_tanh"):
        linear(x, gated, activation="relu")
    wide, dense = torch.zeros(1, 32).half(), pack_dense(x.expand(32, 64), gated=True)
    for weight, name in ((gated, "linear"), (dense, "gemm")):
        with pytest.raises(TilusError, match=rf"{name}: out has shape \[1, 32\], expected \[1, 16\]"):
            linear(x, weight, activation="silu", out=wide, device="reference")
    with pytest.raises(TilusError, match=r"linear: bias has shape \[16\], expected \[32\]"):
        linear(x, gated, activation="silu", bias=torch.zeros(16))
    with pytest.raises(TilusError, match="grouped_linear: a gated weight without activation"):
        grouped_linear(x, gated, torch.tensor([0, 1], dtype=torch.int32))
    for pack_24 in (
        lambda: pack(matrix.take_rows(np.arange(24)), gated=True),
        lambda: pack_dense(x.expand(24, 64), gated=True),
    ):
        with pytest.raises(TilusError, match="a gated weight of 24 rows, expected a multiple of 16"):
            pack_24()
