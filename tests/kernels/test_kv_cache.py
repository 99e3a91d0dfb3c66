"""Quantised caches: what the appending kernel writes, and what paged_decode makes of it, against float64."""

from __future__ import annotations

import math
import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from test_paged_decode import without_spills
from test_rope import make_inputs, rotated

import tilus
from tilus import TilusError
from tilus.kernels import paged_decode, paged_prefill, rope_append
from tilus.kernels.kv_cache import KV_FORMATS, KvFormat, QuantizedCache, quantized_cache
from tilus.kernels.paged_decode import DecodePlan, launch, most_queries, paged_decode_kernel, plans, units_of_codes
from tilus.kernels.paged_decode_split import Split
from tilus.ptx.assembler import SpillError
from tilus.runtime.binaries import build
from tilus.target import get_target

Array = npt.NDArray[np.float64]
NAMES = sorted(KV_FORMATS)
# Formats of a user's own: other types, and ranges that are used in part.
OWN_FORMATS = {
    "e5m2": KvFormat(tilus.float8_e5m2, 256.0, mixes_keys=False),
    "e2m1": KvFormat(tilus.float4_e2m1, 6.0),
    "uint8": KvFormat(tilus.uint8, 255.0, has_centre=True),
    "int2": KvFormat(tilus.int2, 3.0, has_centre=True),
}
FORMATS = KV_FORMATS | OWN_FORMATS
# What codes are as numbers, and the bits behind the first one and the smallest step of those with an exponent.
NUMBERS: dict[str, Any] = {
    "fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8, "int4": ml_dtypes.int4, "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn, "uint8": np.uint8, "int2": ml_dtypes.int2,
}  # fmt: skip
FLOATS = {"fp8": (3, -9), "e5m2": (2, -16), "e2m1": (1, -1)}
NOT_NUMBERS = {"fp8": 0x7F, "e5m2": 0x7F}  # of the largest magnitudes, up from there
NO_PAGE = 2**20
EXECUTIONS = ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


def numbers_of(cache: QuantizedCache) -> tuple[Array, Array]:
    """Codes as numbers, and what they stand for, [pages, Hkv, 2, page_size, D]: by numpy and torch alone."""
    nbits, (name,) = cache.format.code.nbits, [n for n, kind in FORMATS.items() if kind == cache.format]
    bits = np.unpackbits(cache.codes.cpu().numpy(), axis=-1, bitorder="little")
    places = bits.reshape(*bits.shape[:-1], -1, nbits) @ (1 << np.arange(nbits))
    with np.errstate(invalid="ignore"):
        numbers = places.astype(np.uint8).view(NUMBERS[name]).astype(np.float64)
    factors = cache.factors.cpu().double().numpy()
    values = numbers * factors[:, :, :, 0, :, None]
    return numbers, values + factors[:, :, :, 1, :, None] if cache.format.has_centre else values


def moved(cache: QuantizedCache, device: str) -> QuantizedCache:
    if device != "cuda":
        return cache
    return QuantizedCache(cache.format, cache.codes.cuda(), cache.factors.cuda())


def random_cache(name: str, pages: int, page_size: int, kv_heads: int, head_dim: int, seed: int) -> QuantizedCache:
    """All codes but NaN and infinity, everywhere; scales such that elements are of the order of one."""
    generator = torch.Generator().manual_seed(seed)
    cache = quantized_cache(FORMATS[name], pages, page_size, kv_heads, head_dim)
    codes = torch.randint(0, 256, cache.codes.shape, generator=generator, dtype=torch.uint8)
    beyond = {"fp8": 0x7F, "e5m2": 0x5C}.get(name, 0x80)  # of e5m2 magnitudes above 224, too, which are not used
    cache.codes.copy_(torch.where(codes & 127 >= beyond, codes & 0xB0, codes))
    largest = cache.format.largest
    scales = (torch.rand(cache.factors[:, :, :, 0].shape, generator=generator) + 0.5) * (2 / largest)
    cache.factors[:, :, :, 0] = scales
    if cache.format.has_centre:
        cache.factors[:, :, :, 1] = scales / 2
    return cache


