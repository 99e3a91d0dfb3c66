"""Runs batches on a torch device: flattens them to tensors, calls the model, samples.

On a GPU nothing here waits for it. A step's tokens stay on the device, where the next step finds those that it names UNKNOWN;
inputs go through pinned memory that torch keeps until they have been read, results come back into such memory behind an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.core import UNKNOWN, Batch, BatchItem, SampledToken, StepOutput
from serving.decode_graph import DecodeGraphs, GraphLimits, known_tokens
from serving.gpu_spans import GpuSpans
from serving.kv_pool import KvPool, PageShape
from serving.model import Model, StepTensors
from serving.rehearsal import asking_item, without_repetitions
from serving.sampling import Sampler
from serving.swap import PageSwapper
from serving.trace import Trace

_ALIGNMENT = 16  # int32 values: arrays and table rows start at multiples of 64 bytes, so that kernels see one alignment


class TorchRunner:
    """Owns the key-value pool. Keys and values of a page that nobody owns are left as they are, and never read.

    max_rows: tokens that a step samples at most. graphs: how decode steps are captured and replayed, where kernels are those of
    tilus, compiled; None to launch each step's. num_host_pages: in the host's memory, for sequences that lose their place.
    trace: gets the times of steps on a GPU.
    """

    def __init__(
        self, model: Model, num_pages: int, page_size: int, device: torch.device, *, kv_dtype: str = "fp16",
        max_rows: int = 32, graphs: GraphLimits | None = None, num_host_pages: int = 0, trace: Trace | None = None,
    ) -> None:  # fmt: skip
        self.kv_pool = KvPool(PageShape(model.config, page_size, kv_dtype), num_pages, device)
        self.swapper = PageSwapper(self.kv_pool, num_host_pages) if num_host_pages else None
        self._model = model
        self._page_size = page_size
        self._device = device
        self._sampler = Sampler(model.config.vocab_size, max_rows, device)
        self._gpu_spans = GpuSpans(trace) if trace is not None and device.type == "cuda" else None
        self._rows: dict[str, int] = {}  # of the tokens that the last step sampled, by request
        self._graphs = None if graphs is None else DecodeGraphs(model, self.kv_pool, graphs, self._sampler)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        if self.swapper is not None:
            self.swapper.begin(batch)
        items = batch.sampled
        has_drafts = any(item.num_drafts for item in items)
        rows = tuple(row for item in items for row in _rows_of(item)) if has_drafts else items
        graphs = self._graphs if self._graphs is not None and self._graphs.fits(batch) else None
        compute = self._prepare(batch) if graphs is None else graphs.prepare(batch, self._rows)
        self._sampler.write(rows)
        start = self._mark()
        logits = compute()
        if rows and (graphs is None or not graphs.samples):
            self._sampler.run(logits, len(rows))
        end = self._mark()
        self._rows = {row.request_id: index for index, row in enumerate(rows)}
        collect = self._sampler.collect(rows)

        def wait() -> StepOutput:
            found = collect()
            tokens = _agreeing(items, found) if has_drafts else tuple(None if t is None else (t,) for t in found)
            if self._gpu_spans is not None and start is not None and end is not None:
                self._gpu_spans.add(f"{len(batch.items)} sequences", start, end)
            return StepOutput(tokens)

        return wait

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._gpu_spans is None else self._gpu_spans.mark()

    def _prepare(self, batch: Batch) -> Callable[[], Tensor]:
        step = step_tensors(batch, self._page_size, self._device, self._sampler.tokens, self._rows)
        return lambda: self._model.forward(step, self.kv_pool.layers)

    @torch.inference_mode()
    def rehearse(self, batches: Iterable[Batch]) -> None:
        """All different launches of these batches' steps, and of steps that are captured: for `tilus.compile_ahead`."""
        model, caches = without_repetitions(self._model, self.kv_pool.layers)
        for batch in batches:
            logits = model.forward(step_tensors(batch, self._page_size, self._device), caches)
            self._sampler.write(batch.sampled)
            self._sampler.run(logits, len(batch.sampled))
            self._sampler.collect(batch.sampled)
        self._sampler.write(())
        for step, out in self._graphs.steps() if self._graphs is not None else ():
            self._sampler.run(model.forward(step, caches, out), step.decodes)
        self._sampler.write((asking_item(),))
        self._sampler.run(torch.empty(1, model.config.vocab_size, device=self._device), 1)


