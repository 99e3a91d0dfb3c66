"""Times of steps with prompts on a GPU, launched from Python and replayed: `python benchmarks/serving_mixed.py [--out FILE]`.

A model in the shape of --config (Qwen3-0.6B by default) with random weights runs steps in which some sequences of --context
tokens decode, and some prompts, or chunks of them, come behind as many tokens in the cache. A step is what the server's runner
does, with its tokens on the host in the end. With --drafts, steps in which sequences check so many guesses instead.

Output, as JSON:
    device, torch, python, model, weight_dtype, group, kv_dtype, context, drafts
    capture {graphs: of the shapes that are captured at the start, seconds: what that took, mib: of the device's memory,
            activation_mib: that part of it which torch holds for activations}
    rows    list of {decodes, prompts, tokens: of each prompt, rows: of the shape that the step is padded to, launched_us,
            replayed_us: medians of whole steps, host_us: until a replayed step is in the queue}
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from serving_decode import GREEDY, PAGE, add_model_options, fill, median_us, open_model  # beside this file
from serving_throughput import QWEN3_0_6B

import tilus
from serving.config import KV_DTYPES
from serving.core import Batch, BatchItem
from serving.model import Model
from serving.runner import TorchRunner
from serving.step_shapes import GraphLimits, StepShapes

CASES = ((0, 1, 32), (4, 1, 32), (32, 1, 32), (0, 1, 512), (32, 4, 120), (128, 4, 480), (0, 1, 2048))
STEPS = 20


def batch_of(decodes: int, prompts: int, tokens: int, context: int, drafts: int) -> Batch:
    """Each sequence has pages of its own, and `context` tokens in the cache."""
    lengths = [1] * decodes + [tokens] * prompts
    pages = -(-(context + tokens) // PAGE)
    return Batch(
        tuple(
            BatchItem(
                str(row),
                (1,) * count,
                context,
                tuple(range(row * pages, (row + 1) * pages)),
                GREEDY,
                0,
                num_drafts=drafts,
            )
            for row, count in enumerate(lengths)
        )
    )


def measure(model: Model, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    shapes = [(0, count, 1 + options.drafts) for count in (1, 8, 32)] if options.drafts else CASES
    cases = [(case, batch_of(*case, options.context, options.drafts)) for case in shapes]
    num_pages = max(max(item.pages) + 1 for _, batch in cases for item in batch.items)
    max_pages = max(len(item.pages) for _, batch in cases for item in batch.items)
    limits, device = (
        GraphLimits(options.max_batch, max_pages, options.max_step_tokens, options.drafts),
        torch.device("cuda"),
    )
    max_rows = options.max_batch * (1 + options.drafts)
    plain, runner = (
        TorchRunner(model, num_pages, PAGE, device, kv_dtype=options.kv_dtype, max_rows=max_rows, graphs=graphs)
        for graphs in (None, limits)
    )
    for each in (plain, runner):
        fill(each.kv_pool)
    tilus.compile_ahead(lambda: (runner.rehearse(()), plain.rehearse(batch for _, batch in cases)))
    capture, rows = captured(runner, len(StepShapes(limits, device).common())), list[dict[str, Any]]()
    for (decodes, prompts, tokens), batch in cases:
        shape = StepShapes(limits, device).of(batch)
        if shape is None:
            raise SystemExit(
                f"no shape for {decodes} sequences that decode beside {prompts} prompts of {tokens} tokens"
            )
        for each in (plain, runner):
            each.launch(batch)()
        launched, replayed = (
            median_us(lambda each=each, batch=batch: each.launch(batch)(), STEPS) for each in (plain, runner)
        )
        rows.append(
            {
                "decodes": decodes, "prompts": prompts, "tokens": tokens, "rows": shape.rows, "launched_us": launched,
                "replayed_us": replayed, "host_us": host_us(runner, batch),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return capture, rows


def captured(runner: TorchRunner, graphs: int) -> dict[str, Any]:
    torch.cuda.empty_cache()
    free, reserved, start = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved(), time.perf_counter()
    runner.capture(lambda done, total: None)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    activations = torch.cuda.memory_reserved() - reserved
    found = {
        "graphs": graphs, "seconds": round(seconds, 2), "mib": round((free - torch.cuda.mem_get_info()[0]) / 2**20),
        "activation_mib": round(activations / 2**20),
    }  # fmt: skip
    print(found, flush=True)
    return found


def host_us(runner: TorchRunner, batch: Batch) -> float:
    times: list[float] = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        wait = runner.launch(batch)
        times.append((time.perf_counter() - start) * 1e6)
        wait()
    return round(statistics.median(times), 1)


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.set_defaults(weight_dtype="int8", group=32)
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="fp8")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence in the cache (default 1024)")
    parser.add_argument("--drafts", type=int, default=0, help="guesses that each sequence has (default 0)")
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="write the JSON here")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: `tilus doctor` says what is missing")
    name = options.config.stem if options.config else "Qwen3-0.6B"
    with TemporaryDirectory() as directory:
        if options.config is None:
            options.config = Path(directory) / "config.json"
            options.config.write_text(json.dumps(QWEN3_0_6B))
        model, _ = open_model(options)
    capture, rows = measure(model, options)
    report = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "python": platform.python_version(),
        "model": name, "weight_dtype": options.weight_dtype, "group": options.group, "kv_dtype": options.kv_dtype,
        "context": options.context, "drafts": options.drafts, "capture": capture, "rows": rows,
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
