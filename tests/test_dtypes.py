"""Codes, values and bit packing of every type, against exact rational arithmetic and ml_dtypes."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus import dtypes
from tilus.dtypes import DTYPES, DataType, bf16, boolean, dtype, f16, f32, pack_bits, unpack_bits
from tilus.errors import TilusError

Array = npt.NDArray[Any]
FLOATS = [t for t in DTYPES.values() if t.is_float and t.is_small]
INTEGERS = [t for t in DTYPES.values() if t.is_integer]
SMALL = [t for t in DTYPES.values() if t.is_small]
ML_DTYPES: dict[str, Any] = {
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e3m4": ml_dtypes.float8_e3m4,
    "float6_e2m3": ml_dtypes.float6_e2m3fn,
    "float6_e3m2": ml_dtypes.float6_e3m2fn,
    "float4_e2m1": ml_dtypes.float4_e2m1fn,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "int1": ml_dtypes.int1,
    "int2": ml_dtypes.int2,
    "int4": ml_dtypes.int4,
    "uint1": ml_dtypes.uint1,
    "uint2": ml_dtypes.uint2,
    "uint4": ml_dtypes.uint4,
}


def all_codes(t: DataType) -> Array:
    return np.arange(t.num_codes, dtype=t.storage)


def exact(t: DataType, code: int) -> Fraction | float:
    """The value of a float code from its fields, as the formats define it; inf or NaN where they do."""
    sign, rest = divmod(code, 1 << t.nbits - 1)
    exponent, mantissa = divmod(rest, 1 << t.mantissa_nbits)
    fraction = Fraction(mantissa, 1 << t.mantissa_nbits)
    top = 2**t.exponent_nbits - 1
    if t.exponent_nbits in (5, 8) and exponent == top:
        return math.nan if mantissa else math.inf * (-1) ** sign
    if t.name == "float8_e4m3" and rest == 0x7F:
        return math.nan
    bias = 2 ** (t.exponent_nbits - 1) - 1
    scale = Fraction(2) ** ((exponent or 1) - bias)
    return (-1) ** sign * ((1 if exponent else 0) + fraction) * scale


def same(value: float, expected: Fraction | float) -> bool:
    if isinstance(expected, Fraction):
        return Fraction(value) == expected
    return value == expected or (math.isnan(value) and math.isnan(expected))


def test_every_type_of_the_family_exists_once() -> None:
    names = {f"float{1 + x + y}_e{x}m{y}" for x in range(1, 6) for y in range(8) if 3 <= 1 + x + y <= 8}
    names |= {f"{kind}{n}" for kind in ("int", "uint") for n in (*range(1, 9), 16, 32, 64)}
    assert set(DTYPES) == names | {"boolean", "float8_e8m0", "f16", "bf16", "f32", "tf32"}
    for name, t in DTYPES.items():
        assert t.name == str(t) == name and dtype(name) is t and getattr(dtypes, name) is t


@pytest.mark.parametrize("t", [*FLOATS, f16, bf16], ids=str)
def test_float_values_are_the_formats(t: DataType) -> None:
    values = t.decode(all_codes(t))
    assert values.dtype == np.float32
    for code, value in enumerate(values.tolist()):
        assert same(value, exact(t, code)), (t, code, value)
        assert math.isnan(value) or math.copysign(1, value) == (-1 if code >> t.nbits - 1 else 1)


@pytest.mark.parametrize("t", [t for t in INTEGERS if t.nbits <= 16], ids=str)
def test_integer_values_are_twos_complement(t: DataType) -> None:
    values = t.decode(all_codes(t))
    assert values.dtype == t.compute
    for code, value in enumerate(values.tolist()):
        assert t.min_value <= value <= t.max_value and (value - code) % (1 << t.nbits) == 0
    assert t.min_value in values and t.max_value in values


@pytest.mark.parametrize("name", ML_DTYPES)
def test_agrees_with_ml_dtypes(name: str) -> None:
    t, other = dtype(name), ML_DTYPES[name]
    codes = all_codes(t)
    if name == "float8_e3m4":  # theirs is IEEE-like: the top exponent is inf and NaN there, finite here
        codes = codes[codes & 0x70 != 0x70]
    theirs = codes.view(other).astype(np.float32)
    np.testing.assert_array_equal(t.decode(codes).astype(np.float32), theirs)
    if t.is_float:
        random = np.random.default_rng(0).normal(0, t.max_value / 4 if t.nbits <= 8 else 1, 1 << 14).astype(np.float32)
        random = random[np.abs(random) <= (15 if name == "float8_e3m4" else t.max_value)]
        np.testing.assert_array_equal(t.encode(random), random.astype(other).view(t.storage))


@pytest.mark.parametrize("t", list(DTYPES.values()), ids=str)
def test_codes_round_trip(t: DataType) -> None:
    """encode(decode(c)) == c for all codes of finite values (a sample for 32 and 64 bits)."""
    codes = (
        all_codes(t) if t.nbits <= 16 else np.random.default_rng(0).integers(0, 1 << t.nbits - 1, 9999, t.storage) * 2
    )
    codes &= ~t.storage.type((1 << t.ignored_nbits) - 1)
    values = t.decode(codes)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(t.encode(values)[finite], codes[finite])
    np.testing.assert_array_equal(t.round(values)[finite], values[finite])
    assert t.encode(values).dtype == t.storage


@functools.cache
def finite_magnitudes(t: DataType) -> list[tuple[int, Fraction]]:
    return [(code, number) for code in range(1 << t.nbits - 1) if isinstance(number := exact(t, code), Fraction)]


def nearest(t: DataType, value: float) -> int:
    """Brute force: of all finite codes with the sign of the value the nearest, then the even one."""
    finite = finite_magnitudes(t)
    largest = finite[-1][1]
    target = min(abs(Fraction(value)), largest) if math.isfinite(value) else largest
    code, _ = min(finite, key=lambda item: (abs(item[1] - target), item[0] & 1))
    return code + ((1 << t.nbits - 1) if math.copysign(1, value) < 0 else 0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("t", FLOATS, ids=str)
def test_encode_rounds_to_nearest_even_and_saturates(t: DataType) -> None:
    values = np.unique(np.abs(t.decode(all_codes(t))))
    values = values[np.isfinite(values)]
    ties = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    points = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    random = np.random.default_rng(0).uniform(0, 1.2 * t.max_value, 64).astype(np.float32)
    limits = np.array([0, 1e-45, 1e-30, t.max_value * 1.5, 3e38, np.inf], np.float32)
    points = np.concatenate([points, random, limits])
    points = np.concatenate([points, -points])
    assert t.encode(points).tolist() == [nearest(t, value) for value in points.tolist()]


@pytest.mark.parametrize("t", FLOATS, ids=str)
def test_nan_becomes_nan_or_the_largest_value(t: DataType) -> None:
    has_nan = any(isinstance(v := exact(t, code), float) and math.isnan(v) for code in range(t.num_codes))
    for nan in (np.float32(np.nan), -np.float32(np.nan), np.uint32(0xFF800001).view(np.float32)):
        (value,) = t.round(np.array([nan])).tolist()
        assert math.isnan(value) if has_nan else value == t.max_value


def test_scales_are_powers_of_two() -> None:
    """OCP E8M0, against ml_dtypes; that makes NaN of what is not positive, here it becomes the smallest value."""
    t, other = dtypes.float8_e8m0, ml_dtypes.float8_e8m0fnu
    values = t.decode(all_codes(t))
    assert [Fraction(value) for value in values[:-1].tolist()] == [Fraction(2) ** (code - 127) for code in range(255)]
    assert math.isnan(values[-1])
    np.testing.assert_array_equal(values, all_codes(t).view(other).astype(np.float32))
    np.testing.assert_array_equal(t.encode(values), all_codes(t))
    middles = (values[:-2] + values[1:-1]) / 2
    points = np.concatenate(
        [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(math.inf))]
    )
    random = np.ldexp(np.random.default_rng(0).uniform(1, 2, 999), np.arange(999) % 253 - 126).astype(np.float32)
    points = np.concatenate([points, random])
    points = points[points >= 2.0**-126]  # below, where f32 is subnormal, theirs does not round to nearest
    np.testing.assert_array_equal(t.encode(points), points.astype(other).view(np.uint8))
    assert t.encode(np.array([1.499, 1.5, 1.501]) * 2.0**-127).tolist() == [0, 1, 1]
    assert t.encode(np.array([0.0, -0.0, -3.0, -np.inf, 2.0**-140, 2.0**-149])).tolist() == [0] * 6
    assert t.encode(np.array([np.inf, 2.0**128, 1.99 * 2.0**127, np.nan])).tolist() == [254, 254, 254, 255]
    assert (t.is_signed, t.is_small, t.bias, t.max_value, t.min_value) == (False, False, 127, 2.0**127, 2.0**-127)
    assert (t.smallest_subnormal, t.eps, t.max_code) == (2.0**-127, 1.0, 254)


def test_wide_floats_overflow_to_inf_and_keep_nan() -> None:
    for t, over in ((f16, 65520.0), (bf16, 2.0**128 - 2.0**119)):
        assert t.round(np.array([over, -over, np.nan, np.inf])).tolist()[:2] == [np.inf, -np.inf]
        assert np.isnan(t.round(np.array([np.nan]))).all()
    assert f32.round(np.array([1e39])).tolist() == [np.inf]


@given(st.integers(-(2**63), 2**64 - 1), st.sampled_from([f16, bf16, f32]))
def test_integers_are_rounded_to_floats_once(value: int, t: DataType) -> None:
    array = np.array([value], np.int64 if value < 2**63 else np.uint64)
    below, above = neighbours(t, Fraction(value))
    (found,) = t.round(array).tolist()
    assert_nearest(t, Fraction(value), found, below, above)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([f16, bf16, f32]))
def test_doubles_are_rounded_to_floats_once(value: float, t: DataType) -> None:
    (found,) = t.round(np.array([value])).tolist()
    assert_nearest(t, Fraction(value), found, *neighbours(t, Fraction(value)))


@given(st.data())
def test_doubles_near_ties_are_rounded_once(data: st.DataObject) -> None:
    """A double just beside the middle of two neighbours is where a detour through float32 goes wrong."""
    t = data.draw(st.sampled_from([f16, bf16]))
    code = data.draw(st.integers(0, t.max_code - 1))
    low, high = t.decode(np.array([code, code + 1], t.storage)).tolist()
    value = (low + high) / 2 * (1 + data.draw(st.sampled_from([-1, 0, 1])) * 2.0**-50)
    (found,) = t.round(np.array([value])).tolist()
    assert_nearest(t, Fraction(value), found, Fraction(low), Fraction(high))


def neighbours(t: DataType, value: Fraction) -> tuple[Fraction, Fraction]:
    """The multiples of the unit in the last place around a value, had the exponent no upper limit."""
    least = 2 - 2 ** (t.exponent_nbits - 1)
    size = abs(value)
    exponent = max(math.floor(math.log2(size)) if size else least, least)
    while size and exponent > least and Fraction(2) ** exponent > size:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - t.mantissa_nbits)
    return value // ulp * ulp, -(-value // ulp) * ulp


def assert_nearest(t: DataType, value: Fraction, found: float, below: Fraction, above: Fraction) -> None:
    if math.isinf(found):
        assert abs(value) >= Fraction(t.max_value) * (1 + Fraction(1, 2 << t.mantissa_nbits) / 2)
        return
    assert Fraction(found) in (below, above)
    assert abs(Fraction(found) - value) <= min(abs(below - value), abs(above - value))
    if below != above and value - below == above - value:
        assert int(t.encode(np.array([found]))[0]) % 2 == 0


@pytest.mark.parametrize("t", INTEGERS, ids=str)
def test_integers_saturate_and_round_to_even(t: DataType) -> None:
    values = [-np.inf, -1e30, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.49, 2.0**31, 2.0**63, 2.0**64, 1e30, np.inf]
    expected = [t.min_value, t.min_value, -2, -2, 0, 0, 2, 2, 3, 2**31, 2**63, 2**64, t.max_value, t.max_value]
    expected = [min(max(int(value), int(t.min_value)), int(t.max_value)) for value in expected]
    for float_dtype in (np.float32, np.float64):
        assert t.round(np.array(values, float_dtype)).tolist() == expected
        assert t.round(np.array([np.nan], float_dtype)).tolist() == [0]


@pytest.mark.parametrize("src", INTEGERS, ids=str)
def test_integers_clamp_to_each_other(src: DataType) -> None:
    low, high = int(src.min_value), int(src.max_value)
    values = sorted({low, high, 0, 1, high // 2, low // 2, *(min(high, 1 << k) for k in range(64))})
    for dst in INTEGERS:
        expected = [min(max(value, int(dst.min_value)), int(dst.max_value)) for value in values]
        assert dst.round(np.array(values, src.compute)).tolist() == expected


@pytest.mark.parametrize("t", list(DTYPES.values()), ids=str)
def test_single_values_are_arrays_without_axes(t: DataType) -> None:
    for one in (1, 1.0, np.float32(1), True):
        value = 0 if t.name == "int1" else 1
        codes = t.encode(one)
        assert isinstance(codes, np.ndarray) and codes.shape == () and t.decode(codes) == value == t.round(one)


def test_booleans() -> None:
    assert boolean.encode(np.array([0.0, -0.0, 0.5, np.nan])).tolist() == [0, 0, 1, 1]
    assert boolean.decode(np.array([0, 1, 255], np.uint8)).tolist() == [False, True, True]
    assert dtypes.int4.round(np.array([True, False])).tolist() == [1, 0]
    assert f16.round(np.array([True, False])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "largest", "smallest"),
    [
        ("float8_e4m3", 448, 2**-9), ("float8_e5m2", 57344, 2**-16), ("float7_e5m1", 49152, 2**-15),
        ("float7_e4m2", 448, 2**-8), ("float7_e3m3", 30, 2**-5), ("float7_e2m4", 7.75, 2**-4),
        ("float6_e4m1", 384, 2**-7), ("float6_e3m2", 28, 2**-4), ("float6_e2m3", 7.5, 2**-3),
        ("float5_e3m1", 24, 2**-3), ("float5_e2m2", 7, 2**-2), ("float4_e2m1", 6, 2**-1), ("float3_e1m1", 3, 1),
        ("f16", 65504, 2**-24), ("bf16", 2**128 - 2**120, 2**-133), ("f32", 2**128 - 2**104, 2**-149),
        ("tf32", 2**128 - 2**117, 2**-136),
    ],
)  # fmt: skip
def test_published_limits(name: str, largest: float, smallest: float) -> None:
    t = dtype(name)
    assert (t.max_value, t.min_value, t.smallest_subnormal) == (largest, -largest, smallest)


@pytest.mark.parametrize("t", [*FLOATS, f16, bf16], ids=str)
def test_limits_are_those_of_the_values(t: DataType) -> None:
    values = t.decode(all_codes(t))
    values = values[np.isfinite(values)].astype(np.float64)
    assert (t.max_value, t.min_value) == (values.max(), values.min())
    assert t.smallest_subnormal == values[values > 0].min()
    assert t.eps == values[values > 1].min() - 1
    assert t.decode(np.array([t.max_code], t.storage)).tolist() == [t.max_value]


def test_tf32_rounds_to_nearest_and_ties_away_from_zero() -> None:
    """Between every sampled pair of neighbours: their middle, the float64 below it and the one above it."""
    tf32 = dtype("tf32")
    codes = np.random.default_rng(0).integers(0, tf32.max_code >> 13, 20000).astype(np.uint32) << np.uint32(13)
    codes = np.concatenate([codes, np.arange(0, 1 << 23, 1 << 13, np.uint32)])  # all subnormals
    for sign in (0, 1 << 31):
        low, high = codes | np.uint32(sign), codes + np.uint32(1 << 13) | np.uint32(sign)
        middle = (tf32.decode(low).astype(np.float64) + tf32.decode(high)) / 2
        finite = np.isfinite(middle)
        np.testing.assert_array_equal(tf32.encode(middle)[finite], high[finite])
        np.testing.assert_array_equal(tf32.encode(middle.astype(np.float32))[finite], high[finite])
        np.testing.assert_array_equal(tf32.encode(np.nextafter(middle, 0))[finite], low[finite])
        np.testing.assert_array_equal(tf32.encode(middle * (1 + 2**-52))[finite], high[finite])
    assert tf32.encode(np.array([np.inf, -np.inf, 3.4025e38, -1e300])).tolist() == [
        0x7F800000, 0xFF800000, 0x7F800000, 0xFF800000
    ]  # fmt: skip
    assert np.isnan(tf32.round(np.array([np.nan]))).all()
    ignored = np.array([0x3F801FFF, 0xBF800001], np.uint32)
    assert tf32.decode(ignored).tolist() == [1.0, -1.0]


def test_integer_limits() -> None:
    """uint4.max_value is 15, not 16: the public implementation has this wrong."""
    assert [dtype(f"uint{n}").max_value for n in range(1, 9)] == [1, 3, 7, 15, 31, 63, 127, 255]
    assert [dtype(f"int{n}").min_value for n in range(1, 9)] == [-1, -2, -4, -8, -16, -32, -64, -128]


def test_memory_types() -> None:
    assert {t.name: t.numpy for t in DTYPES.values() if t.numpy is not None} == {
        "boolean": np.bool_, "f16": np.float16, "f32": np.float32,
        "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
        "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    }  # fmt: skip
    assert (boolean.nbytes, f16.nbytes, dtypes.int64.nbytes) == (1, 2, 8)


@pytest.mark.parametrize("t", SMALL, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 13), (2, 2, 64)], ids=str)
def test_packing_is_a_little_endian_bit_stream(t: DataType, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, t.num_codes, shape).astype(t.storage)
    data = pack_bits(codes, t)
    assert data.dtype == np.uint8 and data.shape == (*shape[:-1], -(-shape[-1] * t.nbits // 8))
    for index in np.ndindex(shape[:-1]):
        stream = sum(code << i * t.nbits for i, code in enumerate(codes[index].tolist()))
        assert int.from_bytes(data[index].tobytes(), "little") == stream
    np.testing.assert_array_equal(unpack_bits(data, t, shape[-1]), codes)


@pytest.mark.parametrize("t", [f16, bf16, f32, dtypes.int16, dtypes.uint64], ids=str)
def test_packing_whole_bytes(t: DataType) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << t.nbits, (3, 5), t.storage)
    data = pack_bits(codes, t)
    assert [int.from_bytes(row.tobytes(), "little") & (1 << t.nbits) - 1 for row in data] == codes[:, 0].tolist()
    np.testing.assert_array_equal(unpack_bits(data, t, 5), codes)


def test_types_are_values() -> None:
    assert DataType("int4", "int", 4) == dtypes.int4 and hash(DataType("int4", "int", 4)) == hash(dtypes.int4)


def test_mistakes_say_what_was_expected() -> None:
    with pytest.raises(TilusError, match=r"unknown data type 'float16'[\s\S]*f16"):
        dtype("float16")
    with pytest.raises(TilusError, match=r"'i4'[\s\S]*int4"):
        dtype("i4")
    with pytest.raises(TilusError, match="int4 has 4 bits, expected a multiple of 8"):
        _ = dtypes.int4.nbytes
    with pytest.raises(TilusError, match="bias of int4, expected a float type"):
        _ = dtypes.int4.bias
    with pytest.raises(TilusError, match="dtype int64, expected uint8"):
        dtypes.int4.decode(np.array([1]))
    with pytest.raises(TilusError, match="code 16 does not fit int4, expected less than 16"):
        dtypes.int4.decode(np.array([16], np.uint8))
    with pytest.raises(TilusError, match="code 16 does not fit int4"):
        pack_bits(np.array([16], np.uint8), dtypes.int4)
    with pytest.raises(TilusError, match="9 elements of uint4 from 4 x uint8, expected at least 5 x uint8"):
        unpack_bits(np.zeros(4, np.uint8), dtypes.uint4, 9)