def _rows_of(item: BatchItem) -> tuple[BatchItem, ...]:
    """What is to be sampled for an item: behind its last token, and behind those in front of each draft."""
    if not item.num_drafts:
        return (item,)
    drafts = item.token_ids[-item.num_drafts :]
    return tuple(
        item._replace(draw=item.draw + count, history=(*item.history, *drafts[:count]) if item.history else ())
        for count in range(item.num_drafts + 1)
    )


def _agreeing(
    items: tuple[BatchItem, ...], found: tuple[SampledToken | None, ...]
) -> tuple[tuple[SampledToken, ...] | None, ...]:
    """For each item its tokens up to the first that differs from its draft.

    What is sampled behind a right draft is what would have been sampled without drafts: its random number is the same.
    """
    tokens: list[tuple[SampledToken, ...] | None] = []
    rows = iter(found)
    for item in items:
        mine = [next(rows) for _ in range(item.num_drafts + 1)]
        drafts = item.token_ids[len(item.token_ids) - item.num_drafts :]
        agreed = 0
        while agreed < len(drafts) and (token := mine[agreed]) is not None and token.token_id == drafts[agreed]:
            agreed += 1
        kept = [token for token in mine[: agreed + 1] if token is not None]
        tokens.append(tuple(kept) if len(kept) == agreed + 1 else None)
    return tuple(tokens)


def step_tensors(
    batch: Batch,
    page_size: int,
    device: torch.device,
    last: Tensor | None = None,
    rows: Mapping[str, int] | None = None,
) -> StepTensors:
    """The batch as int32 tensors, moved to the device in one copy. last, rows: the tokens of the step before, and their rows."""
    q_lens = [len(item.token_ids) for item in batch.items]
    decodes = next((index for index, count in enumerate(q_lens) if count != 1), len(q_lens))
    q_end = np.cumsum(q_lens)
    positions = np.concatenate([np.arange(item.start, item.kv_len) for item in batch.items])
    width = -(-max(len(item.pages) for item in batch.items) // _ALIGNMENT) * _ALIGNMENT
    block_tables = np.zeros((len(batch.items), width), np.int64)
    for row, item in enumerate(batch.items):
        block_tables[row, : len(item.pages)] = item.pages
    owners = np.repeat(np.arange(len(batch.items)), q_lens)
    token_ids = np.array([token_id for item in batch.items for token_id in item.token_ids])
    wanted = [
        np.arange(end - 1 - item.num_drafts, end) for item, end in zip(batch.items, q_end) if item.params is not None
    ]
    arrays = (
        token_ids,
        positions,
        block_tables[owners, positions // page_size] * page_size + positions % page_size,
        block_tables,
        np.array([0, *(q_end[decodes:] - decodes)]),
        np.array([item.kv_len for item in batch.items]),
        np.concatenate([np.empty(0, np.int64), *wanted]),
        _sources(batch, token_ids, last, rows or {}),
    )
    *step, wanted_rows, sources = _move(arrays, device)
    if last is not None and len(sources):
        step[0] = known_tokens(step[0], sources, last)
    return StepTensors(*step, last=None if wanted_rows.shape == step[0].shape else wanted_rows, decodes=decodes)


def _sources(
    batch: Batch, token_ids: npt.NDArray[np.int64], last: Tensor | None, rows: Mapping[str, int]
) -> npt.NDArray[np.int64]:
    """Where each token is in `last` and `token_ids`, one behind the other; empty where all are known."""
    if last is None or token_ids.min() > UNKNOWN:
        return np.empty(0, np.int64)
    sources = np.arange(len(last), len(last) + len(token_ids))
    unknown = [rows[item.request_id] for item in batch.items if item.token_ids[-1 - item.num_drafts] == UNKNOWN]
    sources[token_ids == UNKNOWN] = unknown
    return sources


def _move(arrays: tuple[npt.NDArray[np.int64], ...], device: torch.device) -> list[Tensor]:
    starts = np.cumsum([0, *(-(-array.size // _ALIGNMENT) * _ALIGNMENT for array in arrays)])
    staging = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    values = staging.numpy()
    for array, start in zip(arrays, starts):
        values[start : start + array.size] = array.reshape(-1)
    moved = staging.to(device, non_blocking=True)
    return [moved[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts)]
