"""What a product could take at best, and the speed-ups that are asked for. Needs neither torch nor a GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The speed of torch's bf16 product of 8192^3 on an H100 80GB HBM3; where a run measures more, that counts.
PEAK_TFLOPS = 758.0

# int4, groups of 128: the geometric mean, over the shapes, of the speed-up over the faster cuBLAS, by tokens.
SPEEDUP_BARS = {
    1: 3.6, 4: 3.6, 8: 3.4, 16: 3.2, 32: 3.0, 64: 2.6, 128: 1.8, 256: 1.15, 512: 1.0, 1024: 1.0, 4096: 0.97,
}  # fmt: skip


def read_bar(nbits: int) -> float:
    """How many times a pure read of the weight a product with few tokens may take."""
    if nbits >= 4:
        return 1.25
    return 1.45 if nbits == 3 else 1.7


def geomean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    if not values or min(values) <= 0:
        raise ValueError(f"the geometric mean of {list(values)}, expected positive numbers, at least one")
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def product_us(n: int, k: int, m: int, tflops: float) -> float:
    """Microseconds that the multiplications and additions of [M, K] times [K, N] take."""
    return 2 * n * k * m / tflops * 1e-6


def limit_us(n: int, k: int, m: int, read_us: float, tflops: float) -> float:
    """A product can be no faster than the read of its weight, nor than its arithmetic."""
    return max(read_us, product_us(n, k, m, tflops))


def speedup(row: Mapping[str, Any], key: str) -> float | None:
    """Of `row[key]` (microseconds) over the faster of the cuBLAS products; None where one of them is missing."""
    peers = [row[name] for name in ("cublas_fp16_us", "cublas_bf16_us") if row[name] is not None]
    return None if not peers or row[key] is None else min(peers) / row[key]


def speedups(rows: Iterable[Mapping[str, Any]], key: str, shapes: int) -> dict[int, float]:
    """The geometric mean of `speedup` over the shapes, by M: of each M for which all shapes have one."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (ratio := speedup(row, key)) is not None:
            found.setdefault(row["M"], []).append(ratio)
    return {m: geomean(ratios) for m, ratios in sorted(found.items()) if len(ratios) == shapes}


def by_tokens(rows: Sequence[Mapping[str, Any]], shapes: int) -> list[dict[str, Any]]:
    """One entry for each M of which all shapes are measured, in order of M.

    {M, speedup, speedup_plain, speedup_triton, speedup_limit, bar, met}: geometric means of speed-ups over the faster cuBLAS;
    None where a row has no time. met: None where there is no bar, and False where a row has no time.
    """
    counts = Counter(row["M"] for row in rows)
    keys = {"": "us", "_plain": "plain_us", "_triton": "triton_us", "_limit": "limit_us"}
    means = {f"speedup{suffix}": speedups(rows, key, shapes) for suffix, key in keys.items()}
    summary: list[dict[str, Any]] = []
    for m in sorted(m for m, count in counts.items() if count == shapes):
        entry = {"M": m} | {name: round(found[m], 3) if m in found else None for name, found in means.items()}
        bar, reached = SPEEDUP_BARS.get(m), means["speedup"].get(m)
        entry |= {"bar": bar, "met": None if bar is None else reached is not None and reached >= bar}
        summary.append(entry)
    return summary
