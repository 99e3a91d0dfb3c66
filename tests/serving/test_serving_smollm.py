"""The real model, SmolLM2-135M-Instruct, on oracle kernels."""

from __future__ import annotations

import pytest
import torch
from serving_fakes import ManualClock
from tiny_llama import CPU
from torch_kernels import TorchKernels

from serving.config import EngineConfig
from serving.core import Batch, BatchItem, Request, SamplingParams
from serving.engine import Engine
from serving.loader import Checkpoint, default_model, open_checkpoint
from serving.model import Model, load_model
from serving.runner import TorchRunner
from serving.step_inputs import step_tensors

pytestmark = pytest.mark.slow
FRANCE = "The capital of France is Paris."
COLOURS = "The primary colours are:\n\nRed, Blue, and Yellow."


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(default_model())


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Model:
    return load_model(checkpoint, TorchKernels(torch.float32), CPU)


def answers(model: Model, checkpoint: Checkpoint, questions: dict[str, str], **limits: int) -> dict[str, list[int]]:
    config = EngineConfig(**({"num_pages": 64, "max_model_len": 1024} | limits))
    runner = TorchRunner(model, config.num_pages, config.page_size, CPU)
    engine = Engine(runner, checkpoint.tokenizer, config, ManualClock())
    for name, question in questions.items():
        prompt = checkpoint.tokenizer.encode_chat([{"role": "user", "content": question}])
        engine.add(Request(name, prompt, SamplingParams(temperature=0, max_tokens=30)))
    tokens: dict[str, list[int]] = {name: [] for name in questions}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += [token.token_id for token in output.tokens]
        engine.check()
    return tokens


def test_golden_answer(model: Model, checkpoint: Checkpoint) -> None:
    tokens = answers(model, checkpoint, {"france": "What is the capital of France?"})
    assert tokens == {"france": [504, 3575, 282, 4649, 314, 7042, 30, 2]}
    assert checkpoint.tokenizer.decode(tokens["france"]) == FRANCE


def test_two_questions_in_chunks_with_too_few_pages(model: Model, checkpoint: Checkpoint) -> None:
    """Steps of 16 tokens, and 6 pages where both need 4: the younger request must wait or give way."""
    questions = {"france": "What is the capital of France?", "colours": "List three primary colours."}
    tokens = answers(model, checkpoint, questions, num_pages=6, max_step_tokens=16, max_batch=2)
    texts = {name: checkpoint.tokenizer.decode(ids) for name, ids in tokens.items()}
    assert texts == {"france": FRANCE, "colours": COLOURS}


@pytest.mark.exhaustive  # tests/serving/test_serving_accuracy.py reads the same model's logits on the library's kernels
def test_logits_equal_transformers(model: Model, checkpoint: Checkpoint) -> None:
    """Teacher-forced over the answer: the same best token wherever the reference is sure (margin above 0.5)."""
    from transformers import AutoModelForCausalLM

    path = default_model()
    reference = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    prompt = checkpoint.tokenizer.encode_chat([{"role": "user", "content": "List three primary colours."}])
    tokens = (*prompt, *checkpoint.tokenizer.encode(COLOURS))
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    pool = torch.zeros(8, 30, 2, 16, 3, 64, dtype=torch.float16)
    pages, greedy = tuple(range(8)), SamplingParams(temperature=0)
    rows = [
        model.forward(step_tensors(Batch((BatchItem("r", (t,), i, pages, greedy, 0),)), 16, CPU), pool.unbind(1))
        for i, t in enumerate(tokens)
    ]
    found = torch.cat(rows)
    best = expected.topk(2).values
    sure = best[:, 0] - best[:, 1] > 0.5
    assert sure.sum() > 20
    assert torch.equal(found.argmax(-1)[sure], expected.argmax(-1)[sure])
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    )
    # The project's measure of low precision: bfloat16 activations give a mean of 8.4e-4 on this model.
    assert divergence.sum(-1).mean() < 8.4e-4
