"""Choosing tokens from logits on the device, for all rows of a step at once: what requests ask for becomes inputs of kernels.

Random numbers are counter-based (Philox; see `tilus.kernels.sampling`): a token depends on the row's logits, the request's
parameters and seed, and on how many tokens were sampled before, and on nothing else. So an answer does not change when others
join the batch, or when the sequence was preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.core import BatchItem, SampledToken, SamplingParams, TokenLogprobs
from tilus.kernels import edit_logits, sample, token_logprobs

Tokens = tuple[SampledToken | None, ...]
_GREEDY = SamplingParams(temperature=0.0)
_WORDS = 8  # of 32 bits, for the parameters of a row


class Sampler:
    """Inputs and outputs of sampling on a device, for steps of up to max_rows rows of logits.

    A step is write, run, collect. On a GPU they only put work into the current stream, and nothing waits. What `run` launches
    follows from the last `write`: for plain rows always the same, at fixed addresses, so that it can be captured.
    tokens, draws: int32 [max_rows] on the device, what the last run chose, for the next step to read there, and how many tokens
    each row's request had been given before.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self._vocab_size = vocab_size
        self._device = device
        self._parameters = torch.zeros(_WORDS * max_rows, dtype=torch.int32, device=device)
        self._columns = _columns(self._parameters)
        self.draws = self._columns[-1]
        self._staging = _Staging(max_rows, device)
        self.tokens = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self._edits: dict[str, Any] | None = None  # arguments of `edit_logits`
        self._asking: _Asking | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the rows ask for no more than temperature, top_k, top_p and min_p: a captured `run` is for these only."""
        return self._edits is None and self._asking is None

    def write(self, items: Sequence[BatchItem]) -> None:
        """Start the copy of the parameters of a step's rows: an item has one in front of each of its drafts, and one behind its
        last token, with draws that follow each other.
        """
        rows = _rows_of(items)
        self._staging.fill([item.params or _GREEDY for item in rows], _draws_of(items))
        self._staging.copy_to(self._parameters)
        self._edits = self._asking = None
        if self._staging.edits or any(item.allowed is not None for item in rows):
            bits, mask_of, places, tokens, penalties, addends = move(
                _edit_arrays(rows, self._vocab_size, self.max_rows), self._device
            )
            self._edits = {
                "bits": bits.view(torch.uint8), "mask_of": mask_of, "rows": places, "tokens": tokens,
                "penalties": penalties.view(torch.float32), "addends": addends.view(torch.float32),
            }  # fmt: skip
        if self._staging.asks:
            wanted = _wanted_logprobs(rows, self._vocab_size)
            places, counts = move([np.array([*column], np.int32) for column in zip(*wanted.items())], self._device)
            self._asking = _Asking(wanted, places, counts)

    def run(self, logits: Tensor, rows: int) -> Tensor:
        """Launch the kernels. logits: float32 [rows or more, V], which are not changed; rows without an item are greedy.

        Returns: the first rows of `tokens`, -1 where the logits are not numbers or nothing is allowed.
        """
        logits, tokens = logits[:rows], self.tokens[:rows]
        wanted = logits
        if self._edits is not None:
            wanted = edit_logits(logits, **{**self._edits, "mask_of": self._edits["mask_of"][:rows]})
        seeds, temperature, top_k, top_p, min_p, positions = (column[:rows] for column in self._columns)
        sample(
            wanted, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds, positions=positions, out=tokens
        )  # fmt: skip
        if self._asking is not None:
            self._asking.found = token_logprobs(logits, tokens, asking=self._asking.rows, counts=self._asking.counts)
        return tokens

    def collect(self, items: Sequence[BatchItem]) -> Callable[[], Tokens]:
        """Start the copy of what the last `run` found for the items of the last `write` to the host.

        Returns: what waits for it and gives a token for each row; None where the logits are not numbers, or nothing is allowed.
        """
        rows = _rows_of(items)
        tokens = self.tokens[: len(rows)].to("cpu", non_blocking=True, copy=True)
        asking = self._asking
        found = () if asking is None else tuple(t.to("cpu", non_blocking=True) for t in asking.found)
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if copied is not None:
            copied.record()

        def wait() -> Tokens:
            if copied is not None:
                copied.synchronize()
            if asking is None:
                return tuple([None if token < 0 else SampledToken(token) for token in tokens.tolist()])
            answers = zip(asking.wanted.items(), *(part.tolist() for part in found))
            logprobs = {row: logprobs_of(values, best, count) for (row, count), values, best in answers}
            return tuple(
                None if token < 0 else SampledToken(token, logprobs.get(row))
                for row, token in enumerate(tokens.tolist())
            )

        return wait


def _rows_of(items: Sequence[BatchItem]) -> Sequence[BatchItem]:
    """The item of each row."""
    if not any(item.num_drafts for item in items):
        return items
    return [item for item in items for _ in range(1 + item.num_drafts)]


def _draws_of(items: Sequence[BatchItem]) -> list[int]:
    """The draw of each row."""
    if not any(item.num_drafts for item in items):
        return [item.draw for item in items]
    return [draw for item in items for draw in range(item.draw, item.draw + 1 + item.num_drafts)]


def _edits(item: BatchItem) -> bool:
    """Whether logits are changed before a token is drawn."""
    return item.allowed is not None or (item.params is not None and item.params.edits_logits)


def _columns(memory: Tensor) -> list[Tensor]:
    """Seeds, temperature, top_k, top_p, min_p and positions of rows, which lie in one piece of memory."""
    rows = len(memory) // _WORDS
    seeds, temperature, top_k, top_p, min_p, positions, _ = memory.split([2 * rows, *[rows] * 6])
    floats = [column.view(torch.float32) for column in (temperature, top_p, min_p)]
    return [seeds.view(torch.int64), floats[0], top_k, floats[1], floats[2], positions]


class _Staging:
    """Parameters of rows in the host's memory, on their way to the device. asks, edits: whether some row's do."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._memory = torch.zeros(_WORDS * max_rows, dtype=torch.int32, pin_memory=device.type == "cuda")
        *self._columns, self._positions = (column.numpy() for column in _columns(self._memory))
        self._params: list[SamplingParams] = []
        self.asks = self.edits = False
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, params: list[SamplingParams], draws: Sequence[int]) -> None:
        """Of so many rows. Those behind them are greedy."""
        if self._copied is not None:
            self._copied.synchronize()
        if params != self._params:  # else the same requests go on, which is quickly seen
            self.asks = any(p.logprobs is not None for p in params)
            self.edits = any(p.edits_logits for p in params)
            padded = params + [_GREEDY] * (len(self._params) - len(params))
            values = (
                np.array([p.seed for p in padded], np.uint64).view(np.int64), [p.temperature for p in padded],
                [min(p.top_k, 2**31 - 1) for p in padded], [p.top_p for p in padded], [p.min_p for p in padded],
            )  # fmt: skip
            for column, of_rows in zip(self._columns, values):
                column[: len(padded)] = of_rows
            self._params = params
        self._positions[: len(params)] = draws

    def copy_to(self, there: Tensor) -> None:
        there.copy_(self._memory, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


@dataclass
class _Asking:
    """Rows that want log-probabilities, of how many tokens beside the chosen one (`wanted`, also on the device), and what
    `token_logprobs` found."""

    wanted: dict[int, int]
    rows: Tensor
    counts: Tensor
    found: tuple[Tensor, ...] = ()


def _edit_arrays(items: Sequence[BatchItem], vocab_size: int, max_rows: int) -> list[npt.NDArray[np.int32]]:
    masks = {item.allowed: None for item in items if item.allowed is not None}
    nbytes = -(-vocab_size // 32) * 4
    bits = np.frombuffer(b"".join(mask[:nbytes].ljust(nbytes, b"\0") for mask in masks) or bytes(nbytes), np.int32)
    places = {mask: place for place, mask in enumerate(masks)}
    mask_of = np.full(max_rows, -1, np.int32)
    mask_of[: len(items)] = [-1 if item.allowed is None else places[item.allowed] for item in items]
    edits = [(row, *_edits_of(item)) for row, item in enumerate(items) if _edits(item)]
    rows = np.repeat(np.array([row for row, *_ in edits], np.int32), [len(tokens) for _, tokens, *_ in edits])
    tokens, penalties, addends = (np.concatenate(arrays) for arrays in list(zip(*edits))[1:])
    return [
        bits.reshape(-1, nbytes // 4), mask_of, rows, tokens.astype(np.int32), penalties.astype(np.float32).view(np.int32),
        addends.astype(np.float32).view(np.int32),
    ]  # fmt: skip


def _edits_of(item: BatchItem) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(tokens, what their logits are divided by or multiplied with, what is added), each token once."""
    params = item.params or _GREEDY
    answer, counts = np.unique(item.history[len(item.history) - item.draw :], return_counts=True)
    seen = np.unique(np.array(item.history if params.repetition_penalty != 1.0 else (), np.int64))
    favoured = np.array([token for token, _ in params.logit_bias], np.int64)
    tokens = np.unique(np.concatenate([seen, answer.astype(np.int64), favoured]))
    penalties, addends = np.ones(len(tokens)), np.zeros(len(tokens))
    penalties[np.searchsorted(tokens, seen)] = params.repetition_penalty
    addends[np.searchsorted(tokens, answer)] -= params.presence_penalty + params.frequency_penalty * counts
    np.add.at(addends, np.searchsorted(tokens, favoured), [bias for _, bias in params.logit_bias])
    return tokens, penalties, addends


def _wanted_logprobs(items: Sequence[BatchItem], vocab_size: int) -> dict[int, int]:
    """By row that wants log-probabilities, of how many tokens beside the chosen one."""
    wanted = {row: item.params.logprobs for row, item in enumerate(items) if item.params is not None}
    return {row: min(count, vocab_size) for row, count in wanted.items() if count is not None}


def logprobs_of(values: Sequence[float], token_ids: Sequence[int], count: int) -> TokenLogprobs:
    """A row of what `token_logprobs` gives, of which `count` best tokens were asked for."""
    return TokenLogprobs(values[0], tuple(zip(token_ids[:count], values[1 : count + 1])))


def move(arrays: Sequence[npt.NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """To the device in one copy; each starts at a multiple of 64 bytes, so that kernels see one alignment."""
    starts = np.cumsum([0, *(-(-array.size // 16) * 16 for array in arrays)])
    staging = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for array, start in zip(arrays, starts):
        staging.numpy()[start : start + array.size] = array.reshape(-1)
    moved = staging.to(device, non_blocking=True)
    return [moved[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts)]
