"""Runs batches on a torch device: flattens them to tensors, calls the model, samples.

On a GPU nothing here waits for it. A step's tokens stay on the device, where the next step finds those that it names UNKNOWN;
inputs go through pinned memory that torch keeps until they have been read, results come back into such memory behind an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor

from serving.core import UNKNOWN, Batch, BatchItem, SampledToken, StepOutput
from serving.cost_model import StepWork
from serving.gpu_spans import GpuSpans
from serving.kv_pool import KvPool, PageShape
from serving.model import Model
from serving.prompt_scores import PromptScores
from serving.rehearsal import asking_item, resumed_item, without_repetitions
from serving.sampling import Sampler
from serving.step_graphs import StepGraphs
from serving.step_inputs import StepInputs, own_inputs, step_tensors
from serving.step_shapes import GraphLimits, StepShape
from serving.swap import PageSwapper
from serving.trace import Trace


class TorchRunner:
    """Owns the key-value pool. Keys and values of a page that nobody owns are left as they are, and never read.

    max_rows: tokens that a step samples at most. graphs: limits of steps that are captured, where kernels are those of tilus,
    compiled; None to launch each step's. num_host_pages: in the host's memory, for sequences that lose their place.
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
        self._rows: dict[str, int] = {}  # of the last tokens that the last step sampled, by request
        self._drafts: dict[str, tuple[int, ...]] = {}  # of that step
        self._graphs = None if graphs is None else StepGraphs(model, self.kv_pool, graphs, self._sampler)

    def drop_graphs(self) -> None:
        """No step can be launched any more."""
        if self._graphs is not None:
            self._graphs.drop()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        if self.swapper is not None:
            self.swapper.begin(batch)
        items = batch.sampled
        # Of the items' rows that are sampled.
        ends = list(accumulate([1 + item.num_drafts for item in items], initial=0))
        num_rows, has_drafts = ends[-1], ends[-1] > len(items)
        scores = PromptScores(batch, self._sampler.max_rows) if any(item.targets for item in batch.items) else None
        compute, samples, inputs, shape = self._prepare(batch, scores)
        self._sampler.write(items)
        next_rows = {item.request_id: end - 1 for item, end in zip(items, ends[1:])}
        if self._drafts and (behind := [i for i in items if i.request_id in self._drafts and UNKNOWN in i.token_ids]):
            inputs.follow(shape, behind, self._drafts, self._rows, next_rows, self._sampler.draws)
        start = self._mark()
        logits = compute()
        if items and not (samples and self._sampler.is_plain):
            self._sampler.run(logits, num_rows)
        end = self._mark()
        self._rows = next_rows
        self._drafts = {item.request_id: item.drafts for item in items if item.num_drafts} if has_drafts else {}
        collect = self._sampler.collect(items)

        def wait() -> StepOutput:
            found = collect()
            tokens = (
                _agreeing(items, found)
                if has_drafts
                else tuple([None if token is None else (token,) for token in found])
            )
            if self._gpu_spans is not None and start is not None and end is not None:
                self._gpu_spans.add(f"{len(batch.items)} sequences", start, end)
            return StepOutput(tokens, {} if scores is None else scores.collect())

        return wait

    def rows(self, work: StepWork) -> int:
        """Of a step as it is computed, those that are made up included."""
        return work.tokens if self._graphs is None else self._graphs.shapes.rows(work)

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._gpu_spans is None else self._gpu_spans.mark()

    def _prepare(
        self, batch: Batch, scores: PromptScores | None
    ) -> tuple[Callable[[], Tensor], bool, StepInputs, StepShape]:
        """What launches a step and gives its logits, whether it samples, too, where rows are plain, and its inputs."""
        shape = None if self._graphs is None or scores is not None else self._graphs.shapes.of(batch)
        if self._graphs is not None and shape is not None:
            return self._graphs.prepare(batch, shape, self._rows), self._graphs.samples, self._graphs.inputs, shape
        inputs, shape = own_inputs(batch, self._page_size, self._sampler.tokens, self._rows)

        def compute() -> Tensor:
            inputs.gather(shape)
            step, layers = inputs.step(shape), self.kv_pool.layers
            return self._model.forward(step, layers) if scores is None else scores.compute(self._model, step, layers)

        return compute, False, inputs, shape

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Capture the steps that are common on a GPU. progress is called with (steps done, steps in all)."""
        if self._graphs is not None:
            self._graphs.capture_common(progress)

    @torch.inference_mode()
    def rehearse(self, batches: Iterable[Batch]) -> None:
        """All different launches of these batches' steps, and of all that may be captured: for `tilus.compile_ahead`."""
        model, caches = without_repetitions(self._model, self.kv_pool.layers)
        for batch in batches:
            logits = model.forward(step_tensors(batch, self._page_size, self._device), caches)
            self._sampler.write(batch.sampled)
            self._sampler.run(logits, len(batch.sampled))
            self._sampler.collect(batch.sampled)
        self._sampler.write(())
        for step, out in self._graphs.steps() if self._graphs is not None else ():
            self._sampler.run(model.forward(step, caches, out), len(out))
        if self._graphs is not None and self._graphs.shapes.limits.num_drafts:
            item, shape, max_pages = resumed_item(), self._graphs.shapes.all[0], self._graphs.shapes.limits.max_pages
            inputs, rows = StepInputs([shape], self._page_size, max_pages, self._sampler.tokens), {item.request_id: 0}
            inputs.write(Batch((item,)), shape, rows)
            inputs.follow(shape, [item], {item.request_id: (0,)}, rows, rows, self._sampler.draws)
        self._sampler.write((asking_item(),))
        self._sampler.run(torch.empty(1, model.config.vocab_size, device=self._device), 1)


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
        drafts, agreed = item.drafts, 0
        while agreed < len(drafts) and (token := mine[agreed]) is not None and token.token_id == drafts[agreed]:
            agreed += 1
        kept = [token for token in mine[: agreed + 1] if token is not None]
        tokens.append(tuple(kept) if len(kept) == agreed + 1 else None)
    return tuple(tokens)
