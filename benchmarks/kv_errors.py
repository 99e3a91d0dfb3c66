"""What quantised key-value caches cost in accuracy: attention over them against float64 over the elements. It needs no GPU.

    python benchmarks/kv_errors.py --out FILE

Sequences of TOKENS tokens with heads of 64 and 128 elements, one query each, whose keys and values are appended by
rope_append (positions 0, so that nothing is turned) and read by paged_decode, both on the reference. Elements are
normal numbers; in "outliers" every sixteenth element of keys is ten times as large. Errors are relative, in the L2 norm over
all queries and heads; bfloat16 is a cache of 16 bits, for comparison.

Output, as JSON: rows of {elements, head_dim, format, nbits: of a cached element, scales and minimums included, error}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tilus.kernels import paged_decode, quantized_cache, rope_append
from tilus.kernels.kv_cache import KV_FORMATS

SEQUENCES, TOKENS, KV_HEADS, GROUP, PAGE = 4, 256, 2, 4, 16
OUTLIERS = {"step": 16, "factor": 10.0}


def rows() -> Iterator[dict[str, Any]]:
    for elements in ("normal", "outliers"):
        for head_dim in (64, 128):
            for name in ("bfloat16", *KV_FORMATS):
                kind = KV_FORMATS.get(name)
                nbits = 16.0 if kind is None else kind.code.nbits + 16 * kind.kinds / head_dim
                error = error_of(elements, head_dim, name)
                yield {"elements": elements, "head_dim": head_dim, "format": name, "nbits": nbits, "error": error}


def error_of(elements: str, head_dim: int, name: str) -> float:
    generator = torch.Generator().manual_seed(head_dim)
    rows = SEQUENCES * TOKENS
    keys_and_values = torch.randn(rows, 2, KV_HEADS, head_dim, generator=generator)
    if elements == "outliers":
        keys_and_values[:, 0, :, :: OUTLIERS["step"]] *= OUTLIERS["factor"]
    keys_and_values = keys_and_values.bfloat16()
    q = torch.randn(SEQUENCES, KV_HEADS * GROUP, head_dim, generator=generator).bfloat16()
    every_q = q.repeat_interleave(TOKENS, dim=0)
    qkv = torch.cat([every_q, keys_and_values.flatten(1, 2)], dim=1).flatten(1)
    pages = rows // PAGE
    if name in KV_FORMATS:
        cache = quantized_cache(name, pages, PAGE, KV_HEADS, head_dim)
    else:
        cache = torch.zeros(pages, 2, PAGE, KV_HEADS, head_dim, dtype=torch.bfloat16)
    cos_sin = torch.cat([torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)], dim=1)
    positions, slots = torch.zeros(rows, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    mixed = rope_append(qkv, positions, cos_sin, slots, cache, device="reference")
    tables = torch.arange(pages, dtype=torch.int32).view(SEQUENCES, -1)
    lens, scale = torch.full((SEQUENCES,), TOKENS, dtype=torch.int32), head_dim**-0.5
    found = paged_decode(mixed[::TOKENS, None].contiguous(), cache, tables, lens, scale, device="reference")[
        :, 0
    ].double()
    keys, values = keys_and_values.double().view(SEQUENCES, TOKENS, 2, KV_HEADS, head_dim).unbind(2)
    queries = q.double().view(SEQUENCES, KV_HEADS, GROUP, head_dim)
    weights = (torch.einsum("shgd,sthd->shgt", queries, keys) * scale).softmax(-1)
    wanted = torch.einsum("shgt,sthd->shgd", weights, values).flatten(1, 2)
    return float(f"{float((found - wanted).norm() / wanted.norm()):.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    found = []
    for row in rows():
        found.append(row)
        print(
            f"{row['elements']:>10}{row['head_dim']:>5}{row['format']:>10}{row['nbits']:>7.2f} bits{row['error']:>10}",
            flush=True,
        )
    if options.out is not None:
        options.out.write_text(json.dumps({"rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
