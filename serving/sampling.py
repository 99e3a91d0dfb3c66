"""Choosing tokens from logits on the device, for all rows of a step at once: what requests ask for becomes inputs of kernels.

Random numbers are counter-based (Philox; see `tilus.kernels.sampling`): a token depends on the row's logits, the request's
parameters and seed, and on how many tokens were sampled before, and on nothing else. So an answer does not change when others
join the batch, or when the sequence was preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    tokens: int32 [max_rows] on the device, what the last `run` chose.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self._vocab_size = vocab_size
        self._device = device
        self._columns = _Columns(torch.zeros(_WORDS * max_rows, dtype=torch.int32, device=device))
        self.tokens = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self._edits: _Edits | None = None
        self._asking: _Asking | None = None

    @staticmethod
    def plain(items: Sequence[BatchItem]) -> bool:
        """Whether a step's rows ask for no more than temperature, top_k, top_p and min_p: a captured `run` is for these only."""
        return not any(_asks(item) or _edits(item) for item in items)

    def write(self, items: Sequence[BatchItem]) -> None:
        """Start the copy of the parameters of a step's rows: an item for each, those of drafts with a draw of their own."""
        staging = torch.zeros(_WORDS * self.max_rows, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        _Columns(staging).fill(items)
        self._columns.memory.copy_(staging, non_blocking=True)
        self._edits = self._asking = None
        if any(_edits(item) for item in items):
            self._edits = _Edits(*_move(_edit_arrays(items, self._vocab_size, self.max_rows), self._device))
        if any(_asks(item) for item in items):
            self._asking = _Asking(*_move(_asking_arrays(items, self._vocab_size), self._device))

    def run(self, logits: Tensor, rows: int) -> Tensor:
        """Launch the kernels. logits: float32 [rows or more, V], which are not changed; rows without an item are greedy.

        Returns: int32 [rows] on the device, at the same address in each step: -1 where the logits are not numbers.
        """
        logits, tokens, edits = logits[:rows], self.tokens[:rows], self._edits
        wanted = logits
        if edits is not None:
            wanted = edit_logits(
                logits, bits=edits.bits.view(torch.uint8), mask_of=edits.mask_of[:rows], rows=edits.rows, tokens=edits.tokens,
                penalties=edits.penalties.view(torch.float32), addends=edits.addends.view(torch.float32),
            )  # fmt: skip
        sample(wanted, **{name: column[:rows] for name, column in self._columns.by_name.items()}, out=tokens)
        if self._asking is not None:
            self._asking.found = token_logprobs(logits, tokens, asking=self._asking.rows, counts=self._asking.counts)
        return tokens

    def collect(self, items: Sequence[BatchItem]) -> Callable[[], Tokens]:
        """Start the copy of what the last `run` found to the host.

        Returns: what waits for it and gives a token for each row; None where the logits are not numbers, or nothing is allowed.
        """
        tokens = self.tokens[: len(items)].to("cpu", non_blocking=True, copy=True)
        found = () if self._asking is None else tuple(t.to("cpu", non_blocking=True) for t in self._asking.found)
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if copied is not None:
            copied.record()

        def wait() -> Tokens:
            if copied is not None:
                copied.synchronize()
            logprobs = _logprobs_by_row(items, self._vocab_size, *found) if found else {}
            return tuple(
                None if token_id < 0 else SampledToken(token_id, logprobs.get(row))
                for row, token_id in enumerate(tokens.tolist())
            )

        return wait


def _asks(item: BatchItem) -> bool:
    """For log-probabilities."""
    return item.params is not None and item.params.logprobs is not None


def _edits(item: BatchItem) -> bool:
    """Whether logits are changed before a token is drawn."""
    params = item.params
    return item.allowed is not None or (params is not None and (bool(params.logit_bias) or params.needs_history))


class _Columns:
    """Parameters of rows, by their names in `tilus.kernels.sample`, in one piece of memory, int32 [_WORDS * rows]."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        rows = len(memory) // _WORDS
        seeds, temperature, top_k, top_p, min_p, positions, _ = memory.split([2 * rows, *[rows] * 6])
        self.by_name = {
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
            self.by_name[name].numpy()[: len(items)] = column


@dataclass(frozen=True)
class _Edits:
    """Arguments of `tilus.kernels.edit_logits`, all as int32."""

    bits: Tensor
    mask_of: Tensor
    rows: Tensor
    tokens: Tensor
    penalties: Tensor
    addends: Tensor


@dataclass
class _Asking:
    """Rows that want log-probabilities, of how many tokens beside the chosen one, and what `token_logprobs` found."""

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


def _asking_arrays(items: Sequence[BatchItem], vocab_size: int) -> list[npt.NDArray[np.int32]]:
    asking = [(row, item.params.logprobs or 0) for row, item in enumerate(items) if item.params and _asks(item)]
    rows, counts = np.array(asking, np.int32).T
    return [rows.copy(), np.minimum(counts, vocab_size)]


def _logprobs_by_row(
    items: Sequence[BatchItem], vocab_size: int, logprobs: Tensor, best: Tensor
) -> dict[int, TokenLogprobs]:
    rows = [row for row, item in enumerate(items) if _asks(item)]
    found: dict[int, TokenLogprobs] = {}
    for row, (of_chosen, *of_best), token_ids in zip(rows, logprobs.tolist(), best.tolist()):
        params = items[row].params
        count = min((params and params.logprobs) or 0, vocab_size)
        found[row] = TokenLogprobs(of_chosen, tuple(zip(token_ids[:count], of_best[:count])))
    return found


def _move(arrays: Sequence[npt.NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """To the device in one copy; each starts at a multiple of 64 bytes, so that kernels see one alignment."""
    starts = np.cumsum([0, *(-(-array.size // 16) * 16 for array in arrays)])
    staging = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for array, start in zip(arrays, starts):
        staging.numpy()[start : start + array.size] = array.reshape(-1)
    moved = staging.to(device, non_blocking=True)
    return [moved[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts)]
