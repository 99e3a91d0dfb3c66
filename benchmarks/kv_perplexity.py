"""What caches of fewer bits cost in perplexity: `python benchmarks/kv_perplexity.py [--kv-dtype NAME ...] [--out FILE]`.

The server's default model (SmolLM2-135M-Instruct, its weights as shipped) reads the first TOKENS tokens of tests/data's
shakespeare.txt and tempest.txt, or of --text, in windows of --length, in the server's runner, with its kernels as native code, in
chunks of CHUNK tokens. Every key and value is read from the cache, those of a token's own chunk too, so that a token finds what
it would find if it were decoded. Nothing but the format of the cache differs between rows; int4 has frames, as in the server. On
two cores a row takes a minute.

Output, as JSON:
    torch, python   versions
    texts, length, tokens   names of files; tokens of a window; those whose likelihood is measured (a window's first has none)
    rows    list of {kv_dtype, nbits: of a cached element, scales and minimums included, perplexity, change: over that of fp16,
            less one, deviation: the standard error of change, divergence: mean over tokens of the Kullback-Leibler divergence of
            what is expected next from what fp16 expects, in nats, same_top: share of tokens for which the most likely next token
            is that of fp16, late: change, deviation and divergence of tokens behind the first FEW_TOKENS of a window, if any}
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
from tilus.errors import TilusError

DATA = Path(__file__).parents[1] / "tests" / "data"
TEXTS = "shakespeare.txt", "tempest.txt"
TOKENS, FEW_TOKENS, CHUNK, PAGE = 12288, 1024, 256, 16
CPU = torch.device("cpu")


def expectations(model: Model, window: list[int], kv_dtype: str) -> torch.Tensor:
    """Logarithms of the likelihood of each next token, float32 [tokens of the window, vocabulary]"""
    pages = tuple(range(-(-len(window) // PAGE)))
    runner = TorchRunner(model, len(pages), PAGE, CPU, kv_dtype=kv_dtype)
    rows: list[torch.Tensor] = []
    for start in range(0, len(window), CHUNK):
        item = BatchItem("text", tuple(window[start : start + CHUNK]), start, pages, SamplingParams(), 0)
        step = replace(step_tensors(Batch((item,)), PAGE, CPU), last=None)
        rows.append(model.forward(step, runner.kv_pool.layers).log_softmax(-1))
    return torch.cat(rows)


def compared(wanted: torch.Tensor, found: torch.Tensor, window: list[int]) -> torch.Tensor:
    """float64 [4, tokens - 1], of each token but the first: the negative logarithm of its likelihood as found, how much more that
    is than as wanted, the divergence, and whether the most likely token is the same."""
    wanted, found = wanted[:-1], found[:-1]
    following = torch.tensor(window[1:])[:, None]
    loss, base = (-each.gather(1, following)[:, 0].double() for each in (found, wanted))
    parts = zip(wanted.split(CHUNK), found.split(CHUNK))  # for the memory's sake
    divergence = torch.cat([(w.exp() * (w - f)).sum(-1) for w, f in parts])
    same = found.argmax(-1) == wanted.argmax(-1)
    return torch.stack([loss, loss - base, divergence.double(), same.double()])


def changes(more: torch.Tensor, divergence: torch.Tensor) -> dict[str, float]:
    return {
        "change": round(math.expm1(more.mean().item()), 6),
        "deviation": round(more.std().item() / more.numel() ** 0.5, 6),
        "divergence": round(divergence.mean().item(), 6),
    }


def row_of(kv_dtype: str, nbits: float, found: list[torch.Tensor]) -> dict[str, Any]:
    """found: what `compared` says of each window."""
    losses, more, divergence, same = torch.stack(found, dim=1)  # [windows, tokens - 1] each
    row: dict[str, Any] = {"kv_dtype": kv_dtype, "nbits": nbits, "perplexity": round(math.exp(losses.mean().item()), 4)}
    row |= {**changes(more, divergence), "same_top": round(same.mean().item(), 4)}
    late = FEW_TOKENS - 1  # the first token has no likelihood
    if more.shape[1] > late:
        row["late"] = changes(more[:, late:], divergence[:, late:])
    return row


def measure(kv_dtypes: list[str], texts: list[Path], length: int) -> dict[str, Any]:
    checkpoint = open_checkpoint(default_model())
    plain = load_model(checkpoint, default_kernels(), CPU)
    framed = with_frames(plain, checkpoint.tokenizer, checkpoint.config.max_positions, CPU)  # as a server starts it
    ids = checkpoint.tokenizer.encode("\n".join(path.read_text(encoding="utf-8") for path in texts))[:TOKENS]
    windows = [list(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
    if not windows:
        raise TilusError(f"the texts have {len(ids)} tokens, which is less than a window of --length {length}")
    found: dict[str, list[torch.Tensor]] = {kv_dtype: [] for kv_dtype in kv_dtypes}
    with torch.inference_mode():
        for window in windows:
            wanted = expectations(plain, window, "fp16")
            for kv_dtype in kv_dtypes:
                model = framed if has_frames(kv_dtype) else plain
                result = wanted if kv_dtype == "fp16" else expectations(model, window, kv_dtype)
                found[kv_dtype].append(compared(wanted, result, window))
    values = checkpoint.config.kv_values_per_token * PAGE
    rows: list[dict[str, Any]] = []
    for kv_dtype in kv_dtypes:
        nbits = TorchRunner(plain, 1, PAGE, CPU, kv_dtype=kv_dtype).kv_pool.shape.nbytes * 8 / values
        rows.append(row_of(kv_dtype, nbits, found[kv_dtype]))
        print(json.dumps(rows[-1]), flush=True)
    return {
        "torch": torch.__version__, "python": platform.python_version(), "texts": [path.name for path in texts],
        "length": length, "tokens": len(windows) * (length - 1), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-dtype", nargs="*", choices=KV_DTYPES, default=list(KV_DTYPES), help="default: all")
    parser.add_argument(
        "--text", nargs="*", type=Path, default=[DATA / name for name in TEXTS], help="files, read in turn"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    choose_execution("cpu")
    result = measure(options.kv_dtype, options.text, options.length)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
