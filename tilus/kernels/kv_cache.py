"""Paged key-value caches of 8, 4 and 2 bits: codes with a scale for each token and head, written by the kernel that rotates keys.

Scales of single tokens and heads need no calibration, and follow outliers: "per-token" quantisation as in C. Hooper et al.,
"KVQuant", arXiv 2401.18079, and Z. Liu et al., "KIVI", arXiv 2402.02750, there for values.

Keys have few channels that are much larger than others, whose range would be everybody's. A Hadamard transform spreads them over
all channels (S. Ashkboos et al., "QuaRot", arXiv 2404.00456). It is orthogonal: queries that are transformed alike have the same
products with keys, so that attention does not know of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f16, f32, int32, uint8
from tilus.dtypes import DataType, float8_e4m3, int4, int8
from tilus.kernels.allocate import empty
from tilus.kernels.hadamard import mixed
from tilus.kernels.kv_frame import VECTOR, WARPS, KvFrame, halves_of, reflected
from tilus.kernels.rotation import angles_of, loaded_norm, normed, rotated
from tilus.kernels.vectors import by_vector

MAX_HEAD_DIM = 256
CODE_NBITS = (8, 4, 2)
ROW_NBYTES = 16  # of a token and head, or a multiple: what tensor copies move


@dataclass(frozen=True)
class KvFormat:
    """code: the type of the codes, any of 8, 4 or 2 bits. largest: the code of the largest magnitude that is used, or where
    `has_centre` the steps from the least element of a head to its largest; then each token and head has the element of code 0,
    too. Codes of both signs keep sums small: tensor cores truncate them (Fasi et al., Numerical behavior of NVIDIA tensor cores,
    2021). mixes_keys: whether keys and queries go through a Hadamard transform, which codes with an exponent do not need."""

    code: DataType
    largest: float
    has_centre: bool = False
    mixes_keys: bool = True

    def __post_init__(self) -> None:
        if self.code.nbits not in CODE_NBITS:
            raise TilusError(
                f"KvFormat: codes of {self.code}, {self.code.nbits} bits, expected a type of "
                f"{', '.join(map(str, CODE_NBITS))} bits",
                hint="codes of other widths lie across the 16-bit units in which tensor cores' operands are loaded",
            )
        if not 0 < self.largest < math.inf:
            raise TilusError(f"KvFormat: largest = {self.largest}, expected a number above 0")

    @property
    def kinds(self) -> int:
        """Numbers in f16 that a token and head has: its scale, and its centre."""
        return 2 if self.has_centre else 1


KV_FORMATS = {
    "fp8": KvFormat(float8_e4m3, 448.0, mixes_keys=False),
    "int8": KvFormat(int8, 127.0),
    "int4": KvFormat(int4, 15.0, has_centre=True),
}


@dataclass(frozen=True, eq=False)
class QuantizedCache:
    """Keys (0) and values (1) of pages: element = code * scale, or code * scale + centre. Elements of keys are those of their
    Hadamard transform where the format mixes them; with a frame (`kv_frame`) those of values are others, too. `rope_append`
    writes them so, and gives queries that fit.

    codes: uint8 [pages, Hkv, 2, page_size, D * nbits / 8], elements from the lowest bits of a byte up. factors:
    float16 [pages, Hkv, 2, kinds, page_size], scales and then centres. Both may be strided views (one layer of a pool) with
    contiguous rows.
    """

    format: KvFormat
    codes: Any
    factors: Any

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[pages, 2, page_size, Hkv, D], as that of a cache of 16 bits."""
        pages, kv_heads, _, page_size, nbytes = self.codes.shape
        return pages, 2, page_size, kv_heads, nbytes * 8 // self.format.code.nbits


def quantized_cache(
    kind: str | KvFormat, pages: int, page_size: int, kv_heads: int, head_dim: int, device: Any = "cpu"
) -> QuantizedCache:  # fmt: skip
    """An empty cache of torch tensors. kind: a name of KV_FORMATS, or a format of one's own.

    Raises: TilusError for a name that is none of them, and for heads whose codes do not fill bytes.
    """
    import torch

    if isinstance(kind, str):
        if kind not in KV_FORMATS:
            raise TilusError(f"quantized_cache: format {kind!r}, expected one of {', '.join(KV_FORMATS)}")
        kind = KV_FORMATS[kind]
    if head_dim * kind.code.nbits % 8:
        raise TilusError(f"quantized_cache: heads of {head_dim} elements of {kind.code}, expected whole bytes")
    codes = torch.zeros(
        pages, kv_heads, 2, page_size, head_dim * kind.code.nbits // 8, dtype=torch.uint8, device=device
    )
    factors = torch.zeros(pages, kv_heads, 2, kind.kinds, page_size, dtype=torch.float16, device=device)
    return QuantizedCache(kind, codes, factors)


