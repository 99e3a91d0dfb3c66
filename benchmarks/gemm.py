"""Products on a GPU: quantised linears beside pure reads of their weights, torch's products (cuBLAS) and a Triton kernel.

    python benchmarks/gemm.py int4 --out FILE       4 bits in groups of 128: five shapes, 1 to 4096 tokens, all peers and limits
    python benchmarks/gemm.py types                 every type of codes at 8192 x 8192, 1 and 16 tokens
    python benchmarks/gemm.py schemes               every scheme, likewise
    python benchmarks/gemm.py chain                 layers that depend on each other
    python benchmarks/gemm.py dense                 products without quantisation, where tilus.kernels.gemm exists
    python benchmarks/gemm.py eight_bits            8-bit activations: 8-bit weights, and 4-bit ones
    python benchmarks/gemm.py grouped               64 experts of which each token takes two, beside a loop over the experts
    python benchmarks/gemm.py sweep --types int4    other schedules than the library's (45 kernels a type)

Without a suite it is int4; with several they run one after the other. --shapes 4096x4096,14336x4096 (N x K), --tokens 1,16 and
--types int4,uint1 take others than the usual ones. --budget SECONDS stops before the first row that would start later; rows come
in an order in which those measured so far cover the range, and the file is whole after each one.

y [M, N] = x [M, K] times the transpose of a weight [N, K]; f16 activations, random codes, all equally likely, and one f16 scale
for each group of 128 unless the scheme says otherwise.

Times are medians over replays of a CUDA graph, in microseconds of one call. A graph goes through copies of the weight that add up
to more than four times the L2 cache, so that every call reads its weight from memory; activations alternate between two. What is
compared runs in the same process. Before and after it is timed, every product is compared with float64 (products/weights.py has
the bound), in outputs that held NaN before; a wrong one ends the run. A kernel that cannot be compiled or launched leaves null,
and its message in `failures`.

Output, as JSON; times in microseconds, null where there is none:
    device, torch, cuda, triton, python    what it ran on; triton: null where it is missing
    l2_nbytes, replays     the GPU's L2 cache; the most replays of a graph
    seconds                since the start, when the last row was done
    measured_tflops        of torch's bf16 product of 8192^3, where a suite needs it
    tflops                 the larger of that and products/limits.py's: what limits are computed from
    suites                 by name {rows, and summary for int4}
Every row has M, N, K and
    us, plain_us           tilus, kernels in a row with dependent launch and without
    read_us, plain_read_us    a pure read of the weight's bytes, likewise
    error, rms             the largest difference in parts of its bound; relative, in the root mean square
    failures               {what is null: why}
int4: cublas_fp16_us, cublas_bf16_us; triton_us, triton_config: the fastest of a handful; limit_us, plain_limit_us: the larger of
    the read (likewise) and the arithmetic at `tflops`. summary: see `by_tokens` in products/limits.py.
types, schemes: dtype, scheme, group; ratio, plain_ratio: us / read_us, plain_us / plain_read_us; bar, met: for ratio,
    null for schemes without a bar; cublas_fp16_us.
sweep: dtype, ratio, schedule; neither plain times nor errors.
dense: dtype, torch_us, ratio: torch_us / us, tflops, limit_us; read_us for up to 256 tokens; no plain times.
eight_bits: dtype (of the weight), act; torch_us: without scales for int8, and of 32 tokens for 16 and fewer, ratio: torch_us /
    us; limit_us; quantise_us: of quantize_tokens for as many tokens; no plain times.
grouped: tokens, experts, active: experts that have rows; loop_us: a graph of products, recorded with the offsets known, ratio:
    loop_us / us; eager_us: launched from Python, host_loop_us: a loop from Python that first copies the offsets to the host,
    host_ratio: host_loop_us / eager_us; bar, met: for host_ratio; read_us: of the active experts' weights; no plain times.
chain: layers; us: of one layer; no error, rms: of the last layer against a float64 chain.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from products import chain, dense, eight_bits, grouped, int4, kinds, sweep
from products.limits import by_tokens
from products.report import Report
from products.run import Run
from products.timing import Budget
from products.weights import Case


@dataclass(frozen=True)
class Suite:
    """rows: given the run and the options. table: the module that has its columns and cells."""

    rows: Callable[[Run, argparse.Namespace], Iterator[dict[str, Any]]]
    table: Any


def int4_rows(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    return int4.rows(run, options.shapes or int4.SHAPES, options.tokens or int4.TOKENS)


def type_rows(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = kinds.type_cases(options.shapes or [kinds.SHAPE])
    return kinds.rows(run, chosen(cases, options), options.tokens or kinds.TOKENS)


def scheme_rows(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = kinds.scheme_cases(options.shapes or [kinds.SHAPE])
    return kinds.rows(run, chosen(cases, options), options.tokens or kinds.TOKENS)


def sweep_rows(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = [Case(shape, name) for shape in options.shapes or [kinds.SHAPE] for name in kinds.TYPES]
    return sweep.rows(run, chosen(cases, options), options.tokens or kinds.TOKENS)


def dense_rows(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shapes = [(m, n, k) for n, k in options.shapes or () for m in options.tokens or (4096,)]
    return dense.rows(run, shapes or dense.SHAPES)


def eight_bit_rows(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    return eight_bits.rows(run, options.shapes or eight_bits.SHAPES, options.tokens or eight_bits.TOKENS)


def grouped_rows(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    return grouped.rows(run, options.shapes or grouped.SHAPES, options.tokens or grouped.TOKENS)


def chain_rows(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sizes = [n for n, k in options.shapes or () if n == k]
    return chain.rows(run, sizes or chain.SIZES, options.tokens or chain.TOKENS)


SUITES = {
    "int4": Suite(int4_rows, int4),
    "types": Suite(type_rows, kinds),
    "schemes": Suite(scheme_rows, kinds),
    "chain": Suite(chain_rows, chain),
    "dense": Suite(dense_rows, dense),
    "eight_bits": Suite(eight_bit_rows, eight_bits),
    "grouped": Suite(grouped_rows, grouped),
    "sweep": Suite(sweep_rows, sweep),
}


def chosen(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    return [case for case in cases if not options.types or case.dtype in options.types]


def shapes_in(text: str) -> list[tuple[int, int]]:
    """`NxK,NxK`."""
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        n, separator, k = part.partition("x")
        if not (separator and n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise argparse.ArgumentTypeError(f"{part!r} is no shape, expected NxK, such as 14336x4096")
        shapes.append((int(n), int(k)))
    return shapes


def tokens_in(text: str) -> list[int]:
    """`M,M`."""
    parts = text.split(",")
    wrong = [part for part in parts if not part.isdigit() or int(part) == 0]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no number of tokens")
    return [int(part) for part in parts]


def types_in(text: str) -> list[str]:
    known = {case.dtype for case in (*kinds.type_cases([kinds.SHAPE]), *kinds.scheme_cases([kinds.SHAPE]))}
    names = text.split(",")
    wrong = [name for name in names if name not in known]
    if wrong:
        raise argparse.ArgumentTypeError(
            f"{wrong[0]!r} is no type that is measured, expected some of {', '.join(sorted(known))}"
        )
    return names


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)} (default int4)")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--replays", type=int, default=30, help="at most so many graph replays a time (default 30)")
    parser.add_argument("--budget", type=float, help="seconds after which no row starts")
    parser.add_argument("--shapes", type=shapes_in, help="NxK, separated by commas")
    parser.add_argument("--tokens", type=tokens_in, help="numbers of tokens, separated by commas")
    parser.add_argument("--types", type=types_in, help="types of codes, separated by commas")
    options = parser.parse_args(arguments)
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"unknown suite {name!r}, expected some of {', '.join(SUITES)}")
    options.suites = options.suites or ["int4"]
    if "dense" in options.suites and not dense.is_available():
        parser.error("suite dense: this version of tilus has no tilus.kernels.gemm")
    return options


def machine(run: Run) -> dict[str, Any]:
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if has_triton else None,
        "python": platform.python_version(),
        "l2_nbytes": run.timer.l2_nbytes,
        "replays": run.timer.replays,
    }


def facts_of(run: Run) -> Mapping[str, Any]:
    """What is known only later."""
    facts: dict[str, Any] = {"seconds": round(run.budget.used, 1)}
    if "measured_tflops" in vars(run):  # cached: it was needed
        facts |= {"measured_tflops": run.measured_tflops, "tflops": run.tflops}
    return facts


def main() -> None:
    options = options_of()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: `tilus doctor` says what is missing")
    run = Run(options.replays, Budget(options.budget))
    report = Report(options.out, machine(run))
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in options.suites:
            suite = SUITES[name]
            report.suite(
                name, suite.rows(run, options), suite.table.COLUMNS, suite.table.cells,
                by_summary(options) if name == "int4" else None, lambda: facts_of(run),
            )  # fmt: skip
    print(f"{run.budget.used:.0f} s" + (", the budget is used up" if run.budget.exhausted else ""))


def by_summary(options: argparse.Namespace) -> Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]:
    count = len(options.shapes or int4.SHAPES)
    return lambda rows: by_tokens(rows, count)


if __name__ == "__main__":
    main()
