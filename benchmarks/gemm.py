"""The quantised linear on a GPU, beside a pure read of the same bytes and torch's fp16 product.

    python benchmarks/gemm.py --out FILE            one token and 16, 8192 x 8192, weights of all widths
    python benchmarks/gemm.py --schemes --out FILE  the same shape, one type for every scheme
    python benchmarks/gemm.py --shapes --out FILE   1 to 256 tokens on two shapes of Llama, three types
    python benchmarks/gemm.py --sweep --types int4,uint1 --out FILE
                                                    other schedules: which of them is the fastest (45 kernels a type)

--types and --tokens narrow each of them. A table goes to the terminal, JSON to FILE.

y [M, N] = x [M, K] times the transpose of a weight [N, K]; activations are f16, codes random, one f16 scale per group of 128
unless the scheme says otherwise.

Times are medians over replays of a CUDA graph. One replay launches the kernel once for each of several copies of the weight,
which together exceed three times the L2 cache, so that every launch reads its weight from memory; a time is that of the replay
divided by the copies. Before a kernel is timed, its result is compared on the spot with the float64 product of the dequantised
weight: each element may differ by f32's work and one rounding to f16, no more.

Output, as JSON:
    device, torch, cuda, python    what it ran on
    l2_nbytes    the GPU's L2 cache
    replays      replays a case
    cases        list of {N, K, M, dtype, scheme, group, schedule, us, read_us, ratio, error, cublas_us}: microseconds of one
                 call of tilus' linear, and of reading as many bytes as the quantised weight has (codes, scales and the like),
                 the floor for small M; their ratio; the largest error, in parts of the bound; microseconds of torch's fp16
                 product of the same shape. schedule: null for the library's own choice, otherwise that of the sweep.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tilus
from tilus import Const, Tensor, TilusError, int32
from tilus.dtypes import DataType
from tilus.kernels import linear
from tilus.kernels.linear import launch
from tilus.kernels.quantize import QuantizedMatrix, QuantizedWeight, pack
from tilus.kernels.schedule import Schedule

TYPES = (
    "uint1", "uint2", "int2", "int3", "int4", "uint4", "float4_e2m1", "int5", "float5_e2m2", "int6", "float6_e3m2", "int7",
    "int8", "float8_e4m3",
)  # fmt: skip
SHAPES = ((4096, 4096), (14336, 4096))  # N, K
SHAPE_TOKENS = (1, 16, 64, 256)
SHAPE_TYPES = ("int4", "int3", "float6_e3m2")
SQUARE = (8192, 8192)
SQUARE_TOKENS = (1, 16)
GROUP = 128
L2_MULTIPLE = 3


@dataclass(frozen=True)
class Case:
    """One weight and the batches that it is multiplied with."""

    shape: tuple[int, int]
    tokens: tuple[int, ...]
    dtype: str
    scheme: str = "symmetric"
    group: int = GROUP


# Scheme, type and group as checkpoints have them.
SCHEMES = (
    Case(SQUARE, SQUARE_TOKENS, "uint4", "zero points", 128),  # AWQ, GPTQ
    Case(SQUARE, SQUARE_TOKENS, "uint4", "activation order", 128),  # GPTQ with desc_act
    Case(SQUARE, SQUARE_TOKENS, "uint4", "minimums", 32),  # Q4_1, Q4_K
    Case(SQUARE, SQUARE_TOKENS, "int8", "symmetric", 32),  # Q8_0
    Case(SQUARE, SQUARE_TOKENS, "int4", "symmetric", 8192),
    Case(SQUARE, SQUARE_TOKENS, "float4_e2m1", "powers of two", 32),  # MXFP4
    Case(SQUARE, SQUARE_TOKENS, "float4_e2m1", "two levels", 16),  # NVFP4
    Case(SQUARE, SQUARE_TOKENS, "uint4", "table", 64),  # NF4
)


@tilus.kernel
def read(x: Tensor[int32, "n"], sums: Tensor[int32, "blocks"], *, block: Const = 8192):
    """One sum per block, so that every byte must arrive."""
    tilus.grid(sums.shape[0], warps=8)
    tile = tilus.load(x, [tilus.block_id(0) * block], shape=[block])
    tilus.store(sums, [tilus.block_id(0)], tilus.reshape(tilus.sum(tile, axis=0), [1]))


def random_matrix(case: Case) -> QuantizedMatrix:
    """Random finite codes; scales such that y is about 1."""
    rng = np.random.default_rng(0)
    dtype: DataType = tilus.dtype(case.dtype)
    n, k = case.shape
    codes = np.arange(dtype.num_codes, dtype=np.uint8)
    codes = rng.choice(codes[np.isfinite(np.float64(dtype.decode(codes)))], (n, k))
    groups = (n, k // case.group)
    scales = tilus.f16.round(rng.uniform(0.5, 1.5, groups) / (max(1.0, float(dtype.max_value)) * np.sqrt(k)))
    matrix = QuantizedMatrix(codes, scales, None, dtype)
    if case.scheme in ("zero points", "activation order"):
        zeros = rng.integers(0, dtype.num_codes, groups, np.int16)
        columns = rng.permutation(k).astype(np.int32) if case.scheme == "activation order" else None
        return dataclasses.replace(matrix, zeros=zeros, columns=columns)
    if case.scheme == "minimums":
        return dataclasses.replace(matrix, mins=tilus.f16.round(-scales * np.float32(dtype.max_value / 2)))
    if case.scheme == "powers of two":
        powers = np.float32(2.0) ** rng.integers(-11, -8, groups)
        return dataclasses.replace(matrix, scales=powers, scale_dtype=tilus.float8_e8m0)
    if case.scheme == "two levels":
        levels = tilus.float8_e4m3.round(rng.uniform(1, 448, groups))
        return dataclasses.replace(matrix, scales=levels, scale_dtype=tilus.float8_e4m3, global_scale=2.0**-18)
    if case.scheme == "table":
        table = tilus.f16.round(np.sort(rng.uniform(-1, 1, 16)))  # in the activations' type, so that nothing is rounded
        return dataclasses.replace(matrix, table=table, scales=scales * np.float32(8))
    return matrix


class Exact:
    """The float64 product of dequantised weights; `dequantize` has its own tests."""

    def __init__(self, matrix: QuantizedMatrix, device: str = "cuda") -> None:
        self.values = torch.from_numpy(matrix.dequantize()).to(device)
        spread = np.zeros(1) if matrix.mins is None else np.abs(matrix.mins).max()
        self.offset = float(np.max(spread))

    def error(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """The largest difference, in parts of what f32's additions and the rounding of y to f16 explain."""
        wide, rows = x.double(), 1024
        worst = 0.0
        for first in range(0, self.values.shape[0], rows):
            part = self.values[first : first + rows].double()
            exact = wide @ part.T
            size = wide.abs() @ (part.abs() + 2 * self.offset).T
            bound = (x.shape[1] + 8) * 2.0**-23 * size + 2.0**-11 * exact.abs() + 2.0**-25
            worst = max(worst, float(((y[:, first : first + rows].double() - exact).abs() / bound).max()))
        return worst


