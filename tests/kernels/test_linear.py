"""Quantised linear layers against float64, for every code type and scheme.

The law: codes (less their zero points) are exact in the activations' type, so are their products with activations in f32;
everything is added up and scaled in f32, and the result is rounded once. No weight is rounded, only the entries of tables. So

    |y - exact| <= (K + 8) * 2^-23 * sum_k |x_k| * (|scale_k * number_k| + |minimum_k|) + rounding of tables and of y.

Warpgroups multiply weights by their scales, and round them, for more than 128 tokens, of groups of 32 for more than 16, of 16 and
with minimums for more than 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import ABSOLUTE, RELATIVE, Array, float64
from weights import CODE_TYPES, SCHEMES, exact, matrix_of, random_matrix

import tilus
from tilus import TilusError
from tilus.compiler import compile_for_cpu
from tilus.dtypes import DTYPES, DataType
from tilus.ir.function import Function
from tilus.kernels import linear
from tilus.kernels.linear import launch, quantized_linear
from tilus.kernels.quantize import QuantizedMatrix, pack
from tilus.kernels.schedule import Schedule, cpu_schedule
from tilus.runtime import binaries
from tilus.target import CpuTarget

GROUPS = [16, 32, 48, 64, 128, 192, 0]
ACTIVATIONS = pytest.mark.parametrize("act", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])


def activations(m: int, k: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_and_bound(
    x: torch.Tensor, matrix: QuantizedMatrix, out: torch.dtype, bias: torch.Tensor | None = None
) -> tuple[Array, Array]:
    weight, size = exact(matrix), np.abs(float64(x))
    offset = 0.0 if bias is None else float64(bias)
    result = float64(x) @ weight.values.T + offset
    work = (x.shape[1] + 8) * 2.0**-23 * (size @ weight.sizes.T + np.abs(offset))
    if matrix.table is not None:
        rounded = RELATIVE[x.dtype] * np.abs(matrix.table).max() + ABSOLUTE[x.dtype]
        work = work + rounded * size @ weight.from_table.T
    return result, work * (1 + RELATIVE[out]) + RELATIVE[out] * np.abs(result) + ABSOLUTE[out]


def rounding_of_weights(device: str, x: torch.Tensor, matrix: QuantizedMatrix) -> Array | float:
    """That of warpgroups, for up to 128 tokens: once, of f16, where it holds the factors."""
    (m, k), group, has_mins = x.shape, matrix.shape[1] // matrix.scales.shape[1], matrix.mins is not None
    least = 8 if group % 32 or has_mins else 16
    are_rounded = matrix.scale_dtype in (tilus.f16, tilus.float8_e4m3) and (group % 64 or has_mins)
    if device != "cuda" or m <= least or k % 64 or x.dtype != torch.float16 or not are_rounded:
        return 0.0
    return RELATIVE[x.dtype] * np.abs(float64(x)) @ exact(matrix).sizes.T


def assert_exact(y: torch.Tensor, expected: Array, bound: Array) -> None:
    wrong = ~(np.abs(float64(y) - expected) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} are wrong, the first at {np.argwhere(wrong)[0]}"


def check(
    device: str,
    x: torch.Tensor,
    matrix: QuantizedMatrix,
    out: torch.dtype = torch.float32,
    bias: torch.Tensor | None = None,
    order: str = "mma",
) -> None:
    y = linear(x, pack(matrix, "cpu", order), bias=bias, out_dtype=out, device=device)
    assert y.dtype == out
    expected, bound = exact_and_bound(x, matrix, out, bias)
    assert_exact(y, expected, bound + rounding_of_weights(device, x, matrix))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_every_type(device: str, dtype: DataType) -> None:
    """Ragged in M, N and K; integers with minimums, floats without; groups in turn."""
    index = CODE_TYPES.index(dtype)
    k, group = [(96, 16), (160, 32), (192, 64), (128, 128), (72, 72)][index % 5]
    check(device, activations(3, k), random_matrix(dtype, 70, k, group, mins=dtype.is_integer, seed=index))


EACH_GROUP = [16, 32, 64, 128, 0]


@pytest.mark.sampled(12)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_type_with_some_groups(device: str, dtype: DataType, turn: int) -> None:
    """Two groups besides that of `test_every_type`; the next type meets other ones, and each type both kinds of activations."""
    index = CODE_TYPES.index(dtype)
    check_group(device, dtype, EACH_GROUP[(index + 1 + 2 * turn) % 5], index + turn)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
@pytest.mark.parametrize("group", EACH_GROUP)
def test_every_type_with_every_group(dtype: DataType, group: int) -> None:
    """The reference execution meets them all in `test_every_type_in_both_orders`."""
    check_group("cuda", dtype, group, CODE_TYPES.index(dtype) + group.bit_length())


def check_group(device: str, dtype: DataType, group: int, turn: int) -> None:
    act = (torch.float16, torch.bfloat16)[turn % 2]
    k = 3 * group if group else 200
    check(device, activations(9, k, act), random_matrix(dtype, 65, k, group or k, mins=True, seed=group), act)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("scheme", SCHEMES)
@ACTIVATIONS
def test_every_scheme(device: str, scheme: str, act: torch.dtype) -> None:
    """Several types, groups and numbers of tokens for each, all ragged."""
    types = SCHEMES[scheme][1]
    start = list(SCHEMES).index(scheme) * 2 + (act == torch.bfloat16)
    for i in (start, start + 3):
        group = GROUPS[i % len(GROUPS)]
        k = group * (2 if group >= 128 else 3) if group else 72
        matrix = matrix_of(scheme, types[7 * i % len(types)], (70, 64)[i % 2], k, group or k, seed=i)
        check(device, activations((1, 9, 17)[i % 3], k, act, seed=i), matrix)


@pytest.mark.parametrize("act", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_scales_have_the_range_of_floats(device: str, act: torch.dtype) -> None:
    """Powers of two far outside of what f16 holds, the smallest and nearly the largest: still not a bit is lost."""
    codes = np.random.default_rng(0).integers(0, 16, (64, 64), np.uint8)
    exponents = np.stack([np.linspace(-127, 100, 64).astype(int), np.full(64, -127)], -1)
    matrix = QuantizedMatrix(
        codes, np.float32(2.0) ** exponents, None, tilus.float4_e2m1, scale_dtype=tilus.float8_e8m0
    )
    x = torch.zeros(2, 64, dtype=act)
    x[0, :32], x[1, 40] = 1, -2
    y = linear(x, pack(matrix, "cpu", "mma"), out_dtype=torch.float32, device=device)
    np.testing.assert_array_equal(float64(y), float64(x) @ exact(matrix).values.T)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("bias", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_bias(device: str, bias: torch.dtype) -> None:
    """Added in f32 before the only rounding; also by the block that adds up splits of K."""
    matrix, x, offset = random_matrix(tilus.int4, 70, 320, 32), activations(9, 320), activations(1, 70)[0].to(bias)
    check(device, x, matrix, torch.float16, offset)
    y = torch.empty(9, 70)
    launch(x, pack(matrix, "cpu", "mma"), y, offset, Schedule(tokens=8, rows=1, warps=2, stages=1, splits=2), device)
    assert_exact(y, *exact_and_bound(x, matrix, torch.float32, offset))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17, 65])
@pytest.mark.parametrize(("group", "mins"), [(32, False), (64, False), (64, True)])
def test_numbers_of_tokens(device: str, tokens: int, group: int, mins: bool) -> None:
    """Around the tiles of 8, 16, 32 and 64 tokens."""
    check(device, activations(tokens, 64), random_matrix(tilus.int4, 64, 64, group, mins=mins), torch.float16)


@pytest.mark.parametrize("act", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("least", [-33, -20])
def test_powers_of_two_as_scales_round_nothing(device: str, act: torch.dtype, least: int) -> None:
    """For so many tokens that weights are multiplied by them, by types that hold them; where f16 lacks some, sums are scaled."""
    matrix = matrix_of("powers of two", tilus.float4_e2m1, 64, 128, 32)
    matrix = replace(matrix, scales=np.maximum(matrix.scales, np.float32(2.0**least)))
    assert matrix.scales.min() == 2.0**least and pack(matrix).header.exact_in_f16 == (least == -20)
    check(device, activations(40, 128, act), matrix, torch.float32)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_numbers_of_rows(device: str, n: int) -> None:
    check(device, activations(2, 64), random_matrix(tilus.uint4, n, 64, 32, mins=True), torch.float16)


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("k", "group"), [(1, 1), (8, 8), (20, 20), (48, 48), (63, 63), (64, 16), (65, 65), (576, 64), (1100, 1100)]
)
def test_sizes_of_k(device: str, k: int, group: int) -> None:
    """Less than a tile of 64 columns, whole tiles, and a rest; more tiles than the warps of a block, too."""
    check(device, activations(2, k), random_matrix(tilus.uint4, 64, k, group, mins=True))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "warps", "stages", "group"),
    [(1, 1, 1, 32), (2, 2, 1, 64), (1, 4, 1, 160), (3, 2, 2, 320), (2, 1, 1, 16), (1, 1, 0, 32), (1, 2, 0, 320)],
)
def test_schedules(device: str, rows: int, warps: int, stages: int, group: int, splits: int) -> None:
    """Blocks that share a tile of the result: the last one adds up, and the counters are zero again, so a second launch works."""
    matrix, x = random_matrix(tilus.uint4, 70, 320, group, mins=True), activations(9, 320)
    packed = pack(matrix, "cpu", "mma")
    for _ in range(2):
        y = torch.full((9, 70), torch.nan)
        launch(x, packed, y, None, Schedule(8, rows, warps, stages, splits), device)
        assert_exact(y, *exact_and_bound(x, matrix, torch.float32))


def test_groups_longer_than_a_step(device: str) -> None:
    """One set of scales for several steps of a block, for two warps, and for a part of a warp's columns."""
    for group, rows, warps, stages in ((256, 1, 1, 1), (256, 2, 4, 1), (128, 1, 2, 1), (128, 1, 1, 2)):
        matrix, x = random_matrix(tilus.int3, 64, 512, group, mins=True), activations(2, 512)
        y = torch.empty(2, 64)
        launch(x, pack(matrix, "cpu", "mma"), y, None, Schedule(8, rows, warps, stages), device)
        assert_exact(y, *exact_and_bound(x, matrix, torch.float32))


