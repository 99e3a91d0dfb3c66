"""Choosing tokens from logits on the device, for all rows of a step at once: what requests ask for becomes inputs of kernels.

Random numbers are counter-based (Philox; see `tilus.kernels.sampling`): a token depends on the row's logits, the request's
parameters and seed, and on how many tokens were sampled before, and on nothing else. So an answer does not change when others
join the batch, or when the sequence was preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from serving.core import BatchItem, SampledToken, SamplingParams, TokenLogprobs
from tilus.kernels import sample

Tokens = tuple[SampledToken | None, ...]
_GREEDY = SamplingParams(temperature=0.0)


class Sampler:
    """The inputs and outputs of sampling on a device, for steps of up to max_rows rows of logits.

    A step is write, run, collect, each of which returns at once on a GPU: they only put work into the current stream. What `run`
    launches follows from the last `write`: for plain rows always the same, at fixed addresses, so that it can be captured.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self._vocab_size = vocab_size
        self._device = device
        self._inputs = _Inputs(torch.zeros(_WORDS * max_rows, dtype=torch.int32, device=device), max_rows)
        self.tokens = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self._logits: Tensor | None = None

    @staticmethod
    def plain(items: Sequence[BatchItem]) -> bool:
        """Whether a step needs no more than temperature, top_k, top_p and min_p: then a captured `run` may be replayed."""
        return not any(
            item.allowed is not None or (p := item.params or _GREEDY).logprobs is not None or p.logit_bias
            or p.needs_history for item in items
        )  # fmt: skip

    def write(self, items: Sequence[BatchItem]) -> None:
        """Start the copy of the parameters of a step's rows: an item for each, those of drafts with a draw of their own."""
        staging = torch.zeros_like(self._inputs.memory, device="cpu", pin_memory=self._device.type == "cuda")
        _Inputs(staging, self.max_rows).fill(items)
        self._inputs.memory.copy_(staging, non_blocking=True)

    def run(self, logits: Tensor, rows: int) -> Tensor:
        """Launch the kernels. logits: float32 [at least rows, V]. Returns int32 [rows], on the device, valid until the next
        run: -1 where the logits are not numbers."""
        self._logits = logits
        of_rows = {name: column[:rows] for name, column in self._inputs.columns.items()}
        return sample(logits[:rows], **of_rows, out=self.tokens[:rows])

    def collect(self, items: Sequence[BatchItem]) -> Callable[[], Tokens]:
        """Start the copy of what the last `run` chose to the host. The result waits for it: a token for each row, None where
        the logits are not numbers."""
        if not items:
            return tuple
        count = len(items)
        tokens = self.tokens[:count].to("cpu", non_blocking=True, copy=True)  # the next run may come before the wait
        logprobs = _logprobs(self._logits, self.tokens[:count], [item.params or _GREEDY for item in items])
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()

        def wait() -> Tokens:
            if copied is not None:
                copied.synchronize()
            return tuple(
                None if token_id < 0 else SampledToken(token_id, logprobs.get(row))
                for row, token_id in enumerate(tokens.tolist())
            )

        return wait


_WORDS = 8  # of 32 bits for a row


class _Inputs:
    """Parameters of rows, columns that lie in one piece of memory."""

    def __init__(self, memory: Tensor, max_rows: int) -> None:
        self.memory = memory
        seeds, temperature, top_k, top_p, min_p, positions, _ = memory.split([2 * max_rows, *[max_rows] * 6])
        self.columns = {
            "seeds": seeds.view(torch.int64), "temperature": temperature.view(torch.float32), "top_k": top_k,
            "top_p": top_p.view(torch.float32), "min_p": min_p.view(torch.float32), "positions": positions,
        }  # fmt: skip

    def fill(self, items: Sequence[BatchItem]) -> None:
        params = [item.params or _GREEDY for item in items]
        values = {
            "seeds": np.array([p.seed for p in params], np.uint64).view(np.int64),
            "temperature": [p.temperature for p in params], "top_k": [min(p.top_k, 2**31 - 1) for p in params],
            "top_p": [p.top_p for p in params], "min_p": [p.min_p for p in params],
            "positions": [item.draw for item in items],
        }  # fmt: skip
        for name, column in values.items():
            self.columns[name].numpy()[: len(items)] = column


def _logprobs(logits: Tensor | None, choice: Tensor, params: Sequence[SamplingParams]) -> dict[int, TokenLogprobs]:
    """By row, for those that asked."""
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not rows or logits is None:
        return {}
    index = torch.tensor(rows, device=logits.device)
    logprobs = logits[index].log_softmax(dim=-1)
    chosen = logprobs.gather(-1, choice[index][:, None].clamp(min=0).long())[:, 0].tolist()
    most = min(max(params[row].logprobs or 0 for row in rows), logits.shape[-1])
    values, token_ids = (found.tolist() for found in logprobs.topk(most, dim=-1))
    return {
        row: TokenLogprobs(chosen[i], tuple(zip(token_ids[i], values[i]))[: params[row].logprobs])
        for i, row in enumerate(rows)
    }
