"""The tensors of a step in memory that stays where it is, so that captured steps find them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.config import MAX_DRAFTS
from serving.core import UNKNOWN, Batch, BatchItem
from serving.model import StepTensors
from serving.sampling import move
from serving.step_shapes import StepShape
from tilus.kernels import follow_drafts

_NO_TOKEN = -2
_ALIGNMENT = 16  # int32 values: arrays start at multiples of 64 bytes, so that kernels see one alignment


@dataclass(frozen=True)
class _Arrays:
    """Of a shape, in the host's memory. sources: where each row's token is: in what the step before sampled, and `given` behind
    that. samples: rows that are sampled."""

    given: npt.NDArray[np.int32]
    sources: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int32]
    kv_lens: npt.NDArray[np.int32]
    q_start: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int32]


class StepInputs:
    """Steps of some shapes, which are written to one piece of memory, on a GPU by one copy.

    Block tables are at its end, the arrays of a shape right in front of them, so that what a step needs is in one run. Most of a
    block table is that of the step before: only what has changed is written. last: what the step before sampled, on the device.
    """

    def __init__(self, shapes: Sequence[StepShape], page_size: int, max_pages: int, last: Tensor) -> None:
        self._page_size, self._max_pages, self._last, self._num_last = page_size, max_pages, last, len(last)
        self._front = max(_starts(shape)[-1] for shape in shapes)
        sequences = max(shape.decodes + shape.others for shape in shapes)
        on_gpu = last.device.type == "cuda"
        self._host = torch.zeros(self._front + sequences * max_pages, dtype=torch.int32, pin_memory=on_gpu)
        self._there = self._host.to(last.device)  # on a CPU the same
        self._copied = torch.cuda.Event() if on_gpu else None
        self._tables = self._host[self._front :].view(sequences, max_pages).numpy()
        self._token_ids = torch.zeros(max(shape.rows for shape in shapes), dtype=torch.int32, device=last.device)
        self._arrays: dict[StepShape, _Arrays] = {}
        self._known: dict[str, tuple[int, tuple[int, ...]]] = {}  # by request: the row, and the pages that are there
        self._ends: dict[str, int] = {}  # by request: the row behind its last one

    def step(self, shape: StepShape) -> StepTensors:
        _, _, positions, slots, kv_lens, q_start, samples = self._parts(self._there, shape)
        return StepTensors(
            self._token_ids[: shape.rows], positions, slots, self._table(shape), q_start, kv_lens,
            last=samples if shape.others else None, decodes=shape.decodes,
        )  # fmt: skip

    def gather(self, shape: StepShape) -> None:
        """Put the tokens in their places, behind `write`; in a GPU's graph, as some are known only there.

        A sequence without numbers has -1 in `last`, and ends as soon as that is known; until then any other token will do.
        """
        given, sources, *_ = self._parts(self._there, shape)
        tokens = self._token_ids[: shape.rows]
        torch.index_select(torch.cat((self._last, given)), 0, sources, out=tokens).clamp_(min=0)

    def write(self, batch: Batch, shape: StepShape, rows: Mapping[str, int]) -> None:
        """A batch that fits the shape. rows: of the tokens that the last step sampled, by request.

        What earlier sequences left in a row of the block tables, behind its sequence's pages, is never read. Waits for the copy
        of the batch before, which begins when the step in front of that has ended.
        """
        if self._copied is not None:
            self._copied.synchronize()
        items, singles = batch.in_rows, len(batch.items) - len(batch.others)
        self._write_tables(items, [*range(singles), *range(shape.decodes, shape.decodes + len(items) - singles)])
        ends = self._write_rows(items, singles, shape, rows)
        self._ends = dict(zip(self._known, ends.tolist()))
        if shape.others:
            self._write_samples(batch, shape)
        if self._there is not self._host:
            sequences = shape.decodes + shape.others
            used = slice(self._front - _starts(shape)[-1], self._front + sequences * self._max_pages)
            self._there[used].copy_(self._host[used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def follow(
        self, shape: StepShape, items: Sequence[BatchItem], before: Mapping[str, tuple[int, ...]], rows: Mapping[str, int],
        next_rows: Mapping[str, int], draws: Tensor,
    ) -> None:  # fmt: skip
        """Behind `write` and in front of `gather`: move what follows drafts that did not agree, which only the device knows.

        items: some of those that were written, with drafts in the step before. before: these, by request. rows, next_rows: of the
        last token that the step before sampled, and that this one does. draws: of what this step samples, on the device.
        """
        _, sources, positions, slots, kv_lens, *_ = self._parts(self._there, shape)
        jobs = self._jobs(items, before, rows, next_rows)
        follow_drafts(
            move([jobs], draws.device)[0], self._last, sources=sources, positions=positions, slots=slots, kv_lens=kv_lens,
            tables=self._table(shape), draws=draws, page_size=self._page_size,
        )  # fmt: skip

    def _jobs(
        self, items: Sequence[BatchItem], before: Mapping[str, tuple[int, ...]], rows: Mapping[str, int],
        next_rows: Mapping[str, int],
    ) -> npt.NDArray[np.int32]:  # fmt: skip
        """Of `follow_drafts`."""
        names = [item.request_id for item in items]
        q_lens, counts = np.array([(len(item.token_ids), len(before[item.request_id])) for item in items]).T
        places = np.array([(self._ends[n], self._known[n][0], next_rows[n] + 1, rows[n]) for n in names])
        drafts = np.array([before[name] + (_NO_TOKEN,) * (MAX_DRAFTS - len(before[name])) for name in names])
        of_row = np.repeat(np.arange(len(names)), q_lens)
        back = np.arange(len(of_row)) - np.cumsum(q_lens)[of_row]  # from an item's end
        jobs = np.zeros((len(of_row), 8 + MAX_DRAFTS), np.int32)
        ends, sequences, draws, last = places[of_row].T
        fields = (ends + back, sequences, draws + back, last - counts[of_row], counts[of_row], back == -q_lens[of_row])
        jobs[:, : len(fields)] = np.stack(fields, 1)
        jobs[:, 8:] = drafts[of_row]
        return jobs

    def _table(self, shape: StepShape) -> Tensor:
        sequences = shape.decodes + shape.others
        return self._there[self._front : self._front + sequences * self._max_pages].view(sequences, -1)

    def _write_samples(self, batch: Batch, shape: StepShape) -> None:
        items, samples = batch.sampled, self._array(shape).samples
        ends, counts = (
            np.array([(self._ends[item.request_id], 1 + item.num_drafts) for item in items], int).reshape(-1, 2).T
        )
        wanted = np.repeat(ends - np.cumsum(counts), counts) + np.arange(counts.sum())
        samples[: len(wanted)], samples[len(wanted) :] = wanted, 0

    def _write_rows(
        self, items: Sequence[BatchItem], singles: int, shape: StepShape, rows: Mapping[str, int]
    ) -> npt.NDArray[np.int64]:
        """Of tokens and of sequences, all but block tables; the row behind each item's last one."""
        arrays, made_up = self._array(shape), shape.decodes - singles
        by_item, starts = [item.token_ids for item in items], np.array([item.start for item in items], np.int64)
        tokens = np.array([*chain.from_iterable(by_item)], np.int32)
        places, owners = np.arange(len(tokens)), np.arange(len(items))
        if len(tokens) == len(items):  # a token each
            ends, positions, of_row = places + 1, starts, places.copy()
        else:
            q_lens = np.array([*map(len, by_item)], np.int64)
            ends, of_row = np.cumsum(q_lens), np.repeat(owners, q_lens)
            positions = places + (starts - (ends - q_lens))[of_row]
        kv_lens = positions[ends - 1] + 1
        for index in (ends, places, owners):
            index[singles:] += made_up
        pages = self._tables[owners[of_row], positions // self._page_size]
        for array, nothing, there, values in (
            (arrays.given, 0, places, tokens),
            (arrays.positions, 0, places, positions),
            (arrays.slots, -1, places, pages * self._page_size + positions % self._page_size),
            (arrays.kv_lens, 0, owners, kv_lens),
        ):
            array.fill(nothing)
            array[there] = values
        arrays.q_start.fill(shape.rows - shape.decodes)
        arrays.q_start[0] = 0
        arrays.q_start[1 : len(items) - singles + 1] = ends[singles:] - shape.decodes
        arrays.sources[:] = np.arange(self._num_last, self._num_last + shape.rows)
        unknown = tokens == UNKNOWN
        if unknown.any():
            arrays.sources[places[unknown]] = [rows[item.request_id] for item in items if UNKNOWN in item.token_ids]
        return ends

    def _write_tables(self, items: Sequence[BatchItem], rows: Sequence[int]) -> None:
        tables = self._tables
        known = [self._known.get(item.request_id, (-1, ())) for item in items]
        moved = [(row, old) for row, (old, _) in zip(rows, known) if old not in (row, -1)]
        if moved:
            there, here = zip(*moved)
            tables[list(there)] = tables[list(here)]
        self._known = {item.request_id: (row, item.pages) for row, item in zip(rows, items)}
        for row, item, (_, old) in zip(rows, items, known):
            pages = item.pages
            if pages is not old:
                same = len(old) if pages[: len(old)] == old else 0
                tables[row, same : len(pages)] = pages[same:]

    def _array(self, shape: StepShape) -> _Arrays:
        if shape not in self._arrays:
            self._arrays[shape] = _Arrays(*(part.numpy() for part in self._parts(self._host, shape)))
        return self._arrays[shape]

    def _parts(self, memory: Tensor, shape: StepShape) -> list[Tensor]:
        """The arrays of a shape, as `_Arrays` names them."""
        *starts, end = _starts(shape)
        return [memory[self._front - end + start :][:size] for start, size in zip(starts, _sizes(shape), strict=True)]


def own_inputs(batch: Batch, page_size: int, last: Tensor, rows: Mapping[str, int]) -> tuple[StepInputs, StepShape]:
    """Of a batch as it is, in memory of its own. last, rows: the tokens that the step before sampled, and their rows."""
    items, singles = batch.items, len(batch.items) - len(batch.others)
    samples = sum(1 + item.num_drafts for item in batch.sampled)
    shape = StepShape(singles, sum(len(item.token_ids) for item in items), len(items) - singles, samples)
    width = -(-max(len(item.pages) for item in items) // _ALIGNMENT) * _ALIGNMENT
    inputs = StepInputs([shape], page_size, width, last)
    inputs.write(batch, shape, rows)
    return inputs, shape


def step_tensors(batch: Batch, page_size: int, device: torch.device) -> StepTensors:
    """A batch as it is, all of whose tokens are known."""
    inputs, shape = own_inputs(batch, page_size, torch.empty(0, dtype=torch.int32, device=device), {})
    inputs.gather(shape)
    return inputs.step(shape)


def _sizes(shape: StepShape) -> tuple[int, ...]:
    samples = shape.samples if shape.others else 0
    return (*[shape.rows] * 4, shape.decodes + shape.others, shape.others + 1, samples)


def _starts(shape: StepShape) -> list[int]:
    """Where the arrays of a shape start in its memory, and where that ends."""
    return list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in _sizes(shape)), initial=0))
