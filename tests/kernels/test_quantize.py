"""Packing loses nothing, for any type, scheme, shape and group; stored weights and headers are checked when they come back."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights import CODE_TYPES, SCHEMES, finite_codes, matrix_of, random_matrix

import tilus
from tilus import TilusError
from tilus.dtypes import DataType
from tilus.kernels.quantize import QuantizedMatrix, QuantizedWeight, WeightHeader, pack, stack, unpack
from tilus.kernels.quantize.codes import pack_codes, pack_codes_on, unpack_codes, unpack_codes_on
from tilus.kernels.quantize.tiles import MMA, ROWS, WHOLE, TileOrder

EVERY_ORDER = pytest.mark.parametrize("order", [MMA, ROWS], ids=str)


@st.composite
def group_sizes(draw: st.DrawFn) -> tuple[int, int]:
    """(K, group): a multiple of 16, or all of K."""
    group = draw(st.sampled_from([16, 32, 48, 64, 96, 128, 0]))
    if group == 0:
        k = draw(st.integers(1, 200))
        return k, k
    return group * draw(st.integers(1, 384 // group)), group


def assert_same(found: QuantizedMatrix, expected: QuantizedMatrix) -> None:
    for field in fields(QuantizedMatrix):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, field.name)
        else:
            assert a == b, field.name


@given(
    st.sampled_from(sorted(SCHEMES)), st.integers(0, 99), st.integers(1, 140), group_sizes(), st.integers(0, 2**32),
    st.booleans(), st.sampled_from([None, "mma", "rows"]),
)  # fmt: skip
def test_unpack_inverts_pack(
    scheme: str, index: int, n: int, sizes: tuple[int, int], seed: int, on_torch: bool, order: str | None
) -> None:
    """Also through JSON and the bare arrays."""
    k, group = sizes
    types = SCHEMES[scheme][1]
    matrix = matrix_of(scheme, types[index % len(types)], n, k, group, seed)
    packed = pack(matrix, "cpu" if on_torch else None, order)
    assert packed.header.order.name == (order or ("rows" if on_torch else "mma"))
    assert all(isinstance(array, torch.Tensor if on_torch else np.ndarray) for array in packed.arrays.values())
    assert (packed.shape, packed.group, packed.dtype) == ((n, k), group, matrix.dtype)
    assert_same(unpack(packed), matrix)
    header = WeightHeader.from_json(json.loads(json.dumps(packed.header.to_json())))
    assert header == packed.header
    assert_same(unpack(QuantizedWeight.from_arrays(header, packed.arrays)), matrix)


@EVERY_ORDER
@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_every_code_in_every_place(dtype: DataType, order: TileOrder) -> None:
    """One tile per code, filled with it, beside a tile with all codes: packing mixes up no places and no bits."""
    all_codes = np.arange(dtype.num_codes, dtype=np.uint8)
    codes = np.repeat(all_codes, 64)[:, None].repeat(128, 1)
    codes[:, 64:] = all_codes[(np.arange(codes.shape[0])[:, None] * 7 + np.arange(64)) % all_codes.size]
    lookup = CODE_TYPES.index(dtype) % 2 == 0
    packed = pack_codes(codes, dtype, lookup, order)
    np.testing.assert_array_equal(unpack_codes(packed, dtype, lookup, order), codes)
    assert packed.nbytes * 8 == codes.size * dtype.nbits  # not a bit more than the codes have


@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_where_each_bit_of_the_order_mma_stands(dtype: DataType) -> None:
    """Thread 4 (r % 8) + c % 8 / 2 holds the code in row r, column c of a block of 16 rows, in register (PTX ISA, fragment A of
    mma.m16n8k16) 2 (c / 8 % 2) + r / 8 of step c / 16. Of its `nbits` words of the block, u = gcd(nbits, 4) at a time lie in a
    chunk of 16 bytes, those of 4 / u blocks side by side.
    """
    nbits = dtype.nbits
    together = math.gcd(nbits, 4)
    codes = np.random.default_rng(nbits).integers(0, dtype.num_codes, (70, 100), np.uint8)
    n, k, j = np.ix_(np.arange(70), np.arange(100), np.arange(nbits))
    block, row, column = n % 64 // 16, n % 16, k % 64
    thread = row % 8 * 4 + column % 8 // 2
    code = (column // 16 * 4 + column // 8 % 2 * 2 + row // 8) * 2 + column % 2
    word, bit = np.divmod(code * nbits + j, 32)
    piece = word // together * 4 + block
    chunk, place = np.divmod(piece, 4 // together)
    address = (chunk * 32 + thread) * 4 + place * together + word % together
    packed = pack_codes(codes, dtype, True, MMA)
    assert packed.shape == (2, 2, 512 * nbits)
    words = packed.view("<u4")[n // 64, k // 64, address]
    np.testing.assert_array_equal(words >> bit.astype(np.uint32) & 1, codes[n, k] >> j & 1)


@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_where_each_bit_of_the_order_rows_stands(dtype: DataType) -> None:
    """Bit j of the code in row r, column c of a tile is bit (c nbits + j) % 32 of word (c nbits + j) / 32 of that row. Rows 0 to
    31 come first, word by word; then rows 32 to 63. Tables change nothing.
    """
    nbits = dtype.nbits
    codes = np.random.default_rng(nbits).integers(0, dtype.num_codes, (70, 100), np.uint8)
    n, k, j = np.ix_(np.arange(70), np.arange(100), np.arange(nbits))
    row, place = n % 64, k % 64 * nbits + j
    word = ((row // 32) * 2 * nbits + place // 32) * 32 + row % 32
    for lookup in (False, True):
        packed = pack_codes(codes, dtype, lookup, ROWS)
        assert packed.shape == (2, 2, 512 * nbits)
        words = packed.view("<u4")[n // 64, k // 64, word]
        np.testing.assert_array_equal(words >> (place % 32).astype(np.uint32) & 1, codes[n, k] >> j & 1)


def test_where_each_factor_of_the_order_rows_stands() -> None:
    """Row r of a tile at place r of its set, for every kind of factor; rows beyond N are zero."""
    for group, span in ((16, 16), (48, 16), (64, 64), (192, WHOLE)):
        matrix = matrix_of("everything", tilus.uint4, 70, 192, group)
        packed = pack(matrix, "cpu", "rows")
        assert matrix.zeros is not None
        for array, values, dtype in ((packed.scales, matrix.scales, "<f4"), (packed.zeros, matrix.zeros, "<f2")):
            for column in range(0, 192, span or 192):
                found = array.numpy()[:, column // (span or 192)].reshape(2, -1).view(dtype).reshape(-1)
                np.testing.assert_array_equal(found[:70], values[:, column // group])
                assert not found[70:].any()


# C takes seconds to compile for each: on the CPU the order of CPUs for all types, the other one for a few. On the emulator, too,
# each type in one order, and all of them with `exhaustive`.
KERNELS = [
    pytest.param(name, dtype, order, marks=marks, id=f"{name}-{dtype}-{order}")
    for name, mark in (("reference", ()), ("cpu", ()), ("emulator", (pytest.mark.slow,)), ("cuda", (pytest.mark.gpu,)))
    for turn, order in enumerate((MMA, ROWS))
    for index, dtype in enumerate(CODE_TYPES)
    for marks in [mark if name != "emulator" or index % 2 == turn else (*mark, pytest.mark.exhaustive)]
    if name != "cpu" or order == ROWS or index % 5 == 0
]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("device", "dtype", "order"), KERNELS)
def test_the_kernel_packs_like_numpy(device: str, dtype: DataType, order: TileOrder) -> None:
    """Ragged shapes; and back again."""
    index = CODE_TYPES.index(dtype)
    lookup = index % 3 == 0
    codes = np.random.default_rng(index).integers(0, dtype.num_codes, (70, 100), np.uint8)
    expected = pack_codes(codes, dtype, lookup, order)
    packed, again = np.full_like(expected, 255), np.full_like(codes, 255)
    pack_codes_on(codes, packed, dtype, lookup, order, device)
    np.testing.assert_array_equal(packed, expected)
    unpack_codes_on(packed, again, dtype, lookup, order, device)
    np.testing.assert_array_equal(again, codes)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packing_on_a_gpu(scheme: str) -> None:
    """Tensors on the GPU are those of the CPU, and unpack to the matrix."""
    for dtype in SCHEMES[scheme][1]:
        matrix = matrix_of(scheme, dtype, 130, 96, 32)
        on_gpu, on_cpu = pack(matrix, "cuda"), pack(matrix, "cpu", "mma")
        for name, array in on_gpu.arrays.items():
            assert array.is_cuda and torch.equal(array.cpu(), on_cpu.arrays[name])
        assert_same(unpack(on_gpu), matrix)
        moved, back = pack(matrix, "cpu").to("cuda"), on_gpu.to("cpu")
        assert (moved.header.order, back.header.order) == (MMA, ROWS)
        for name, array in moved.arrays.items():
            assert torch.equal(array, on_gpu.arrays[name])
        assert_same(unpack(back), matrix)


def test_weights_move_between_devices() -> None:
    packed = pack(matrix_of("everything", tilus.uint4, 64, 64, 32), "cpu")
    moved = packed.to("cpu")
    assert moved.header == packed.header and all(torch.equal(moved.arrays[n], a) for n, a in packed.arrays.items())
    assert packed.nbytes == sum(a.numel() * a.element_size() for a in packed.arrays.values())


def test_weights_get_the_order_of_the_device_that_they_move_to() -> None:
    """From numpy arrays, and from tensors that were packed for a GPU."""
    matrix = matrix_of("everything", tilus.uint3, 70, 96, 32)
    expected = pack(matrix, "cpu", "rows")
    for packed in (pack(matrix), pack(matrix, order="rows"), pack(matrix, "cpu", "mma")):
        moved = packed.to("cpu")
        assert moved.header == expected.header
        assert all(torch.equal(moved.arrays[name], array) for name, array in expected.arrays.items())


def test_an_unknown_order() -> None:
    with pytest.raises(TilusError, match="a packed weight in the order 'columns', expected mma or rows"):
        pack(BASE, order="columns")


def test_headers_without_an_order_are_those_of_older_weights() -> None:
    header = pack(BASE).header
    data = header.to_json()
    assert (data.pop("order"), data.pop("is_gated"), data.pop("exact_in_f16")) == ("mma", False, False)
    assert WeightHeader.from_json(data) == header


BASE = random_matrix(tilus.uint4, 4, 64, 32)
FLOAT8 = random_matrix(tilus.float8_e4m3, 4, 64, 32)


def with_element(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("matrix", "changes", "message"),
    [
        (BASE, {"codes": with_element(BASE.codes, (1, 2), 16)}, "code 16, expected less than 16 for uint4"),
        (BASE, {"codes": BASE.codes.astype(np.int8)}, r"codes of dtype int8, expected uint8 \[N, K\]"),
        (FLOAT8, {"codes": with_element(FLOAT8.codes, (1, 2), 255)}, "code 255 of float8_e4m3 in row 1, column 2 is nan"),
        (BASE, {"scales": with_element(BASE.scales, (3, 1), np.inf)}, "scale of row 3, group 1 is inf, expected a finite"),
        (BASE, {"scales": with_element(BASE.scales, (3, 1), np.nan)}, "scale of row 3, group 1 is nan, expected a finite"),
        (BASE, {"scales": with_element(BASE.scales, (3, 1), 0.1)}, r"scale 0\.1\d+ .* no number of f16; the nearest is 0\.0999"),
        (BASE, {"scales": with_element(BASE.scales, (3, 1), 1e6)}, "scale 1000000 .* the nearest is inf"),
        (BASE, {"scales": np.full((4, 2), 3, np.float32), "scale_dtype": tilus.float8_e8m0},
         "scale 3 of row 0, group 0 is no number of float8_e8m0; the nearest is 4"),
        (BASE, {"scales": np.full((4, 2), 0, np.float32), "scale_dtype": tilus.float8_e8m0},
         "scale 0 of row 0, group 0 is no number of float8_e8m0; the nearest is 5.877"),
        (BASE, {"scale_dtype": tilus.int8}, "scales of int8, expected one of f16, bf16, f32, float8_e4m3, float8_e8m0"),
        (BASE, {"mins": with_element(BASE.scales, (0, 0), -np.inf)}, "minimum of row 0, group 0 is -inf, expected a finite"),
        (BASE, {"zeros": np.full((4, 2), 17, np.int16)}, "zero point 17 of row 0, group 0, expected 0 to 16 for uint4"),
        (BASE, {"zeros": np.full((4, 2), -1, np.int16)}, "zero point -1 of row 0, group 0, expected 0 to 16 for uint4"),
        (FLOAT8, {"zeros": np.zeros((4, 2), np.int16)}, "zero points beside codes of float8_e4m3, expected integer codes"),
        (BASE, {"table": np.full(16, np.nan, np.float32)}, "table entry 0 is not finite, expected 16 finite numbers"),
        (FLOAT8, {"table": np.ones(256, np.float32)}, "a table for codes of float8_e4m3, expected a type of 4 bits"),
        (BASE, {"columns": np.zeros(64, np.int32)}, "columns are no permutation of 0 to 63: .* column 0 is there 64 times"),
        (BASE, {"columns": np.arange(1, 65, dtype=np.int32)}, "they go from 1 to 64, and column 0 is there 0 times"),
        (BASE, {"global_scale": float("nan")}, "a global scale of nan, expected a finite number other than 0"),
        (BASE, {"global_scale": 2.0, "mins": BASE.scales}, r"a global scale of 2.0 beside minimums, expected 1"),
        (BASE, {"scales": np.ones((4, 8), np.float32)}, "groups of 8 columns for K = 64, expected a multiple of 16"),
        (BASE, {"dtype": tilus.f16}, "weights of f16, expected a type of 1 to 8 bits"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_named_with_both_values(
    matrix: QuantizedMatrix, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TilusError, match=message):
        pack(replace(matrix, **changes))


def test_k_that_the_group_does_not_divide() -> None:
    with pytest.raises(TilusError, match=r"scales of shape \[4, 3\] for codes of \[4, 64\], expected \[N, K / group\]"):
        replace(BASE, scales=np.ones((4, 3), np.float32))


def test_a_scale_of_zero_makes_its_group_zero() -> None:
    """The minimum stays."""
    matrix = replace(BASE, scales=np.zeros((4, 2), np.float32), mins=np.full((4, 2), 0.5, np.float32))
    y = tilus.kernels.linear(np.ones((1, 64), np.float16), pack(matrix), out_dtype=np.float32, device="reference")
    assert (y == 32).all()


def powers_of_two(dtype: tilus.DataType, codes: np.ndarray, exponents: np.ndarray) -> QuantizedMatrix:
    return QuantizedMatrix(codes, np.ldexp(np.float32(1), exponents), None, dtype, scale_dtype=tilus.float8_e8m0)


@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_packed_weights_say_whether_f16_holds_them(dtype: tilus.DataType) -> None:
    """Each code, of 6 bits and more every seventh, times each power of two, alone among zeros. f16 has multiples of 2^-24 below
    65520."""
    zero = np.flatnonzero(dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8)) == 0)[0]
    for code in finite_codes(dtype)[:: 1 if dtype.nbits < 6 else 7]:
        number = Fraction(float(dtype.decode(np.array([code]))[0]))
        for exponent in (-127, *range(-42, 18), 127):
            codes = np.full((1, 32), zero, np.uint8)
            codes[0, 5], scale = code, Fraction(2) ** exponent
            holds_scale = scale < 65520 and (number == 0 or scale >= Fraction(1, 2**24))
            expected = holds_scale and abs(number * scale) < 65520 and (number * scale * 2**24).denominator == 1
            matrix = powers_of_two(dtype, codes, np.array([[exponent]]))
            assert pack(matrix).header.exact_in_f16 == expected, (number, exponent)
    assert not pack(random_matrix(dtype, 4, 64, 32)).header.exact_in_f16  # known of powers of two only


def test_stacked_weights_are_exact_in_f16_where_each_one_is() -> None:
    def packed(exponent: int) -> QuantizedWeight:
        return pack(powers_of_two(tilus.float4_e2m1, np.full((64, 32), 2, np.uint8), np.full((64, 1), exponent)))

    usual, tiny = packed(-8), packed(-40)
    assert (usual.header.exact_in_f16, tiny.header.exact_in_f16) == (True, False)
    assert stack([usual, usual]).header.exact_in_f16
    assert not stack([usual, tiny]).header.exact_in_f16 and not stack([tiny, usual]).header.exact_in_f16


def test_arrays_that_do_not_belong_to_the_header() -> None:
    packed = pack(matrix_of("everything", tilus.uint4, 70, 64, 32))
    arrays, header = packed.arrays, packed.header
    for name, array in arrays.items():
        cut = array.reshape(-1)[:-1] if array.ndim == 1 else array[:-1]
        for wrong in (cut, array.astype(np.int64)):
            message = f"{name} of a packed weight are {wrong.dtype}{list(wrong.shape)}, expected"
            with pytest.raises(TilusError, match=re.escape(message)):
                QuantizedWeight.from_arrays(header, {**arrays, name: wrong})
        with pytest.raises(TilusError, match=rf"missing: {name}"):
            QuantizedWeight.from_arrays(header, {n: a for n, a in arrays.items() if n != name})
    with pytest.raises(TilusError, match="not of this scheme: more"):
        QuantizedWeight.from_arrays(header, {**arrays, "more": arrays["codes"]})
    with pytest.raises(TilusError, match="zeros of a packed weight are there, the header says minimums"):
        QuantizedWeight(replace(header, has_zeros=False), **arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "a packed weight of layout version 1, these kernels read version 3"),
        ({"version": None}, "a packed weight of layout version None"),
        ({"dtype": "uint9"}, "names the type 'uint9', expected one of"),
        ({"shape": [64]}, r"field shape .* is \[64\], expected \[N, K\]"),
        ({"group": "32"}, "field group .* is '32', expected int"),
        ({"has_zeros": 1}, "field has_zeros .* is 1, expected bool"),
        ({"more": 1}, r"has fields \[.*'more'.*\], expected \["),
        ({"group": 24}, "groups of 24 columns for K = 64"),
        ({"order": "columns"}, "a packed weight in the order 'columns', expected mma or rows"),
        ({"order": None}, "field order .* is None, expected str"),
        ({"shape": [0, 64]}, r"a weight of shape \[0, 64\], expected at least \[1, 1\]"),
    ],
)
def test_headers_that_are_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TilusError, match=message):
        WeightHeader.from_json({**pack(BASE).header.to_json(), **changes})
