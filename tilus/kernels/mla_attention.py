"""Multi-head latent attention on any device, without haste: what `mla_decode` and `mla_prefill` do where there is no Hopper GPU.

A block computes 16 heads of one query token. Latents come straight from global memory, 16 tokens at a time.
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.kernels.allocate import empty
from tilus.kernels.attention import find_queries
from tilus.kernels.mla_stages import LATENT, WIDTH
from tilus.kernels.online_softmax import OnlineSoftmax

WARPS = 4
HEADS = 16
TOKENS = 16  # of the cache, at a time: every page is a multiple
COLUMNS = 64  # that are multiplied together


@tilus.kernel
def mla_attention_kernel(
    q: Tensor["dtype", "tokens", "heads", "width"],
    cache: Tensor["dtype", "pages", "page_size", "width"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    q_start: Tensor[int32, "sequences_plus_1"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["dtype", "tokens", "heads", "latent"],
    scale_log2: float,
    lse: Tensor[f32, "tokens", "heads"] = None,
    *,
    width: Const,
    latent: Const,
    page_size: Const,
):
    tilus.grid(q.shape[0], q.shape[1] // HEADS, warps=WARPS)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    row, head = tilus.block_id(0), tilus.block_id(1) * HEADS
    sequence, _ = find_queries(q_start, kv_lens.shape[0], 1, row)
    length = kv_lens[sequence]
    seen = min(length - (q_start[sequence + 1] - row) + 1, length)
    softmax = OnlineSoftmax([HEADS, 1], 1)
    acc = tilus.zeros([HEADS, latent])
    token = tilus.arange(TOKENS, shape=[1, TOKENS], axis=1)
    for first in tilus.range(0, seen, TOKENS):
        page = cache[block_tables[sequence, first // page_size]]
        latents = tilus.narrow(page, 0, first % page_size, min(seen - first, TOKENS))
        scores = tilus.zeros([HEADS, TOKENS])
        for column in tilus.range(0, width, COLUMNS):
            left = tilus.load(q, [row, head, column], [HEADS, COLUMNS], dims=[1, 2])
            right = tilus.load(latents, [0, column], [TOKENS, COLUMNS])
            scores = tilus.dot(left, tilus.transpose(right), scores)
        weights, shrink = softmax.weigh(tilus.where(token < seen - first, scores * scale_log2, -math.inf))
        values = tilus.load(latents, [0, 0], [TOKENS, latent])
        acc = tilus.dot(weights.to(q.dtype), values, acc * shrink)
    found = softmax.total > 0.0
    result = acc * (1.0 / tilus.where(found, softmax.total, 1.0))
    tilus.store(out, [row, head, 0], result.to(out.dtype), dims=[1, 2])
    if lse is not None:
        logs = (tilus.log2(tilus.where(found, softmax.total, 1.0)) + softmax.highest) * math.log(2.0)
        tilus.store(lse, [row, head], tilus.where(found, logs, -math.inf).reshape([HEADS]), dims=[1])


def mla_attention(
    q: Any,
    cache: Any,
    block_tables: Any,
    q_start: Any,
    kv_lens: Any,
    scale: float,
    return_lse: bool,
    device: str | None,
) -> tuple[Any, Any]:
    """(output [M, H, 512], logarithms [M, H] or None) of ragged queries, as `mla_prefill` says."""
    out = empty(q, (*q.shape[:2], LATENT))
    lse = empty(q, tuple(q.shape[:2]), "float32") if return_lse else None
    if q.shape[0]:
        mla_attention_kernel.on(device)(
            q, cache, block_tables, q_start, kv_lens, out, scale * math.log2(math.e), lse,
            width=WIDTH, latent=LATENT, page_size=cache.shape[1],
        )  # fmt: skip
    return out, lse
