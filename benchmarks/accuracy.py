"""What quantisation costs in perplexity: `python benchmarks/accuracy.py [--device cuda] [--only ROW ...] [--out FILE]`.

The server's default model (SmolLM2-135M-Instruct, shipped as Q4_1) is dequantised, rounded again in each way, and run by
transformers in float32 on 8 x 512 tokens of tests/data/shakespeare.txt, so that nothing but the rounding differs between
rows. The embedding, which is the head too, stays as shipped. On two cores a row takes a minute or two, on a GPU some seconds.

Output, as JSON:
    device, torch, python    what it ran on
    tokens       tokens whose likelihood is measured (the first of each window has none)
    shipped      perplexity of the model as shipped
    rows         list of {row, dtype, scheme, group, search, calibrated, nbits, error, perplexity, ratio, seconds}.
                 group: weights that share a scale, 0 for a whole row. nbits: of a weight, scales included. error: norm of all
                 rounding errors over the norm of all weights. ratio: perplexity over that of the model as shipped.

Rows that are in the output file already are kept, and not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.loader import default_model, open_checkpoint
from serving.offline.model_source import ModelSource, open_source
from serving.offline.quantize_model import Totals, chosen_names
from tilus.dtypes import DTYPES
from tilus.kernels.quantize import PRESETS, RECIPE_NAMES, QuantizedMatrix, Recipe, recipe

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "tests" / "data" / "shakespeare.txt"
OTHER_TEXT = ROOT / "tests" / "data" / "tempest.txt"  # calibration must not see what is measured
WINDOWS, LENGTH = 8, 512


@dataclass(frozen=True)
class Row:
    """One way to quantise. search: False for plain rounding. calibrated: codes chosen by GPTQ, for tests/data/tempest.txt."""

    recipe: Recipe
    name: str
    search: bool = True
    calibrated: bool = False


def all_rows() -> list[Row]:
    """Every type in groups of 32 under its schemes, the presets, and some other groups; int4 in the plain way as well."""
    small = [DTYPES[name] for name in RECIPE_NAMES if name not in PRESETS]
    rows = [_row(dtype.name, 32, None) for dtype in small]
    rows += [_row(dtype.name, 32, "zero") for dtype in small if dtype.kind == "uint"]
    rows += [Row(PRESETS[name], name) for name in PRESETS]
    rows += [_row("int4", 64, None), _row("int4", 192, None), _row("uint4", 64, None), _row("int8", 0, None)]
    rows += [_row("float8_e4m3", 0, None)]
    rows += [Row(recipe(name, 32), f"{name}-g32-plain", search=False) for name in ("int4", "int3", "uint4")]
    rows += [Row(recipe(name, 32), f"{name}-g32-gptq", calibrated=True) for name in ("int4", "int3", "uint4")]
    return rows


def _row(dtype: str, group: int, scheme: str | None) -> Row:
    suffix = "" if scheme is None else f"-{scheme}"
    return Row(recipe(dtype, group, scheme), f"{dtype}-g{group}{suffix}" if group else f"{dtype}-row{suffix}")


class Subject:
    """The model in float32 on a device, whose matrices are replaced row by row."""

    def __init__(self, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.source: ModelSource = open_source(default_model())
        dropped = ("architectures", "model_type", "torch_dtype")
        config = {key: value for key, value in self.source.config().items() if key not in dropped}
        self.device = device
        self.model = LlamaForCausalLM(LlamaConfig(**config)).eval()
        self.floats = {name: np.array(self.source.floats(name)) for name in self.source.names()}
        self.model.load_state_dict({name: torch.from_numpy(x) for name, x in self.floats.items()}, strict=False)
        self.model.tie_weights()
        self.model.to(device)
        self.chosen = chosen_names(self.source)
        tokenizer = open_checkpoint(default_model()).tokenizer
        ids = tokenizer.encode(TEXT.read_text())[: WINDOWS * LENGTH]
        self.tokens = torch.tensor(ids, device=device).view(WINDOWS, LENGTH)

    def put(self, round_one: Callable[[str], QuantizedMatrix]) -> Totals:
        """Replace the matrices by what a function of their names makes of them."""
        totals, parameters = Totals(), dict(self.model.named_parameters())

        def work(name: str) -> tuple[QuantizedMatrix, np.ndarray]:
            matrix = round_one(name)
            return matrix, matrix.dequantize()

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
            for name, (matrix, rounded) in zip(self.chosen, pool.map(work, self.chosen)):
                totals.add(self.floats[name], matrix, rounded)
                parameters[name].data.copy_(torch.from_numpy(rounded))
        return totals

    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of each window's tokens but the first."""
        total = 0.0
        with torch.inference_mode():
            for window in self.tokens:
                logits = self.model(window[None]).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        return math.exp(total / (WINDOWS * (LENGTH - 1)))


