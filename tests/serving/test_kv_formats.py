"""Caches of every format in the server: memory, and the same text however requests are run, on the kernels as native code.

The runs differ in company, chunks, captured steps and sequences that lose their pages: all that may not change a token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from serving_fakes import ManualClock
from tiny_llama import CPU, TINY

from serving.config import KV_DTYPES, EngineConfig
from serving.core import Batch, Request, SampledToken, SamplingParams, StepOutput
from serving.engine import Engine
from serving.kernels import default_kernels
from serving.kv_frames import has_frames, with_frames
from serving.kv_pool import KvPool, PageShape
from serving.loader import Checkpoint
from serving.memory import ModelSize, Wishes, plan
from serving.model import Model, load_model
from serving.runner import TorchRunner
from serving.step_shapes import GraphLimits

PAGE = 16
LAYERS, KV_HEADS, HEAD_DIM = TINY["num_hidden_layers"], TINY["num_key_value_heads"], TINY["head_dim"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILUS_DEVICE", raising=False)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> Model:
    return load_model(tiny_checkpoint, default_kernels(invariant=True), CPU)


class Counting(TorchRunner):
    """Counts the tokens that go through the model."""

    count = 0

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        self.count += sum(len(item.token_ids) for item in batch.items)
        return super().launch(batch)


Answers = dict[str, list[SampledToken]]


def answers(
    model: Model, checkpoint: Checkpoint, kv_dtype: str, graphs: bool, rounds: int = 1, **limits: int
) -> tuple[Answers, list[int]]:
    """Of nine requests that come together, greedy, logarithms of probabilities included: those of the last round, and how many
    tokens were computed in each."""
    given = {
        "num_pages": 64,
        "max_model_len": 96,
        "max_step_tokens": 64,
        "prefix_cache": rounds > 1,
        "admission": "aggressive",
    }
    config = EngineConfig(**(given | limits))
    captures = GraphLimits(config.max_batch, 6, config.max_step_tokens) if graphs else None
    runner = Counting(
        model, config.num_pages, PAGE, CPU, kv_dtype=kv_dtype, graphs=captures, num_host_pages=config.num_host_pages
    )
    engine = Engine(runner, checkpoint.tokenizer, config, ManualClock())
    found, counts, preempted = Answers(), list[int](), 0
    for _ in range(rounds):
        rng, found, runner.count = np.random.default_rng(5), {}, 0
        for index in range(9):
            tokens = tuple(rng.integers(0, 256, rng.integers(1, 60)).tolist())
            params = SamplingParams(max_tokens=int(rng.integers(6, 30)), temperature=0, ignore_eos=True, logprobs=2)
            engine.add(Request(str(index), tokens, params))
        while engine.has_work:
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.tokens)
            engine.check()
            preempted += sum(seq.num_preemptions for seq in engine.scheduler.waiting)
        counts.append(runner.count)
    assert (preempted > 0) == (config.num_pages < 32)
    assert (engine.scheduler.num_swapped > 0) == (config.num_host_pages > 0)
    return found, counts


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_same_text_however_it_is_run(model: Model, tiny_checkpoint: Checkpoint, kv_dtype: str) -> None:
    if has_frames(kv_dtype):
        model = with_frames(model, tiny_checkpoint.tokenizer, tiny_checkpoint.config.max_positions, CPU)

    def run(graphs: bool, **limits: int) -> tuple[Answers, list[int]]:
        return answers(model, tiny_checkpoint, kv_dtype, graphs, **limits)

    loop, (count,) = run(False, max_batch=1)
    assert len(loop) == 9 and all(len(tokens) >= 6 for tokens in loop.values())
    assert run(False, max_batch=9) == (loop, [count]), "batched"
    assert run(True, max_batch=7) == (loop, [count]), "batched, captured"
    assert run(False, max_batch=4, max_step_tokens=7) == (loop, [count]), "in chunks"
    again, counts = run(True, max_batch=9, num_pages=12)
    assert again == loop and counts[0] > count, "computed again"
    swapped, counts = run(True, max_batch=9, num_pages=12, num_host_pages=40)
    assert swapped == loop and counts[0] == count, "copied to the host and back, nothing is computed again"
    cached, counts = run(True, max_batch=9, rounds=2)
    assert cached == loop and counts[0] == count and counts[1] < 0.8 * count, "beginnings found in the cache"


def test_formats_differ(model: Model, tiny_checkpoint: Checkpoint) -> None:
    """So that the test above does not compare one format five times."""
    found = [answers(model, tiny_checkpoint, name, False, max_batch=9)[0] for name in KV_DTYPES]
    assert all(a != b for index, a in enumerate(found) for b in found[:index])


NBYTES = {
    "fp16": 2 * HEAD_DIM,
    "bf16": 2 * HEAD_DIM,
    "fp8": HEAD_DIM + 2,
    "int8": HEAD_DIM + 2,
    "int4": HEAD_DIM // 2 + 4,
}


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_page_is_contiguous_and_as_large_as_its_format(tiny_checkpoint: Checkpoint, kv_dtype: str) -> None:
    """Each byte of the pool is written through one layer's cache, that of its page alone."""
    shape = PageShape(tiny_checkpoint.config, PAGE, kv_dtype)
    assert shape.nbytes == PAGE * LAYERS * 2 * KV_HEADS * NBYTES[kv_dtype]
    pool = KvPool(shape, 5, CPU)
    assert pool.memory.shape == (5, shape.nbytes) and pool.memory.is_contiguous()
    for cache in pool.layers:
        assert tuple(cache.shape) == (5, 2, PAGE, KV_HEADS, HEAD_DIM)
        for part in [cache] if isinstance(cache, torch.Tensor) else [cache.codes, cache.factors]:
            raw = part[3].view(torch.uint8)
            raw.add_(1)
    assert (pool.memory[3] == 1).all() and not pool.memory[:3].any() and not pool.memory[4:].any()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_memory_decides_how_many_pages_of_a_format_there_are(tiny_checkpoint: Checkpoint, kv_dtype: str) -> None:
    found = plan(tiny_checkpoint.config, ModelSize(0, 0), Wishes(10**6, 64, None, None, kv_dtype), 2**40, CPU)
    nbytes = PAGE * LAYERS * 2 * KV_HEADS * NBYTES[kv_dtype]
    assert (found.page_nbytes, found.num_pages) == (nbytes, 2**30 // nbytes)