ORDERS = pytest.mark.parametrize("order", [pytest.param("mma", marks=pytest.mark.slow), "rows"])
SPANS = [(16, 80), (32, 96), (64, 192), (128, 256), (0, 100)]


@pytest.mark.sampled(12)
@ORDERS
@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_every_type_in_both_orders(dtype: DataType, order: str) -> None:
    """With sets of factors for 16, 32, 64, 128 and all columns, with minimums and without; N and most K end inside of a tile."""
    for i, (group, k) in enumerate(SPANS):
        m = (1, 2, 3, 7, 8, 9, 17, 40)[(CODE_TYPES.index(dtype) + i) % 8]
        matrix = random_matrix(dtype, 70, k, group or k, mins=i % 2 == 0, seed=i)
        check("reference", activations(m, k), matrix, order=order)


@pytest.mark.sampled(12)
@ORDERS
@ACTIVATIONS
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_in_both_orders(scheme: str, act: torch.dtype, order: str) -> None:
    types = SCHEMES[scheme][1]
    for i, (group, k) in enumerate(SPANS):
        matrix = matrix_of(scheme, types[5 * i % len(types)], (70, 64, 130)[i % 3], k, group or k, seed=i)
        check("reference", activations((40, 9, 3, 17, 1)[i], k, act), matrix, order=order)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 17, 40])
