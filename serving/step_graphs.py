"""Steps of the shapes in `step_shapes`, each captured once and replayed from then on.

A step is hundreds of short launches, and Python between them takes a third of the time of a small model on a CPU, and most of it
on a GPU. A replay is one call. On a GPU all steps are padded to a shape that there is a graph for; on a CPU only small steps that
decode have graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

import tilus
from serving.core import Batch
from serving.kernels import KvCache
from serving.kv_pool import KvPool
from serving.model import Model, StepTensors
from serving.rehearsal import without_repetitions
from serving.sampling import Sampler
from serving.step_inputs import StepInputs
from serving.step_shapes import GraphLimits, StepShape, StepShapes


class CpuCapture:
    """Records the launches of tilus' kernels, and nothing else. samples: whether a graph also gathers the tokens of a step, and
    samples."""

    samples = False

    def __call__(self, run: Callable[[], None], first: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches; what is returned launches it again. first: launches every kernel of it, so that what they
        keep is made, and plans that need too many registers are found out, where a capture launches nothing.
        """
        with tilus.capture() as launches:  # they run, too
            run()
        return launches.replay

    def drop(self) -> None:
        """Graphs are memory only."""


class CudaCapture:
    """CUDA graphs, which share the memory of activations: they never run at the same time. As `CpuCapture`."""

    samples = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, run: Callable[[], None], first: Callable[[], None]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            first()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph, which gives all free memory back each time.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        self._graphs.append(graph)
        return graph.replay

    def drop(self) -> None:
        """Give back what graphs hold, of NCCL, say, when all of them have run."""
        torch.cuda.synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


def capture_of(device: torch.device) -> CpuCapture | CudaCapture:
    return CudaCapture(device) if device.type == "cuda" else CpuCapture()


class StepGraphs:
    """A graph for each shape. Its logits are the bits that the model computes for the same shape.

    Only for kernels of tilus that are compiled: native code on the CPU, or a GPU. samples: whether a replay also samples, in the
    plain way.
    """

    def __init__(self, model: Model, pool: KvPool, limits: GraphLimits, sampler: Sampler) -> None:
        device = pool.memory.device
        self._whole = model, pool.layers
        self._parts = without_repetitions(model, pool.layers)
        self._sampler = sampler
        self.shapes = StepShapes(limits, device)
        shapes = self.shapes.all
        self.inputs = StepInputs(shapes, pool.shape.page_size, limits.max_pages, sampler.tokens)
        self._logits = torch.empty(
            (max(shape.samples for shape in shapes), model.config.vocab_size), dtype=torch.float32, device=device
        )
        self._capture = capture_of(device)
        self.samples = self._capture.samples
        self._graphs: dict[StepShape, Callable[[], None]] = {}

    def drop(self) -> None:
        """All graphs. No step can be prepared any more."""
        self._graphs.clear()
        self._capture.drop()

    def steps(self) -> Iterator[tuple[StepTensors, Tensor]]:
        """Inputs of all shapes, and where their logits go."""
        for shape in self.shapes.all:
            yield self.inputs.step(shape), self._logits[: shape.samples]

    def capture_common(self, progress: Callable[[int, int], None]) -> None:
        """Capture shapes that are common on a GPU, the largest first, whose memory the others share; the cache stays as it is.
        progress: called with (graphs done, graphs in all).
        """
        shapes = sorted(self.shapes.common(), key=lambda shape: shape.rows, reverse=True)
        for done, shape in enumerate(shapes):
            progress(done, len(shapes))
            self.prepare(Batch(()), shape, {})
        torch.cuda.empty_cache()  # of the runs before the captures
        progress(len(shapes), len(shapes))

    def prepare(self, batch: Batch, shape: StepShape, rows: Mapping[str, int]) -> Callable[[], Tensor]:
        """Write the inputs of a batch that fits. What is returned launches it; its logits, float32 [samples, vocabulary], are
        valid until the next call. rows: of the tokens that the last step sampled, by request.
        """
        self.inputs.write(batch, shape, rows)
        if shape not in self._graphs:
            self._graphs[shape] = self._captured(shape)
        replay_graph, logits = self._graphs[shape], self._logits[: shape.samples]

        def replay() -> Tensor:
            if not self.samples:
                self.inputs.gather(shape)
            replay_graph()
            return logits

        return replay

    def _captured(self, shape: StepShape) -> Callable[[], None]:
        step, logits = self.inputs.step(shape), self._logits[: shape.samples]

        def run(model: Model, caches: Sequence[KvCache]) -> None:
            if self.samples:
                self.inputs.gather(shape)
            model.forward(step, caches, logits)
            if self.samples:
                self._sampler.run(logits, shape.samples)

        self._sampler.write(())  # what is captured is the plain way
        last = self._sampler.tokens.clone()
        # What the first run writes to the cache the replay writes again.
        replay = self._capture(lambda: run(*self._whole), lambda: run(*self._parts))
        self._sampler.tokens.copy_(last)  # which the replay will look for
        return replay