def rounding(subject: Subject, row: Row) -> Callable[[str], QuantizedMatrix]:
    """The function that makes a row's matrix of a tensor's name."""
    if row.calibrated:
        from serving.offline.calibrate import calibrate

        return calibrate(subject.source, subject.chosen, row.recipe, OTHER_TEXT, lambda done, total: None).__getitem__
    return lambda name: row.recipe.quantize(subject.floats[name], search=row.search, name=name)


def measure(subject: Subject, row: Row, shipped: float) -> dict[str, Any]:
    start = time.perf_counter()
    report = subject.put(rounding(subject, row)).report("", 0)
    perplexity = subject.perplexity()
    return {
        "row": row.name,
        "dtype": row.recipe.dtype.name,
        "scheme": row.recipe.scheme,
        "group": row.recipe.group or 0,
        "search": row.search,
        "calibrated": row.calibrated,
        "nbits": round(report.nbits, 3),
        "error": round(report.error, 5),
        "perplexity": round(perplexity, 3),
        "ratio": round(perplexity / shipped, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(result: dict[str, Any]) -> str:
    """The rows as the table of docs/quantization.md."""
    lines = ["| row | scheme | bits a weight | error | perplexity | of the shipped |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        scheme = row["scheme"] + ("" if row["search"] else ", plain rounding") + (", GPTQ" if row["calibrated"] else "")
        lines.append(
            f"| {row['row']} | {scheme} | {row['nbits']:.2f} | {100 * row['error']:.2f} % | {row['perplexity']:.2f} "
            f"| {row['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity of the default model in every way to quantise it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="these rows, such as int4-g32 (default: all)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: torch's own)")
    parser.add_argument("--out", type=Path, help="a JSON file; rows in it are kept")
    parser.add_argument(
        "--table", action="store_true", help="print --out as the table of the documentation, and measure nothing"
    )
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())), end="")
        return
    known = {row.name: row for row in all_rows()}
    unknown = set(options.only or ()) - known.keys()
    if unknown:
        sys.exit(f"no rows {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = list(known.values()) if options.only is None else [known[name] for name in options.only]
    if options.threads:
        torch.set_num_threads(options.threads)
    run(rows, torch.device(options.device), options.out)


def run(rows: list[Row], device: torch.device, out: Path | None) -> None:
    subject = Subject(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    known: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    shipped = known.get("shipped") or round(subject.perplexity(), 3)
    print(f"{'as shipped':24} perplexity {shipped:9.3f}", flush=True)
    found: dict[str, dict[str, Any]] = {row["row"]: row for row in known.get("rows", [])}
    for row in rows:
        if row.name not in found:
            found[row.name] = measure(subject, row, shipped)
        entry = found[row.name]
        print(
            f"{row.name:24} perplexity {entry['perplexity']:9.3f}, {entry['ratio']:7.4f} of the shipped, "
            f"{entry['nbits']:5.2f} bits, error {100 * entry['error']:6.2f} %, {entry['seconds']} s",
            flush=True,
        )
        if out is not None:
            versions = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
            result = versions | {"tokens": WINDOWS * (LENGTH - 1), "shipped": shipped, "rows": list(found.values())}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
