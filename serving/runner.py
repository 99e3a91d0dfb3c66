"""Runs batches on a torch device: flattens them to tensors, calls the model, samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving import sampling
from serving.core import Batch, StepOutput
from serving.decode_graph import DecodeGraphs, GraphLimits
from serving.kv_pool import KvPool, PageShape
from serving.model import Model, StepTensors
from serving.rehearsal import without_repetitions

_ALIGNMENT = 16  # int32 values: arrays and table rows start at multiples of 64 bytes, so that kernels see one alignment


class TorchRunner:
    """Owns the key-value pool. Keys and values of a page that nobody owns are left as they are, and never read.

    graphs: how decode steps are captured and replayed, where kernels are those of tilus, compiled; None to launch each step's.
    """

    def __init__(
        self, model: Model, num_pages: int, page_size: int, device: torch.device, *, kv_dtype: str = "fp16",
        graphs: GraphLimits | None = None,
    ) -> None:  # fmt: skip
        self.kv_pool = KvPool(PageShape(model.config, page_size, kv_dtype), num_pages, device)
        self._model = model
        self._page_size = page_size
        self._device = device
        self._graphs = None if graphs is None else DecodeGraphs(model, self.kv_pool, graphs)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepOutput:
        return StepOutput(sampling.sample(self._logits(batch), batch.sampled))

    @torch.inference_mode()
    def rehearse(self, batches: Iterable[Batch]) -> None:
        """All different launches of these batches' steps, and of steps that are captured: for `tilus.compile_ahead`."""
        model, caches = without_repetitions(self._model, self.kv_pool.layers)
        for batch in batches:
            logits = model.forward(step_tensors(batch, self._page_size, self._device), caches)
            sampling.sample(logits, batch.sampled)
        if self._graphs is not None:
            for step, out in self._graphs.steps():
                model.forward(step, caches, out)

    def _logits(self, batch: Batch) -> Tensor:
        if self._graphs is not None and self._graphs.fits(batch):
            return self._graphs.forward(batch)
        return self._model.forward(step_tensors(batch, self._page_size, self._device), self.kv_pool.layers)


def step_tensors(batch: Batch, page_size: int, device: torch.device) -> StepTensors:
    """The batch as int32 tensors, moved to the device in one copy."""
    q_lens = [len(item.token_ids) for item in batch.items]
    decodes = next((index for index, count in enumerate(q_lens) if count != 1), len(q_lens))
    q_end = np.cumsum(q_lens)
    positions = np.concatenate([np.arange(item.start, item.kv_len) for item in batch.items])
    width = -(-max(len(item.pages) for item in batch.items) // _ALIGNMENT) * _ALIGNMENT
    block_tables = np.zeros((len(batch.items), width), np.int64)
    for row, item in enumerate(batch.items):
        block_tables[row, : len(item.pages)] = item.pages
    owners = np.repeat(np.arange(len(batch.items)), q_lens)
    arrays = (
        np.array([token_id for item in batch.items for token_id in item.token_ids]),
        positions,
        block_tables[owners, positions // page_size] * page_size + positions % page_size,
        block_tables,
        np.array([0, *(q_end[decodes:] - decodes)]),
        np.array([item.kv_len for item in batch.items]),
        np.array([end - 1 for item, end in zip(batch.items, q_end) if item.params is not None], np.int64),
    )
    *step, last = _move(arrays, device)
    return StepTensors(*step, last=None if last.shape == step[0].shape else last, decodes=decodes)


def _move(arrays: tuple[npt.NDArray[np.int64], ...], device: torch.device) -> list[Tensor]:
    starts = np.cumsum([0, *(-(-array.size // _ALIGNMENT) * _ALIGNMENT for array in arrays)])
    staging = np.zeros(starts[-1], np.int32)
    for array, start in zip(arrays, starts):
        staging[start : start + array.size] = array.reshape(-1)
    moved = torch.from_numpy(staging).to(device)
    return [moved[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts)]
