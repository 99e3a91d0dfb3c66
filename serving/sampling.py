"""Choosing tokens from logits, for all rows of a batch at once.

Randomness is counter-based (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the number
that decides a token depends on the request's seed and on how many tokens it has, and on nothing else. So an answer
does not change when others join the batch, or when the sequence was preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from serving.core import BatchItem, SampledToken, SamplingParams, TokenLogprobs
from serving.logits import adjusted


def sample(logits: Tensor, items: Sequence[BatchItem]) -> tuple[SampledToken | None, ...]:
    """The next token of each row. logits: float32 [S, V]; items: S of them, all with params.

    None for a row that is not all finite: the fault of one request must not become another's.
    """
    params = [item.params or SamplingParams() for item in items]
    # The largest and the smallest are finite only where all are: NaN is propagated. Much cheaper than to look at each.
    broken = ~(logits.amax(dim=-1).isfinite() & logits.amin(dim=-1).isfinite())
    wanted = adjusted(logits, items)
    choice = _largest(wanted)
    for draw, rows in _draws(params):
        index = torch.tensor(rows, device=logits.device)
        finite = wanted[index].masked_fill(broken[index, None], 0.0)
        uniform = [uniform_number(params[row].seed, items[row].draw) for row in rows]
        choice[index] = draw(finite, [params[row] for row in rows], uniform)
    token_ids, is_broken = torch.stack([choice, broken.to(choice.dtype)]).tolist()
    logprobs = _logprobs(logits, choice, params)
    return tuple(
        None if is_broken[row] else SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)
    )


def _largest(logits: Tensor) -> Tensor:
    """The place of each row's largest element; on a CPU numpy finds it in a tenth of torch's time."""
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(dim=-1)


def uniform_number(seed: int, draw: int) -> float:
    """In [0, 1): the `draw`-th number of the stream `seed`."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=draw)).random())


_Draw = Callable[[Tensor, Sequence[SamplingParams], Sequence[float]], Tensor]


def _draws(params: Sequence[SamplingParams]) -> Iterator[tuple[_Draw, list[int]]]:
    """The rows that are random, by how they are drawn. A row's way depends on nothing but its own parameters."""
    random = [row for row, p in enumerate(params) if p.temperature > 0]
    limited = [row for row in random if params[row].top_k > 0 or params[row].top_p < 1]
    unlimited = [row for row in random if row not in limited]
    if unlimited:
        yield _draw_from_all, unlimited
    if limited:
        yield _draw_from_best, limited


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _draw_from_all(logits: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Tensor:
    """Inverse-transform sampling in the order of the vocabulary: without top_k and top_p, nothing has to be sorted. int64 [S]."""
    scaled = logits.double() / _column([p.temperature for p in params], logits)
    gathered = scaled.softmax(dim=-1).cumsum(dim=-1)
    target = _column(uniform, logits) * gathered[:, -1:]
    return torch.searchsorted(gathered, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _draw_from_best(logits: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Tensor:
    """Inverse-transform sampling, best token first, after temperature, top_k and top_p. int64 [S]."""
    scaled = logits.double() / _column([p.temperature for p in params], logits)
    probabilities = scaled.softmax(dim=-1)
    return _draw_sorted(*_candidates(probabilities, params), params, uniform)


def _candidates(probabilities: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Probabilities and ids, [S, C], of all tokens that top_k and top_p can leave, best first and ties in the vocabulary's order.

    To sort the whole vocabulary takes longer than a step of a small model. Tokens with less than (1 - top_p) / V each have less
    than 1 - top_p together, so that all others reach top_p without them; half of that leaves room for rounding.
    """
    size = probabilities.shape[-1]
    top_k = [min(p.top_k, size) for p in params]
    bound = _column([(1 - p.top_p) / (2 * size) for p in params], probabilities)
    if any(top_k):
        best = probabilities.topk(max(top_k), dim=-1).values
        last = torch.tensor([[max(k, 1) - 1] for k in top_k], device=probabilities.device)
        limited = torch.tensor([[k > 0] for k in top_k], device=probabilities.device)
        bound = torch.where(limited, best.gather(-1, last), bound)
    candidates = probabilities.where(probabilities >= bound, 0.0)
    count = int((candidates > 0).sum(dim=-1).max())
    token_ids = candidates.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    best, order = candidates.gather(-1, token_ids).sort(dim=-1, descending=True, stable=True)
    return best, token_ids.gather(-1, order)


def _draw_sorted(
    probabilities: Tensor, token_ids: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]
) -> Tensor:
    size = probabilities.shape[-1]
    top_k = _column([p.top_k for p in params], probabilities)
    allowed = (torch.arange(size, device=probabilities.device) < top_k) | (top_k == 0)
    probabilities = probabilities * allowed
    # Without top_k the others, which are not here, count too: then the sum of all is 1.
    probabilities = probabilities / torch.where(top_k > 0, probabilities.sum(dim=-1, keepdim=True), 1.0)
    # top_p keeps the shortest list of best tokens that reaches it: those before whom less than top_p has gathered.
    gathered = probabilities.cumsum(dim=-1)
    kept = allowed & (gathered - probabilities < _column([p.top_p for p in params], probabilities))
    gathered = (probabilities * kept).cumsum(dim=-1)
    target = _column(uniform, probabilities) * gathered[:, -1:]
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
