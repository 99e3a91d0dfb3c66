"""Caches of every format in the server: memory, and the same text however requests are run, on the kernels as native code.

The runs differ in company, chunks, captured steps and sequences that lose their pages: all that may not change a token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_llama import CPU, TINY
from ways_to_run import PAGE, Run, run

from serving.config import KV_DTYPES, ServerConfig
from serving.core import Request, SamplingParams
from serving.kernels import default_kernels
from serving.kv_frames import has_frames, with_frames
from serving.kv_pool import KvPool, PageShape
from serving.loader import Checkpoint
from serving.memory import ModelSize, plan
from serving.model import Model, load_model

LAYERS, KV_HEADS, HEAD_DIM = TINY["num_hidden_layers"], TINY["num_key_value_heads"], TINY["head_dim"]
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> Model:
    return load_model(tiny_checkpoint, default_kernels(invariant=True), CPU)


def requests() -> list[Request]:
    """Nine, greedy, logarithms of probabilities included."""
    rng = np.random.default_rng(5)
    found: list[Request] = []
    for index in range(9):
        tokens = tuple(rng.integers(0, 256, rng.integers(1, 60)).tolist())
        params = SamplingParams(max_tokens=int(rng.integers(6, 30)), temperature=0, ignore_eos=True, logprobs=2)
        found.append(Request(str(index), tokens, params))
    return found


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_same_text_however_it_is_run(model: Model, tiny_checkpoint: Checkpoint, kv_dtype: str) -> None:
    if has_frames(kv_dtype):
        model = with_frames(model, tiny_checkpoint.tokenizer, tiny_checkpoint.config.max_positions, CPU)

    def runs(graphs: bool, **limits: int) -> Run:
        return run(model, tiny_checkpoint, requests(), kv_dtype=kv_dtype, graphs=graphs, **limits)

    loop = runs(False, max_batch=1)
    (count,) = loop.counts
    assert len(loop.answers) == 9 and all(len(tokens) >= 6 for tokens in loop.answers.values())
    for way, found in {
        "batched": runs(False, max_batch=9),
        "batched, captured": runs(True, max_batch=7),
        "in chunks": runs(False, max_batch=4, max_step_tokens=7),
    }.items():
        assert found.answers == loop.answers and found.counts == (count,) and not found.preempted, way
    again = runs(True, max_batch=9, num_pages=12)
    assert again.answers == loop.answers and again.counts[0] > count and again.preempted and not again.swapped
    swapped = runs(True, max_batch=9, num_pages=12, num_host_pages=40)
    assert swapped.answers == loop.answers and swapped.swapped
    assert swapped.counts == (count,), "nothing is computed again"
    cached = runs(True, max_batch=9, rounds=2)
    assert cached.answers == loop.answers and not cached.preempted
    assert cached.counts[0] == count and cached.counts[1] < 0.8 * count, "beginnings found in the cache"


def test_formats_differ(model: Model, tiny_checkpoint: Checkpoint) -> None:
    """So that the test above does not compare one format five times."""
    found = [run(model, tiny_checkpoint, requests(), kv_dtype=name, max_batch=9).answers for name in KV_DTYPES]
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
    found = plan(
        tiny_checkpoint.config,
        ModelSize(0, 0),
        ServerConfig(max_batch=10**6, max_step_tokens=64, kv_dtype=kv_dtype),
        2**40,
        CPU,
    )
    nbytes = PAGE * LAYERS * 2 * KV_HEADS * NBYTES[kv_dtype]
    assert (found.page_nbytes, found.num_pages) == (nbytes, 2**30 // nbytes)
