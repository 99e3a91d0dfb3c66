"""What caches of fewer bits cost in perplexity: `python benchmarks/kv_perplexity.py [--kv-dtype NAME ...] [--out FILE]`.

The server's default model (SmolLM2-135M-Instruct, its weights as shipped) reads WINDOWS x LENGTH tokens of
tests/data/shakespeare.txt and tempest.txt in the server's runner, with its kernels as native code, in chunks of CHUNK tokens.
Every key and value is read from the cache, those of a token's own chunk too, so that a token finds what it would find if it were
decoded. Nothing but the format of the cache differs between rows; int4 has frames, as in the server. On two cores a row takes a
minute.

Output, as JSON:
    torch, python, tokens   versions; tokens whose likelihood is measured (the first of each window has none)
    rows    list of {kv_dtype, nbits: of a cached element, scales and minimums included, perplexity, change: over that of fp16,
            less one, deviation: the standard error of change, same_top: share of tokens for which the most likely next token is
            that of fp16}
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from serving.config import KV_DTYPES
from serving.core import Batch, BatchItem, SamplingParams
from serving.execution import choose_execution
from serving.kernels import default_kernels
from serving.kv_frames import has_frames, with_frames
from serving.loader import default_model, open_checkpoint
from serving.model import Model, load_model
from serving.runner import TorchRunner
from serving.step_inputs import step_tensors

DATA = Path(__file__).parents[1] / "tests" / "data"
TEXTS = "shakespeare.txt", "tempest.txt"
WINDOWS, LENGTH, CHUNK, PAGE = 12, 1024, 256, 16
CPU = torch.device("cpu")


def likelihoods(model: Model, windows: torch.Tensor, kv_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(negative logarithm of the likelihood of each token but the first, most likely token instead), [windows, LENGTH - 1]"""
    pages = tuple(range(-(-LENGTH // PAGE)))
    runner = TorchRunner(model, len(pages), PAGE, CPU, kv_dtype=kv_dtype)
    losses, best = [], []
    for window in windows.tolist():
        rows: list[torch.Tensor] = []
        for start in range(0, LENGTH, CHUNK):
            item = BatchItem("text", tuple(window[start : start + CHUNK]), start, pages, SamplingParams(), 0)
            step = step_tensors(Batch((item,)), PAGE, CPU)
            every_row = replace(step, last=torch.arange(CHUNK, dtype=torch.int32))
            rows.append(model.forward(every_row, runner.kv_pool.layers))
        logits = torch.cat(rows)[:-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="none"))
        best.append(logits.argmax(-1))
    return torch.stack(losses), torch.stack(best)


def measure(kv_dtypes: list[str]) -> dict[str, Any]:
    checkpoint = open_checkpoint(default_model())
    plain = load_model(checkpoint, default_kernels(), CPU)

    def model_for(kv_dtype: str) -> Model:  # as a server starts it
        if not has_frames(kv_dtype):
            return plain
        return with_frames(plain, checkpoint.tokenizer, checkpoint.config.max_positions, CPU)

    ids = checkpoint.tokenizer.encode("\n".join((DATA / name).read_text() for name in TEXTS))[: WINDOWS * LENGTH]
    windows = torch.tensor(ids).view(WINDOWS, LENGTH)
    values = checkpoint.config.kv_values_per_token * PAGE
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        base, base_best = likelihoods(plain, windows, "fp16")
        for kv_dtype in kv_dtypes:
            losses, best = (
                (base, base_best) if kv_dtype == "fp16" else likelihoods(model_for(kv_dtype), windows, kv_dtype)
            )
            nbits = TorchRunner(plain, 1, PAGE, CPU, kv_dtype=kv_dtype).kv_pool.shape.nbytes * 8 / values
            row = {
                "kv_dtype": kv_dtype, "nbits": nbits, "perplexity": round(math.exp(losses.mean().item()), 4),
                "change": round(math.expm1((losses - base).mean().item()), 6),
                "deviation": round((losses - base).std().item() / losses.numel() ** 0.5, 6),
                "same_top": round((best == base_best).double().mean().item(), 4),
            }  # fmt: skip
            change, deviation, same = (100 * float(row[key]) for key in ("change", "deviation", "same_top"))
            print(
                f"{kv_dtype:5}{nbits:7.2f} bits  perplexity {row['perplexity']:9.4f}  change {change:8.4f} +- {deviation:.4f} %  "
                f"same most likely token {same:6.2f} %",
                flush=True,
            )
            rows.append(row)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return versions | {"tokens": WINDOWS * (LENGTH - 1), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-dtype", nargs="*", choices=KV_DTYPES, default=list(KV_DTYPES), help="default: all")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    choose_execution("cpu")
    result = measure(options.kv_dtype)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
