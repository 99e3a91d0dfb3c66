"""Steps that are padded to the shapes of a GPU give what they give as they are, whatever is made up beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_step import plain_step
from serving_fakes import ManualClock
from test_step_graphs import GREEDY, MAX_PAGES, PAGE, copy_of, graphs_of, random_batch, random_pool, replayed
from tiny_llama import CPU, TINY
from ways_to_run import EagerLookup

import tilus.kernels
from serving import runner, step_graphs
from serving.config import EngineConfig
from serving.core import Batch, BatchItem, Request, SampledToken, SamplingParams, is_decode
from serving.dummy import open_dummy
from serving.engine import Engine
from serving.kernels import default_kernels
from serving.kv_pool import KvPool, PageShape
from serving.loader import Checkpoint
from serving.model import Model, load_model
from serving.runner import TorchRunner
from serving.sampling import Sampler
from serving.step_graphs import StepGraphs
from serving.step_inputs import StepInputs
from serving.step_shapes import GraphLimits, StepShape, StepShapes
from tilus.dtypes import int8

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def mixed_batch(rng: np.random.Generator, limits: GraphLimits, num_pages: int) -> Batch:
    """Sequences that decode, prompts from their start or behind what is cached, whole or in part, and guesses, in any order."""
    free, items = rng.permutation(num_pages).tolist(), list[BatchItem]()
    room, count = limits.max_step_tokens, int(rng.integers(1, rng.integers(2, limits.max_batch + 2)))
    for index in range(count):
        kind = rng.integers(4)
        drafts = int(rng.integers(1, limits.num_drafts + 1)) if kind == 1 and limits.num_drafts else 0
        tokens = 1 + drafts if kind < 2 else int(rng.integers(1, 25 if rng.integers(2) else 2))
        tokens = min(tokens, room - (count - index - 1))
        start = int(rng.integers(0, limits.max_pages * PAGE - tokens + 1))
        pages = tuple(free.pop() for _ in range(-(-(start + tokens) // PAGE)))
        params = None if kind == 3 else GREEDY
        ids = tuple(rng.integers(0, 256, tokens).tolist())
        items.append(BatchItem(str(index), ids, start, pages, params, 0, num_drafts=min(drafts, tokens - 1)))
        room -= tokens
    return Batch(tuple(items))


def check_made_up(inputs: StepInputs, shape: StepShape, batch: Batch) -> None:
    """Sequences without keys own all rows that are made up, which are not written to the cache."""
    step, singles = inputs.step(shape), sum(map(is_decode, batch.items))
    others, starts = len(batch.items) - singles, step.q_start.tolist()
    own_keys = [*range(singles), *range(shape.decodes, shape.decodes + others)]
    assert [row for row, length in enumerate(step.kv_lens.tolist()) if length] == own_keys
    assert starts == sorted(starts) and starts[0] == 0 and starts[-1] == shape.rows - shape.decodes
    own_rows = [*range(singles), *range(shape.decodes, shape.decodes + starts[others])]
    assert [row for row, slot in enumerate(step.slots.tolist()) if slot >= 0] == own_rows
    assert starts[others] == sum(len(item.token_ids) for item in batch.items) - singles


@pytest.mark.parametrize("kv_dtype", ["fp16", "int4"])
@torch.inference_mode()
def test_rows_that_are_made_up_change_nothing(tiny_checkpoint: Checkpoint, kv_dtype: str) -> None:
    """A GPU pads every step; what steps before left in the inputs is never read."""
    model, rng = load_model(tiny_checkpoint, default_kernels(invariant=True), CPU), np.random.default_rng(6)
    limits = GraphLimits(12, MAX_PAGES, 40, 3)
    num_pages = limits.max_batch * MAX_PAGES
    shapes, pool = StepShapes(limits, torch.device("cuda")), random_pool(rng, model, num_pages, kv_dtype)
    plain, inputs = copy_of(pool), StepInputs(shapes.all, PAGE, MAX_PAGES, torch.zeros(48, dtype=torch.int32))
    seen: set[StepShape] = set()
    for _ in range(40):
        batch = mixed_batch(rng, limits, num_pages)
        shape = shapes.of(batch)
        assert shape is not None
        seen.add(shape)
        inputs.write(batch, shape, {})
        inputs.gather(shape)
        check_made_up(inputs, shape, batch)
        found = model.forward(inputs.step(shape), pool.layers)
        expected = model.forward(plain_step(batch, PAGE, CPU), plain.layers)
        assert torch.equal(pool.memory, plain.memory)
        assert torch.equal(found[: len(expected)], expected) and found.isfinite().all()
    assert len(seen) > 5


class Padded:
    """Captures nothing: what a GPU's graph does, which samples in the way of its capture, is done again on the CPU."""

    samples = True

    def __init__(self) -> None:
        self.replaying = False

    def __call__(self, run: Callable[[], None], first: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replaying = True
            run()
            self.replaying = False

        first()
        return replay


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, padded, sample = step_graphs.StepShapes, Padded(), Sampler.run

    def run(sampler: Sampler, logits: torch.Tensor, rows: int) -> torch.Tensor:
        asked = sampler._edits, sampler._asking
        if padded.replaying:
            sampler._edits = sampler._asking = None
        found = sample(sampler, logits, rows)
        sampler._edits, sampler._asking = asked
        return found

    monkeypatch.setattr(Sampler, "run", run)
    monkeypatch.setattr(step_graphs, "StepShapes", lambda limits, device: shapes(limits, torch.device("cuda")))
    monkeypatch.setattr(step_graphs, "capture_of", lambda device: padded)


def conversation(engine: Engine, drafts: bool) -> dict[str, list[SampledToken]]:
    """Prompts that begin alike, cut into chunks beside answers, some of which want more than a plain draw."""
    rng, found = np.random.default_rng(5), dict[str, list[SampledToken]]()
    beginning = tuple(rng.integers(0, 256, 37).tolist())
    for index in range(9):
        prompt = (*beginning[: int(rng.integers(1, 38))], *rng.integers(0, 256, rng.integers(1, 9)).tolist())
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 12)), temperature=index % 3 / 2, seed=index, ignore_eos=True,
            logprobs=2 if index % 4 == 1 else None, frequency_penalty=0.5 if index % 4 == 2 else 0.0,
        )  # fmt: skip
        engine.add(Request(str(index), prompt * 2 if drafts else prompt, params))
        for _ in range(int(rng.integers(1, 4))):
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.tokens)
            engine.check()
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.tokens)
    return found


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    ("drafts", "overlap", "num_pages"),
    [(0, False, 30), (0, True, 30), (0, True, 9), (3, False, 30), (3, True, 30), (3, True, 16)],
)
def test_an_engine_whose_steps_are_padded(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, drafts: int, overlap: bool, num_pages: int
) -> None:
    """Chunks, mixed steps, beginnings in the cache, guesses, tokens that only the device knows, and lost pages."""
    model, found = load_model(tiny_checkpoint, default_kernels(invariant=True), CPU), list[object]()
    for limits in (None, GraphLimits(5, MAX_PAGES + 1, 24, drafts)):
        config = EngineConfig(
            num_pages, 96, PAGE, max_batch=5, max_step_tokens=24, num_drafts=drafts, overlap=overlap and limits is not None,
            admission="aggressive",
        )  # fmt: skip
        torch_runner = TorchRunner(model, num_pages, PAGE, CPU, max_rows=5 * (1 + drafts), graphs=limits)
        drafter = EagerLookup() if drafts else None
        engine = Engine(torch_runner, tiny_checkpoint.tokenizer, config, ManualClock(), drafter=drafter)
        found.append(conversation(engine, drafts > 0))
        monkeypatch.delattr(runner, "step_tensors", raising=False)  # so that the second engine has nothing else
    assert found[0] == found[1]


