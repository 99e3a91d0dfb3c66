"""Quantised linear layers on the CPU against the bandwidth of its memory: `python benchmarks/cpu_linear.py --out FILE`.

Every launch takes another copy of the weight, together more than four times the largest cache, so that weights come from memory
as they do between the layers of a model. All results are checked against float64. The bandwidth is measured in the same run, by a
kernel that adds up integers.

Output, as JSON:
    processor, compiler, threads, lanes     of this machine
    read_gbps       bytes a second that all threads read from memory
    cases           list of {dtype, scheme, group, n, k, m, us, gbps, read_ratio, gweights, gflops}; read_ratio: of the bandwidth
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import tilus
from tilus import Const, Tensor, int32
from tilus.kernels import linear
from tilus.kernels.quantize import QuantizedMatrix, QuantizedWeight, pack
from tilus.runtime.cpu import features, threads, toolchain

SIDE = 4096
GROUP = 128
CACHE_NBYTES = 32 << 20
READ_NBYTES = 512 << 20
REPEATS = 5  # rounds over all copies
DTYPES = (
    "uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8", "int4", "int8", "float4_e2m1", "float6_e3m2",
    "float8_e4m3",
)  # fmt: skip
MANY_TOKENS = (8, 64, 512)


@tilus.kernel
def read(x: Tensor[int32, "n"], sums: Tensor[int32, "blocks"], *, block: Const = 1 << 16):
    """One sum per block, so that every byte must arrive."""
    tilus.grid(sums.shape[0], warps=8)
    tile = tilus.load(x, [tilus.block_id(0) * block], shape=[block])
    tilus.store(sums, [tilus.block_id(0)], tilus.reshape(tilus.sum(tile, axis=0), [1]))


def seconds(launches: Sequence[Callable[[], Any]]) -> float:
    """The median time of a launch; the first round warms up."""
    times: list[float] = []
    for round_ in range(REPEATS + 1):
        for launch in launches:
            start = time.perf_counter()
            launch()
            if round_:
                times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second."""
    x = torch.ones(READ_NBYTES // 4, dtype=torch.int32)  # zeros would all be one page
    sums = torch.zeros(x.numel() >> 16, dtype=torch.int32)
    return READ_NBYTES / seconds([lambda: read.on("cpu")(x, sums)])


def random_matrix(name: str, n: int, k: int, group: int, mins: bool) -> QuantizedMatrix:
    rng = np.random.default_rng(0)
    dtype = tilus.dtype(name)
    codes = np.arange(dtype.num_codes, dtype=np.uint8)
    codes = rng.choice(codes[np.isfinite(np.float64(dtype.decode(codes)))], (n, k))
    scales = tilus.f16.round(rng.uniform(0.5, 1.5, (n, k // group)) / (max(1.0, float(dtype.max_value)) * np.sqrt(k)))
    minimums = tilus.f16.round(-scales * np.float32(dtype.max_value / 2)) if mins else None
    return QuantizedMatrix(codes, scales, minimums, dtype)


def copies_of(weight: QuantizedWeight) -> list[QuantizedWeight]:
    count = max(2, -(-4 * CACHE_NBYTES // weight.nbytes))
    return [QuantizedWeight(weight.header, **{n: a.clone() for n, a in weight.arrays.items()}) for _ in range(count)]


def check(matrix: QuantizedMatrix, x: torch.Tensor, y: torch.Tensor) -> None:
    exact = x.double() @ torch.from_numpy(matrix.dequantize()).double().T
    error = float((y.double() - exact).abs().max() / exact.abs().max())
    if not error <= 2.0**-10:
        raise SystemExit(f"{matrix.dtype}: the result is off by {error:.1e} of its largest element")


def measure(name: str, m: int, read_gbps: float, *, group: int = GROUP, mins: bool = False) -> dict[str, Any]:
    matrix = random_matrix(name, SIDE, SIDE, group, mins)
    weights = copies_of(pack(matrix, torch.device("cpu")))
    x = torch.randn(m, SIDE, generator=torch.Generator().manual_seed(0)).half()
    check(matrix, x, linear(x, weights[0], device="cpu"))
    took = seconds([lambda w=w: linear(x, w, device="cpu") for w in weights])
    gbps = weights[0].nbytes / took / 1e9
    return {
        "dtype": name, "scheme": "minimums" if mins else "symmetric", "group": group, "n": SIDE, "k": SIDE, "m": m,
        "us": round(took * 1e6, 1), "gbps": round(gbps, 2), "read_ratio": round(gbps / read_gbps, 3),
        "gweights": round(SIDE * SIDE / took / 1e9, 2), "gflops": round(2 * m * SIDE * SIDE / took / 1e9, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantised linear layers on the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="write the JSON here")
    out: Path = parser.parse_args().out
    read_gbps = read_bandwidth() / 1e9
    plans: list[dict[str, Any]] = [{"name": name, "m": 1} for name in DTYPES]
    plans += [{"name": "uint4", "m": 1, "group": 32, "mins": True}, {"name": "int8", "m": 1, "group": 32}]
    plans += [{"name": name, "m": m} for name in ("uint4", "int8") for m in MANY_TOKENS]
    with click.progressbar(plans, label="measuring", file=sys.stderr) as bar:
        cases = [measure(plan.pop("name"), plan.pop("m"), read_gbps, **plan) for plan in bar]
    host = dataclasses.asdict(features.host_target())
    result = {
        "processor": host["arch"], "lanes": host["lanes"], "compiler": toolchain.find_compiler().version,
        "threads": threads.num_threads(), "read_gbps": round(read_gbps, 2), "cases": cases,
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=2) + "\n")
    for case in cases:
        print(
            f"{case['dtype']:12} {case['scheme']:10} g{case['group']:<4} M={case['m']:<4} {case['us']:10.1f} us  "
            f"{case['gbps']:6.2f} GB/s ({case['read_ratio']:.0%} of {read_gbps:.1f})  {case['gflops']:7.1f} GFLOP/s"
        )


if __name__ == "__main__":
    main()
