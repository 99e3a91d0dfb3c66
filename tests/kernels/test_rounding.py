"""Rounding floats: codes are nearest under scales that storage can hold, and the search never loses against plain rounding."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights import finite_codes

from tilus.dtypes import (
    DTYPES,
    DataType,
    bf16,
    f32,
    float4_e2m1,
    float6_e3m2,
    float8_e4m3,
    int2,
    int3,
    int4,
    int8,
    uint2,
    uint3,
    uint4,
    uint8,
)
from tilus.errors import TilusError
from tilus.kernels.quantize import PRESETS, RECIPE_NAMES, Recipe, quantize, recipe
from tilus.kernels.quantize.rounding import NF4

TYPES = [DTYPES[name] for name in RECIPE_NAMES if name not in PRESETS]
UNSIGNED = [t for t in TYPES if t.kind == "uint"]
OTHERS = [t for t in TYPES if t.kind != "uint"]
CASES = [
    *((dtype, 32, "symmetric") for dtype in OTHERS),
    *((dtype, 32, scheme) for dtype in UNSIGNED for scheme in ("minimum", "zero")),
    *((dtype, 32, "mx") for dtype in (*(t for t in OTHERS if t.is_float), int4, int8)),
    (uint4, 64, "table"),
    (float4_e2m1, 16, "nv"),
    (float6_e3m2, 16, "nv"),
]
IDS = [f"{dtype}-{scheme}" for dtype, _, scheme in CASES]


def random_weight(rows: int = 6, width: int = 192, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (rows, width)).astype(np.float32)


def numbers_of(matrix) -> np.ndarray:
    """What the codes in use can stand for, before scales, float64 [codes]."""
    if matrix.table is not None:
        return matrix.table.astype(np.float64)
    return matrix.dtype.decode(finite_codes(matrix.dtype)).astype(np.float64)


def values_of(matrix, numbers: np.ndarray) -> np.ndarray:
    """Every value that each weight could have been rounded to, float64 [N, K, codes]; the documented formula."""
    per_group = matrix.codes.shape[1] // matrix.scales.shape[1]

    def spread(part):
        return np.repeat(part.astype(np.float64), per_group, axis=1)[..., None]

    zeros = 0 if matrix.zeros is None else spread(matrix.zeros)
    mins = 0 if matrix.mins is None else spread(matrix.mins)
    return matrix.global_scale * spread(matrix.scales) * (numbers - zeros) + mins


def group_errors(matrix, weight: np.ndarray) -> np.ndarray:
    return np.square(matrix.dequantize().astype(np.float64) - weight).reshape(*matrix.scales.shape, -1).sum(-1)


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@pytest.mark.parametrize(("dtype", "group", "scheme"), CASES, ids=IDS)
def test_every_code_is_nearest(dtype: DataType, group: int, scheme: str, search: bool) -> None:
    weight = random_weight()
    matrix = quantize(weight, dtype, group, scheme, search=search)
    assert (matrix.shape, matrix.group, matrix.dtype) == (weight.shape, group, dtype)
    best = np.abs(values_of(matrix, numbers_of(matrix)) - weight[..., None]).min(-1)
    found = np.abs(matrix.dequantize().astype(np.float64) - weight)
    assert np.all(found <= best + 1e-6 * np.abs(weight).max())  # float32 arithmetic decides near-ties either way


@pytest.mark.parametrize(("dtype", "group", "scheme"), CASES, ids=IDS)
def test_search_beats_plain_rounding(dtype: DataType, group: int, scheme: str) -> None:
    weight = random_weight(32)
    plain, searched = (quantize(weight, dtype, group, scheme, search=search) for search in (False, True))
    before, after = group_errors(plain, weight), group_errors(searched, weight)
    assert np.all(after <= before * (1 + 1e-5))
    assert after.sum() < before.sum()


@pytest.mark.parametrize("dtype", [int2, int3, int4])
def test_plain_rounding_is_the_textbooks(dtype: DataType) -> None:
    """scale = largest magnitude / largest code, code = round(weight / scale), and the search gains what is worth having."""
    weight = random_weight(32).astype(np.float64)
    groups = weight.reshape(32, 6, 32)
    scales = (np.abs(groups).max(-1, keepdims=True) / dtype.max_value).astype(np.float16).astype(np.float64)
    expected = (np.clip(np.rint(groups / scales), dtype.min_value, dtype.max_value) * scales).reshape(weight.shape)
    np.testing.assert_allclose(quantize(weight, dtype, 32, search=False).dequantize(), expected, rtol=1e-6, atol=1e-9)
    gain = group_errors(quantize(weight, dtype, 32), weight).sum() / np.square(expected - weight).sum()
    assert gain < {2: 0.3, 3: 0.6, 4: 0.8}[dtype.nbits]


@pytest.mark.parametrize("dtype", [int3, int4, uint3, uint4, float4_e2m1])
def test_the_search_comes_close_to_a_scan_of_all_scales(dtype: DataType) -> None:
    weight = random_weight(6, 32)
    found = group_errors(quantize(weight, dtype, 32, "zero" if dtype in UNSIGNED else None), weight)[:, 0]
    grid = dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8)).astype(np.float64)
    best = np.full(6, np.inf)
    for zero in range(dtype.num_codes) if dtype in UNSIGNED else [0]:
        for scale in np.abs(weight).max() / grid.max() * np.linspace(-2.5, 2.5, 1001):
            numbers = np.sort(scale * (grid - zero))
            places = np.searchsorted((numbers[1:] + numbers[:-1]) / 2, weight)
            best = np.minimum(best, np.square(weight - numbers[places]).sum(-1))
    assert found.sum() <= 1.1 * best.sum()


@pytest.mark.parametrize(("dtype", "group", "scheme"), CASES, ids=IDS)
def test_scales_are_numbers_of_their_type(dtype: DataType, group: int, scheme: str) -> None:
    matrix = quantize(random_weight(), dtype, group, scheme)
    if scheme == "mx":
        assert np.all(np.frexp(matrix.scales)[0] == 0.5)
    else:
        storage = ml_dtypes.float8_e4m3fn if scheme == "nv" else np.float16
        assert matrix.scale_dtype.name == ("float8_e4m3" if scheme == "nv" else "f16")
        for part in (matrix.scales, matrix.mins):
            if part is not None:
                np.testing.assert_array_equal(part, part.astype(storage).astype(np.float32))
    if matrix.zeros is not None:
        assert matrix.zeros.dtype == np.int16 and 0 <= matrix.zeros.min() <= matrix.zeros.max() <= dtype.max_value
    if scheme == "nv":
        assert np.float32(1 / matrix.global_scale) == 1 / matrix.global_scale  # what files store


@given(st.sampled_from([int3, int8, uint4, uint8, float8_e4m3]), st.integers(0, 2**32))
def test_what_is_on_a_grid_stays(dtype: DataType, seed: int) -> None:
    """Weights that codes can express exactly are found again, when the largest code of each group is in use."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(finite_codes(dtype), (3, 2, 32))
    codes[..., 0] = dtype.max_code
    if dtype.kind == "uint":
        codes[..., 1] = 0
    if dtype.kind == "int":  # a magnitude beyond the largest code is another scale
        codes = np.where(codes == 1 << (dtype.nbits - 1), codes + 1, codes).astype(np.uint8)
    scales = np.float32(2.0) ** rng.integers(-6, 6, (3, 2, 1))
    low = 0 if dtype.kind != "uint" else np.float32(0.25) * rng.integers(-8, 8, (3, 2, 1))
    weight = (dtype.decode(codes) * scales + low).astype(np.float32).reshape(3, 64)
    np.testing.assert_array_equal(quantize(weight, dtype, 32).dequantize(), weight)


