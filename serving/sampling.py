"""Choosing tokens from logits, for all rows of a batch at once, by one kernel (`tilus.kernels.sample`).

Randomness is counter-based: the numbers that decide a token depend on the request's seed and on how many tokens it has, and on
nothing else. So an answer does not change when others join the batch, or when the sequence was preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.core import BatchItem, SampledToken, SamplingParams, TokenLogprobs
from tilus import kernels


def sample(logits: Tensor, items: Sequence[BatchItem]) -> tuple[SampledToken | None, ...]:
    """The next token of each row. logits: float32 [S, V]; items: S of them, all with params.

    None for a row with NaN or plus infinity, or without a finite logit: the fault of one request must not become another's.
    """
    if not items:
        return ()
    params = [item.params or SamplingParams() for item in items]

    def of_requests(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device)

    choice: Tensor = kernels.sample(
        logits,
        temperature=of_requests([p.temperature for p in params], torch.float32),
        top_k=of_requests([min(p.top_k, logits.shape[1]) for p in params], torch.int32),
        top_p=of_requests([p.top_p for p in params], torch.float32),
        min_p=of_requests([p.min_p for p in params], torch.float32),
        seeds=of_requests([p.seed - (p.seed >> 63 << 64) for p in params], torch.int64),  # the same bits, signed
        positions=of_requests([item.draw for item in items], torch.int32),
    )
    logprobs = _logprobs(logits, choice.clamp(min=0).long(), params)
    return tuple(
        None if token_id < 0 else SampledToken(token_id, logprobs.get(row))
        for row, token_id in enumerate(choice.tolist())
    )


def _logprobs(logits: Tensor, choice: Tensor, params: Sequence[SamplingParams]) -> dict[int, TokenLogprobs]:
    """By row, for those that asked."""
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return {}
    index = torch.tensor(rows, device=logits.device)
    logprobs = logits[index].log_softmax(dim=-1)
    chosen = logprobs.gather(-1, choice[index][:, None])[:, 0].tolist()
    most = min(max(params[row].logprobs or 0 for row in rows), logits.shape[-1])
    values, token_ids = (found.tolist() for found in logprobs.topk(most, dim=-1))
    return {
        row: TokenLogprobs(chosen[i], tuple(zip(token_ids[i], values[i]))[: params[row].logprobs])
        for i, row in enumerate(rows)
    }