@tilus.kernel(varying=("tokens", "pages"))
def rope_append_quantized_kernel(
    qkv: Tensor["dtype", "tokens", "heads", "head_dim"],
    positions: Tensor[int32, "tokens"],
    cos_sin: Tensor[f32, "max_positions", "head_dim"],
    slots: Tensor[int32, "tokens"],
    codes: Tensor[uint8, "pages", "kv_heads", 2, "page_size", "nbytes"],
    factors: Tensor[f16, "pages", "kv_heads", 2, "kinds", "page_size"],
    q: Tensor["dtype", "tokens", "q_heads", "head_dim"],
    eps: f32,
    q_norm: Tensor[f32, "head_dim"] = None,
    k_norm: Tensor[f32, "head_dim"] = None,
    to_queries: Tensor[f32, 3, "q_heads", "head_dim"] = None,
    to_keys: Tensor[f32, 4, "kv_heads", "head_dim"] = None,
    *,
    head_dim: Const,
    q_heads: Const,
    kv_heads: Const,
    page_size: Const,
    kind: Const,
    constant: Const = False,
):
    """A block has a token's queries, or its keys and values, which are all asked for first. Tiles hold a power of two of heads:
    those beyond the last read zeros and are not written."""
    tilus.grid(qkv.shape[0], 2, warps=WARPS)
    tilus.launch_dependents()
    token = tilus.block_id(0)
    half = head_dim // 2
    if not constant:
        tilus.wait_dependencies()
    position, slot = positions[token], slots[token]
    angles = angles_of(cos_sin, position, half)
    q_weight, k_weight = loaded_norm(q_norm, half), loaded_norm(k_norm, half)
    if constant:  # asked for while the kernel in front ends
        tilus.wait_dependencies(constant=[positions, slots, cos_sin, q_norm, k_norm])
    place = slot // page_size, slot % page_size

    def heads_of(first: int, count: int) -> Any:
        return halves_of(qkv[token, first : first + count], count, half)

    if tilus.block_id(1) == 0:
        queries = rotated(normed(heads_of(0, q_heads), q_weight, eps), angles)
        low, high = spread(queries, to_queries, q_heads, kind)
        tilus.store(q, [token, 0, 0], low.to(q.dtype))
        tilus.store(q, [token, 0, half], high.to(q.dtype))
    else:
        keys, values = heads_of(q_heads, kv_heads), heads_of(q_heads + kv_heads, kv_heads)
        keys = rotated(normed(keys, k_weight, eps), angles)
        if to_keys is not None:
            keys = [part - centre for part, centre in zip(keys, halves_of(to_keys[3], kv_heads, half))]
            values = mixed(*reflected(values, halves_of(to_keys[2], kv_heads, half)))
        append(codes, factors, place, 0, spread(keys, to_keys, kv_heads, kind), kind)
        append(codes, factors, place, 1, values, kind)


def spread(halves: Any, frame: Any, count: int, kind: KvFormat) -> Any:
    """The halves of rotated queries or keys as they meet each other. frame: their part of it, or None."""
    if frame is not None:
        for row in (0, 1):
            halves = reflected(halves, halves_of(frame[row], count, halves[0].shape[1]))
    return mixed(*halves) if kind.mixes_keys else halves


def check_rows(what: str, cache: Any) -> None:
    """Raise a TilusError where tensor copies cannot move the codes of a token and head."""
    if not has_whole_rows(cache):
        raise TilusError(
            f"{what}: heads of {cache.shape[4]} elements of {cache.format.code}, {cache.codes.shape[4]} bytes, expected a "
            f"multiple of {ROW_NBYTES}",
            hint="tilus.kernels.paged_attention takes them",
        )


def has_whole_rows(cache: Any) -> bool:
    return not isinstance(cache, QuantizedCache) or cache.codes.shape[4] % ROW_NBYTES == 0


def append(codes: Any, factors: Any, slot: tuple[Any, Any], which: int, halves: Any, kind: KvFormat) -> None:
    """Write the keys (0) or values (1) of a token, if its slot, a page and an offset in it, is one of the cache."""
    page, offset = slot
    low, high = halves
    scale, least = factors_of(low, high, kind)
    rounded = [codes_of(part, scale, least, kind) for part in halves]
    tilus.store(factors, [page, 0, which, 0, offset], scale, dims=[1, 3])
    if kind.has_centre:
        tilus.store(factors, [page, 0, which, 1, offset], centre_of(halves, rounded, scale), dims=[1, 3])
    for half, part in enumerate(rounded):
        row = as_bytes(part, kind)
        tilus.store(codes, [page, 0, which, offset, half * row.shape[1]], row, dims=[1, 4])


