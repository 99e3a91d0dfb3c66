"""Choosing tokens from logits, for all rows of a batch at once.

Randomness is counter-based (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the number
that decides a token depends on the request's seed and on how many tokens it has, and on nothing else. So an answer
does not change when others join the batch, or when the sequence was preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serving.core import BatchItem, SampledToken, SamplingParams, TokenLogprobs


def sample(logits: Tensor, items: Sequence[BatchItem]) -> tuple[SampledToken | None, ...]:
    """The next token of each row. logits: float32 [S, V]; items: S of them, all with params.

    None for a row that is not all finite: the fault of one request must not become another's.
    """
    params = [item.params or SamplingParams() for item in items]
    broken = ~logits.isfinite().all(dim=-1)
    logits = logits.masked_fill(broken[:, None], 0.0)
    choice = logits.argmax(dim=-1)
    random_rows = [row for row, p in enumerate(params) if p.temperature > 0]
    if random_rows:
        index = torch.tensor(random_rows, device=logits.device)
        uniform = [uniform_number(params[row].seed, items[row].draw) for row in random_rows]
        choice[index] = _draw(logits[index], [params[row] for row in random_rows], uniform)
    token_ids, is_broken = torch.stack([choice, broken.to(choice.dtype)]).tolist()
    logprobs = _logprobs(logits, choice, params)
    return tuple(
        None if is_broken[row] else SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)
    )


def uniform_number(seed: int, draw: int) -> float:
    """In [0, 1): the `draw`-th number of the stream `seed`."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=draw)).random())


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Tensor:
    """Inverse-transform sampling from each row's distribution after temperature, top_k and top_p. int64 [S]."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.double() / column([p.temperature for p in params])
    ordered, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    allowed = ranks < column([p.top_k or logits.shape[-1] for p in params])
    # top_p keeps the shortest list of best tokens that reaches it: those before whom less than top_p has gathered.
    probabilities = probabilities * allowed
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    gathered = probabilities.cumsum(dim=-1)
    kept = allowed & (gathered - probabilities < column([p.top_p for p in params]))
    gathered = (probabilities * kept).cumsum(dim=-1)
    target = column(uniform) * gathered[:, -1:]
    rank = (gathered <= target).sum(dim=-1).clamp(max=kept.sum(dim=-1) - 1)
    return token_ids.gather(-1, rank[:, None])[:, 0]


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
