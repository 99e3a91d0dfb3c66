"""Captured steps compute the bits of the plain way, whatever their inputs become and whatever is made up beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from plain_step import plain_step
from serving_fakes import ManualClock
from test_serving_model import mixed_checkpoint
from tiny_llama import CPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch_kernels import TorchKernels

import tilus.kernels
from serving import build
from serving.config import EngineConfig, ServerConfig
from serving.core import Batch, BatchItem, Request, SampledToken, SamplingParams
from serving.engine import Engine
from serving.execution import Execution
from serving.kernels import Kernels
from serving.kv_pool import KvPool, PageShape
from serving.loader import Checkpoint
from serving.model import Model, load_model
from serving.runner import TorchRunner
from serving.sampling import Sampler
from serving.step_graphs import StepGraphs
from serving.step_inputs import step_tensors
from serving.step_shapes import LARGEST_BATCH, GraphLimits, StepShape, StepShapes
from tilus.errors import TilusError

PAGE = 16
MAX_PAGES = 5
GREEDY = SamplingParams(temperature=0)
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def mixed_model(tiny_checkpoint: Checkpoint) -> Model:
    """q and k apart from v."""
    return load_model(mixed_checkpoint(tiny_checkpoint), tilus.kernels, CPU)


def random_pool(rng: np.random.Generator, model: Model, pages: int, kv_dtype: str = "fp16") -> KvPool:
    """Elements, or scales, of the order of one; codes are any but those of fp8's NaN."""
    pool = KvPool(PageShape(model.config, PAGE, kv_dtype), pages, CPU)
    for cache in pool.layers:
        if isinstance(cache, torch.Tensor):
            cache.copy_(torch.from_numpy(rng.normal(size=tuple(cache.shape))))
        else:
            cache.codes.copy_(torch.from_numpy(rng.integers(0, 120, tuple(cache.codes.shape), np.uint8)))
            cache.factors.copy_(torch.from_numpy(rng.uniform(-0.02, 0.02, tuple(cache.factors.shape))))
    return pool


def copy_of(pool: KvPool) -> KvPool:
    copy = KvPool(pool.shape, len(pool.memory), CPU)
    copy.memory.copy_(pool.memory)
    return copy


def graphs_of(model: Model, pool: KvPool) -> StepGraphs:
    limits = GraphLimits(max_batch=32, max_pages=MAX_PAGES, max_step_tokens=64)
    return StepGraphs(model, pool, limits, Sampler(model.config.vocab_size, 32, pool.memory.device))


def replayed(graphs: StepGraphs, batch: Batch) -> torch.Tensor:
    """The logits of a batch that fits."""
    shape = graphs.shapes.of(batch)
    assert shape is not None
    return graphs.prepare(batch, shape, {})()


