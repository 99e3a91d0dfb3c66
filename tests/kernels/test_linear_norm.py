"""Norms between two linear layers that are parts of them, against float64.

The laws, each from what the kernel in front has stored: the stream is the exact sum as f32 adds it up; values are the stream
times scale and weight, rounded once; squares are sums of the stream's; the layer behind gives its exact sums over the root of the
mean square, rounded once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import RELATIVE, Array, assert_rounded_once, float64
from test_gated_linear import check
from weights import SCHEMES, exact, matrix_of

import tilus
from tilus import TilusError
from tilus.kernels import DeferredNorm, add_rms_norm, linear, linear_add_rms_norm, pack_dense
from tilus.kernels.activation import silu
from tilus.kernels.deferred_norm import Addend, Norms
from tilus.kernels.linear import launch
from tilus.kernels.linear_norm import TOKENS, deferred
from tilus.kernels.quantize import QuantizedMatrix, QuantizedWeight, WeightHeader, pack
from tilus.kernels.trial_arrays import placeholder
from tilus.kernels.warpgroup_linear import kernel_call
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_schedule import invariant_plans, warpgroup_plans
from tilus.ptx.assembler import KernelUsage, assemble
from tilus.target import get_target

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
EPS = 1e-5

# (tokens, rows, splits, blocks, depth, stages), and what is special.
PLANS = [
    (WarpgroupPlan(8, 1, 2, 1, 2, 4), "symmetric", torch.float16),
    (WarpgroupPlan(8, 1, 4, 1, 2, 8, unit="mma"), "zero points", torch.float16),
    (WarpgroupPlan(16, 2, 1, 2, 2, 3), "minimums", torch.bfloat16),
    (WarpgroupPlan(16, 1, 2, 2, 2, 4, overlap="step"), "symmetric", torch.float16),
    (WarpgroupPlan(32, 1, 3, 1, 1, 6), "symmetric", torch.bfloat16),
    (WarpgroupPlan(64, 1, 2, 2, 2, 4, overlap="step"), "symmetric", torch.float16),
    (WarpgroupPlan(64, 2, 1, 1, 2, 3, blocks_per_sm=1, overlap="others"), "symmetric", torch.float16),
    (WarpgroupPlan(40, 1, 2, 2, 2, 4, overlap="step"), "symmetric", torch.float16),
    (WarpgroupPlan(112, 2, 1, 1, 2, 3, 232, overlap="steps"), "symmetric", torch.float16),
    (WarpgroupPlan(16, 1, 1, 1, 2, 3, sharing=2), "symmetric", torch.float16),
    (WarpgroupPlan(16, 1, 1, 1, 2, 3, launched=2), "symmetric", torch.float16),
    (WarpgroupPlan(8, 1, 2, 1, 1, 4, launched=3, streamed=True), "symmetric", torch.float16),
]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(scheme: str, n: int, k: int, seed: int = 0) -> QuantizedMatrix:
    types = SCHEMES[scheme][1]
    return matrix_of(scheme, types[len(types) // 2], n, k, 64, seed=seed)


def addend(m: int, h: int, scale: float = 1.0, spread: float = 3.0) -> Addend:
    return Addend(spread * normal(m, h, seed=5), normal(h, seed=6), torch.full((m, h // 64), torch.nan), scale)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("plan", "scheme", "act"), PLANS, ids=str)
def test_a_layer_that_adds_to_the_stream(device: str, plan: WarpgroupPlan, scheme: str, act: torch.dtype) -> None:
    """An odd number of rows of tiles, more tokens than one block has, a bias."""
    m, k, h = plan.tokens + 3, 256, 192
    matrix, x, bias = weight_of(scheme, h, k), normal(m, k).to(act), normal(h, seed=1)
    after = addend(m, h, scale=0.5)
    before, values = float64(after.stream.clone()), torch.full((m, h), torch.nan, dtype=act)
    launch(x, pack(matrix, "cpu", "mma"), values, bias, plan, device, norms=Norms(after=after))
    weights, size = exact(matrix), np.abs(float64(x))
    total = before + float64(x) @ weights.values.T + float64(bias)
    sizes = np.abs(before) + size @ weights.sizes.T + np.abs(float64(bias))
    assert_rounded_once(after.stream, total, sizes, work=(k + 16) * 2.0**-23)
    stream = 0.5 * float64(after.stream)
    assert_rounded_once(values, stream * float64(after.weight), work=2.0**-23)
    squares = (stream * stream).reshape(m, -1, 64).sum(2)
    assert_rounded_once(after.squares, squares, work=64 * 2.0**-24)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("plan", "scheme", "act"), PLANS, ids=str)
def test_a_layer_that_divides_by_root_mean_squares(
    device: str, plan: WarpgroupPlan, scheme: str, act: torch.dtype
) -> None:
    """Sums of squares that differ from token to token, in a number that is no multiple of what a thread loads."""
    m, k, n = plan.tokens + 3, 384, 150
    matrix, values, bias = weight_of(scheme, n, k), normal(m, k).to(act), normal(n, seed=1)
    squares = (10 * normal(m, k // 64, seed=2)).exp2()
    y = torch.full((m, n), torch.nan)
    norms = Norms(before=DeferredNorm(values, squares, EPS))
    launch(values, pack(matrix, "cpu", "mma"), y, bias, plan, device, norms=norms)
    sums, errors = divided(values, squares, matrix, bias)
    assert (np.abs(float64(y) - sums) <= errors).all()


def divided(
    values: torch.Tensor, squares: torch.Tensor, matrix: QuantizedMatrix, bias: torch.Tensor | None
) -> tuple[Array, Array]:
    """Exact results of the layer behind a norm, and bounds of their errors before they are rounded."""
    weights, k = exact(matrix), values.shape[1]
    inverse = 1 / np.sqrt(float64(squares).sum(1, keepdims=True) / k + EPS)
    offset = np.zeros(matrix.shape[0]) if bias is None else float64(bias)
    sizes = np.abs(float64(values)) @ weights.sizes.T * inverse + np.abs(offset)
    return float64(values) @ weights.values.T * inverse + offset, (k + 32) * 2.0**-23 * sizes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "plan", [WarpgroupPlan(8, 2, 1, 1, 2, 3, unit="mma"), WarpgroupPlan(64, 2, 1, 1, 2, 3)], ids=str
)
def test_gates_behind_a_norm(device: str, plan: WarpgroupPlan) -> None:
    """Both halves of the sums are divided before the activation."""
    m, k, n = plan.tokens, 128, 160
    matrix, values, bias = weight_of("symmetric", n, k), normal(m, k).half(), normal(n, seed=1)
    squares = (4 + normal(m, k // 64, seed=2)).exp2()
    y = torch.full((m, n // 2), torch.nan).half()
    norms = Norms(before=DeferredNorm(values, squares, EPS))
    launch(values, pack(matrix, "cpu", "mma", gated=True), y, bias, plan, device, silu, norms)
    check(y, *divided(values, squares, matrix, bias), "silu")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [1, 9, 40])
def test_two_layers(device: str, m: int) -> None:
    """As `linear` plans them: the result is that of exact norms but for the rounding of their values."""
    k, h, n = 192, 128, 96
    first, second = weight_of("symmetric", h, k), weight_of("zero points", n, h, seed=1)
    x, residual, norm = normal(m, k).half(), 3 * normal(m, h, seed=1), normal(h, seed=2)
    before = float64(residual.clone())
    between = deferred(x, pack(first, "cpu", "mma"), residual, norm, EPS, device=device)
    assert isinstance(between, DeferredNorm) and between.shape == (m, h) and between.dtype == torch.float16
    y = linear(between, pack(second, "cpu", "mma"), out_dtype=torch.float32, device=device)
    stream = before + float64(x) @ exact(first).values.T
    normed = stream / np.sqrt((stream * stream).mean(1, keepdims=True) + EPS) * float64(norm)
    sizes = np.abs(normed) @ exact(second).sizes.T
    error = np.abs(float64(y) - normed @ exact(second).values.T)
    assert (error <= (RELATIVE[torch.float16] + 2.0**-13) * sizes).all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_scale_of_the_stream_changes_no_bit(device: str) -> None:
    """It is a power of two, and nothing is subnormal; a stream that 16 bits do not hold fits by it."""
    first, second = (
        pack(weight_of("symmetric", 64, 64), "cpu", "mma"),
        pack(weight_of("symmetric", 64, 64), "cpu", "mma"),
    )
    x, norm = normal(5, 64).half(), 1 + normal(64, seed=2).abs()
    results = []
    for scale in (1.0, 2.0**-6):
        between = deferred(x, first, 100 * normal(5, 64, seed=1), norm, EPS, scale=scale, device=device)
        results.append(linear(between, second, device=device))
    assert torch.equal(results[0], results[1])
    large = [
        deferred(x, first, 1e5 * normal(5, 64, seed=1), norm, EPS, scale=scale, device=device).values
        for scale in (1.0, 2.0**-6)
    ]
    assert large[0].isinf().any() and large[1].isfinite().all()


@pytest.mark.parametrize("device", ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pairs_give_the_same_bits_twice_and_to_a_row_in_any_batch(device: str) -> None:
    """Where plans differ in their tokens alone: root mean squares have one order."""
    first, second = (
        pack(weight_of("symmetric", 128, 256), "cpu", "mma"),
        pack(weight_of("symmetric", 64, 128), "cpu", "mma"),
    )
    x, residual = normal(40, 256).half(), 3 * normal(40, 128, seed=1)
    found: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for m in (40, 1, 13, 40):
        front, behind = (invariant_plans(weight.header, m, 132)[0] for weight in (first, second))
        after = Addend(residual[:m].clone(), normal(128, seed=2), torch.empty(m, 2), 1.0)
        values, y = torch.empty(m, 128).half(), torch.empty(m, 64).half()
        launch(x[:m].clone(), first, values, None, front, device, norms=Norms(after=after))
        launch(values, second, y, None, behind, device, norms=Norms(before=DeferredNorm(values, after.squares, EPS)))
        found.setdefault(m, []).append((after.stream, values, after.squares, y))
        assert front.tokens == {40: 64, 1: 8, 13: 16}[m]
    for runs in found.values():
        for run in runs:
            for part, whole in zip(run, found[40][0]):
                assert torch.equal(part, whole[: len(part)])
    assert len(found[40]) == 2


@given(st.integers(1, 80), st.booleans())
def test_elsewhere_it_is_a_product_and_a_norm(m: int, is_read: bool) -> None:
    weight = pack(weight_of("symmetric", 64, 64), "cpu", "mma")
    x, residual, norm = normal(m, 64, seed=m).half(), normal(m, 64, seed=1), normal(64, seed=2)
    other = residual.clone()
    y = linear_add_rms_norm(
        x, weight, residual, norm, EPS, reader=weight if is_read else None, scale=0.25, device="reference"
    )
    expected = add_rms_norm(linear(x, weight, device="reference"), other, norm, EPS, device="reference")
    assert torch.equal(y, expected) and torch.equal(residual, other)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 64, 65])
def test_the_choice_on_hopper(m: int) -> None:
    """Few tokens, but more than one; packed weights; results that need not be invariant."""
    weight = pack(weight_of("symmetric", 128, 128), "cuda", "mma")
    x, norm = normal(m, 128).half().cuda(), normal(128, seed=2).cuda()

    def between(reader: Any, invariant: bool = False) -> Any:
        residual = normal(m, 128, seed=1).cuda()
        return linear_add_rms_norm(x, weight, residual, norm, EPS, reader=reader, invariant=invariant)

    assert isinstance(between(weight), DeferredNorm) == (m in TOKENS)
    assert isinstance(between(weight, invariant=True), torch.Tensor)
    for reader in (None, pack_dense(normal(64, 128).half().cuda())):
        assert isinstance(between(reader), torch.Tensor)


@pytest.mark.sampled(9)
@pytest.mark.slow
@pytest.mark.parametrize(("m", "group"), [(2, 128), (16, 128), (32, 128), (64, 128), (64, 64)])
@pytest.mark.parametrize(("h", "k", "n"), [(4096, 14336, 28672), (4096, 4096, 6144), (640, 1536, 3072)])
def test_norms_spill_no_registers(h: int, k: int, n: int, m: int, group: int) -> None:
    """By the rule's plans, some of which spill anyway where scales are many; the next kernel's blocks want registers, too."""
    front, behind = (WeightHeader(tilus.int4, shape, group, "f16", None) for shape in ((h, k), (n, h)))
    after = Addend(*(placeholder(shape, tilus.f32) for shape in ((m, h), (h,), (m, h // 64))), 1.0)
    before = DeferredNorm(None, placeholder((m, h // 64), tilus.f32), EPS)
    for weight, norms, activation in ((front, Norms(after=after), None), (behind, Norms(before=before), silu)):
        plan = warpgroup_plans(weight, m, 132)[0]
        plan = plan if norms.after is None else plan.with_wide_results(weight)
        alone, beside = (usage(weight, m, plan, norms, activation) for norms in (Norms(), norms))
        assert beside.spill_store_nbytes <= alone.spill_store_nbytes and beside.stack_nbytes <= alone.stack_nbytes
        assert beside.registers <= alone.registers + 8
        assert group < 128 or beside.spill_store_nbytes == 0


def usage(weight: WeightHeader, m: int, plan: WarpgroupPlan, norms: Norms, activation: Any) -> KernelUsage:
    packed = QuantizedWeight(weight, **{name: np.empty(*kind) for name, kind in weight.arrays.items()})
    n, k = weight.shape
    y = placeholder((m, n if activation is None else n // 2), tilus.f16)
    kernel, arguments, values = kernel_call(
        placeholder((m, k), tilus.f16), packed, y, None, plan, activation, norms=norms
    )
    ptx = kernel.ptx(*arguments, target="sm_90a", **values)
    (found,) = assemble(ptx, get_target("sm_90a"), allow_spills=True).kernels
    return found


def test_misfits_are_named() -> None:
    weight = pack(weight_of("symmetric", 64, 128), "cpu", "mma")
    x, norm = normal(3, 128).half(), normal(64)
    with pytest.raises(TilusError, match=r"x has shape \[3, 128\], residual \[2, 64\], the weight is \[64, 128\]"):
        deferred(x, weight, normal(2, 64), norm, EPS, device="reference")
    between = deferred(x, weight, normal(3, 64), norm, EPS, device="reference")
    with pytest.raises(TilusError, match=r"linear: x has shape \[3, 64\], the weight is \[64, 128\]"):
        linear(between, weight, device="reference")
    with pytest.raises(TilusError, match="linear: the norm of x is deferred, the weight is dense"):
        linear(between, pack_dense(normal(8, 64).half()), device="reference")
