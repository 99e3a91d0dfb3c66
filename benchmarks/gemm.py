"""The quantised linear beside torch's fp16 product and a pure read: `python benchmarks/gemm.py [--out FILE]` on a GPU.

y [M, N] = x [M, K] times the transpose of a weight [N, K]; activations are f16, one f16 scale per group of weights.

Times are medians over replays of a CUDA graph. One replay launches the kernel once for each of several copies of the weight,
which together exceed three times the L2 cache, so that every launch reads its weight from memory; a time is that of the replay
divided by the copies. Results are compared with torch's product of the decoded weight before anything is timed.

Output, as JSON:
    device, torch, cuda, python    what it ran on
    l2_nbytes    the GPU's L2 cache
    replays      replays a case
    cases        list of {N, K, M, dtype, group, us, cublas_us, read_us}: microseconds of one call of tilus' linear, of torch's
                 fp16 product of the same shape, and of reading as many bytes as the quantised weight has (codes and scales), the
                 floor for small M.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tilus
from tilus import Const, Tensor, int32
from tilus.dtypes import DataType
from tilus.kernels import linear
from tilus.kernels.quantize import QuantizedWeight, pack

SHAPES = ((4096, 4096), (14336, 4096))  # N, K
BATCHES = (1, 16, 64, 256)
DTYPES = ("int4", "int3", "float6_e3m2")
GROUP = 128
L2_MULTIPLE = 3


@tilus.kernel
def read(x: Tensor[int32, "n"], sums: Tensor[int32, "blocks"], *, block: Const = 8192):
    """One sum per block, so that every byte must arrive."""
    tilus.grid(sums.shape[0], warps=8)
    tile = tilus.load(x, [tilus.block_id(0) * block], shape=[block])
    tilus.store(sums, [tilus.block_id(0)], tilus.reshape(tilus.sum(tile, axis=0), [1]))


def random_weight(n: int, k: int, dtype: DataType, group: int, device: str) -> tuple[QuantizedWeight, torch.Tensor]:
    """A packed weight and its values as f16 [N, K]."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, dtype.num_codes, (n, k), np.uint8)
    scales = rng.uniform(0.5, 1.5, (n, k // group)).astype(np.float16) / np.float16(dtype.max_value * np.sqrt(k))
    values = torch.from_numpy(dtype.decode(codes).astype(np.float32)).to(device)
    factors = torch.from_numpy(scales).to(device).float().repeat_interleave(group, dim=1)
    weight = pack(torch.from_numpy(codes).to(device), torch.from_numpy(scales).to(device), dtype, group=group)
    return weight, (values * factors).half()


def check(weight: QuantizedWeight, decoded: torch.Tensor, m: int) -> None:
    """Refuse to time a wrong kernel: the products differ by no more than f16 roundings of operands and result."""
    x = torch.randn(m, weight.shape[1], device=decoded.device).half()
    found, expected = linear(x, weight).float(), x.float() @ decoded.float().T
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst < 4 * 2**-10:
        raise SystemExit(
            f"{weight.dtype} {list(weight.shape)} M={m}: relative error {worst}, expected below {4 * 2**-10}"
        )


def copies(nbytes: int, l2_nbytes: int) -> int:
    """How many operands of this size exceed the cache L2_MULTIPLE times; at least 2."""
    return max(2, L2_MULTIPLE * l2_nbytes // nbytes + 1)


def graph_us(actions: Sequence[Callable[[], object]], replays: int) -> float:
    """Median microseconds of one action, from replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for action in actions:  # compile, load and allocate before the capture
            action()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for action in actions:
                action()
        times: list[float] = []
        for _ in range(replays + 2):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            stop.record(stream)
            stream.synchronize()
            times.append(1e3 * start.elapsed_time(stop) / len(actions))
    return round(statistics.median(times[2:]), 3)


def weight_nbytes(weight: QuantizedWeight) -> int:
    parts = [weight.codes, weight.scales, *([] if weight.minimums is None else [weight.minimums])]
    return sum(part.numel() * part.element_size() for part in parts)


def read_us(nbytes: int, l2_nbytes: int, replays: int) -> float:
    count = -(-nbytes // 4)
    buffers = [torch.zeros(count, dtype=torch.int32, device="cuda") for _ in range(copies(nbytes, l2_nbytes))]
    sums = torch.empty(-(-count // 8192), dtype=torch.int32, device="cuda")
    return graph_us([lambda x=x: read(x, sums) for x in buffers], replays)


def cublas_us(n: int, k: int, m: int, l2_nbytes: int, replays: int) -> float:
    x = torch.randn(m, k, device="cuda").half()
    out = torch.empty(m, n, dtype=torch.half, device="cuda")
    weights = [torch.randn(n, k, device="cuda").half() for _ in range(copies(2 * n * k, l2_nbytes))]
    return graph_us([lambda w=w: torch.mm(x, w.T, out=out) for w in weights], replays)


def linear_us(weight: QuantizedWeight, m: int, l2_nbytes: int, replays: int) -> float:
    n, k = weight.shape
    x = torch.randn(m, k, device="cuda").half()
    out = torch.empty(m, n, dtype=torch.half, device="cuda")
    weights = [
        dataclasses.replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())
        for _ in range(copies(weight_nbytes(weight), l2_nbytes))
    ]
    return graph_us([lambda w=w: linear(x, w, out=out) for w in weights], replays)


def measure(replays: int) -> dict[str, Any]:
    l2_nbytes = torch.cuda.get_device_properties(0).L2_cache_size
    cases: list[dict[str, Any]] = []
    for n, k in SHAPES:
        dense = {m: cublas_us(n, k, m, l2_nbytes, replays) for m in BATCHES}
        for name in DTYPES:
            weight, decoded = random_weight(n, k, tilus.dtype(name), GROUP, "cuda")
            floor = read_us(weight_nbytes(weight), l2_nbytes, replays)
            for m in BATCHES:
                check(weight, decoded, m)
                us = linear_us(weight, m, l2_nbytes, replays)
                shape = {"N": n, "K": k, "M": m, "dtype": name, "group": GROUP}
                cases.append({**shape, "us": us, "cublas_us": dense[m], "read_us": floor})
    return {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "l2_nbytes": l2_nbytes,
        "replays": replays,
        "cases": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to the terminal")
    parser.add_argument("--replays", type=int, default=30, help="graph replays a case (default 30)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: `tilus doctor` says what is missing")
    text = json.dumps(measure(options.replays), indent=2)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
