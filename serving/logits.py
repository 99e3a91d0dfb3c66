"""What a request asks of the logits before a token is drawn: penalties, biases, a grammar's mask, min_p.

Rows depend on nothing but themselves. In this order: repetition, frequency and presence penalties, biases, then the mask and,
of what it leaves, min_p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serving.core import BatchItem, SamplingParams


def adjusted(logits: Tensor, items: Sequence[BatchItem]) -> Tensor:
    """The logits from which tokens are drawn. logits: float32 [S, V], left as they are; items: S of them, all with params.

    The same object when no row asks for anything; -inf where a token must not be drawn.
    """
    asked = [(row, item, item.params) for row, item in enumerate(items) if item.params and _asks(item, item.params)]
    if not asked:
        return logits
    logits = logits.clone()
    for row, item, params in asked:
        _penalise(logits[row], item, params)
        for token_id, bias in params.logit_bias:
            logits[row, token_id] += bias
        if item.allowed is not None:
            logits[row].masked_fill_(~_allowed_tokens(item.allowed, logits.shape[-1]).to(logits.device), -math.inf)
        if params.min_p > 0:  # p / p_best >= min_p, and p is exp(logit / temperature) but for a factor
            least = logits[row].max() + params.temperature * math.log(params.min_p)
            logits[row].masked_fill_(logits[row] < least, -math.inf)
    return logits


def _asks(item: BatchItem, params: SamplingParams) -> bool:
    return params.needs_history or bool(params.logit_bias) or params.min_p > 0 or item.allowed is not None


def _penalise(logits: Tensor, item: BatchItem, params: SamplingParams) -> None:
    """logits: a row, changed in place. Repetition: Keskar et al., "CTRL", 2019; presence and frequency: OpenAI's definition."""
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(item.history)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    answer = item.history[len(item.history) - item.draw :]
    if answer and (params.frequency_penalty or params.presence_penalty):
        token_ids, counts = np.unique(answer, return_counts=True)
        penalty = params.frequency_penalty * counts + params.presence_penalty
        logits[torch.from_numpy(token_ids).to(logits.device)] -= torch.from_numpy(penalty).to(logits)


def _allowed_tokens(bits: bytes, size: int) -> Tensor:
    """bool [size] of a bitmask; what lies behind its end is not allowed."""
    allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=size, bitorder="little")
    return torch.from_numpy(allowed.astype(np.bool_))
