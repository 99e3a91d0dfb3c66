"""How long the choice of shared layouts takes: `python benchmarks/shared_layouts.py`. Needs no GPU.

For every shared tensor of the examples and of paged attention: median milliseconds of processor time, candidates that there are,
and the layout. The last line is the median over tensors.
"""

from __future__ import annotations

import runpy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import tilus
from tilus.ir.function import Function
from tilus.kernels.attention import paged_attention_kernel
from tilus.target import get_target
from tilus.transforms import run_pipeline
from tilus.transforms.layout_shared import best, candidates, uses

EXAMPLES = Path(__file__).parents[1] / "examples"
REPEATS = 7
TARGET = get_target("sm_90a")


def kernels() -> Iterator[tuple[str, Function]]:
    for name in ("matmul_v1", "matmul_v2", "matmul_v3", "matmul_v4", "attention"):
        module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        yield name, module[name.split("_v")[0]].specialize().function
    for head_dim, rows, kv_tile in ((64, 16, 64), (64, 64, 64), (128, 16, 64), (128, 64, 32)):
        values = {
            "dtype": tilus.f16,
            "unit": tilus.f16,
            "out_dtype": tilus.f16,
            "group": 4,
            "head_dim": head_dim,
            "page_size": 16,
            "rows": rows,
            "kv_tile": kv_tile,
        }
        yield f"paged_attention {head_dim} {rows}", paged_attention_kernel.specialize(**values).function


def milliseconds(placed: Function) -> list[float]:
    """Of each tensor. New accesses each time: they keep what they have computed."""
    times: list[float] = []
    for tensor, accesses in uses(placed, TARGET).items():
        start = time.process_time()
        best(tensor, accesses)
        times.append(1e3 * (time.process_time() - start))
    return times


def main() -> None:
    medians: list[float] = []
    for name, function in kernels():
        placed = run_pipeline(function, TARGET, after="infer_layouts")
        samples = [milliseconds(placed) for _ in range(REPEATS)]
        for index, (tensor, accesses) in enumerate(uses(placed, TARGET).items()):
            medians.append(statistics.median(sample[index] for sample in samples))
            layout, count = best(tensor, accesses).layout, len(candidates(tensor, accesses))
            print(f"{name:24} {tensor.name:10} {medians[-1]:6.1f} ms  {count:3} candidates  {layout}")
    print(f"median {statistics.median(medians):.1f} ms")


if __name__ == "__main__":
    main()