def checked(error: float, what: str) -> float:
    """Refuse to time a wrong kernel."""
    if not error <= 1:
        raise SystemExit(f"{what}: an element is off by {error:.3g} times what rounding explains")
    return round(error, 4)


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


class Bench:
    """Measurements on the current GPU; floors and fp16 products are measured once for each size."""

    def __init__(self, replays: int) -> None:
        self.replays = replays
        self.l2_nbytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._reads: dict[int, float] = {}
        self._products: dict[tuple[int, int, int], float] = {}

    def read_us(self, nbytes: int) -> float:
        if nbytes not in self._reads:
            count = -(-nbytes // 4)
            buffers = [
                torch.zeros(count, dtype=torch.int32, device="cuda") for _ in range(copies(nbytes, self.l2_nbytes))
            ]
            sums = torch.empty(-(-count // 8192), dtype=torch.int32, device="cuda")
            self._reads[nbytes] = graph_us([lambda x=x: read(x, sums) for x in buffers], self.replays)
        return self._reads[nbytes]

    def cublas_us(self, n: int, k: int, m: int) -> float:
        if (n, k, m) not in self._products:
            x = torch.randn(m, k, device="cuda").half()
            out = torch.empty(m, n, dtype=torch.half, device="cuda")
            weights = [torch.randn(n, k, device="cuda").half() for _ in range(copies(2 * n * k, self.l2_nbytes))]
            self._products[n, k, m] = graph_us([lambda w=w: torch.mm(x, w.T, out=out) for w in weights], self.replays)
        return self._products[n, k, m]

    def measure(self, case: Case, plans: Iterable[Schedule | None] = (None,)) -> Iterator[dict[str, Any]]:
        """One entry for each batch and schedule; a schedule whose kernel would spill registers is left out."""
        matrix = random_matrix(case)
        weight, exact = pack(matrix, "cuda"), Exact(matrix)
        count = copies(weight.nbytes, self.l2_nbytes)
        weights = [weight] + [clone(weight) for _ in range(count - 1)]
        for m in case.tokens:
            for plan in plans:
                if plan is not None and plan.tokens != (8 if m <= 8 else 16):
                    continue
                try:
                    yield self._entry(case, m, plan, weights, exact)
                except TilusError as error:
                    if "spill" not in str(error):
                        raise

    def _entry(
        self, case: Case, m: int, plan: Schedule | None, weights: Sequence[QuantizedWeight], exact: Exact
    ) -> dict[str, Any]:
        n, k = case.shape
        x = torch.randn(m, k, device="cuda").half()
        y = torch.empty(m, n, dtype=torch.half, device="cuda")

        def product(weight: QuantizedWeight) -> None:
            if plan is None:
                linear(x, weight, out=y)
            else:
                launch(x, weight, y, None, plan, None)

        product(weights[0])
        error = checked(exact.error(x, y), f"{case} M={m} {plan}")
        us, floor = graph_us([lambda w=w: product(w) for w in weights], self.replays), self.read_us(weights[0].nbytes)
        return {
            "N": n, "K": k, "M": m, "dtype": case.dtype, "scheme": case.scheme, "group": case.group,
            "schedule": None if plan is None else dataclasses.asdict(plan), "us": us, "read_us": floor,
            "ratio": round(us / floor, 3), "error": error, "cublas_us": self.cublas_us(n, k, m),
        }  # fmt: skip


def clone(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.header, **{name: array.clone() for name, array in weight.arrays.items()})


def sweep_plans() -> list[Schedule]:
    """Schedules that leave 8 to 16 warps on each of 132 multiprocessors for 128 rows of tiles."""
    shapes = (
        (1, 8, 1, 1), (1, 16, 1, 1), (1, 4, 2, 2), (1, 8, 2, 2), (2, 4, 2, 1), (2, 8, 2, 1), (2, 4, 4, 2), (4, 2, 4, 1),
        (4, 4, 4, 1),
    )  # fmt: skip
    plans = [
        Schedule(tokens, rows, warps, stages, splits, blocks_per_sm)
        for tokens in (8, 16)
        for rows, warps, splits, blocks_per_sm in shapes
        for stages in (1, 2, 4)
    ]
    return [plan for plan in plans if plan.stages < 4 or plan.tokens == 8]


def table(entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same entries; each is printed when it has been measured."""
    names = ("N x K", "M", "type", "scheme", "group", "us", "read", "ratio", "cuBLAS")
    widths = (13, 5, 13, 18, 7, 9, 9, 7, 9)
    print("".join(f"{name:>{width}}" for name, width in zip(names, widths)), " schedule")
    for entry in entries:
        plan = "" if entry["schedule"] is None else Schedule(**entry["schedule"])
        cells = (f"{entry['N']} x {entry['K']}", *(entry[key] for key in ("M", "dtype", "scheme", "group")))
        numbers = (f"{entry[key]:.2f}" for key in ("us", "read_us", "ratio", "cublas_us"))
        print("".join(f"{cell:>{width}}" for cell, width in zip((*cells, *numbers), widths)), f" {plan}", flush=True)
        yield entry


def chosen(options: argparse.Namespace) -> list[Case]:
    if options.schemes:
        cases = list(SCHEMES)
    elif options.shapes:
        cases = [Case(shape, SHAPE_TOKENS, name) for shape in SHAPES for name in SHAPE_TYPES]
    else:
        cases = [Case(SQUARE, SQUARE_TOKENS, name) for name in TYPES]
    if options.types:
        cases = [case for case in cases if case.dtype in options.types.split(",")]
    if options.tokens:
        tokens = tuple(int(m) for m in options.tokens.split(","))
        cases = [dataclasses.replace(case, tokens=tokens) for case in cases]
    return cases


def measure(options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(options.replays)
    plans: Sequence[Schedule | None] = sweep_plans() if options.sweep else (None,)
    entries = table(entry for case in chosen(options) for entry in bench.measure(case, plans))
    return {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "l2_nbytes": bench.l2_nbytes,
        "replays": options.replays,
        "cases": list(entries),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--replays", type=int, default=30, help="graph replays a case (default 30)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--schemes", action="store_true", help="every scheme at 8192 x 8192")
    what.add_argument("--shapes", action="store_true", help="two shapes of Llama at 1 to 256 tokens")
    what.add_argument("--sweep", action="store_true", help="other schedules at 8192 x 8192")
    parser.add_argument("--types", help="only these code types, separated by commas")
    parser.add_argument("--tokens", help="only these numbers of tokens, separated by commas")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: `tilus doctor` says what is missing")
    text = json.dumps(measure(options), indent=2)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