@pytest.mark.parametrize(("group", "k"), SPANS)
def test_schedules_for_cpus(m: int, group: int, k: int) -> None:
    """Any number of tokens up to eight, with nothing fetched ahead, and with K split."""
    matrix, x = random_matrix(tilus.uint4, 70, k, group or k, mins=True), activations(m, k)
    packed = pack(matrix, "cpu")
    plan = cpu_schedule(m, *packed.codes.shape[:2], 4, num_threads=4)
    for splits in (plan.splits, 2):
        y = torch.full((m, 70), torch.nan)
        launch(x, packed, y, None, replace(plan, splits=splits), "reference")
        assert_exact(y, *exact_and_bound(x, matrix, torch.float32))


@pytest.fixture(params=[4, 8, 16])
def other_vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Native code for vectors of so many lanes, whatever this processor has: C compilers make wide ones of narrow ones."""

    def compile_with_lanes(function: Function, target: CpuTarget) -> str:
        return compile_for_cpu(function, replace(target, lanes=request.param))

    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(binaries, "compile_for_cpu", compile_with_lanes)
    monkeypatch.setattr(quantized_linear, "_launchers", {})
    monkeypatch.setattr(quantized_linear, "_specializations", {})
    binaries.on_cpu.cache_clear()
    yield
    binaries.on_cpu.cache_clear()


@pytest.mark.sampled(9)
@pytest.mark.usefixtures("other_vectors")
@pytest.mark.parametrize("m", [1, 5, 9, 16, 17])
def test_the_vectors_of_other_cpus(m: int) -> None:
    """Also where a block of tokens is more than the processor's registers hold."""
    matrix, x = random_matrix(tilus.uint4, 70, 96, 32, mins=True), activations(m, 96)
    y = linear(x, pack(matrix, "cpu"), out_dtype=torch.float32, device="cpu")
    assert_exact(y, *exact_and_bound(x, matrix, torch.float32))


