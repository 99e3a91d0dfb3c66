"""Numbers in C are those of the types: every code of small types, casts of hostile values, functions, integer arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tilus
from tilus import Const, Tensor
from tilus.dtypes import DTYPES, DataType, bf16, boolean, f16, f32, pack_bits, tf32
from tilus.layout import spatial

Array = npt.NDArray[Any]
BLOCK = 2048
SMALL = [dtype for dtype in DTYPES.values() if dtype.nbits <= 8 and dtype != boolean]
INTEGERS = [dtype for dtype in DTYPES.values() if dtype.is_integer]
TARGETS = tuple(d for d in DTYPES.values() if d not in (boolean, tf32) and d.name != "uint64")


def same(found: Array, expected: Array, what: str) -> None:
    """Equal numbers, zeros with equal signs."""
    np.testing.assert_array_equal(found, expected, err_msg=what)
    zero = found == 0
    np.testing.assert_array_equal(np.signbit(found[zero]), np.signbit(expected[zero]), err_msg=what)


@tilus.kernel
def decoded(x: Tensor["t", "n"], raw: Tensor[tilus.uint8, "bytes"], y: Tensor[f32, 3, "n"], *, src: Const, dst: Const):
    """As they stand in memory, out of shared memory, and as a view of each thread's bytes."""
    tilus.grid(tilus.cdiv(x.shape[0], dst.size), warps=1)
    i = tilus.block_id(0)
    loaded = tilus.load(x, [i * dst.size], dst.shape, layout=dst)
    memory = tilus.shared(x.dtype, dst.shape)
    tilus.store_shared(memory, loaded)
    tilus.sync()
    viewed = tilus.view(tilus.load(raw, [i * src.size], src.shape, layout=src), x.dtype, dst.shape, dst)
    for way, tile in enumerate((loaded, tilus.load_shared(memory), viewed)):
        tilus.store(y, [way, i * dst.size], tilus.cast(tile, f32))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_every_code_decodes(dtype: DataType) -> None:
    """Each at every place of eight, so at every bit of a byte."""
    codes = np.stack([np.roll(np.arange(dtype.num_codes), i) for i in range(8)], axis=1).reshape(-1)
    codes = np.resize(codes, -(-codes.size // 256) * 256).astype(dtype.storage)
    raw = np.ascontiguousarray(pack_bits(codes, dtype)).view(np.uint8)
    y = np.zeros((3, codes.size), np.float32)
    layouts = {"src": spatial(32).local(dtype.nbits), "dst": spatial(32).local(8)}
    decoded.on("cpu")(tilus.packed(raw, dtype, codes.shape), raw, y, **layouts)
    for found in y:
        same(found, dtype.decode(codes).astype(np.float32), dtype.name)


@tilus.kernel
def casts(
    x: Tensor["t", "n"], whole: Tensor[tilus.int64, "count", "n"], floats: Tensor[f32, "count", "n"],
    *, types: Const, block: Const,
):  # fmt: skip
    tilus.grid(tilus.cdiv(x.shape[0], block), warps=4)
    i = tilus.block_id(0) * block
    tile = tilus.load(x, [i], [block])
    for index, dtype in enumerate(types):
        if dtype.is_float:
            tilus.store(floats, [index, i], tilus.cast(tilus.cast(tile, dtype), f32))
        else:
            tilus.store(whole, [index, i], tilus.cast(tilus.cast(tile, dtype), tilus.int64))


def hostile_floats() -> Array:
    """Around each limit, each half and each power of two of f32, all values of f16 and bf16, and random bits."""
    powers = np.ldexp(1.0, np.arange(-149, 128))
    halves = np.concatenate([np.arange(-300, 300) / 2, (2.0 ** np.arange(1, 24)) + 0.5, 2.0 ** np.arange(1, 24) - 0.5])
    limits = [float(v) for d in TARGETS for v in (d.max_value, d.min_value)]
    with np.errstate(over="ignore"):
        special = np.array([*powers, *halves, *limits, *(1.5 * powers[:-1]), np.inf, np.nan, 0.0], np.float32)
        near = np.concatenate(
            [special, np.nextafter(special, np.float32(np.inf)), np.nextafter(special, -np.float32(np.inf))]
        )
    numbers = np.arange(1 << 16)
    sixteen = [dtype.decode(numbers.astype(dtype.storage)).astype(np.float32) for dtype in (f16, bf16)]
    finite = [values[:infinity] for values, infinity in zip(sixteen, (0x7C00, 0x7F80), strict=True)]
    ties = [v[:-1] + (v[1:] - v[:-1]) / 2 for v in finite]
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint32).view(np.float32)
    return np.concatenate([near, -near, *sixteen, *ties, bits]).astype(np.float32)


def hostile_integers(dtype: DataType) -> Array:
    low, high = int(dtype.min_value), int(dtype.max_value)
    around = [v + i for d in INTEGERS for v in (int(d.min_value), int(d.max_value)) for i in (-2, -1, 0, 1, 2)]
    around += [(1 << n) + i for n in range(63) for i in (-1, 0, 1)] + [(3 << n) + i for n in range(61) for i in (0, 1)]
    values = sorted({s * v for v in around for s in (1, -1) if low <= s * v <= high} | {low, high})
    return np.array(values, dtype.compute)


def codes_of(dtype: DataType) -> Array:
    if dtype == f32:
        return hostile_floats().view(np.uint32)
    if dtype.nbits <= 16:
        return np.arange(dtype.num_codes).astype(dtype.storage)
    return dtype.encode(hostile_integers(dtype))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("src", [d for d in DTYPES.values() if d.nbits >= 8 and d not in (boolean, tf32)], ids=str)
def test_casts_encode(src: DataType) -> None:
    """Casts to all other types are what `encode` says."""
    codes = codes_of(src)
    values = src.decode(codes)
    shape = (len(TARGETS), values.size)
    whole, floats = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    x = tilus.packed(codes.view(np.uint8), src, values.shape)
    casts.on("cpu")(x, whole, floats, types=TARGETS, block=BLOCK)
    for index, dst in enumerate(TARGETS):
        with np.errstate(over="ignore"):
            expected = values if dst == src else dst.decode(dst.encode(values))
        found = floats[index] if dst.is_float else whole[index]
        same(found, expected, f"{src} to {dst}")


@tilus.kernel
def functions(x: Tensor[f32, "n"], y: Tensor[f32, "count", "n"], *, names: Const, block: Const):
    tilus.grid(tilus.cdiv(x.shape[0], block), warps=4)
    i = tilus.block_id(0) * block
    tile = tilus.load(x, [i], [block])
    for index, function in enumerate(names):
        tilus.store(y, [index, i], function(tile))


ULPS = {"exp": 1.5, "exp2": 1.25, "log": 1.0, "log2": 1.0, "sqrt": 0.5, "rsqrt": 1.5}
"""How far results may be from exact ones, in units of the last place of f32."""


def test_functions_are_within_ulps() -> None:
    values = hostile_floats()
    values = np.concatenate([values, np.random.default_rng(1).uniform(-104, 89, 1 << 17).astype(np.float32)])
    y = np.zeros((len(ULPS), values.size), np.float32)
    functions.on("cpu")(values, y, names=tuple(getattr(tilus, name) for name in ULPS), block=BLOCK)
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float64)
    for (name, bound), found in zip(ULPS.items(), y, strict=True):
        with np.errstate(all="ignore"):
            exact = 1 / np.sqrt(wide) if name == "rsqrt" else getattr(np, name)(wide)
            expected = exact.astype(np.float32)
            error = np.abs(found.astype(np.float64) - exact) / np.spacing(np.abs(expected))
        ordinary = np.isfinite(found) & np.isfinite(expected)
        worst = np.argmax(np.where(ordinary, error, 0))
        assert error[worst] <= bound, (name, values[worst], found[worst], exact[worst])
        edge = ~ordinary & ~(np.isinf(found) & (np.abs(exact) > 0.9999999 * float(f32.max_value)))
        np.testing.assert_array_equal(found[edge], expected[edge], err_msg=name)


