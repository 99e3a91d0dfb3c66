"""What is compiled before the first client comes is all that any step launches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llama import CPU

import tilus
from serving import step_graphs
from serving.architectures import by_huggingface
from serving.config import EngineConfig
from serving.core import UNKNOWN, Batch, BatchItem, SamplingParams
from serving.kernels import default_kernels
from serving.layers import Dense, Linear, Norm
from serving.loader import Checkpoint
from serving.model import Embedding, Layer, Model, load_model
from serving.model_config import LayerAttention, ModelConfig
from serving.rehearsal import rehearsal, without_repetitions
from serving.rope import Rope
from serving.runner import TorchRunner
from serving.step_shapes import GraphLimits, StepShapes
from tilus.dtypes import int8, uint4
from tilus.kernels.quantize import QuantizedWeight, WeightHeader
from tilus.runtime import cuda
from tilus.runtime.compile_pool import CompilePool
from tilus.target import get_target

LLAMA = by_huggingface("LlamaForCausalLM", "a test")
ATTENTION = (LayerAttention(Rope((1.0,))),)
SMOLLM = ModelConfig(LLAMA, 576, 30, 9, 3, 64, 1536, 49152, 8192, 1e-5, ATTENTION, 64**-0.5)
LLAMA_8B = ModelConfig(LLAMA, 4096, 32, 32, 8, 128, 14336, 128256, 8192, 1e-5, ATTENTION, 128**-0.5)
LIMITS = EngineConfig(num_pages=2912, max_model_len=8192)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100, for steps that launch nothing."""
    monkeypatch.setenv("TILUS_DEVICE", "cuda")
    device = SimpleNamespace(index=0, name="H100", target=get_target("sm_90a"), num_sms=132)
    monkeypatch.setattr(cuda, "current_device", lambda: device)
    monkeypatch.setattr(step_graphs, "StepShapes", lambda limits, _: StepShapes(limits, torch.device("cuda")))


