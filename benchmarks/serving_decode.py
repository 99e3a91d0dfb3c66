"""Times of decoding steps of the server on a GPU, with random weights: `python benchmarks/serving_decode.py [--out FILE]`.

A model of the shape of --config (Llama-3-8B by default) decodes batches of sequences of --context tokens each, whose keys and
values fill the cache in every --kv-dtype. A step is what the server's runner does: inputs written, a CUDA graph replayed, tokens
sampled. With --prefill, one sequence's prompt of so many tokens as well, in one step.

Output, as JSON; times in microseconds:
    device, torch, python, model, weight_dtype, group, context
    rows    list of {kv_dtype, batch, step_us: the median of whole steps, graph_us: of graphs that follow each other, nbytes: of
            weights and of cached keys and values, read_us: these at 3.14 TB/s, ratio: graph_us over it}
    prefill list of {kv_dtype, tokens, us}
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from serving.config import KV_DTYPES
from serving.core import Batch, BatchItem, SamplingParams
from serving.dummy import open_dummy
from serving.kernels import default_kernels
from serving.kv_pool import KvPool
from serving.model import Model, build_model
from serving.packing import PackedWeights, pack_weights
from serving.quantize import weight_type
from serving.runner import TorchRunner
from serving.sampling import Sampler
from serving.step_graphs import StepGraphs
from serving.step_inputs import step_tensors
from serving.step_shapes import GraphLimits, StepShape
from tilus.kernels import DenseWeight
from tilus.kernels.quantize import QuantizedWeight

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
READ = 3.14e6  # bytes a microsecond: what an H100 reads
PAGE = 16
GREEDY = SamplingParams(temperature=0)
STEPS = 30


def open_model(options: argparse.Namespace, device: str = "cuda") -> tuple[Model, int]:
    """And the bytes of its linear layers."""
    settings: dict[str, Any] = LLAMA_3_8B if options.config is None else json.loads(options.config.read_text())
    layers = options.layers or int(settings["num_hidden_layers"])
    with TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(settings | {"num_hidden_layers": 1}))
        checkpoint = open_dummy(path, weight_type(options.weight_dtype), options.group)
    packed = with_layers(pack_weights(checkpoint, default_kernels(), torch.device(device)), layers)
    nbytes = sum(int(part.nbytes) for parts in packed.linears.values() for part in parts)
    config = replace(checkpoint.config, num_layers=layers)
    return build_model(config, default_kernels(), packed), nbytes


def with_layers(packed: PackedWeights, count: int) -> PackedWeights:
    """Copies of the only layer, each in memory of its own."""
    tensors, linears = dict(packed.tensors), dict(packed.linears)
    for index in range(1, count):
        for name, tensor in packed.tensors.items():
            if name.startswith("blk.0."):
                tensors[f"blk.{index}.{name[6:]}"] = tensor.clone()
        for name, parts in packed.linears.items():
            if name.startswith("blk.0."):
                linears[f"blk.{index}.{name[6:]}"] = tuple(copied(part) for part in parts)
    return PackedWeights(tensors, linears)


def copied(weight: QuantizedWeight | DenseWeight) -> QuantizedWeight | DenseWeight:
    if isinstance(weight, DenseWeight):
        return replace(weight, values=weight.values.clone())
    return replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())


def decode_batch(size: int, context: int) -> Batch:
    """Sequences whose last token comes; the pages of each are its own."""
    pages = -(-context // PAGE)
    return Batch(
        tuple(
            BatchItem(str(row), (row % 256,), context - 1, tuple(range(row * pages, (row + 1) * pages)), GREEDY, 0)
            for row in range(size)
        )
    )


def fill(pool: KvPool) -> None:
    """Numbers of the order of one, whatever the format: no step computes NaN."""
    for cache in pool.layers:
        if isinstance(cache, torch.Tensor):
            cache.normal_()
        else:
            cache.codes.random_(0, 120)
            cache.factors.fill_(0.01)


def median_us(action: Any, repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return round(statistics.median(times), 1)


def measure(
    model: Model, weights_nbytes: int, kv_dtype: str, options: argparse.Namespace, report: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    largest, pages = max(options.batch), -(-max(options.context, options.prefill) // PAGE)
    limits = GraphLimits(largest, pages, largest)
    runner = TorchRunner(
        model, largest * pages, PAGE, torch.device("cuda"), kv_dtype=kv_dtype, max_rows=largest, graphs=limits
    )
    fill(runner.kv_pool)
    sampler = Sampler(model.config.vocab_size, largest, torch.device("cuda"))
    graphs = StepGraphs(model, runner.kv_pool, limits, sampler)
    page_nbytes = runner.kv_pool.shape.nbytes
    for size in options.batch:
        batch = decode_batch(size, options.context)
        for _ in range(3):
            runner.launch(batch)()
        step_us = median_us(lambda batch=batch: runner.launch(batch)(), STEPS)
        with torch.inference_mode():
            replay = graphs.prepare(batch, StepShape(size, size, 0, size), {})

            def several(replay: Callable[[], torch.Tensor] = replay) -> None:
                for _ in range(5):
                    replay()

            graph_us = round(median_us(several, 10) / 5, 1)
        nbytes = weights_nbytes + size * -(-options.context // PAGE) * page_nbytes
        read_us = round(nbytes / READ, 1)
        yield {
            "kv_dtype": kv_dtype, "batch": size, "step_us": step_us, "graph_us": graph_us, "nbytes": nbytes,
            "read_us": read_us, "ratio": round(graph_us / read_us, 3),
        }  # fmt: skip
    if options.prefill:
        item = BatchItem("prompt", (1,) * options.prefill, 0, tuple(range(pages)), GREEDY, 0)
        step = step_tensors(Batch((item,)), PAGE, torch.device("cuda"))
        with torch.inference_mode():
            model.forward(step, runner.kv_pool.layers)
            us = median_us(lambda: model.forward(step, runner.kv_pool.layers), 5)
        report["prefill"].append({"kv_dtype": kv_dtype, "tokens": options.prefill, "us": us})
        print(f"{kv_dtype:6}prefill of {options.prefill}: {us} us", flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Those that `open_model` reads."""
    parser.add_argument("--config", type=Path, help="a config.json; default: that of Llama-3-8B")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has: to compile kernels ahead")
    parser.add_argument("--weight-dtype", default="int4", help="type of the weights (default int4)")
    parser.add_argument("--group", type=int, default=128, help="weights that share a scale (default 128)")


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--batch", type=numbers, default=[1, 16, 64], help="sequences, separated by commas")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence (default 1024)")
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt that is timed too")
    parser.add_argument("--kv-dtype", nargs="*", choices=KV_DTYPES, default=["fp16", "fp8", "int4"])
    parser.add_argument("--out", type=Path, help="write the JSON here")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: `tilus doctor` says what is missing")
    model, weights_nbytes = open_model(options)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "python": platform.python_version(),
        "model": options.config.stem if options.config else "Llama-3-8B",
        "weight_dtype": options.weight_dtype, "group": options.group,
        "context": options.context, "rows": [], "prefill": [],
    }  # fmt: skip
    print("kv    batch  step us  graph us   read us  ratio")
    for kv_dtype in options.kv_dtype:
        for row in measure(model, weights_nbytes, kv_dtype, options, report):
            report["rows"].append(row)
            print(
                f"{kv_dtype:6}{row['batch']:5}{row['step_us']:9}{row['graph_us']:10}{row['read_us']:10}{row['ratio']:8}",
                flush=True,
            )
            if options.out is not None:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
