"""Attention over paged caches on a GPU, beside pure reads of the cached bytes, torch's attention and a Triton kernel.

    python benchmarks/attention.py decode --out FILE    batches of 1 to 128 sequences of 1k to 16k tokens, and skewed ones
    python benchmarks/attention.py quantised            decoding from caches of fp8, int8 and int4, without peers
    python benchmarks/attention.py prefill              causal prefill, and appending to a cache
    python benchmarks/attention.py quantised_prefill    the same from caches of fp8, int8 and int4, without peers
    python benchmarks/attention.py sustained            prefill for seconds, beside torch's on as hot a GPU, and the clock then
    python benchmarks/attention.py prefixes             sequences that begin with the same pages, tilus alone
    python benchmarks/attention.py quantised_prefixes   the same from caches of fp8, int8 and int4
    python benchmarks/attention.py mla                  multi-head latent attention, without peers
    python benchmarks/attention.py plans                decoding by several plans, tilus alone; quantised_plans likewise
    python benchmarks/attention.py decode prefill       one after the other; without a name all but plans and sustained
    python benchmarks/attention.py --batch 8,32         only batches of so many sequences
    python benchmarks/attention.py --no-peers           only tilus and reads

--budget SECONDS stops before the first row that would start later; the file is whole after each row.

Pages of a sequence are in random order. Times are medians over replays of a CUDA graph, in microseconds of one call. A graph goes
through copies of the cache that add up to more than three times the L2 cache, so that every call reads its keys and values from
memory. What is compared runs in the same process. Results of tilus, before and after they are timed, and of the others are
compared with f32 for up to three sequences; a wrong one ends the run.

Output, as JSON; times in microseconds, null where there is none:
    device, torch, cuda, triton, python    what it ran on; triton: null where it is missing
    l2_nbytes, replays     the GPU's L2 cache; the most replays of a graph
    seconds                since the start, when the last row was done
    suites                 {name: {rows}}
Every row has phase, batch, context (of a skewed batch the mean), q_len, heads, kv_heads, head_dim, page, kv_dtype and
    us, plain_us           tilus, calls in a row with dependent launch and without; lengths and block tables are constant
    tbps                   of decoding, TB/s: the bytes of all cached keys and values, scales included, by us
    tflops                 of prefill, TFLOP/s of both products with the tokens that each query sees
    read_us, plain_read_us    a pure read of as many bytes, likewise
    error                  relative, in the L2 norm, the largest of the sequences that were checked
    peers                  microseconds by name: sdpa_flash and sdpa_cudnn on contiguous keys and values of equal lengths; triton:
                           the fastest of a few configurations of the kernel in paged/triton_decode.py
    peer_errors            of those whose results were checked, as error
    bar, met               wanted tbps or tflops, and whether it was reached
    failures               {peer: why there is no time}
sustained: a row for each that takes turns: by, us, tflops, mhz and watts (medians of what nvidia-smi reads), share: the part of
    the tensor cores' cycles at that clock that products with seen tokens take.
prefixes: tokens of a prefix, groups that have one each, own tokens of a sequence; us with the groups found before, with_find_us,
    find_us (the launch that finds groups, alone), paged_decode_us (which shares nothing), read_us of every page once; bar in
    microseconds, of with_find_us.
mla: phase, batch, context, q_len, heads, page, kv_dtype, us, tbps, tflops (of keys that are seen), read_us and error.
plans: tile, stages, warps, blocks, us, tbps and error of each plan.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from paged import decode, mla, plans, prefill, prefixes, sustained
from paged.cases import DECODE, PREFILL, QUANTISED, QUANTISED_PREFILL, SUSTAINED
from products.report import Report
from products.timing import Budget, Timer

SUITES = {
    "decode": (decode, DECODE),
    "quantised": (decode, QUANTISED),
    "prefill": (prefill, PREFILL),
    "quantised_prefill": (prefill, QUANTISED_PREFILL),
    "sustained": (sustained, SUSTAINED),
    "prefixes": (prefixes, prefixes.PREFIXES),
    "quantised_prefixes": (prefixes, prefixes.QUANTISED_PREFIXES),
    "mla": (mla, mla.CASES),
    "plans": (plans, DECODE),
    "quantised_plans": (plans, QUANTISED),
}
DEFAULT = ("decode", "quantised", "prefill", "quantised_prefill", "prefixes", "quantised_prefixes", "mla")


def numbers_in(text: str) -> list[int]:
    """`N,N`."""
    parts = text.split(",")
    wrong = [part for part in parts if not part.isdigit() or int(part) == 0]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no number of sequences")
    return [int(part) for part in parts]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"what to measure: {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--batch", type=numbers_in, help="numbers of sequences, separated by commas")
    parser.add_argument("--no-peers", action="store_true", help="measure tilus and reads only")
    parser.add_argument("--replays", type=int, default=30, help="at most so many graph replays a time (default 30)")
    parser.add_argument("--budget", type=float, help="seconds after which no row starts")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"no suite {', '.join(map(repr, unknown))}, expected {', '.join(SUITES)}")
    return options


def main() -> None:
    options = options_of()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: `tilus doctor` says what is missing")
    budget, timer = Budget(options.budget), Timer(options.replays)
    has_triton = importlib.util.find_spec("triton") is not None
    facts = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if has_triton else None, "python": platform.python_version(),
        "l2_nbytes": timer.l2_nbytes, "replays": timer.replays,
    }  # fmt: skip
    report = Report(options.out, facts)
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in options.suites or DEFAULT:
            module, cases = SUITES[name]
            chosen = [case for case in cases if options.batch is None or case.batch in options.batch]
            rows = module.rows(timer, budget, not options.no_peers, chosen)
            report.suite(name, rows, module.COLUMNS, module.cells, facts=lambda: {"seconds": round(budget.used, 1)})


if __name__ == "__main__":
    main()