def shaped(config: ModelConfig, dtype: tilus.DataType, layers: int) -> Model:
    """A model of memory that nobody has written: nothing will be read."""

    def weight(n: int, k: int, is_gated: bool = False) -> QuantizedWeight:
        header = WeightHeader(dtype, (n, k), 32, "f16", "f16", is_gated=is_gated)
        arrays = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in header.arrays.items()}
        return QuantizedWeight(header, **arrays)

    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    norm = torch.empty(hidden)
    cos_sin = torch.empty(config.max_positions, config.head_dim)
    layer = Layer(
        attn_norm=Norm(norm),
        qkv=Linear((weight(q + 2 * config.num_kv_heads * config.head_dim, hidden),)),
        q_norm=None,
        k_norm=None,
        cos_sin=cos_sin,
        window=None,
        attn_output=Linear((weight(hidden, q),)),
        post_attention_norm=None,
        ffn_norm=Norm(norm),
        feed_forward=Dense(
            Linear((weight(2 * config.ffn_size, hidden, is_gated=True),)),
            Linear((weight(hidden, config.ffn_size),)),
            "silu",
        ),
        post_ffw_norm=None,
    )
    table = torch.empty(config.vocab_size, hidden, dtype=torch.int8)
    embedding = Embedding(table, torch.empty(config.vocab_size, hidden // 32, dtype=torch.float16))
    head = weight(config.vocab_size, hidden)
    return Model(replace(config, num_layers=layers), default_kernels(), embedding, (layer,) * layers, norm, head)


def random_batches(rng: random.Random, count: int) -> Iterator[Batch]:
    for _ in range(count):
        decodes = rng.randrange(0, 32)
        prompts, room = rng.randrange(0 if decodes else 1, 33 - decodes), LIMITS.max_step_tokens - decodes
        lengths = [1] * decodes
        while prompts and room:
            lengths.append(rng.randint(1, min(room, rng.choice([8, 64, 512]))))
            prompts, room = prompts - 1, room - lengths[-1]
        items = (
            BatchItem(str(i), (0,) * n, 0, (0,) * -(-n // 16), None if n > 1 and rng.random() < 0.3 else GREEDY, 0)
            for i, n in enumerate(lengths)
        )
        yield Batch(tuple(item if rng.random() < 0.7 else asking(rng, item) for item in items))


def behind_drafts() -> Iterator[Batch]:
    """Steps with drafts, and behind each one whose sequences go on from where they agreed, with and without more of them."""
    for size in (1, 5, 16):
        first = [BatchItem(str(i), (0, 1, 2, 3), 4, (0,), GREEDY, 0, num_drafts=3) for i in range(size)]
        then = [item._replace(token_ids=(UNKNOWN, 4, 5, 6), start=8, draw=4) for item in first]
        last = [item._replace(token_ids=(UNKNOWN,), start=12, draw=8, num_drafts=0) for item in then]
        yield from (Batch(tuple(items)) for items in (first, then, last))


def asking(rng: random.Random, item: BatchItem) -> BatchItem:
    """The same item of a request that wants more than tokens, or others."""
    history = tuple(rng.choices(range(99), k=rng.randrange(1, 40)))
    wanted = (
        {"params": SamplingParams(logprobs=rng.randrange(21))},
        {"params": SamplingParams(logit_bias=tuple((token, 1.0) for token in range(rng.randrange(1, 20))))},
        {"params": SamplingParams(presence_penalty=1.0), "history": history, "draw": rng.randrange(len(history) + 1)},
        {"allowed": rng.randbytes(9)},
    )
    return item if item.params is None else item._replace(**rng.choice(wanted))


# Of products: for queries, keys and values, of attention's output, for gates, behind them, over the vocabulary.
LAYER_KINDS = 5


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("config", "dtype", "kv_dtype"), [(SMOLLM, uint4, "fp16"), (LLAMA_8B, uint4, "int8"), (SMOLLM, int8, "int4")]
)
def test_no_step_needs_another_kernel(
    config: ModelConfig, dtype: tilus.DataType, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are no more than one for each kind of layer and number of rows in eights; the other kernels are few."""
    runner = TorchRunner(shaped(config, dtype, 2), 64, 16, CPU, kv_dtype=kv_dtype, graphs=GraphLimits(32, 512, 512))
    needed: list[Any] = []
    monkeypatch.setattr(CompilePool, "compile_all", lambda _, jobs, **__: needed.extend(job.args[:3] for job in jobs))
    tilus.compile_ahead(lambda: runner.rehearse(()))
    rehearsed = frozenset(needed)
    linears = [name for _, name, *_ in rehearsed if name == "warpgroup_linear"]
    shapes = StepShapes(GraphLimits(32, 512, 512), torch.device("cuda")).all
    eights = {-(-shape.rows // 8) for shape in shapes}
    assert 20 < len(linears) <= LAYER_KINDS * len(eights)
    assert 20 < len(rehearsed) - len(linears) < 40
    needed.clear()
    tilus.compile_ahead(lambda: [runner.launch(batch) for batch in random_batches(random.Random(0), 60)])
    assert needed and rehearsed.issuperset(needed)


@pytest.mark.usefixtures("gpu")
def test_what_runs_behind_drafts_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = GraphLimits(32, 512, 512, 3)
    runner = TorchRunner(shaped(SMOLLM, uint4, 1), 64, 16, CPU, max_rows=128, graphs=graphs)
    needed: list[Any] = []
    monkeypatch.setattr(CompilePool, "compile_all", lambda _, jobs, **__: needed.extend(job.args[:3] for job in jobs))
    found: list[frozenset[Any]] = []
    for run in (lambda: runner.rehearse(()), lambda: [runner.launch(batch) for batch in behind_drafts()]):
        needed.clear()
        tilus.compile_ahead(run)
        found.append(frozenset(job for job in needed if job[1] == "follow_drafts_kernel"))
    assert len(found[0]) == 1 and found[1] == found[0]


@pytest.mark.parametrize(
    "limits", [{"max_step_tokens": 40}, {"max_model_len": 20}, {"num_pages": 2, "max_batch": 3}, {"max_batch": 1}]
)
def test_batches_are_within_the_limits(limits: dict[str, int]) -> None:
    config = replace(LIMITS, **limits)
    for batch in rehearsal(config):
        tokens = [len(item.token_ids) for item in batch.items]
        assert len(tokens) <= config.max_batch and sum(tokens) <= config.max_step_tokens
        assert max(tokens) <= min(config.max_model_len, config.num_pages * config.page_size)


def test_few_layers_of_each_kind_stand_for_all() -> None:
    """The first, which finds its norm taken, the last, whose norm others read, and between them what is new."""
    first, second = (shaped(replace(SMOLLM, vocab_size=64), dtype, 1).layers[0] for dtype in (uint4, int8))
    model = replace(
        shaped(replace(SMOLLM, vocab_size=64), uint4, 1), layers=(first, second, first, second, first, second)
    )
    caches = [torch.empty(index) for index in range(6)]
    kept, of_kept = without_repetitions(model, caches)
    assert kept.layers == (first, second, first, second) and of_kept == [*caches[:3], caches[5]]
    kept, of_kept = without_repetitions(replace(model, layers=(first,) * 6), caches)
    assert kept.layers == (first, first) and of_kept == [caches[0], caches[5]]
    assert without_repetitions(replace(model, layers=(first,)), caches)[0].layers == (first,)
    norm = torch.empty(64)
    others = ({"window": 7}, {"window": 9}, {"q_norm": norm}, {"post_attention_norm": norm}, {"post_ffw_norm": norm})
    layers = (first, *(replace(first, **changes) for changes in others))
    assert set(without_repetitions(replace(model, layers=layers * 3), [None] * 18)[0].layers) == set(layers)


@pytest.mark.exhaustive
def test_a_server_on_the_cpu_compiles_nothing_later(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path))
    model = load_model(tiny_checkpoint, default_kernels(), CPU)
    config = replace(LIMITS, num_pages=200, max_model_len=model.config.max_positions)
    runner = TorchRunner(model, config.num_pages, 16, CPU, graphs=GraphLimits(32, 16, 512))
    assert tilus.compile_ahead(lambda: runner.rehearse(rehearsal(config))) > 10
    before = tilus.num_compilations()
    for batch in random_batches(random.Random(1), 40):
        if max(len(item.token_ids) for item in batch.items) <= config.max_model_len:
            runner.launch(batch)()
    assert tilus.num_compilations() == before
