"""Steps that only decode, captured once for each number of sequences and replayed from then on.

A step is hundreds of short launches, and Python between them takes a third of the time of a small model on a CPU, and most of it
on a GPU. A replay is one call. On a GPU a step runs with the next larger number of sequences for which there is a graph; those
that are made up have no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tilus
from serving.core import Batch
from serving.kv_pool import KvPool
from serving.model import Model, StepTensors

# Sequences of a step on a CPU: graphs keep their activations, and with more of them kernels take most of the time anyway.
LARGEST_BATCH = 8
_ALIGNMENT = 16  # int32 values: arrays start at multiples of 64 bytes, so that kernels see one alignment


@dataclass(frozen=True)
class GraphLimits:
    """max_batch: sequences of a step. max_pages: of a sequence."""

    max_batch: int
    max_pages: int


def graph_sizes(device: torch.device, max_batch: int) -> tuple[int, ...]:
    """Numbers of sequences that there are graphs for: on a CPU each small one, on a GPU powers of two and then multiples of 8."""
    if device.type == "cpu":
        return tuple(range(1, min(LARGEST_BATCH, max_batch) + 1))
    return tuple(sorted({min(size, max_batch) for size in (1, 2, 4, *range(8, max_batch + 8, 8))}))


class DecodeGraphs:
    """One graph for each size, made when such a batch first comes. Its logits are the bits that the model computes.

    Only for kernels of tilus that are compiled: native code on the CPU, or a GPU.
    """

    def __init__(self, model: Model, pool: KvPool, limits: GraphLimits) -> None:
        self._model = model
        self._pool = pool
        self._max_pages = limits.max_pages
        self._device = pool.memory.device
        self.sizes = graph_sizes(self._device, limits.max_batch)
        self._graphs: dict[int, _DecodeGraph] = {}
        self._on_gpu = _GpuCapture(model, self.sizes[-1]) if self._device.type == "cuda" else None

    def steps(self) -> Iterator[tuple[StepTensors, Tensor | None]]:
        """Inputs as graphs of all sizes have them, and where their logits go."""
        for size in self.sizes:
            inputs = _Inputs(size, self._pool.shape.page_size, self._max_pages, self._device)
            yield inputs.step, None if self._on_gpu is None else self._on_gpu.logits(size)

    def fits(self, batch: Batch) -> bool:
        """Whether a batch only decodes, and is small enough."""
        return len(batch.items) <= self.sizes[-1] and all(
            len(item.token_ids) == 1 and item.params is not None for item in batch.items
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits float32 [S, vocabulary] of a batch that fits, valid until the next call."""
        count = len(batch.items)
        size = next(size for size in self.sizes if size >= count)
        graph = self._graphs.get(size)
        if graph is None:
            inputs = _Inputs(size, self._pool.shape.page_size, self._max_pages, self._device)
            graph = self._graphs[size] = _DecodeGraph(inputs, self._on_gpu)
        return graph.forward(batch, self._model, self._pool)[:count]


class _Inputs:
    """The tensors of a step of `size` sequences, which every step is written to, on a GPU by one copy."""

    def __init__(self, size: int, page_size: int, max_pages: int, device: torch.device) -> None:
        self._page_size = page_size
        shapes = ((size,), (size,), (size,), (size, max_pages), (1,), (size,))
        self._host, arrays = _int32(shapes, torch.device("cpu"), pinned=device.type == "cuda")
        self._there, tensors = (self._host, arrays) if device.type == "cpu" else _int32(shapes, device)
        self._token_ids, self._positions, self._slots, self._block_tables, _, self._kv_lens = (
            a.numpy() for a in arrays
        )
        self.step = StepTensors(*tensors, last=None, decodes=size)

    def write(self, batch: Batch) -> None:
        """What earlier sequences left in a row of the block table, behind its sequence's pages, is never read."""
        items, size = batch.items, self._page_size
        count = len(items)
        for row, item in enumerate(items):
            self._block_tables[row, : len(item.pages)] = item.pages
        self._token_ids[:count] = [item.token_ids[0] for item in items]
        self._positions[:count] = [item.start for item in items]
        self._slots[:count] = [item.pages[item.start // size] * size + item.start % size for item in items]
        self._kv_lens[:count] = [item.kv_len for item in items]
        self._slots[count:], self._kv_lens[count:] = -1, 0
        if self._there is not self._host:
            self._there.copy_(self._host, non_blocking=True)  # the last step's has ended: its tokens are known


def _int32(
    shapes: Sequence[tuple[int, ...]], device: torch.device, *, pinned: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """One tensor of zeros, and its parts."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    starts = [sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes[:index]) for index in range(len(sizes) + 1)]
    whole = torch.zeros(starts[-1], dtype=torch.int32, device=device, pin_memory=pinned)
    return whole, [whole[start : start + size].view(shape) for start, size, shape in zip(starts, sizes, shapes)]


class _DecodeGraph:
    """The launches of a step over its inputs."""

    def __init__(self, inputs: _Inputs, on_gpu: _GpuCapture | None) -> None:
        self._inputs = inputs
        self._on_gpu = on_gpu
        self._captured: tuple[tilus.LaunchGraph | torch.cuda.CUDAGraph, Tensor] | None = None

    def forward(self, batch: Batch, model: Model, pool: KvPool) -> Tensor:
        self._inputs.write(batch)
        if self._captured is None and self._on_gpu is not None:
            self._captured = self._on_gpu.capture(self._inputs.step, pool)
        elif self._captured is None:
            with tilus.capture() as launches:
                logits = model.forward(self._inputs.step, pool.layers)
            self._captured = launches, logits
            return logits
        graph, logits = self._captured
        graph.replay()
        return logits


class _GpuCapture:
    """Captures steps as CUDA graphs, which share the memory of activations and logits: they never run at the same time."""

    def __init__(self, model: Model, max_batch: int) -> None:
        device = model.norm.device
        self._model = model
        self._logits = torch.empty((max_batch, model.config.vocab_size), dtype=torch.float32, device=device)
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def logits(self, size: int) -> Tensor:
        """Where the logits of `size` sequences go."""
        return self._logits[:size]

    def capture(self, step: StepTensors, pool: KvPool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step runs once before: kernels are compiled then, and what they keep is made."""
        logits = self.logits(step.token_ids.shape[0])
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._model.forward(step, pool.layers, logits)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            self._model.forward(step, pool.layers, logits)
        return graph, logits