@pytest.mark.usefixtures("_as_on_a_gpu")
@torch.inference_mode()
def test_what_is_captured_samples_in_the_plain_way(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the first step of a shape behind one that wanted more."""
    graphs, plain = graphs_of(model, KvPool(PageShape(model.config, PAGE), 1, CPU)), list[bool]()
    sampler = graphs._sampler
    sampler.write([BatchItem("a", (1,), 0, (0,), SamplingParams(logprobs=1), 0)])
    assert not sampler.is_plain
    sample = Sampler.run
    monkeypatch.setattr(Sampler, "run", lambda own, *args: plain.append(own.is_plain) or sample(own, *args))
    replayed(graphs, Batch((BatchItem("a", (1,), 0, (0,), GREEDY, 0),)))
    assert plain == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
@torch.inference_mode()
def test_cuda_graphs_compute_the_bits_of_the_model(tiny_checkpoint: Checkpoint, kv_dtype: str) -> None:
    """Batches of 1 to 11 sequences, with and without prompts and guesses, over page borders."""
    gpu, rng = torch.device("cuda"), np.random.default_rng(0)
    model = load_model(tiny_checkpoint, default_kernels(invariant=True), gpu)
    pools = [KvPool(PageShape(model.config, PAGE, kv_dtype), 11 * MAX_PAGES, gpu) for _ in range(2)]
    limits = GraphLimits(11, MAX_PAGES, 40, 3)
    graphs = StepGraphs(model, pools[0], limits, Sampler(model.config.vocab_size, 44, gpu))
    graphs.capture_common(lambda done, total: None)
    assert not pools[0].memory.any()
    lengths = rng.integers(0, PAGE * MAX_PAGES - 3, 11)
    decoding = [random_batch(rng, lengths[:size].tolist(), 11 * MAX_PAGES) for size in (11, 3, 1, 8, 2, 5, 11)]
    for batch in (*decoding, *(mixed_batch(rng, limits, 11 * MAX_PAGES) for _ in range(30))):
        expected = model.forward(plain_step(batch, PAGE, gpu), pools[1].layers)
        found = replayed(graphs, batch)[: len(expected)]
        assert torch.equal(found, expected)
        assert torch.equal(pools[0].memory, pools[1].memory)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["fp16", "fp8", "int4"])
@torch.inference_mode()
def test_cuda_graphs_of_the_fastest_kernels(tmp_path: Path, kv_dtype: str) -> None:
    """Heads of 64, which Hopper's kernels of attention take. Their sums depend on the shape: bits are those of the same shape
    launched one by one, numbers those of the step as it is."""
    settings = TINY | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    gpu, rng = torch.device("cuda"), np.random.default_rng(2)
    model = load_model(open_dummy(tmp_path, int8), tilus.kernels, gpu)
    pools = [KvPool(PageShape(model.config, PAGE, kv_dtype), 11 * MAX_PAGES, gpu) for _ in range(3)]
    for cache in (cache for pool in pools for cache in pool.layers if isinstance(cache, torch.Tensor)):
        cache.copy_(torch.linspace(-1, 1, cache.numel(), device=gpu).view(cache.shape))
    limits = GraphLimits(11, MAX_PAGES, 40, 3)
    graphs = StepGraphs(model, pools[0], limits, Sampler(model.config.vocab_size, 44, gpu))
    for _ in range(40):
        batch = mixed_batch(rng, limits, 11 * MAX_PAGES)
        shape = graphs.shapes.of(batch)
        assert shape is not None
        found = graphs.prepare(batch, shape, {})()
        assert torch.equal(found, model.forward(graphs.inputs.step(shape), pools[1].layers))
        assert torch.equal(pools[0].memory, pools[1].memory)
        assert found.isfinite().all()
        if kv_dtype == "fp16":  # what is quantised may be rounded to another code
            plain = model.forward(plain_step(batch, PAGE, gpu), pools[2].layers)
            difference, scale = (found[: len(plain)] - plain).norm(), plain.norm()
            assert difference <= (10 * model.config.num_layers + 2) * 2**-11 * scale
            pools[2].memory.copy_(pools[0].memory)
