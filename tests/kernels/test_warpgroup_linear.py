"""The quantised linear on warpgroups: however it is cut, the sums are exact, and every plan that is offered can be compiled."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import RELATIVE, float64
from weights import CODE_TYPES, SCHEMES, exact, finite_codes, matrix_of

import tilus
from tilus.codegen.lower import lower
from tilus.compiler import compile_function
from tilus.kernels import linear_problem
from tilus.kernels.linear import kernel_call, launch, linear
from tilus.kernels.linear_problem import LinearProblem, candidates, heuristic
from tilus.kernels.quantize import QuantizedMatrix, QuantizedWeight, WeightHeader, pack
from tilus.kernels.quantize.tiles import TILE
from tilus.kernels.schedule import Schedule
from tilus.kernels.trial_arrays import placeholder
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_schedule import invariant_plans, warpgroup_plans
from tilus.kernels.warpgroup_tiles import BAND
from tilus.ptx.assembler import assemble
from tilus.target import get_target
from tilus.transforms import run_pipeline

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
HOPPER = get_target("sm_90a")

# (tokens, rows, splits, blocks, depth, stages), and what is special.
PLANS = [
    (WarpgroupPlan(8, 1, 1, 1, 1, 2), "symmetric", 128, 128),
    (WarpgroupPlan(8, 1, 4, 1, 2, 8), "symmetric", 128, 1024),
    (WarpgroupPlan(16, 1, 2, 2, 4, 4), "zero points", 64, 1024),
    (WarpgroupPlan(16, 2, 1, 2, 2, 3), "minimums", 32, 1024),
    (WarpgroupPlan(8, 1, 2, 4, 2, 4), "wide factors", 256, 1024),
    (WarpgroupPlan(32, 1, 2, 1, 2, 4, overlap="steps"), "symmetric", 128, 1024),
    (WarpgroupPlan(16, 1, 1, 1, 2, 3, overlap="steps"), "zero points", 32, 512),
    (WarpgroupPlan(16, 1, 2, 2, 4, 4, overlap="step"), "symmetric", 128, 1024),
    (WarpgroupPlan(8, 1, 1, 1, 4, 3, overlap="step"), "minimums", 64, 512),
    (WarpgroupPlan(8, 1, 2, 1, 4, 4, overlap="steps"), "symmetric", 0, 512),
    (WarpgroupPlan(64, 2, 1, 1, 2, 3, 208, overlap="steps"), "table", 64, 384),
    (WarpgroupPlan(8, 1, 2, 1, 2, 4, overlap="steps"), "minimums", 64, 512),
    (WarpgroupPlan(16, 2, 1, 1, 4, 2, blocks_per_sm=2, overlap="others"), "symmetric", 128, 512),
    (WarpgroupPlan(16, 1, 2, 1, 2, 4, overlap="others"), "zero points", 32, 512),
    (WarpgroupPlan(24, 1, 2, 2, 2, 4, overlap="step"), "minimums", 64, 1024),
    (WarpgroupPlan(40, 2, 1, 1, 2, 3, blocks_per_sm=2, overlap="others"), "symmetric", 128, 512),
    (WarpgroupPlan(48, 1, 2, 1, 2, 4, overlap="step"), "zero points", 64, 512),
    (WarpgroupPlan(80, 1, 2, 1, 2, 4, 208), "symmetric", 128, 512),
    (WarpgroupPlan(8, 1, 1, 1, 4, 3, overlap="others"), "symmetric", 0, 512),
    (WarpgroupPlan(8, 1, 2, 1, 2, 2), "two levels", 16, 256),
    (WarpgroupPlan(8, 1, 3, 1, 1, 3), "symmetric", 64, 64),  # warpgroups without work
    (WarpgroupPlan(8, 1, 2, 1, 4, 4, unit="mma"), "symmetric", 128, 1024),
    (WarpgroupPlan(16, 1, 2, 1, 2, 4, unit="mma"), "minimums", 64, 512),
    (WarpgroupPlan(8, 1, 2, 2, 4, 4, unit="mma"), "zero points", 32, 1024),
    (WarpgroupPlan(16, 1, 1, 1, 2, 3, sharing=2), "symmetric", 128, 1024),
    (WarpgroupPlan(16, 1, 2, 2, 2, 4, sharing=2), "symmetric", 128, 1024),
    (WarpgroupPlan(16, 1, 1, 1, 2, 3, launched=2), "symmetric", 128, 512),
    (WarpgroupPlan(16, 1, 1, 1, 2, 3, sharing=2, launched=2, overlap="steps"), "symmetric", 128, 512),
    (WarpgroupPlan(8, 1, 2, 1, 2, 4, launched=2, unit="mma"), "zero points", 128, 512),
    (WarpgroupPlan(16, 1, 3, 1, 1, 6, launched=2), "symmetric", 64, 640),
    (WarpgroupPlan(8, 1, 2, 1, 1, 4, launched=4, streamed=True), "symmetric", 64, 448),
    (WarpgroupPlan(16, 1, 3, 1, 1, 6, launched=5, streamed=True, overlap="steps"), "symmetric", 64, 320),
    (WarpgroupPlan(16, 2, 1, 1, 2, 3, launched=3, streamed=True, overlap="step"), "minimums", 32, 512),
]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("plan", "scheme", "group", "k"), PLANS, ids=str)
def test_sums_are_exact(device: str, plan: WarpgroupPlan, scheme: str, group: int, k: int) -> None:
    """Rows that end inside of a tile and of a block, more tokens than one block has, and fewer."""
    dtype = SCHEMES[scheme][1][len(SCHEMES[scheme][1]) // 2]
    matrix = matrix_of(scheme, dtype, 150, k, group or k, seed=k)
    m = plan.tokens + 3
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(group)).half()
    bias = torch.arange(150, dtype=torch.float32) / 64
    y = torch.full((m, 150), torch.nan)
    launch(x, pack(matrix, "cpu", "mma"), y, bias, plan, device)
    weights = exact(matrix)
    expected = x.double().numpy() @ weights.values.T + bias.double().numpy()
    sizes = np.abs(x.double().numpy()) @ weights.sizes.T + np.abs(bias.double().numpy())
    bound = (k + 16) * 2.0**-23 * sizes
    if matrix.table is not None:  # whose entries are rounded to the activations' type
        bound = bound + 2.0**-11 * np.abs(x.double().numpy()) @ weights.from_table.T
    assert (np.abs(y.double().numpy() - expected) <= bound).all()


SCALED = [
    WarpgroupPlan(32, 2, 1, 1, 2, 3, scaled=True),
    WarpgroupPlan(32, 2, 1, 1, 2, 3, scaled=True, launched=1),  # all tiles in turn by one block
    WarpgroupPlan(32, 2, 1, 1, 2, 3, scaled=True, launched=2, sharing=2),  # or by a pair
    WarpgroupPlan(128, 2, 1, 1, 2, 3, 232, scaled=True, launched=3, streamed=True),
    WarpgroupPlan(192, 2, 1, 1, 2, 2, 232, scaled=True, launched=3, streamed=True),
    WarpgroupPlan(144, 2, 1, 1, 2, 3, 232, scaled=True),
    WarpgroupPlan(160, 1, 1, 1, 2, 3, 232, scaled=True),
    WarpgroupPlan(192, 2, 1, 1, 2, 2, 232, scaled=True),
    WarpgroupPlan(224, 1, 1, 1, 2, 3, 232, scaled=True),
    WarpgroupPlan(224, 2, 1, 1, 2, 2, 232, scaled=True),
]


SHORT_GROUPS = [
    WarpgroupPlan(24, 2, 1, 1, 2, 3, blocks_per_sm=2, scaled=True),
    WarpgroupPlan(16, 1, 3, 1, 2, 6, scaled=True),  # warpgroups without work
    WarpgroupPlan(32, 1, 2, 2, 2, 4, scaled=True),
    WarpgroupPlan(40, 1, 1, 1, 1, 3, scaled=True),  # a tile a step
    WarpgroupPlan(128, 1, 1, 2, 2, 3, 232, scaled=True),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("plan", "scheme", "group"),
    [
        *itertools.product(SCALED, ["symmetric", "minimums"], [64]),
        *itertools.product(SHORT_GROUPS, ["symmetric", "minimums", "zero points"], [32]),
        *itertools.product(SHORT_GROUPS, ["two levels"], [16]),
    ],
    ids=str,
)
def test_scaled_weights_are_rounded_once_more(device: str, plan: WarpgroupPlan, scheme: str, group: int) -> None:
    """An odd number of rows of tiles, more tokens than one block has."""
    dtype = tilus.float4_e2m1 if scheme == "two levels" else tilus.uint4
    matrix, m = matrix_of(scheme, dtype, 192, 256, group), plan.tokens + 8
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(1)).half()
    y = torch.full((m, 192), torch.nan)
    launch(x, pack(matrix, "cpu", "mma"), y, None, plan, device)
    weights = exact(matrix)
    sizes = np.abs(x.double().numpy()) @ weights.sizes.T
    difference = np.abs(y.double().numpy() - x.double().numpy() @ weights.values.T)
    assert (difference <= 3 * 2.0**-11 * sizes).all()
    is_rounded = bool(difference.max() > 2.0**-18 * sizes.max())  # it is another kernel than the exact one
    assert is_rounded == (scheme != "two levels")  # numbers of 2 bits times scales of 4 are exact


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [dtype for dtype in CODE_TYPES if dtype.is_float], ids=str)
def test_numbers_keep_their_range_under_small_scales(device: str, dtype: tilus.DataType) -> None:
    """Scaled weights of usual models are about 0.01; f16 must not lose bits of smaller ones on the way there."""
    matrix = matrix_of("symmetric", dtype, 64, 128, 64)
    matrix = replace(matrix, scales=tilus.f16.round(matrix.scales / 100))
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(5)).half()
    y, weights = torch.full((32, 64), torch.nan), exact(matrix)
    launch(x, pack(matrix, "cpu", "mma"), y, None, WarpgroupPlan(32, 1, 1, 1, 2, 2, scaled=True), device)
    size = np.abs(float64(x))
    lost = 2.0**-24 * size.sum(1, keepdims=True)  # of weights that are less than normal numbers
    bound = 3 * RELATIVE[x.dtype] * size @ weights.sizes.T + lost
    assert (np.abs(float64(y) - float64(x) @ weights.values.T) <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_2_bits_times_every_scale_of_8_bits_are_exact(device: str, act: torch.dtype) -> None:
    """The smallest ones, too."""
    scale = tilus.float8_e4m3
    scales = scale.decode(np.arange(256, dtype=np.uint8)).astype(np.float32).reshape(64, 4)
    codes = np.tile(np.arange(16, dtype=np.uint8), (64, 4))
    matrix = QuantizedMatrix(
        codes, np.where(np.isfinite(scales), scales, 0), None, tilus.float4_e2m1, scale_dtype=scale
    )
    y = torch.full((64, 64), torch.nan)
    plan = WarpgroupPlan(32, 1, 1, 1, 1, 2, scaled=True)
    launch(torch.eye(64, dtype=act), pack(matrix, "cpu", "mma"), y, None, plan, device)
    np.testing.assert_array_equal(float64(y).T, exact(matrix).values)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_numbers_times_powers_of_two_that_f16_holds_are_exact(device: str, dtype: tilus.DataType) -> None:
    """Each number times the least power of two by which all weights are multiples of 2^-24, the largest, and those between."""
    numbers = finite_codes(dtype)
    sizes = np.unique(np.abs(np.float64(dtype.decode(numbers))))
    sizes = sizes[sizes > 0]
    lowest, highest = -24 - np.log2(sizes.min()), np.floor(np.log2(65504 / sizes.max()))
    exponents = np.int32(np.round(np.linspace(lowest, highest, 64)))[:, None]
    codes = np.resize(numbers, -(-len(numbers) // 64) * 64)[None].repeat(64, 0)
    scales = np.ldexp(np.float32(1), exponents.repeat(codes.shape[1] // 32, 1))
    weight = pack(QuantizedMatrix(codes, scales, None, dtype, scale_dtype=tilus.float8_e8m0), "cpu", "mma")
    assert weight.header.exact_in_f16
    y = torch.full((codes.shape[1], 64), torch.nan)
    launch(torch.eye(codes.shape[1]).half(), weight, y, None, WarpgroupPlan(32, 1, 1, 1, 1, 2, scaled=True), device)
    np.testing.assert_array_equal(float64(y).T, np.float64(scales[:, :1]) * dtype.decode(codes))


@pytest.mark.parametrize("device", DEVICES[1:])  # numpy promises no bits
@pytest.mark.parametrize("shares", [{}, {"launched": 3, "streamed": True}], ids=["whole tiles", "equal shares"])
def test_a_token_has_the_same_bits_in_a_tile_that_lacks_some(shares: dict[str, Any], device: str) -> None:
    """However many tiles have it, and whichever of them is stored last."""
    plan = WarpgroupPlan(80, 1, 1, 1, 1, 2, 232, **shares)
    matrix = matrix_of("symmetric", tilus.uint4, 128, 448, 64)
    x, packed = torch.randn(160, 448, generator=torch.Generator().manual_seed(2)).half(), pack(matrix, "cpu", "mma")
    found = []
    for m in (160, 101):
        y = torch.full((m, 128), torch.nan)
        launch(x[:m].contiguous(), packed, y, None, plan, device)
        found.append(y[:101])
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 16, 24, 40, 64, 80, 128, 160, 256])
def test_any_number_of_tokens(tokens: int) -> None:
    """Fewer than a tile has, and up to two more tiles, the last of which begins inside of the one in front."""
    plan = WarpgroupPlan(tokens, 1, 1, 1, 2, 2, 232 if tokens > 64 else None, scaled=tokens > 128)
    matrix = matrix_of("symmetric", tilus.uint4, 64, 128, 64)
    weights, packed = exact(matrix), pack(matrix, "cuda", "mma")
    for m in range(1, 3 * tokens + 1, 1 if tokens <= 64 else 5):
        x = torch.randn(m, 128, generator=torch.Generator().manual_seed(m)).half()
        y = torch.full((m, 64), torch.nan, device="cuda")
        launch(x.cuda(), packed, y, None, plan, "cuda")
        rounded = 3 * 2.0**-11 if plan.scaled else 0
        bound = (rounded + 140 * 2.0**-23) * np.abs(x.double().numpy()) @ weights.sizes.T
        assert (np.abs(y.cpu().double().numpy() - x.double().numpy() @ weights.values.T) <= bound).all(), m


@pytest.mark.parametrize("device", DEVICES)
def test_bands_of_rows(device: str) -> None:
    """More rows of tiles than a band has, the last band being a part of one, for two columns of tokens."""
    n = TILE * (BAND + 2) - 10
    matrix = matrix_of("symmetric", tilus.uint4, n, 64, 64)
    x = torch.randn(11, 64, generator=torch.Generator().manual_seed(4)).half()
    y = torch.full((11, n), torch.nan)
    launch(x, pack(matrix, "cpu", "mma"), y, None, WarpgroupPlan(8, 1, 1, 1, 1, 2, launched=5), device)
    weights = exact(matrix)
    bound = 80 * 2.0**-23 * np.abs(x.double().numpy()) @ weights.sizes.T
    assert (np.abs(y.double().numpy() - x.double().numpy() @ weights.values.T) <= bound).all()


@pytest.mark.parametrize("device", ["reference", "emulator"])
def test_blocks_that_meet_leave_their_tickets_at_zero(device: str) -> None:
    """The next launch finds them, and none of the sums of this one."""
    matrix = matrix_of("symmetric", tilus.int4, 150, 448, 64)
    x, y = torch.randn(8, 448).half(), torch.empty(8, 150)
    plan = WarpgroupPlan(8, 1, 2, 1, 1, 4, launched=2, streamed=True)
    kernel, arguments, values = kernel_call(x, pack(matrix, "cpu", "mma"), y, None, plan)
    (tickets,) = (array for array in arguments if getattr(array, "dtype", None) == torch.int32)
    for _ in range(2):
        kernel.on(device)(*arguments, **values)
        assert not tickets.any()


@pytest.mark.parametrize("device", ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_invariant_plans_give_a_row_the_same_bits_whatever_the_batch(device: str) -> None:
    matrix = matrix_of("symmetric", tilus.int4, 64, 512, 128)
    packed, x = pack(matrix, "cpu", "mma"), torch.randn(40, 512, generator=torch.Generator().manual_seed(2)).half()
    results = {}
    for m in (1, 13, 40):
        (plan, *_) = invariant_plans(packed.header, m, 132)
        results[m] = torch.full((m, 64), torch.nan)
        launch(x[:m].clone(), packed, results[m], None, plan, device)
    assert torch.equal(results[1], results[40][:1])
    assert torch.equal(results[13], results[40][:13])


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_invariant_products(device: str) -> None:
    matrix, k = matrix_of("minimums", tilus.uint4, 70, 1024, 32), 1024
    packed = pack(matrix, "cpu", "rows" if device == "cpu" else "mma")
    x = torch.randn(33, k, generator=torch.Generator().manual_seed(3)).half()
    whole = linear(x, packed, out_dtype=torch.float32, device=device, invariant=True)
    for first, last in ((0, 1), (5, 22), (32, 33)):
        part = linear(x[first:last].clone(), packed, out_dtype=torch.float32, device=device, invariant=True)
        assert torch.equal(part, whole[first:last])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("act", "k"), [(torch.float16, 2048), (torch.bfloat16, 2064)], ids=["float16", "bfloat16, ragged"]
)
def test_invariant_products_do_not_depend_on_the_other_rows_of_the_weight(
    act: torch.dtype, k: int, device: str
) -> None:
    """A device that holds some rows of a layer gives the bits of one that holds all. Few rows alone would be cut along K."""
    matrix, order = matrix_of("minimums", tilus.uint4, 448, k, 16), "rows" if device == "cpu" else "mma"
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(4)).to(act)
    whole, few = (
        linear(x, pack(part, "cpu", order), out_dtype=torch.float32, device=device, invariant=True)
        for part in (matrix, matrix.take_rows(np.arange(384, 448)))
    )
    assert torch.equal(few, whole[:, 384:])


@given(
    n=st.integers(1, 2000),
    k=st.integers(1, 500),
    m=st.integers(1, 300),
    width=st.integers(2, 8),
    sms=st.integers(1, 200),
)
def test_invariant_plans_do_not_depend_on_the_other_rows_of_the_weight(
    n: int, k: int, m: int, width: int, sms: int
) -> None:
    """n, k: in blocks of 16; of plans of warpgroups and of the portable kernel."""
    plans = []
    for rows in (n, 64):
        problem = LinearProblem.of(header(f"int{width}", 16 * rows, 16 * k, 16), m, tilus.f16, tilus.f16)
        plans.append([linear_problem.invariant_plans(problem, sms, hopper=hopper) for hopper in (False, True)])
    assert plans[0] == plans[1]


def header(dtype: str, n: int, k: int, group: int, **changes: Any) -> WeightHeader:
    kinds = {"scale_dtype": "f16", "mins_dtype": None, "has_zeros": False, "has_table": False, "has_columns": False}
    return WeightHeader(getattr(tilus, dtype), (n, k), group, **{**kinds, "global_scale": 1.0, **changes})


@pytest.mark.sampled(9)
@pytest.mark.parametrize("m", [1, 16, 32, 64, 128, 300])
@pytest.mark.parametrize(
    ("dtype", "n", "k", "group", "changes"),
    [
        ("int4", 4096, 4096, 128, {}),
        ("uint8", 14336, 4096, 32, {"has_zeros": True}),
        ("uint1", 4096, 14336, 14336, {}),
        ("float6_e3m2", 192, 64, 16, {"mins_dtype": "f16"}),
    ],
)
def test_offered_plans_fit_into_shared_memory(dtype: str, n: int, k: int, group: int, changes: Any, m: int) -> None:
    """All of the first ones, as lowering counts it."""
    weight_header = header(dtype, n, k, group, **changes)
    plans = warpgroup_plans(weight_header, m, 132)
    assert plans
    assert len(plans) == len(set(plans))
    weight = QuantizedWeight(weight_header, **{name: np.empty(*kind) for name, kind in weight_header.arrays.items()})
    for plan in plans[:2]:
        arguments = placeholder((m, k), tilus.f16), weight, placeholder((m, n), tilus.f16)
        kernel, args, values = kernel_call(*arguments, None, plan)
        function = kernel.specialize(*args, **values).function
        assert lower(run_pipeline(function, HOPPER), HOPPER).shared_nbytes <= HOPPER.max_shared_nbytes


def test_the_rule() -> None:
    """Warpgroups on Hopper, where K is whole tiles; the direct kernel elsewhere."""
    problem = LinearProblem.of(header("int4", 8192, 8192, 128), 16, tilus.f16, tilus.f16)
    assert isinstance(heuristic(problem, 132, hopper=True), WarpgroupPlan)
    assert isinstance(heuristic(problem, 132), Schedule)
    ragged = LinearProblem.of(header("int4", 8192, 8192 + 16, 16), 16, tilus.f16, tilus.f16)
    assert isinstance(heuristic(ragged, 132, hopper=True), Schedule)
    kinds = {type(plan) for plan in candidates(problem, 132, hopper=True)}
    assert kinds == {WarpgroupPlan, Schedule}
    assert (8192 + 16) % TILE


@pytest.mark.parametrize("n", [1024, 2560, 4096, 6144, 14336])
@pytest.mark.parametrize("k", [2048, 4096, 14336])
@pytest.mark.parametrize("m", [33, 64, 100, 128])
def test_few_rows_have_fewer_tokens_a_block_instead_of_sums_across_blocks(n: int, k: int, m: int) -> None:
    """As long as there are multiprocessors for them, and K is short."""
    best = warpgroup_plans(header("int4", n, k, 128), m, 132)[0]
    rows = -(-n // TILE)
    if best.tokens < m:
        assert -(-n // (TILE * best.rows)) * -(-m // best.tokens) * best.blocks <= 132 and k < 14336
    elif best.blocks > 1:
        assert k == 14336
    if k == 4096 and n == 4096:
        assert (best.tokens, best.blocks) == (-(-m // 16) * 8, 1)
    if 2 * rows > 132:
        assert m <= best.tokens < m + (8 if m <= 64 else 16)


@pytest.mark.parametrize(
    ("splits", "stages", "changes", "message"),
    [
        (2, 3, {}, "3 stages for 2 splits, expected a multiple from 2 up"),
        (2, 2, {"overlap": "steps"}, "2 stages for 2 splits, expected a multiple from 4 up"),
        (1, 1, {"scaled": True}, "1 stages for 1 splits, expected a multiple from 2 up"),
    ],
)
def test_plans_that_would_wait_for_ever_are_refused(splits: int, stages: int, changes: Any, message: str) -> None:
    with pytest.raises(tilus.TilusError, match=message):
        WarpgroupPlan(8, 1, splits, 1, 2, stages, **changes)


def test_easier_plans_end() -> None:
    plan: WarpgroupPlan | None = WarpgroupPlan(64, 1, 2, 1, 2, 4, None, 2, overlap="steps")
    seen = []
    while plan is not None:
        seen.append(plan)
        plan = plan.easier()
    assert len(seen) == len(set(seen)) == 7
    assert seen[-1] == WarpgroupPlan(8, 1, 1, 1, 2, 4)
    deep = WarpgroupPlan(64, 1, 2, 1, 4, 4, overlap="step").easier()
    assert deep is not None and deep.easier() == WarpgroupPlan(64, 1, 2, 1, 2, 6)
    plan, tokens = WarpgroupPlan(256, 2, 1, 1, 2, 2, 208, scaled=True, sharing=2, launched=132), []
    while plan is not None:
        tokens.append((plan.tokens, plan.scaled, plan.launched))
        plan = plan.easier()
    narrow = [(n, False, 0) for n in (128, 64, 32, 16, 8)]
    assert tokens == [(256, True, 132), (256, True, 0), *narrow]


@pytest.mark.parametrize("tokens", range(80, 257, 16))
def test_easier_plans_need_fewer_registers_and_store_whole_parts(tokens: int) -> None:
    """The sums of a group stand beside those of all groups, unless weights are multiplied by their scales."""
    plan: WarpgroupPlan | None = WarpgroupPlan(tokens, 2, 1, 1, 2, 2, 232, scaled=True)
    seen = []
    while plan is not None:
        assert plan.tokens % 8 == 0
        seen.append(plan.tokens if plan.scaled else 2 * plan.tokens)
        plan = plan.easier()
    assert seen == sorted(seen, reverse=True) and len(set(seen[1:])) == len(seen[1:]) and seen[-1] == 16


@given(n=st.integers(1, 3000), k=st.integers(1, 300), m=st.integers(65, 3000), sms=st.integers(1, 200))
def test_blocks_that_share_all_steps_have_a_tile_at_least(n: int, k: int, m: int, sms: int) -> None:
    """n, k: in tiles. No more than two blocks may meet in one."""
    for plan in warpgroup_plans(header("int4", TILE * n, TILE * k, TILE), m, sms):
        assert not plan.streamed or -(-n // plan.rows) * -(-m // plan.tokens) >= plan.launched


@pytest.mark.parametrize(
    ("group", "changes", "m", "scaled"),
    [
        (128, {}, 700, True),
        (32, {}, 700, True),
        (128, {}, 200, False),
        (128, {"mins_dtype": "f16"}, 200, True),
        (128, {"scale_dtype": "float8_e8m0"}, 700, False),
    ],
)
def test_plans_without_registers_or_range_come_last(group: int, changes: Any, m: int, scaled: bool) -> None:
    """Those that scale sums, where there are minimums; those that scale weights of f16 by any power of two."""
    weight = header("int4", 4096, 4096, group, **changes)
    assert warpgroup_plans(weight, m, 132)[0].scaled == scaled
    assert warpgroup_plans(weight, 700, 132, tilus.bf16)[0].scaled


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("n", "k", "group", "m"), [(4096, 7168, 32, 64), (1024, 14336, 32, 32), (4096, 4096, 128, 16)])
@pytest.mark.parametrize("dtype", [tilus.uint4, tilus.int6, tilus.int8], ids=str)
def test_there_is_room_for_results_of_32_bits(dtype: tilus.DataType, n: int, k: int, group: int, m: int) -> None:
    """`lower` raises where a block has no room."""
    header = WeightHeader(dtype, (n, k), group, "f16", None)
    weight = QuantizedWeight(
        header,
        **{name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in header.arrays.items()},
    )
    x, y = torch.empty(m, k).half(), torch.empty(m, n)
    for plan in (invariant_plans(header, m, 132)[0], warpgroup_plans(header, m, 132)[0]):
        kernel, arguments, values = kernel_call(x, weight, y, None, plan.with_wide_results(header))
        function = kernel.specialize(*arguments, **values).function
        lower(run_pipeline(function, get_target("sm_90a")), get_target("sm_90a"))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [
    WarpgroupPlan(64, 1, 1, 2, 2, 2, blocks_per_sm=2, overlap="others"),
    WarpgroupPlan(64, 2, 1, 1, 4, 2, blocks_per_sm=2, overlap="others"),
    WarpgroupPlan(64, 1, 2, 1, 2, 4, blocks_per_sm=2, overlap="others"),
    WarpgroupPlan(64, 2, 1, 2, 2, 2, blocks_per_sm=2, overlap="others"),
], ids=str)  # fmt: skip
def test_nothing_is_read_after_its_stage_was_given_back(plan: WarpgroupPlan) -> None:
    """Many times, with many blocks on each multiprocessor, whose products keep loads from shared memory waiting."""
    matrix = matrix_of("symmetric", tilus.int4, 28672, 2048, 128, seed=1)
    weight = pack(matrix, "cuda")
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(2)).half().cuda()
    right, found = (torch.empty(64, 28672, dtype=torch.float16, device="cuda") for _ in range(2))
    launch(x, weight, right, None, WarpgroupPlan(64, 1, 1, 1, 2, 4), "cuda")
    bound = 2.0**-9 * right.float().abs().amax()
    for _ in range(300):
        launch(x, weight, found, None, plan, "cuda")
        assert (found.float() - right.float()).abs().amax() <= bound


@pytest.mark.sampled(9)
@pytest.mark.parametrize("plan", [
    *(plan for plan, *_ in PLANS if plan.unit == "wgmma" and not plan.launched and plan.sharing == 1),
    WarpgroupPlan(64, 2, 1, 1, 4, 2, blocks_per_sm=2, overlap="others"),
], ids=str)  # fmt: skip
def test_no_load_stands_between_the_last_product_and_the_return_of_a_stage(plan: WarpgroupPlan) -> None:
    """The return would wait for it, and products of other warps can keep it waiting for long."""
    weight_header = header("int4", 256, 2048, 128)
    weight = QuantizedWeight(weight_header, **{name: np.empty(*kind) for name, kind in weight_header.arrays.items()})
    operands = placeholder((plan.tokens, 2048), tilus.f16), weight, placeholder((plan.tokens, 256), tilus.f16)
    kernel, arguments, values = kernel_call(*operands, None, plan)
    ptx = compile_function(kernel.specialize(*arguments, **values).function, HOPPER).ptx
    ends = [part.rpartition("wgmma.wait_group")[1:] for part in ptx.split("mbarrier.arrive.shared::cta")[:-1]]
    returns = [behind for found, behind in ends if found]
    assert len(returns) >= plan.splits and not any("ld.shared" in behind for behind in returns)


@pytest.mark.parametrize("shape", [(18944, 3584), (4096, 4096), (28672, 4096), (640, 8192)])
def test_no_weight_is_rounded_for_up_to_128_tokens(shape: tuple[int, int]) -> None:
    weight = header("int4", *shape, 128)
    assert not any(plan.scaled for m in (1, 16, 64, 65, 100, 128) for plan in warpgroup_plans(weight, m, 132))
    assert any(plan.scaled for plan in warpgroup_plans(weight, 129, 132))


@pytest.mark.parametrize("changes", [{}, {"has_zeros": True}, {"mins_dtype": "f16"}], ids=str)
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (28672, 4096), (4096, 14336), (576, 1536)])
def test_weights_of_short_groups_are_rounded_from_17_tokens_on(n: int, k: int, group: int, changes: Any) -> None:
    """From 9 on, where each product of 16 columns has scales of its own, or a second product for minimums."""
    weight = header("int4", n, k, group, **changes)
    assert not any(plan.scaled for m in (1, 8) for plan in warpgroup_plans(weight, m, 132))
    assert all(warpgroup_plans(weight, m, 132)[0].scaled == (group == 16 or "mins_dtype" in changes) for m in (9, 16))
    assert all(warpgroup_plans(weight, m, 132)[0].scaled for m in (17, 32, 64, 65, 100, 128, 200, 700))
    for factors in ({"scale_dtype": "float8_e8m0"}, {"mins_dtype": "f32"}):  # f16 does not hold all of them
        wide = header("int4", n, k, group, **(changes | factors))
        assert not any(warpgroup_plans(wide, m, 132)[0].scaled for m in (17, 64, 128))


@pytest.mark.parametrize("group", [64, 128, 4096])
def test_with_minimums_weights_are_rounded_from_9_tokens_on(group: int) -> None:
    """Where f16 holds them: rounded to bf16, minimums would be off for all weights of a group at once."""
    weight = header("uint4", 4096, 4096, group, mins_dtype="f16")
    assert not any(plan.scaled for m in (1, 8) for plan in warpgroup_plans(weight, m, 132))
    assert all(warpgroup_plans(weight, m, 132)[0].scaled for m in (9, 16, 17, 32, 64, 65, 100, 128, 200, 700))
    assert not any(warpgroup_plans(weight, m, 132, tilus.bf16)[0].scaled for m in (17, 64, 128))


@pytest.mark.parametrize("group", [32, 128, 4096])
@pytest.mark.parametrize("n", [4096, 28672])
def test_scales_that_are_powers_of_two_multiply_weights_of_a_type_with_their_range(n: int, group: int) -> None:
    """There they round nothing. f16 has no range for all of them: where it lacks some, no plan multiplies weights by them."""
    weight = header("float4_e2m1", n, 4096, group, scale_dtype="float8_e8m0")
    for m in (1, 17, 32, 64, 65, 100, 128, 512, 700, 2048, 5000):
        expected = m > (16 if group == 32 else 128)
        assert warpgroup_plans(weight, m, 132, tilus.bf16)[0].scaled == expected
        assert warpgroup_plans(replace(weight, exact_in_f16=True), m, 132)[0].scaled == expected
        assert not any(plan.scaled for plan in warpgroup_plans(weight, m, 132))


@pytest.mark.sampled(18)
@pytest.mark.parametrize("m", [16, 24, 64, 128, 512])
@pytest.mark.parametrize("n", [6144, 28672])
@pytest.mark.parametrize("changes", [{}, {"has_zeros": True}, {"mins_dtype": "f16"}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "group"),
    [("int4", 32), ("uint8", 32), ("uint3", 32), ("uint4", 16), ("float6_e2m3", 32), ("float4_e2m1", 16)],
)
def test_registers_suffice_for_the_first_plan_of_short_groups(
    dtype: str, group: int, changes: Any, n: int, m: int
) -> None:
    """And products are not serialised, which `assemble` refuses."""
    if changes.get("has_zeros") and not getattr(tilus, dtype).is_integer:
        changes = {"scale_dtype": "float8_e4m3"}
    weight_header = header(dtype, n, 4096, group, **changes)
    weight = QuantizedWeight(weight_header, **{name: np.empty(*kind) for name, kind in weight_header.arrays.items()})
    operands = placeholder((m, 4096), tilus.f16), weight, placeholder((m, n), tilus.f16)
    kernel, arguments, values = kernel_call(*operands, None, warpgroup_plans(weight_header, m, 132)[0])
    assemble(compile_function(kernel.specialize(*arguments, **values).function, HOPPER).ptx, HOPPER)