def factors_of(low: Any, high: Any, kind: KvFormat) -> Any:
    """Scales [heads, 1], and least elements or None, rounded to f16: what codes are computed with."""
    if kind.has_centre:
        least = tilus.minimum(tilus.min(low, 1, keepdims=True), tilus.min(high, 1, keepdims=True)).to(f16)
        most = tilus.maximum(tilus.max(low, 1, keepdims=True), tilus.max(high, 1, keepdims=True))
        return ((most - least.to(f32)) * (1 / kind.largest)).to(f16), least
    peak = tilus.maximum(tilus.max(abs(low), 1, keepdims=True), tilus.max(abs(high), 1, keepdims=True))
    return (peak * (1 / kind.largest)).to(f16), None


def codes_of(elements: Any, scale: Any, least: Any, kind: KvFormat) -> Any:
    """Codes [heads, columns] of elements, rounded to nearest even, and saturated; with a scale of zero all are the same."""
    wide = scale.to(f32)
    factor = tilus.where(wide > 0.0, tilus.rcp(tilus.where(wide > 0.0, wide, 1.0)), 0.0)
    steps = elements * factor if least is None else (elements - least.to(f32)) * factor + kind.code.min_value
    rows, columns = elements.shape
    return tilus.cast(steps, kind.code, layout=by_vector(rows, columns, VECTOR, WARPS))


def centre_of(halves: Any, codes: Any, scale: Any) -> Any:
    """The centre with which a head's mean is exact, up to its rounding to f16: errors of codes then add up to zero."""
    wide = scale.to(f32)
    left = [tilus.sum(part - each.to(f32) * wide, 1, keepdims=True) for part, each in zip(halves, codes)]
    return ((left[0] + left[1]) * (1 / (2 * halves[0].shape[1]))).to(f16)


def as_bytes(codes: Any, kind: KvFormat) -> Any:
    rows, columns = codes.shape
    nbytes = columns * kind.code.nbits // 8
    return tilus.view(codes, uint8, [rows, nbytes], by_vector(rows, nbytes, VECTOR * kind.code.nbits // 8, WARPS))


def append_quantized(
    qkv: Any, positions: Any, cos_sin: Any, slots: Any, cache: QuantizedCache, norms: tuple[Any, Any, float],
    frame: KvFrame | None, constant: bool, device: str | None,
) -> Any:  # fmt: skip
    """`rope_append` with a quantised cache. qkv: [M, heads, D]. norms: q_norm, k_norm and eps.

    Raises: TilusError for heads that kernels do not have, and for a frame that does not fit them or the format."""
    _, _, page_size, kv_heads, head_dim = cache.shape
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise TilusError(
            f"rope_append: quantised heads of {head_dim} elements, expected a multiple of 16 from 16 to {MAX_HEAD_DIM}",
            hint="a cache of 16 bits takes any even number",
        )
    q_norm, k_norm, eps = norms
    q_heads = qkv.shape[1] - 2 * kv_heads
    if frame is not None:
        check_frame(frame, cache, q_heads)
    to_queries, to_keys = (None, None) if frame is None else (frame.queries, frame.keys)
    q = empty(qkv, (qkv.shape[0], q_heads, head_dim))
    rope_append_quantized_kernel.on(device)(
        qkv, positions, cos_sin, slots, cache.codes, cache.factors, q, eps, q_norm, k_norm, to_queries, to_keys,
        head_dim=head_dim, q_heads=q_heads, kv_heads=kv_heads, page_size=page_size, kind=cache.format,
        constant=constant,
    )  # fmt: skip
    return q


def check_frame(frame: KvFrame, cache: QuantizedCache, q_heads: int) -> None:
    _, _, _, kv_heads, head_dim = cache.shape
    found, expected = (frame.queries.shape, frame.keys.shape), ((3, q_heads, head_dim), (4, kv_heads, head_dim))
    if tuple(map(tuple, found)) != expected:
        raise TilusError(
            f"rope_append: a frame of shapes {list(found[0])} and {list(found[1])}, expected {list(expected[0])} and "
            f"{list(expected[1])}"
        )
    if not cache.format.mixes_keys:
        raise TilusError(
            f"rope_append: a frame for a cache of {cache.format.code}, whose keys are kept as they are",
            hint="frames are for formats that mix keys: int4 and int8",
        )