def random_batch(rng: np.random.Generator, starts: Sequence[int], num_pages: int) -> Batch:
    """A token for each sequence, whose length is given, with new pages each time: other sequences have come."""
    free = rng.permutation(num_pages).tolist()
    tables = [tuple(free.pop() for _ in range(start // PAGE + 1)) for start in starts]
    return Batch(
        tuple(
            BatchItem(str(row), (int(rng.integers(256)),), start, table, GREEDY, 0)
            for row, (start, table) in enumerate(zip(starts, tables))
        )
    )


@pytest.mark.sampled(6)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("kind", "kv_dtype"), [("fused", "fp16"), ("parts", "fp16"), ("fused", "bf16"), ("fused", "int4"), ("fused", "fp8")]
)
@torch.inference_mode()
def test_logits_and_cache_are_the_same_bits(
    model: Model, mixed_model: Model, kind: str, kv_dtype: str, size: int
) -> None:
    """All inputs change from step to step, over page borders; whatever were computed outside of the kernels would not."""
    rng, chosen, num_pages = np.random.default_rng(size), model if kind == "fused" else mixed_model, 5 * MAX_PAGES
    pool = random_pool(rng, chosen, num_pages, kv_dtype)
    plain = copy_of(pool)
    graphs = graphs_of(chosen, pool)
    lengths = rng.integers(0, PAGE * MAX_PAGES - 12, size)
    for step in range(12):
        batch = random_batch(rng, (lengths + step).tolist(), num_pages)
        found = replayed(graphs, batch)
        expected = chosen.forward(plain_step(batch, PAGE, CPU), plain.layers)
        assert torch.equal(found, expected)
        assert torch.equal(pool.memory, plain.memory)
    assert len(graphs._graphs) == 1


class Watching(TorchDispatchMode):
    """Collects the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_torch_computes_nothing_in_a_step_whose_rows_are_all_wanted(mixed_model: Model) -> None:
    rng = np.random.default_rng(1)
    pool, step = random_pool(rng, mixed_model, 10), step_tensors(random_batch(rng, [3, 20], 10), PAGE, CPU)
    assert step.last is None
    with Watching() as watching:
        mixed_model.forward(step, pool.layers)
    assert watching.seen <= {"empty", "view", "slice", "select", "split", "split_with_sizes"}


def new_engine(model: Model, checkpoint: Checkpoint, *, graphs: bool, num_pages: int) -> Engine:
    config = EngineConfig(num_pages=num_pages, max_model_len=80, page_size=PAGE, max_batch=5, max_step_tokens=24)
    runner = TorchRunner(model, num_pages, PAGE, CPU, graphs=GraphLimits(5, MAX_PAGES, 24) if graphs else None)
    return Engine(runner, checkpoint.tokenizer, config, ManualClock())


def answers(engine: Engine) -> dict[str, list[SampledToken]]:
    """Requests that come one by one, some random, some aborted."""
    rng, found = np.random.default_rng(3), {}
    for step in range(400):
        if step < 60 and step % 4 == 0:
            prompt = tuple(rng.integers(0, 256, rng.integers(1, 40)).tolist())
            params = SamplingParams(
                max_tokens=int(rng.integers(1, 40)), temperature=step % 3 / 2, seed=step, logprobs=3, ignore_eos=True
            )
            engine.add(Request(str(step), prompt, params))
        if step == 30:
            engine.abort("20")
        for output in engine.step():
            assert output.finish_reason in (None, "length")
            found.setdefault(output.request_id, []).extend(output.tokens)
        engine.check()
        if step > 60 and not engine.has_work:
            return found
    raise AssertionError("requests do not end")


@pytest.mark.parametrize("num_pages", [25, 8])  # enough for all, or too few: sequences lose theirs and compute again
def test_requests_that_come_and_go(model: Model, tiny_checkpoint: Checkpoint, num_pages: int) -> None:
    plain = new_engine(model, tiny_checkpoint, graphs=False, num_pages=num_pages)
    captured = new_engine(model, tiny_checkpoint, graphs=True, num_pages=num_pages)
    expected = answers(plain)
    assert len(expected) >= 14
    assert answers(captured) == expected  # logarithms of probabilities, too
    runner = captured._runner
    assert isinstance(runner, TorchRunner) and runner._graphs is not None
    assert {shape.rows for shape in runner._graphs._graphs} >= {1, 2, 3}


def test_on_a_cpu_small_batches_that_decode_have_graphs(model: Model) -> None:
    shapes = StepShapes(GraphLimits(32, MAX_PAGES, 64), CPU)
    decode = BatchItem("a", (1,), 4, (0,), GREEDY, 0)
    assert tuple(shapes.of(Batch((decode,) * size)) for size in range(1, LARGEST_BATCH + 1)) == shapes.all
    assert shapes.of(Batch((decode,) * (LARGEST_BATCH + 1))) is None
    assert shapes.of(Batch((decode, BatchItem("b", (1, 2), 0, (1,), GREEDY, 0)))) is None
    assert shapes.of(Batch((decode, BatchItem("b", (1,), 0, (1,), None, 0)))) is None


@torch.inference_mode()
def test_a_capture_that_failed_is_tried_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    pool = random_pool(rng, model, 10)
    graphs, batch = graphs_of(model, pool), random_batch(rng, [5, 18], 10)

    def fails(*args: object, **options: object) -> None:
        raise TilusError("the compiler is gone")

    with monkeypatch.context() as broken:
        broken.setattr(tilus.kernels, "linear_add_rms_norm", fails)
        with pytest.raises(TilusError, match="the compiler is gone"):
            replayed(graphs, batch)
    expected = model.forward(plain_step(batch, PAGE, CPU), copy_of(pool).layers)
    for _ in range(2):
        assert torch.equal(replayed(graphs, batch), expected)


@pytest.mark.parametrize(
    ("kernels", "way", "captures"),
    [(tilus.kernels, "cpu", True), (tilus.kernels, "reference", False), (TorchKernels(), "cpu", False)],
)
def test_only_native_kernels_of_tilus_are_compiled_ahead_and_captured(
    tiny_checkpoint: Checkpoint, tmp_path, monkeypatch: pytest.MonkeyPatch, kernels: Kernels, way, captures: bool
) -> None:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path))
    path = tiny_checkpoint.weights._tensors.path
    config = ServerConfig(max_batch=2, num_pages=6)
    compiled: list[object] = []
    monkeypatch.setattr(tilus, "compile_ahead", lambda run, done: compiled.append(run), raising=False)
    engine = build.build_engine(config, path, tiny_checkpoint, kernels, Execution(CPU, way))
    runner = engine._runner
    assert isinstance(runner, TorchRunner) and (runner._graphs is not None) == captures
    assert len(compiled) == captures
    if runner._graphs is not None:
        assert runner._graphs.inputs.step(StepShape(2, 2, 0, 2)).block_tables.shape == (2, 6)


def test_where_steps_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of several CPUs are none of tilus' launches; checks of indices wait for a GPU."""
    ways = [(Execution(CPU, "cpu"), False), (Execution(CPU, "cpu"), True), (Execution(CPU, "reference"), False)]
    ways += [(Execution(torch.device("cuda"), "cuda"), is_parallel) for is_parallel in (False, True)]
    found: list[list[bool]] = []
    for debug in "01":
        monkeypatch.setenv("TILUS_DEBUG", debug)
        found.append([build.can_capture(*way) for way in ways])
    assert found == [[True, False, False, True, True], [True, False, False, False, False]]
