"""The real model through the real kernels against transformers' own loading of the same file, on real text.

The law: over 2,000 tokens, teacher-forced, the most likely next token is the same at 97 % of positions or more, and the
perplexity differs by 1 % or less; CI looks at the first 500 of them. On the CPU the kernels are native code, with `-m gpu` they
run on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tilus.kernels
from serving.config import EngineConfig
from serving.core import Batch, BatchItem, Request, SamplingParams
from serving.engine import Engine
from serving.kv_frames import with_frames
from serving.loader import Checkpoint, default_model, open_checkpoint
from serving.model import Model, load_model
from serving.runner import TorchRunner
from serving.step_inputs import step_tensors

pytestmark = pytest.mark.slow

TEXT = Path(__file__).parents[1] / "data" / "shakespeare.txt"
WINDOW, PAGE = 500, 16


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(default_model())


@pytest.fixture(scope="module", params=[1, pytest.param(4, marks=pytest.mark.exhaustive)])
def windows(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> torch.Tensor:
    ids = checkpoint.tokenizer.encode(TEXT.read_text())[: WINDOW * request.param]
    assert len(ids) == WINDOW * request.param
    return torch.tensor(ids).view(request.param, WINDOW)


@pytest.fixture(scope="module")
def expected(windows: torch.Tensor) -> torch.Tensor:
    """Logits of transformers in f32, [windows, tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    path = default_model()
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    with torch.inference_mode():
        return torch.stack([model(window[None]).logits[0] for window in windows])


def nll(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood of each next token, in nats."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_logits_on_real_text(
    where: torch.device, checkpoint: Checkpoint, windows: torch.Tensor, expected: torch.Tensor
) -> None:
    model = load_model(checkpoint, tilus.kernels, where)
    pages = -(-WINDOW // PAGE)
    found: list[torch.Tensor] = []
    for window in windows.tolist():
        pool = torch.zeros(pages, 30, 2, PAGE, 3, 64, dtype=torch.float16, device=where)
        item = BatchItem("text", tuple(window), 0, tuple(range(pages)), SamplingParams(temperature=0), 0)
        step = step_tensors(Batch((item,)), PAGE, where)
        every_row = replace(step, last=torch.arange(WINDOW, dtype=torch.int32, device=where))
        found.append(model.forward(every_row, pool.unbind(1)).cpu())
    logits = torch.stack(found)
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
    ratio = math.exp(nll(logits, windows) - nll(expected, windows))
    assert same >= 0.97, f"top-1 agrees at {same:.2%} of {windows.numel()} tokens"
    assert abs(ratio - 1) <= 0.01, f"perplexity ratio {ratio:.4f}"


@pytest.mark.exhaustive
def test_frames_halve_what_4_bits_of_cache_cost(checkpoint: Checkpoint) -> None:
    """On 2,000 tokens: by the divergence of what the model expects next from what it expects with a cache of 16 bits, which
    varies less than a perplexity."""
    device = torch.device("cpu")
    plain = load_model(checkpoint, tilus.kernels, device)
    framed = with_frames(plain, checkpoint.tokenizer, checkpoint.config.max_positions, device)
    ids = checkpoint.tokenizer.encode(TEXT.read_text())[: 4 * WINDOW]

    def expectations(model: Model, kv_dtype: str) -> torch.Tensor:
        runner = TorchRunner(model, -(-WINDOW // PAGE), PAGE, device, kv_dtype=kv_dtype)
        pages, rows = tuple(range(-(-WINDOW // PAGE))), list[torch.Tensor]()
        for start in range(0, len(ids), WINDOW):
            item = BatchItem("text", ids[start : start + WINDOW], 0, pages, SamplingParams(), 0)
            step = step_tensors(Batch((item,)), PAGE, device)
            rows.append(model.forward(replace(step, last=None), runner.kv_pool.layers).log_softmax(-1))
        return torch.cat(rows)

    with torch.inference_mode():
        wanted = expectations(plain, "fp16")
        lost = [
            torch.nn.functional.kl_div(
                expectations(model, "int4"), wanted, log_target=True, reduction="batchmean"
            ).item()
            for model in (plain, framed)
        ]
    assert 0 < lost[1] < lost[0] / 2, lost


def test_the_capital_of_france(where: torch.device, checkpoint: Checkpoint) -> None:
    config = EngineConfig(num_pages=64, max_model_len=1024)
    model = load_model(checkpoint, tilus.kernels, where)
    engine = Engine(
        TorchRunner(model, config.num_pages, config.page_size, where), checkpoint.tokenizer, config, lambda: 0.0
    )
    prompt = checkpoint.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    engine.add(Request("france", prompt, SamplingParams(temperature=0, max_tokens=16)))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += [token.token_id for token in output.tokens]
        engine.check()
    assert checkpoint.tokenizer.decode(tokens) == "The capital of France is Paris."
