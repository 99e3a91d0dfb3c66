"""Log-probabilities of the tokens of prompts, which evaluations ask for: of steps that are launched as they are, not captured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from serving.core import Batch, SampledToken
from serving.kernels import KvCache
from serving.model import Model, StepTensors
from serving.sampling import logprobs_of, move
from tilus.kernels import token_logprobs


class PromptScores:
    """What a step finds of the `targets` of its items. max_rows: whose logits are in memory at a time."""

    def __init__(self, batch: Batch, max_rows: int) -> None:
        ends = accumulate(len(item.token_ids) for item in batch.in_rows)
        firsts = [(item, end - len(item.token_ids)) for item, end in zip(batch.in_rows, ends) if item.targets]
        self._items = [item for item, _ in firsts]
        self._rows = [row for item, first in firsts for row in range(first, first + len(item.targets))]
        self._max_rows = max_rows
        self._found: list[tuple[Tensor, Tensor]] = []

    def compute(self, model: Model, step: StepTensors, layers: Sequence[KvCache]) -> Tensor:
        """The step's logits, as `Model.forward` gives them; the copies of what is found to the host are under way."""
        x = model.hidden(step, layers)
        targets = [token for item in self._items for token in item.targets]
        counts = [min(item.num_best, model.config.vocab_size) for item in self._items for _ in item.targets]
        columns = move([np.array(column, np.int32) for column in (self._rows, targets, counts)], x.device)
        for some_rows, chosen, numbers in zip(*(column.split(self._max_rows) for column in columns)):
            logits = model.logits(x.index_select(0, some_rows))
            asking = torch.arange(len(chosen), dtype=torch.int32, device=x.device)
            found = token_logprobs(logits, chosen.clone(), asking=asking, counts=numbers.clone())
            self._found.append((found[0].to("cpu", non_blocking=True), found[1].to("cpu", non_blocking=True)))
        return model.logits(x if step.last is None else x.index_select(0, step.last))

    def collect(self) -> dict[str, tuple[int, tuple[SampledToken, ...]]]:
        """By request the place of the first target in its prompt, and all targets; once the copies have arrived."""
        found = (row for values, ids in self._found for row in zip(values.tolist(), ids.tolist()))
        return {
            item.request_id: (
                item.start + 1,
                tuple(SampledToken(token, logprobs_of(*next(found), item.num_best)) for token in item.targets),
            )
            for item in self._items
        }