@tilus.kernel
def arithmetic(a: Tensor["t", "n"], b: Tensor["t", "n"], y: Tensor["t", 9, "n"], *, block: Const):
    tilus.grid(tilus.cdiv(a.shape[0], block), warps=4)
    i = tilus.block_id(0) * block
    p, q = tilus.load(a, [i], [block]), tilus.load(b, [i], [block])
    results = (p + q, p - q, p * q, p // q, p % q, p << q, p >> q, tilus.minimum(p, q), tilus.maximum(p, q))
    for index, tile in enumerate(results):
        tilus.store(y, [index, i], tile)


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if d.nbits >= 16], ids=str)
def test_integer_arithmetic_is_that_of_the_reference(dtype: DataType) -> None:
    """Of all pairs of hostile numbers: division by 0 and -1, shifts by the width and by negative numbers, wrapping."""
    values = np.unique(
        np.concatenate([hostile_integers(dtype)[::3], np.array([0, 1, 2, 3, 7, 8, 31, 32, 63, 64], dtype.compute)])
    )
    pairs = np.meshgrid(values, values)
    a, b = (np.ascontiguousarray(p.reshape(-1)) for p in pairs)
    found, expected = (np.zeros((9, a.size), a.dtype) for _ in range(2))
    arithmetic.on("cpu")(a, b, found, block=BLOCK)
    arithmetic.on("reference")(a, b, expected, block=BLOCK)
    for op, (left, right) in enumerate(zip(found, expected, strict=True)):
        wrong = np.flatnonzero(left != right)[:5]
        assert not wrong.size, (op, a[wrong], b[wrong], left[wrong], right[wrong])