def check_decode(
    name: str, kv_lens: tuple[int, ...], device: str, dtype: torch.dtype = torch.float16, q_len: int = 1, group: int = 4,
    head_dim: int = 64, page_size: int = 16, kv_heads: int = 2, blocks: int = 3, fixed: bool = False,
) -> None:  # fmt: skip
    """Off by the rounding of weights to f16 (absolutely below its normal numbers) and of the result, and f32 arithmetic.

    Pages that no sequence uses, and tokens behind the end, have NaN for factors, and with fp8 for codes.
    """
    counts = [-(-n // page_size) for n in kv_lens]
    cache = random_cache(name, sum(counts) + 2, page_size, kv_heads, head_dim, len(kv_lens))
    numbers, values = numbers_of(cache)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    tables = torch.full((len(kv_lens), max(counts) + 1), NO_PAGE, dtype=torch.int32)
    used = torch.zeros(len(order), page_size, dtype=torch.bool)
    for row, count in enumerate(counts):
        mine, order = order[:count], order[count:]
        tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
        for token in range(kv_lens[row]):
            used[mine[token // page_size], token % page_size] = True
    unused = ~used[:, None, None, :].expand(cache.codes.shape[:4])
    cache.codes[unused] = NOT_NUMBERS.get(name, 0)
    cache.factors.masked_fill_(unused[:, :, :, None].expand(cache.factors.shape), math.nan)
    q = torch.randn(len(kv_lens), q_len, kv_heads * group, head_dim, generator=generator).to(dtype)
    lens, scale = torch.tensor(kv_lens, dtype=torch.int32), head_dim**-0.5
    tensors = [t.cuda() if device == "cuda" else t for t in (q, tables, lens)]
    there, candidates = (
        moved(cache, device),
        plans(q_len, group, head_dim, page_size, cache.format.code.nbits, crowded=False),
    )

    def launched(plan: DecodePlan) -> torch.Tensor:
        split = Split(384, fixed=True) if fixed else Split(min(plan.tile, page_size))
        return launch(tensors[0], there, *tensors[1:], scale, plan, split, blocks, False, device)[0]

    out = without_spills(candidates, launched)
    half_step = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    for row, length in enumerate(kv_lens):
        pages = tables[row, : counts[row]].tolist()
        for query in range(q_len):
            seen = max(0, length - q_len + query + 1)
            for head in range(kv_heads * group if seen else 0):
                keys, elements = np.concatenate([values[page, head // group] for page in pages], axis=1)[:, :seen]
                codes = np.concatenate([numbers[page, head // group, 1] for page in pages], axis=0)[:seen]
                scores = keys @ q[row, query, head].double().numpy() * scale
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                expected, size = weights @ elements, weights @ (np.abs(elements) + 2)
                limit = half_step * np.abs(expected) + (2.0**-11 + 2.0**-14) * size + 2.0**-25 * np.abs(codes).sum(0)
                error = np.abs(out[row, query, head].cpu().double().numpy() - expected)
                assert (error <= limit).all(), f"{(error / limit).max()} of the limit"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize(
    "name",
    [
        "fp8",
        "int4",
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("int8", "e2m1", "uint8")),
        "e5m2",
        "int2",
    ],
)
def test_decode(name: str, device: str) -> None:
    """Parts of pages and of tiles, and several blocks a sequence."""
    check_decode(name, (140, 0, 17), device, blocks=2)


@pytest.mark.parametrize("name", ["fp8", pytest.param("int8", marks=pytest.mark.exhaustive), "int4"])
@pytest.mark.parametrize(
    ("q_len", "group", "head_dim", "page_size", "kv_heads"),
    [(5, 3, 64, 128, 2), pytest.param(2, 8, 96, 32, 1, marks=pytest.mark.exhaustive)],
)
def test_decode_shapes(name: str, q_len: int, group: int, head_dim: int, page_size: int, kv_heads: int) -> None:
    check_decode(
        name, (70, 5), "reference", torch.bfloat16, q_len, group, head_dim, page_size, kv_heads, blocks=2, fixed=True
    )


def test_a_fixed_split_gives_the_same_bits_however_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are so many that another plan is faster."""
    monkeypatch.setattr(sys.modules["tilus.kernels.paged_decode"], "num_sms_of", lambda *_: 6)
    cache = random_cache("int8", 24, 16, 1, 64, 5)
    q, tables = torch.randn(2, 1, 2, 64).half(), torch.randperm(24).int().reshape(2, 12)
    lens = torch.tensor([190, 150], dtype=torch.int32)
    both = paged_decode(q, cache, tables, lens, 0.1, fixed_split=128, device="reference")
    alone = paged_decode(q[1:], cache, tables[1:], lens[1:], 0.1, fixed_split=128, device="reference")
    assert torch.equal(both[1:], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("q_len", "group"), [(1, 1), (1, 4), (1, 8), (2, 8), (4, 4), (8, 3), (8, 8), (8, 16)])
@pytest.mark.parametrize("page_size", [16, 128])
def test_all_shapes(name: str, head_dim: int, q_len: int, group: int, page_size: int) -> None:
    if q_len <= most_queries(group, head_dim):
        check_decode(name, (700, 17), "cuda", torch.bfloat16, q_len, group, head_dim, page_size, blocks=5)


@pytest.mark.parametrize("name", ["fp8", pytest.param("int8", marks=pytest.mark.exhaustive), "int4"])
@pytest.mark.parametrize(
    ("head_dim", "q_len", "group", "page_size"),
    [(128, 1, 4, 16), *(pytest.param(*shape, marks=pytest.mark.exhaustive) for shape in [
        (64, 1, 8, 32), (96, 1, 4, 16), (96, 7, 8, 16), (128, 2, 8, 64), (128, 4, 8, 16), (128, 8, 8, 64), (128, 1, 4, 128),
        (256, 1, 8, 16), (256, 8, 4, 16),
    ])],
)  # fmt: skip
def test_assembles_without_spills(name: str, head_dim: int, q_len: int, group: int, page_size: int) -> None:
    """Some plan has no spills, for which `build` raises; and codes reach registers by ldmatrix."""
    cache = quantized_cache(name, 4, page_size, 2, head_dim)
    q = torch.zeros(2, q_len, 2, group, head_dim, dtype=torch.bfloat16)
    int32, f32 = (torch.zeros(2, 2, dtype=dtype) for dtype in (torch.int32, torch.float32))
    found: list[str] = []
    for plan in plans(q_len, group, head_dim, page_size, cache.format.code.nbits, crowded=False):
        special = paged_decode_kernel.specialize(
            q, units_of_codes(cache), int32, int32[0], q, f32.new_zeros(9, q_len, group, head_dim),
            f32.new_zeros(9, q_len, group), int32[0], 1.0, f32.new_zeros(2, q_len, 2, group), cache.factors, q_len=q_len,
            group=group, head_dim=head_dim, page_size=page_size, blocks=132, split=Split(min(plan.tile, page_size)), plan=plan,
            kind=cache.format,
        )  # fmt: skip
        try:
            found.append(build(special.function, get_target("sm_90a"))[0].ptx)
        except SpillError:
            continue
        break
    assert found and "ldmatrix.sync.aligned.m8n8.x" in found[0] and ".trans.shared.b16" in found[0]


def append_inputs(
    name: str, heads: tuple[int, int], head_dim: int, page_size: int
) -> tuple[dict[str, Any], QuantizedCache]:
    """Five tokens, one of which has no slot, one all zeros, one with outliers; the cache holds something before."""
    inputs = make_inputs(5, heads, head_dim, page_size)
    pages = inputs.pop("kv_cache").shape[0]
    inputs["slots"][1] = -1
    inputs["qkv"][2] = 0
    inputs["qkv"][3, ::7] *= 100
    return inputs, random_cache(name, pages, page_size, heads[1], head_dim, 5)


def hadamard(row: Array) -> Array:
    """Of the whole row, or of the largest runs of a power of two that it, or each half of it, consists of; orthonormal."""
    half = len(row) // 2
    run = half & -half
    run = len(row) if run == half else run
    bits = np.arange(run)
    parity = np.vectorize(lambda n: n.bit_count() % 2)(bits[:, None] & bits)
    return ((1 - 2 * parity) @ row.reshape(-1, run).T).T.reshape(-1) / math.sqrt(run)


def check_elements(found: Array, wanted: Array, scale: float, name: str) -> None:
    """A head's elements are off by half a step of their codes, next to what rounded factors cut off; where there is a centre,
    by half a step around a mean error that is that centre's rounding."""
    kind = FORMATS[name]
    low = min(wanted) if kind.has_centre else 0.0
    span = max(wanted) - low if kind.has_centre else max(abs(wanted))
    assert abs(scale - span / kind.largest) <= 2.0**-9 * span / kind.largest + 2.0**-24
    step = np.full(len(wanted), scale)
    if name in FLOATS:
        behind, smallest = FLOATS[name]
        exponent = np.frexp(wanted / max(scale, 2.0**-30))[1] - 1
        step = scale * 2.0 ** np.maximum(exponent - behind, smallest)
    errors, rounding = found - wanted, 2.0**-10 * (span + abs(low))
    if kind.has_centre:
        assert abs(errors.mean()) <= 2.0**-11 * (span + abs(low)) + 2.0**-24
        assert errors.max() - errors.min() <= scale + 2 * rounding
    else:
        assert (abs(errors) <= step / 2 + rounding).all()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "head_dim"), [*((name, 64) for name in FORMATS), ("int4", 96), ("int8", 16)])
def test_append(name: str, head_dim: int, device: str) -> None:
    """Elements are those of the heads; everything else in the cache stays as it was, and the queries are those of rope_append."""
    q_heads, kv_heads, page_size = 3, 2, 16
    inputs, cache = append_inputs(name, (q_heads, kv_heads), head_dim, page_size)
    before = numbers_of(cache)[1].copy()
    there = moved(cache, device)
    given = {key: t.cuda() if device == "cuda" else t for key, t in inputs.items()}
    q = rope_append(**given, kv_cache=there, constant=name == "int4", device=device).cpu()
    found = numbers_of(there)[1]
    factors = there.factors.cpu().double().numpy()
    mix = hadamard if FORMATS[name].mixes_keys else lambda row: row
    rows, cos_sin = inputs["qkv"].double().numpy().reshape(5, -1, head_dim), inputs["cos_sin"].double().numpy()
    for token, (position, slot) in enumerate(zip(inputs["positions"].tolist(), inputs["slots"].tolist(), strict=True)):
        turned = [mix(rotated(row, cos_sin[position])) for row in rows[token, : q_heads + kv_heads]]
        assert np.allclose(q[token].double().numpy(), turned[:q_heads], rtol=2.0**-10, atol=2.0**-20)
        if slot < 0:
            continue
        page, offset = divmod(slot, page_size)
        for head in range(kv_heads):
            for which, wanted in enumerate((turned[q_heads + head], rows[token, q_heads + kv_heads + head])):
                check_elements(found[page, head, which, offset], wanted, factors[page, head, which, 0, offset], name)
                before[page, head, which, offset] = found[page, head, which, offset]
    assert np.array_equal(before, found), "something else was written"


def test_names_and_shapes() -> None:
    with pytest.raises(TilusError, match="format 'int3', expected one of fp8, int8, int4"):
        quantized_cache("int3", 1, 16, 1, 64)
    with pytest.raises(TilusError, match="codes of int6, 6 bits, expected a type of 8, 4, 2 bits"):
        KvFormat(tilus.int6, 31.0)
    with pytest.raises(TilusError, match=r"largest = 0\.0, expected a number above 0"):
        KvFormat(tilus.int8, 0.0)
    with pytest.raises(TilusError, match="heads of 18 elements of int2, expected whole bytes"):
        quantized_cache(OWN_FORMATS["int2"], 1, 16, 1, 18)
    tables, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    narrow = quantized_cache(OWN_FORMATS["int2"], 1, 16, 1, 96)
    for attend in (
        lambda: paged_decode(torch.zeros(1, 1, 1, 96).half(), narrow, tables, lens, 1.0, device="reference"),
        lambda: paged_prefill(
            torch.zeros(1, 1, 96).half(), narrow, tables, torch.arange(2).int(), lens, 1.0, device="reference"
        ),
    ):
        with pytest.raises(TilusError, match="heads of 96 elements of int2, 24 bytes, expected a multiple of 16"):
            attend()
    inputs, cache = append_inputs("int4", (3, 2), 64, 16)
    with pytest.raises(TilusError, match=r"rows of 100 elements with 2 kv heads of 64"):
        rope_append(**{**inputs, "qkv": torch.zeros(5, 100).half()}, kv_cache=cache, device="reference")
    with pytest.raises(TilusError, match="head_dim 128 of q and 64 of kv_cache"):
        tables, lens = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        paged_decode(torch.zeros(1, 1, 2, 128).half(), cache, tables, lens, 1.0, device="reference")