def test_mx_exponents_are_ocps() -> None:
    weight = random_weight(20, 32)
    for dtype, largest_exponent in ((float4_e2m1, 2), (float6_e3m2, 4), (float8_e4m3, 8)):
        expected = [2.0 ** (math.floor(math.log2(abs(row).max())) - largest_exponent) for row in weight]
        assert quantize(weight, dtype, 32, "mx", search=False).scales[:, 0].tolist() == expected


def test_nf4_has_the_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, appendix E: 8 negative and 9 positive quantiles up to the same tail, joined at 0 and scaled to 1."""
    tail = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    negative = -quantile(torch.linspace(tail, 0.5, 8, dtype=torch.float64))[:-1]
    positive = quantile(torch.linspace(tail, 0.5, 9, dtype=torch.float64))[:-1]
    expected = torch.cat([negative, torch.zeros(1), positive.flip(0)]) / positive[0]
    np.testing.assert_allclose(NF4, expected, atol=1e-6)


def test_custom_tables() -> None:
    table = [3.0, -1.0, 0.5, -8.0]
    weight = np.array([[3.0, -1.0, 0.5, -8.0, 2.9, -0.9, 0.4, -7.9]], np.float32)
    matrix = quantize(weight, uint2, 8, "table", table=table)
    assert matrix.codes.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert matrix.table is not None and matrix.table.tolist() == table


@given(st.integers(1, 40), st.integers(0, 100))
def test_rows_do_not_depend_on_their_company(rows: int, seed: int) -> None:
    weight = random_weight(40, 96, seed)
    whole, part = quantize(weight, uint4, 32), quantize(weight[:rows], uint4, 32)
    np.testing.assert_array_equal(whole.dequantize()[:rows], part.dequantize())


def test_many_pieces_are_one_matrix() -> None:
    weight = random_weight(1000, 128)
    pieces = [quantize(weight[i : i + 10], int4, 64).dequantize() for i in range(0, 1000, 10)]
    np.testing.assert_array_equal(quantize(weight, int4, 64).dequantize(), np.concatenate(pieces))


def test_torch_tensors_of_any_float_type() -> None:
    weight = torch.from_numpy(random_weight())
    for stored in (torch.float64, torch.bfloat16, torch.float16):
        expected = quantize(weight.to(stored).float().numpy(), int8, 32)
        np.testing.assert_array_equal(quantize(weight.to(stored), int8, 32).dequantize(), expected.dequantize())


@pytest.mark.parametrize("scale_dtype", [bf16, f32])
def test_scales_of_other_types(scale_dtype: DataType) -> None:
    matrix = quantize(random_weight(), int4, 32, scale_dtype=scale_dtype)
    assert matrix.scale_dtype == scale_dtype
    np.testing.assert_array_equal(matrix.scales, scale_dtype.decode(scale_dtype.encode(matrix.scales)))


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@pytest.mark.parametrize(("dtype", "group", "scheme"), CASES, ids=IDS)
def test_groups_of_zeros(dtype: DataType, group: int, scheme: str, search: bool) -> None:
    weight = random_weight()
    weight[2, :group] = 0
    matrix = quantize(weight, dtype, group, scheme, search=search)
    assert np.all(matrix.dequantize()[2, :group] == 0)
    assert matrix.scales[2, 0] == (2.0**-127 if scheme == "mx" else 0)
    assert np.all(quantize(np.zeros((2, 64), np.float32), dtype, group, scheme, search=search).dequantize() == 0)


def test_constant_groups_and_underflowing_scales() -> None:
    for dtype, scheme in ((uint3, "minimum"), (uint3, "zero"), (int3, "symmetric")):
        found = quantize(np.full((1, 32), 0.3, np.float32), dtype, 32, scheme).dequantize()
        np.testing.assert_allclose(found, 0.3, rtol=2**-10)
    tiny = quantize(np.full((1, 32), 1e-9, np.float32), int4, 32)  # far below the smallest float16
    assert tiny.scales[0, 0] == 0 and not tiny.codes.any()


WEIGHT = random_weight(2, 96)


def with_value(value: float) -> np.ndarray:
    changed = WEIGHT.copy()
    changed[1, 7] = value
    return changed


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (
            WEIGHT[:, :40],
            (int8, 32),
            "w: groups of 32 do not divide K = 40\n  hint: choose a group that divides K, or K itself",
        ),
        (WEIGHT, (int8, 0), "w: groups of 0 do not divide K = 96"),
        (with_value(np.nan), (int8, 32), r"w has 1 weights that are not finite, the first nan at \[1, 7\]"),
        (
            with_value(-np.inf),
            (float4_e2m1, 16, "nv"),
            r"w has 1 weights that are not finite, the first -inf at \[1, 7\]",
        ),
        (np.full((1, 32), 127e7), (int8, 32), r"w needs a quantisation scale of 1e\+07, but f16 holds at most 65504"),
        (np.full((1, 32), -1e6), (uint4, 32), r"w needs a quantisation scale of 1e\+06, but f16 holds at most 65504"),
        (WEIGHT[0], (int8, 32), r"w has shape \[96\], expected a matrix \[N, K\]"),
        (WEIGHT[:0], (int8, 32), r"w has shape \[0, 96\], expected a matrix \[N, K\]"),
        (WEIGHT, (f32, 32), "codes of f32, expected a type of 1 to 8 bits"),
        (WEIGHT, (int4, 32, "zero"), "scheme 'zero' with codes of int4, expected symmetric, mx or nv for this type"),
        (WEIGHT, (uint4, 32, "mx"), "scheme 'mx' with codes of uint4, expected zero, minimum or table for this type"),
        (WEIGHT, (uint3, 32, "table"), r"a table of shape \[16\], expected 8 finite numbers for uint3"),
    ],
)
def test_what_cannot_be_quantised_is_named(weight: np.ndarray, arguments: tuple, message: str) -> None:
    with pytest.raises(TilusError, match=message):
        quantize(weight, *arguments, name="w")


def test_recipes() -> None:
    assert recipe("int4") == Recipe(int4, "symmetric", 128)
    assert recipe("uint4", 0, "zero") == Recipe(uint4, "zero", None)
    assert recipe("uint3", 32) == Recipe(uint3, "minimum", 32)
    assert recipe("nvfp4") == Recipe(float4_e2m1, "nv", 16)
    assert recipe("nf4", 32) == Recipe(uint4, "table", 32)
    for name in RECIPE_NAMES:
        found = recipe(name, 64).quantize(random_weight(2, 64))
        assert found.group == 64 and np.isfinite(found.dequantize()).all()
    assert set(PRESETS) < set(RECIPE_NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int9",), "unknown weight type 'int9'\n  hint: expected a type of 1 to 8 bits such as int4"),
        (("int4", 32, "best"), "unknown scheme 'best', expected one of symmetric, zero, minimum, table, mx, nv"),
        (("int4", -1), "groups of -1 columns, expected a positive number, or 0 for one scale a row"),
        (("nf4", None, "mx"), "nf4 has scheme 'table', but 'mx' was asked for"),
    ],
)
def test_recipes_that_are_none(arguments: tuple, message: str) -> None:
    with pytest.raises(TilusError, match=message):
        recipe(*arguments)