@pytest.mark.sampled(6)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "dtype", "group", "k"),
    [
        ("minimums", tilus.uint4, 32, 96), ("wide factors", tilus.int3, 16, 80), ("table", tilus.uint4, 64, 192),
        ("powers of two", DTYPES["float6_e3m2"], 128, 256), ("everything", tilus.uint5, 0, 100),
        ("symmetric", tilus.float8_e4m3, 48, 96), ("zero points", tilus.int1, 64, 192),
    ],
)  # fmt: skip
def test_the_order_for_cpus_on_the_emulator(scheme: str, dtype: DataType, group: int, k: int) -> None:
    """Its layouts are such as any other, so GPU code is right with it, if not fast; with the same sums as the reference's."""
    matrix, x = matrix_of(scheme, dtype, 70, k, group or k), activations(9, k)
    check("emulator", x, matrix, order="rows")
    columns = slice(None) if matrix.columns is None else torch.from_numpy(matrix.columns).long()
    packed = pack(matrix, "cpu", "rows")
    for plan in (Schedule(8, 1, 1, 0), Schedule(16, 2, 2, 0, 2)):
        y = torch.full((9, 70), torch.nan)
        launch(x[:, columns], packed, y, None, plan, "emulator")
        assert_exact(y, *exact_and_bound(x, matrix, torch.float32))


def test_a_weight_for_cpus_on_a_gpu_is_refused() -> None:
    weight = pack(random_matrix(tilus.int4, 64, 96, 32), "cpu")
    message = r'in the order rows, expected mma\n  hint: pack it again: weight.to\("cuda"\)'
    with pytest.raises(TilusError, match=message):
        linear(activations(2, 96), weight, device="cuda")


def test_numpy_arrays(device: str) -> None:
    matrix, x = matrix_of("activation order", tilus.int4, 70, 96, 32), activations(3, 96)
    y = linear(x.numpy(), pack(matrix), out_dtype=np.float32, device=device)
    assert_exact(torch.from_numpy(y), *exact_and_bound(x, matrix, torch.float32))


def test_strided_activations(device: str) -> None:
    """A slice of wider rows, with NaN beside it; columns are taken from it as well."""
    wide = torch.full((3, 100), torch.nan, dtype=torch.float16)
    wide[:, 10:74] = activations(3, 64)
    check(device, wide[:, 10:74], random_matrix(tilus.int4, 64, 64, 32))
    check(device, wide[:, 10:74], matrix_of("activation order", tilus.int4, 64, 64, 32))


def test_output_in_place(device: str) -> None:
    weight, x = pack(random_matrix(tilus.int4, 64, 64, 32), "cpu", "mma"), activations(3, 64)
    out = torch.empty(3, 64, dtype=torch.float16)
    assert linear(x, weight, out=out, device=device) is out
    assert torch.equal(out, linear(x, weight, device=device))


def test_no_tokens(device: str) -> None:
    assert linear(
        activations(0, 64), pack(random_matrix(tilus.int4, 64, 64, 32), "cpu", "mma"), device=device
    ).shape == (
        0,
        64,
    )


def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    """As long as both batches get the same schedule."""
    weight, x = pack(random_matrix(tilus.float4_e2m1, 64, 128, 32), "cpu", "mma"), activations(5, 128)
    together = linear(x, weight, device=device)
    assert torch.equal(torch.cat([linear(row[None], weight, device=device) for row in x]), together)


def test_misfits_are_named_with_both_values() -> None:
    weight = pack(random_matrix(tilus.int4, 64, 96, 32), "cpu", "mma")
    with pytest.raises(
        TilusError, match=r"linear: x has shape \[2, 64\], the weight is \[64, 96\]\n  hint: x must be \[M, 96\]"
    ):
        linear(activations(2, 64), weight)
    with pytest.raises(TilusError, match=r"linear: x has dtype torch.float32, expected float16 or bfloat16"):
        linear(activations(2, 96, torch.float32), weight)
    with pytest.raises(
        TilusError, match=r"linear: bias has shape \[96\], expected \[64\] for the weight of \[64, 96\]"
    ):
        linear(activations(2, 96), weight, bias=torch.zeros(96))
