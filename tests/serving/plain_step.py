"""A step's tensors token by token: the oracle of those that the server writes."""

from __future__ import annotations

import torch

from serving.core import Batch
from serving.model import StepTensors


def plain_step(batch: Batch, page_size: int, device: torch.device) -> StepTensors:
    """Sequences in the order of the batch, of which those with one token in front are said to decode. All tokens are known."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last: list[int] = []
    ends = [0]
    decodes = 0
    for item in batch.items:
        for position, token_id in enumerate(item.token_ids, item.start):
            token_ids.append(token_id)
            positions.append(position)
            slots.append(item.pages[position // page_size] * page_size + position % page_size)
        if len(token_ids) == decodes + 1 == len(ends):
            decodes += 1
        ends.append(len(token_ids))
        if item.params is not None:
            last += range(len(token_ids) - 1 - item.num_drafts, len(token_ids))
    width = max(len(item.pages) for item in batch.items)
    tables = [[*item.pages, *[0] * (width - len(item.pages))] for item in batch.items]
    q_start = [end - decodes for end in ends[decodes:]]
    lists = token_ids, positions, slots, tables, q_start, [item.kv_len for item in batch.items], last
    *step, wanted = (torch.tensor(values, dtype=torch.int32, device=device) for values in lists)
    return StepTensors(*step, last=wanted, decodes=decodes)
