"""Real text of the real model: however the engine runs its requests, they get the answers of the plain loop, token for token.

In the batch-invariant mode, on the device that is named; the plain loop answers one request after the other, launches each kernel
from Python and waits for each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ways_to_run import PAGE, Run, limits_of, run

import tilus
from serving.config import EngineConfig
from serving.core import Request, SamplingParams
from serving.kernels import default_kernels
from serving.loader import Checkpoint, default_model, open_checkpoint
from serving.model import Model, load_model
from serving.rehearsal import rehearsal
from serving.runner import TorchRunner

TOKENS = 48
STORY = (
    "The lighthouse keeper climbed the stairs every evening at six. He lit the lamp, wrote the weather into a book with a "
    "blue cover, and watched the ships pass until he fell asleep. One night the lamp went out, and a small boat lost its "
    "way. The keeper rang the bell until his arms hurt. In the morning the boat lay on the beach, and its crew brought him "
    "a basket of oranges. "
)
QUESTIONS = (
    "What is the capital of France?",
    "List three primary colours, and for each of them an animal that has it.",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "Repeat the following sentences word for word: The cat sat on the mat. The dog sat on the log. The cat sat on the mat.",
    f"{STORY}Summarise this story in two sentences.",
    f"{STORY}What did the crew bring, and why?",
    f"{2 * STORY}Which sentences does this text have twice?",
)
LONGEST = 448  # tokens of a question in the chat's template, and of its answer
LIMITS: dict[str, Any] = {"max_model_len": LONGEST, "num_pages": 256, "max_step_tokens": 512}
FEW = 40  # pages, where one request needs up to 20


@dataclass(frozen=True)
class Asked:
    checkpoint: Checkpoint
    model: Model
    requests: list[Request]
    loop: Run

    def again(self, **options: Any) -> Run:
        return run(self.model, self.checkpoint, self.requests, **LIMITS | options)


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", marks=pytest.mark.exhaustive), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def asked(request: pytest.FixtureRequest) -> Iterator[Asked]:
    device = torch.device(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TILUS_DEVICE", raising=False)
        patch.delenv("TILUS_CFLAGS", raising=False)
        checkpoint = open_checkpoint(default_model())
        model = load_model(checkpoint, default_kernels(invariant=True), device)
        compiling = EngineConfig(**LIMITS | {"max_batch": 8})
        captures = limits_of(compiling)
        runner = TorchRunner(model, compiling.num_pages, PAGE, device, graphs=captures)
        tilus.compile_ahead(lambda: runner.rehearse(rehearsal(compiling)))
        prompts = [checkpoint.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
        params = SamplingParams(temperature=0, max_tokens=TOKENS)
        requests = [Request(str(index), prompt, params) for index, prompt in enumerate(prompts)]
        loop = run(model, checkpoint, requests, **LIMITS | {"max_batch": 1})
        yield Asked(checkpoint, model, requests, loop)


def test_the_plain_loop_answers(asked: Asked) -> None:
    """Guards the test below: the answers are texts, most of them as long as they may be, and differ."""
    texts = {
        name: asked.checkpoint.tokenizer.decode([t.token_id for t in ts]) for name, ts in asked.loop.answers.items()
    }
    assert texts["0"] == "The capital of France is Paris."
    assert len(set(texts.values())) == len(QUESTIONS)
    assert sum(len(tokens) == TOKENS for tokens in asked.loop.answers.values()) >= 5
    assert asked.loop.counts == (sum(len(r.prompt) + len(asked.loop.answers[r.id]) - 1 for r in asked.requests),)


WAYS: dict[str, dict[str, Any]] = {
    "batched": {"max_batch": 8},
    "in chunks": {"max_batch": 4, "max_step_tokens": 23},
    "captured": {"max_batch": 7, "graphs": True},
    "overlapped": {"max_batch": 8, "graphs": True, "overlap": True},
    "computed again": {"max_batch": 8, "graphs": True, "overlap": True, "num_pages": FEW},
    "swapped": {"max_batch": 8, "graphs": True, "overlap": True, "num_pages": FEW, "num_host_pages": 256},
    "beginnings in the cache": {"max_batch": 8, "graphs": True, "overlap": True, "rounds": 2},
    "drafted": {"max_batch": 8, "graphs": True, "num_drafts": 4},
    "drafted, overlapped": {"max_batch": 8, "graphs": True, "num_drafts": 4, "overlap": True},
    "drafted and overlapped, alone": {"max_batch": 1, "graphs": True, "num_drafts": 4, "overlap": True},
    "drafted, alone": {"max_batch": 1, "graphs": True, "num_drafts": 4},
    "all at once": {
        "max_batch": 8, "max_step_tokens": 23, "graphs": True, "overlap": True, "num_pages": FEW - 10,
        "num_host_pages": 256, "rounds": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_answers_are_those_of_the_plain_loop(asked: Asked, way: str) -> None:
    found, (count,) = asked.again(**WAYS[way]), asked.loop.counts
    assert found.answers == asked.loop.answers
    assert bool(found.preempted) == ("num_pages" in WAYS[way])
    assert bool(found.swapped) == ("num_host_pages" in WAYS[way])
    if "rounds" in WAYS[way]:
        assert found.counts[1] < found.counts[0]
    if way == "drafted, alone":
        assert found.steps < 0.9 * asked.loop.steps
    if way in ("batched", "in chunks", "captured"):
        assert found.counts == (count,)
