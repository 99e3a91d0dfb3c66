"""The same requests, run by the engine in different ways: company, chunks, captured steps, overlap, lost places, drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from serving_fakes import ManualClock

from serving import core
from serving.config import EngineConfig
from serving.core import Batch, Request, SampledToken, StepOutput
from serving.engine import Engine
from serving.loader import Checkpoint
from serving.model import Model
from serving.runner import TorchRunner
from serving.speculation import PromptLookup
from serving.step_shapes import GraphLimits

PAGE = 16
Answers = dict[str, list[SampledToken]]


class Counting(TorchRunner):
    """Counts the steps, and the tokens that go through the model."""

    steps = count = 0

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        self.steps += 1
        self.count += sum(len(item.token_ids) for item in batch.items)
        return super().launch(batch)


class EagerLookup(PromptLookup):
    """Guesses whatever it finds, right or wrong."""

    def chances(self, seq: core.Sequence) -> tuple[float, float]:
        found = float(super().chances(seq)[0] > 0)
        return found, found


@dataclass(frozen=True)
class Run:
    """Of the last round. counts: tokens that were computed in each round. preempted, swapped: in all rounds."""

    answers: Answers
    counts: tuple[int, ...]
    steps: int
    preempted: int
    swapped: int


def limits_of(config: EngineConfig) -> GraphLimits:
    """Of the steps that an engine's runner captures."""
    pages = -(-config.max_model_len // PAGE)
    return GraphLimits(config.max_batch, pages, config.max_step_tokens, config.num_drafts)


def run(
    model: Model, checkpoint: Checkpoint, requests: Sequence[Request], *, kv_dtype: str = "fp16", graphs: bool = False,
    rounds: int = 1, **limits: Any,
) -> Run:  # fmt: skip
    """The answers to requests that come together, once in each round. graphs: whether steps are captured."""
    given = {"num_pages": 64, "max_model_len": 96, "max_step_tokens": 64, "admission": "aggressive"}
    config = EngineConfig(**given | {"prefix_cache": rounds > 1} | limits)
    captures = limits_of(config) if graphs else None
    runner = Counting(
        model, config.num_pages, PAGE, model.norm.device, kv_dtype=kv_dtype, graphs=captures,
        max_rows=config.max_batch * (1 + config.num_drafts), num_host_pages=config.num_host_pages,
    )  # fmt: skip
    drafter = EagerLookup() if config.num_drafts else None
    engine = Engine(runner, checkpoint.tokenizer, config, ManualClock(), drafter=drafter)
    found, counts = Answers(), list[int]()
    for _ in range(rounds):
        found, runner.count, runner.steps = {}, 0, 0
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                assert output.finish_reason in (None, "stop", "length")
                found.setdefault(output.request_id, []).extend(output.tokens)
            engine.check()
        counts.append(runner.count)
    if model.norm.device.type == "cuda":
        torch.cuda.synchronize()  # the last step of a sequence that has ended
    scheduler = engine.scheduler
    return Run(
        found, tuple(counts), runner.steps, scheduler.num_recomputed + scheduler.num_swapped, scheduler.num_swapped
    )
