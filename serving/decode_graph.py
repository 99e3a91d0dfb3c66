"""Steps that only decode, captured once for each number of sequences and replayed from then on.

A step is hundreds of short launches, and Python between them takes a third of the time of a small model on a CPU, and most of it
on a GPU. A replay is one call. On a GPU a step runs with the next larger number of sequences for which there is a graph; those
that are made up have no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import tilus
from serving.core import UNKNOWN, Batch, BatchItem
from serving.kv_pool import KvPool
from serving.model import Model, StepTensors
from serving.sampling import Sampler

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


def known_tokens(token_ids: Tensor, sources: Tensor, last: Tensor, out: Tensor | None = None) -> Tensor:
    """A step's tokens, int32: `sources` says where each is in `last`, what the step before sampled, and `token_ids` behind it.

    A sequence without numbers has -1 there, and ends as soon as that is known; until then any other token will do.
    """
    return torch.index_select(torch.cat((last, token_ids)), 0, sources, out=out).clamp_(min=0)


class DecodeGraphs:
    """One graph for each size, made when such a batch first comes. Its logits are the bits that the model computes.

    Only for kernels of tilus that are compiled: native code on the CPU, or a GPU, where a graph also samples.
    """

    def __init__(self, model: Model, pool: KvPool, limits: GraphLimits, sampler: Sampler) -> None:
        self._model = model
        self._pool = pool
        self._sampler = sampler
        device = pool.memory.device
        self.sizes = graph_sizes(device, limits.max_batch)
        self._inputs = DecodeInputs(self.sizes[-1], pool.shape.page_size, limits.max_pages, sampler.tokens)
        self._graphs: dict[int, tuple[tilus.LaunchGraph | torch.cuda.CUDAGraph, Tensor]] = {}
        self._on_gpu = _GpuCapture(model, sampler, self.sizes[-1]) if device.type == "cuda" else None

    def steps(self) -> Iterator[tuple[StepTensors, Tensor | None]]:
        """Inputs as graphs of all sizes have them, and where their logits go."""
        for size in self.sizes:
            yield self._inputs.step(size), None if self._on_gpu is None else self._on_gpu.logits(size)

    def fits(self, batch: Batch) -> bool:
        """Whether a batch only decodes, and is small enough."""
        return len(batch.items) <= self.sizes[-1] and all(
            len(item.token_ids) == 1 and item.params is not None for item in batch.items
        )

    @property
    def samples(self) -> bool:
        """Whether a replay leaves the tokens of the rows that the sampler has in the sampler."""
        return self._on_gpu is not None and self._sampler.is_plain

    def prepare(self, batch: Batch, rows: Mapping[str, int]) -> Callable[[], Tensor]:
        """Write the inputs of a batch that fits. What is returned launches it; its logits, float32 [S, vocabulary], are valid
        until the next call. rows: of the tokens that the last step sampled, by request.
        """
        count = len(batch.items)
        size = next(size for size in self.sizes if size >= count)
        self._inputs.write(batch, size, rows)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, logits = self._graphs[size]

        def replay() -> Tensor:
            graph.replay()
            return logits[:count]

        return replay

    def _capture(self, size: int) -> tuple[tilus.LaunchGraph | torch.cuda.CUDAGraph, Tensor]:
        """Computes the step, too: kernels are compiled then, and what they keep is made."""
        if self._on_gpu is not None:
            return self._on_gpu.capture(self._inputs, size, self._pool)
        with tilus.capture() as launches:
            logits = self._model.forward(self._inputs.step(size), self._pool.layers)
        return launches, logits


class DecodeInputs:
    """The tensors of decode steps of up to `max_batch` sequences, which every step is written to, on a GPU by one copy.

    Most of a block table is that of the step before: only what has changed is written.
    """

    def __init__(self, max_batch: int, page_size: int, max_pages: int, last: Tensor) -> None:
        self._page_size = page_size
        self._last = last
        shapes = (*[(max_batch,)] * 5, (max_batch, max_pages))
        self._on_gpu = last.device.type == "cuda"
        self._host, arrays = _int32(shapes, torch.device("cpu"))
        self._there, self._tensors = _int32(shapes, last.device) if self._on_gpu else (self._host, arrays)
        self._arrays = [array.numpy() for array in arrays]
        self._token_ids = torch.zeros(max_batch, dtype=torch.int32, device=last.device)
        self._q_start = torch.zeros(1, dtype=torch.int32, device=last.device)
        self._tables: dict[str, tuple[int, tuple[int, ...]]] = {}  # by request: the row, and the pages that are there

    def step(self, size: int) -> StepTensors:
        """The first `size` sequences."""
        _, _, positions, slots, kv_lens, tables = (tensor[:size] for tensor in self._tensors)
        return StepTensors(self._token_ids[:size], positions, slots, tables, self._q_start, kv_lens, None, size)

    def gather(self, size: int) -> None:
        """Put the tokens that only the device knows in their places; in a GPU's graph, so that no step waits for them."""
        given, sources = self._tensors[0][:size], self._tensors[1][:size]
        known_tokens(given, sources, self._last, out=self._token_ids[:size])

    def write(self, batch: Batch, size: int, rows: Mapping[str, int]) -> None:
        """What earlier sequences left in a row of the block table, behind its sequence's pages, is never read."""
        items, page_size = batch.items, self._page_size
        count, known = len(items), len(self._last)
        token_ids, sources, positions, slots, kv_lens, tables = self._arrays
        given = [item.token_ids[0] for item in items]
        token_ids[:count] = given
        sources[:size] = np.arange(known, known + size)
        if UNKNOWN in given:
            unknown = [row for row, token_id in enumerate(given) if token_id == UNKNOWN]
            sources[unknown] = [rows[items[row].request_id] for row in unknown]
        starts = np.array([item.start for item in items])
        self._write_tables(items)
        positions[:count] = starts
        slots[:count] = tables[np.arange(count), starts // page_size] * page_size + starts % page_size
        kv_lens[:count] = starts + 1
        token_ids[count:size], slots[count:size], kv_lens[count:size] = 0, -1, 0
        if self._on_gpu:
            end = len(self._host) - tables.size + size * tables.shape[1]
            staging = torch.empty(end, dtype=torch.int32, pin_memory=True)
            staging.copy_(self._host[:end])
            self._there[:end].copy_(staging, non_blocking=True)
        else:
            self.gather(size)

    def _write_tables(self, items: Sequence[BatchItem]) -> None:
        tables = self._arrays[-1]
        known = [self._tables.get(item.request_id, (-1, ())) for item in items]
        moved = [row for row, _ in known]
        if any(old not in (row, -1) for row, old in enumerate(moved)):
            tables[: len(items)] = tables[moved]
        self._tables = {item.request_id: (row, item.pages) for row, item in enumerate(items)}
        for row, (item, (_, old)) in enumerate(zip(items, known)):
            pages = item.pages
            if pages is not old:
                same = len(old) if pages[: len(old)] == old else 0
                tables[row, same : len(pages)] = pages[same:]


def _int32(shapes: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """One tensor of zeros, and its parts, the last of which ends it."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    starts = [sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes[:index]) for index in range(len(sizes))]
    whole = torch.zeros(starts[-1] + sizes[-1], dtype=torch.int32, device=device)
    return whole, [whole[start : start + size].view(shape) for start, size, shape in zip(starts, sizes, shapes)]


class _GpuCapture:
    """Captures steps as CUDA graphs, which share the memory of activations and logits: they never run at the same time."""

    def __init__(self, model: Model, sampler: Sampler, max_batch: int) -> None:
        device = model.norm.device
        self._model = model
        self._sampler = sampler
        self._logits = torch.empty((max_batch, model.config.vocab_size), dtype=torch.float32, device=device)
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def logits(self, size: int) -> Tensor:
        """Where the logits of `size` sequences go."""
        return self._logits[:size]

    def capture(self, inputs: DecodeInputs, size: int, pool: KvPool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step runs once before."""
        step, logits, last = inputs.step(size), self.logits(size), self._sampler.tokens.clone()

        def run() -> None:
            inputs.gather(size)
            self._model.forward(step, pool.layers, logits)
            self._sampler.run(logits, size)

        self._sampler.write(())  # what is captured is the plain way
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
            self._sampler.tokens.copy_(last)  # which the replay will look for
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph, logits
