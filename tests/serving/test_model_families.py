"""Every architecture against transformers, on tiny random models: in float32, in chunks, and on the real kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_serving_model import WideKernels
from tiny_families import FAMILIES, transformers_logits, write_family, write_gguf_family
from tiny_llama import CPU

import tilus.kernels
from serving.core import Batch, BatchItem, SamplingParams
from serving.dummy import open_dummy
from serving.kv_pool import KvPool, PageShape
from serving.loader import open_checkpoint
from serving.memory import expected_size, size_of
from serving.model import Model, build_model, load_model
from serving.packing import pack_weights
from serving.sampling import Sampler
from serving.step_graphs import StepGraphs
from serving.step_inputs import step_tensors
from serving.step_shapes import GraphLimits, StepShape
from tilus.dtypes import int4
from tilus.errors import TilusError
from tilus.kernels.model_layers import model_layers

PAGE_SIZE = 16
PROMPT = np.random.default_rng(11).integers(0, 256, 40).tolist()
CHUNKS = [9, 1, 1, 17, 1, 11]
FEW = [7, 1, 1, 3]
GGUF = {
    "llama 3": "llama",
    "qwen 2": "qwen2",
    "qwen 3": "qwen3",
    "gemma 2": "gemma2",
    "gemma 3": "gemma3",
    "mixtral": "llama",
    "qwen 3 with experts": "qwen3moe",
}


class WatchingKernels(WideKernels):
    """margins: by how much the best expert that is not chosen is behind, in units of the logits' size."""

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[float] = []

    def mixture(self, x, logits, *weights, top, normalized):
        best = logits.sort(dim=-1, descending=True).values
        self.margins += ((best[:, top - 1] - best[:, top]) / logits.square().mean().sqrt()).tolist()
        return super().mixture(x, logits, *weights, top=top, normalized=normalized)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_family(tmp_path_factory.mktemp("family") / "m", name) for name in FAMILIES}


def logits_of(model: Model, chunks: list[int], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Logits after each chunk of the prompt, in a cache that is poisoned."""
    config, rows, start = model.config, [], 0
    shape = (4, config.num_layers, 2, PAGE_SIZE, config.num_kv_heads, config.head_dim)
    device = model.norm.device
    pool = torch.full(shape, torch.nan, dtype=dtype, device=device).unbind(1)
    for size in chunks:
        tokens = tuple(PROMPT[start : start + size])
        item = BatchItem("r", tokens, start, (3, 0, 2), SamplingParams(temperature=0), 0)
        rows.append(model.forward(step_tensors(Batch((item,)), PAGE_SIZE, device), pool))
        start += size
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(directories: dict[str, Path], family: str) -> None:
    """Token by token and in chunks: only the order of float32 sums differs. A feature left out costs more than a tenth."""
    expected = transformers_logits(directories[family], PROMPT)
    model = load_model(open_checkpoint(directories[family]), WideKernels(), CPU)
    assert expected.abs().max() > 2
    found = logits_of(model, [1] * len(PROMPT), torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    ends = np.cumsum(CHUNKS) - 1
    torch.testing.assert_close(logits_of(model, CHUNKS, torch.float32), expected[ends], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("family", "architecture"), GGUF.items())
def test_gguf_files_hold_the_same_model(
    directories: dict[str, Path], tmp_path: Path, family: str, architecture: str
) -> None:
    """The weights lose nothing in Q8_0; what a file says of a rotary embedding has been rounded to float32. GGUF files do not say
    of Gemma and Qwen 3 what is the same in all models that there are."""
    if family.startswith("gemma"):
        period = {"sliding_window_pattern": 6 if family == "gemma 3" else 2, "query_pre_attn_scalar": 32}
        other = (
            {"num_hidden_layers": 6, "rope_local_base_freq": 10000.0, "rope_scaling": None}
            if family == "gemma 3"
            else {}
        )
        directory = write_family(tmp_path / "m", family, **period, **other)
    elif family == "qwen 3 with experts":
        directory = write_family(tmp_path / "m", family, norm_topk_prob=True)
    else:
        directory = directories[family]
    path = write_gguf_family(tmp_path / "m.gguf", directory, architecture)
    found, expected = (load_model(open_checkpoint(at), WideKernels(), CPU) for at in (path, directory))
    assert found.config.architecture.activation == expected.config.architecture.activation
    logits = logits_of(expected, CHUNKS, torch.float32)
    torch.testing.assert_close(logits_of(found, CHUNKS, torch.float32), logits, rtol=0, atol=1e-3)
    if found.config.experts is not None:
        with pytest.raises(TilusError, match=r"m\.gguf is .*, expected a dense model of architecture llama, qwen2, "):
            model_layers(path, None, None)
        return
    layer = found.layers[0]
    fused = (layer.qkv, layer.attn_output, layer.feed_forward.gate_up, layer.feed_forward.down)
    assert {(tuned.n, tuned.k) for tuned in model_layers(path, None, None)} == {
        tuple(weight.shape) for weight in (*(linear.parts[0] for linear in fused), found.head)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.exhaustive), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_real_kernels_stay_within_their_rounding(directories: dict[str, Path], family: str, device: str) -> None:
    """The bound of `test_serving_model`, for ten tensors that a layer rounds to float16, or to bfloat16. No expert is chosen by
    rounding: those that are not are behind by twenty times as much as a number is rounded by."""
    checkpoint, watching = open_checkpoint(directories[family]), WatchingKernels()
    expected = logits_of(load_model(checkpoint, watching, CPU), FEW, torch.float32)
    assert min(watching.margins, default=1.0) > 20 * 2**-11
    found = logits_of(load_model(checkpoint, tilus.kernels, torch.device(device)), FEW).cpu()
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    half_step = 2**-8 if checkpoint.config.architecture.wide else 2**-11
    assert 0 < error < (10 * checkpoint.config.num_layers + 2) * half_step


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["gemma 3", "mixtral"])
def test_captured_steps_give_the_same_bits(directories: dict[str, Path], family: str) -> None:
    """Only kernels compute, so that a step that decodes can be replayed, with other tokens and experts."""
    model = load_model(open_checkpoint(directories[family]), tilus.kernels, CPU)
    shape, found = PageShape(model.config, PAGE_SIZE), []
    for graphs in (None, StepGraphs):
        pool = KvPool(shape, 4, CPU)
        sampler = Sampler(model.config.vocab_size, 2, CPU)
        own = graphs and graphs(model, pool, GraphLimits(2, 3, 16), sampler)
        rows: list[torch.Tensor] = []
        for start in range(20):
            items = (
                BatchItem("a", (PROMPT[start],), start, (3, 0), SamplingParams(temperature=0), 0),
                BatchItem("b", (PROMPT[-start],), start, (1, 2), SamplingParams(temperature=0), 0),
            )
            batch = Batch(items)
            logits = (
                model.forward(step_tensors(batch, PAGE_SIZE, CPU), pool.layers)
                if own is None
                else own.prepare(batch, StepShape(2, 2, 0, 2), {})()
            )
            rows.append(logits.clone())
        found.append(torch.stack(rows))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["qwen 2", "gemma 3", "mixtral"])
def test_dummies_and_their_sizes(directories: dict[str, Path], family: str) -> None:
    checkpoint = open_dummy(directories[family], int4)
    packed = pack_weights(checkpoint, WideKernels(), CPU)
    assert expected_size(checkpoint, WideKernels(), CPU) == size_of(packed)
    model = build_model(checkpoint.config, WideKernels(), packed)
    assert logits_of(model, [40], torch.float32).isfinite().all()
