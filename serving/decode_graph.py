"""Decode steps of small batches on the CPU, captured once and replayed from then on.

A step is hundreds of short launches, and Python between them takes a third of the time of a small model. A replay is one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tilus
from serving.core import Batch
from serving.model import Model, StepTensors

# Sequences of a step. Each graph keeps all of its activations; with more sequences, kernels take most of the time anyway.
LARGEST_BATCH = 8


class DecodeGraphs:
    """One graph for each batch size, made when such a batch first comes. Its logits are the bits that the model computes.

    kv_pool: as of `Model.forward`. max_pages: of a sequence. Only for kernels of tilus that run as native code on the CPU.
    """

    def __init__(self, model: Model, kv_pool: Tensor, page_size: int, max_pages: int) -> None:
        self._model = model
        self._kv_pool = kv_pool
        self._page_size = page_size
        self._max_pages = max_pages
        self._graphs: dict[int, _DecodeGraph] = {}

    def fits(self, batch: Batch) -> bool:
        """Whether a batch only decodes, and is small."""
        return len(batch.items) <= LARGEST_BATCH and all(
            len(item.token_ids) == 1 and item.params is not None for item in batch.items
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits float32 [S, vocabulary] of a batch that fits, valid until the next call."""
        size = len(batch.items)
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = _DecodeGraph(size, self._page_size, self._max_pages)
        return graph.forward(batch, self._model, self._kv_pool)


class _DecodeGraph:
    """The launches of a step of `size` sequences, over tensors that every step is written to."""

    def __init__(self, size: int, page_size: int, max_pages: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        self._page_size = page_size
        self._step = StepTensors(
            token_ids=zeros(size),
            positions=zeros(size),
            slots=zeros(size),
            block_tables=zeros(size, max_pages),
            q_start=torch.arange(size + 1, dtype=torch.int32),
            kv_lens=zeros(size),
            last=None,
        )
        self._captured: tuple[tilus.LaunchGraph, Tensor] | None = None

    def forward(self, batch: Batch, model: Model, kv_pool: Tensor) -> Tensor:
        self._write(batch)
        if self._captured is None:
            with tilus.capture() as launches:
                logits = model.forward(self._step, kv_pool)
            self._captured = launches, logits
        else:
            launches, logits = self._captured
            launches.replay()
        return logits

    def _write(self, batch: Batch) -> None:
        """What earlier sequences left in a row of the block table, behind its sequence's pages, is never read."""
        step, size = self._step, self._page_size
        block_tables = step.block_tables.numpy()
        for row, item in enumerate(batch.items):
            block_tables[row, : len(item.pages)] = item.pages
        step.token_ids.numpy()[:] = [item.token_ids[0] for item in batch.items]
        step.positions.numpy()[:] = [item.start for item in batch.items]
        step.slots.numpy()[:] = [item.pages[item.start // size] * size + item.start % size for item in batch.items]
        step.kv_lens.numpy()[:] = [item.kv_len for item in batch.items]
