"""Log-probabilities of prompts: those of the model's own distribution, however prompts are cut and whoever is beside them."""

from __future__ import annotations

import math
from dataclasses import replace

import openai
import pytest
import torch
from live_server import MODEL, LiveServer
from serving_fakes import ManualClock
from tiny_llama import CPU

from serving.config import EngineConfig
from serving.core import Batch, BatchItem, Request, SampledToken, SamplingParams
from serving.engine import Engine
from serving.loader import Checkpoint
from serving.model import Model
from serving.runner import TorchRunner
from serving.step_inputs import step_tensors

PAGE = 4
PROMPTS = {"long": tuple(range(1, 60, 2)), "like it": (*range(1, 40, 2), 7, 7), "short": (5, 6), "one": (9,)}
TEXT = "What is the tide?"
UNIT = 2.0**-24  # of float32: relative error of one rounding


def rounding(logits: torch.Tensor) -> float:
    """How far the float32 log-softmax of a row may be from the exact one.

    The V terms are added up by V - 1 roundings. A term's argument is a rounded difference, times a rounded log2(e): three
    roundings, of numbers up to the largest magnitude, which exp makes a relative error of the term; exp itself and the logarithm
    are good to 4 units each. The logarithm of the sum plus the largest logit, and a logit less that, are rounded once each.
    """
    largest = 2 * float(logits.abs().max())  # of differences, and so of logarithms of probabilities but for log(V)
    return UNIT * (len(logits) + 8 + 5 * (largest + math.log(len(logits))))


def expected(model: Model, prompt: tuple[int, ...], top: int) -> list[tuple[float, list[tuple[int, float]], float]]:
    """By torch, of all of a prompt at once: behind each token but the last what follows, the best, and `rounding`. Kernels of the
    tests multiply in float64, so that logits do not depend on what is computed together."""
    pages = tuple(range(-(-len(prompt) // PAGE)))
    config = model.config
    pool = torch.zeros(2, len(pages), 2, PAGE, config.num_kv_heads, config.head_dim, dtype=torch.float16)
    step = step_tensors(Batch((BatchItem("r", prompt, 0, pages, None, 0),)), PAGE, CPU)
    logits = model.forward(replace(step, last=None), [*pool]).double()
    found = []
    for own, row, token in zip(logits, logits.log_softmax(-1), prompt[1:]):
        values, ids = row.topk(top)
        found.append((float(row[token]), list(zip(ids.tolist(), values.tolist())), rounding(own)))
    return found


def assert_alike(found: tuple[SampledToken, ...], prompt: tuple[int, ...], model: Model, top: int) -> None:
    assert tuple(token.token_id for token in found) == prompt
    assert found[0].logprobs is None
    for token, (value, best, error) in zip(found[1:], expected(model, prompt, top), strict=True):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(value, rel=0, abs=error)
        assert [n for _, n in token.logprobs.top] == pytest.approx([n for _, n in best], rel=0, abs=error)
        assert len(token.logprobs.top) == top


@pytest.mark.parametrize(
    ("limits", "is_tight"),
    [
        ({"max_step_tokens": 64}, False),
        ({"max_step_tokens": 7}, False),
        ({"max_step_tokens": 7, "overlap": True}, False),
        ({"max_step_tokens": 64, "num_pages": 24, "admission": "aggressive"}, True),
        ({"max_step_tokens": 64, "num_pages": 24, "admission": "aggressive", "num_host_pages": 24}, True),
    ],
)
def test_prompts_have_the_models_own_distribution(
    tiny_model: Model, tiny_checkpoint: Checkpoint, limits: dict[str, object], is_tight: bool
) -> None:
    """In chunks, beside answers, where the cache knows their beginnings, and where requests lose their places."""
    config = EngineConfig(**{"num_pages": 60, "max_model_len": 96, "page_size": PAGE, "max_batch": 6} | limits)
    runner = TorchRunner(
        tiny_model, config.num_pages, PAGE, CPU, max_rows=5, num_host_pages=config.num_host_pages
    )  # fewer rows at a time than a step has
    engine = Engine(runner, tiny_checkpoint.tokenizer, config, ManualClock())
    plain = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    engine.add(Request("known", PROMPTS["long"], plain))
    while engine.has_work:
        engine.step()
    engine.add(Request("beside", (3, 4, 5), plain))
    for top, (name, prompt) in enumerate(PROMPTS.items()):
        engine.add(Request(name, prompt, replace(plain, max_tokens=20, prompt_logprobs=top)))
    prompts = dict[str, list[tuple[SampledToken, ...]]]()
    while engine.has_work:
        for output in engine.step():
            prompts.setdefault(output.request_id, []).append(output.prompt)
    preempted = engine.scheduler.num_recomputed + engine.scheduler.num_swapped
    assert bool(preempted) == is_tight
    assert not any(prompts.pop("beside"))
    for top, (name, prompt) in enumerate(PROMPTS.items()):
        first, *others = prompts[name]
        assert not any(others)
        assert_alike(first, prompt, tiny_model, top)


@pytest.fixture
def client(tiny_server: LiveServer):
    with tiny_server.client() as client:
        yield client
    tiny_server.check_idle()


def test_an_answer_that_comes_back_as_a_prompt_has_the_same_probabilities(
    client: openai.OpenAI, tiny_checkpoint: Checkpoint
) -> None:
    """As evaluation harnesses ask: echo, with 0 or 1 token besides."""
    fields = {"model": MODEL, "temperature": 0, "logprobs": 2}
    ids = list(tiny_checkpoint.tokenizer.encode(TEXT))
    letters = {"structured_outputs": {"regex": "[a-z]*"}}  # other tokens may be parts of a character
    answer = client.completions.create(prompt=ids, max_tokens=8, extra_body=letters, **fields)
    told = answer.choices[0].logprobs
    tokens = list(tiny_checkpoint.tokenizer.encode(answer.choices[0].text))
    assert len(tokens) == len(told.tokens) > 0
    for most in (0, 1):
        reply = client.completions.create(prompt=[[*ids, *tokens], ids[:1]], max_tokens=most, echo=True, **fields)
        whole, single = (choice.logprobs for choice in reply.choices)
        end = len(ids) + len(tokens)
        assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) == end + most
        assert whole.tokens[len(ids) : end] == told.tokens
        assert whole.token_logprobs[len(ids) : end] == told.token_logprobs  # of the same logits
        assert whole.top_logprobs[len(ids) : end] == told.top_logprobs
        assert (whole.token_logprobs[0], whole.top_logprobs[0], single.token_logprobs[0]) == (None, None, None)
        assert "".join(whole.tokens) == reply.choices[0].text
        assert whole.text_offset[-1] + len(whole.tokens[-1]) == len(reply.choices[0].text)
        assert [choice.finish_reason for choice in reply.choices] == ["length"] * 2
        assert reply.usage.completion_tokens == 2 * most and len(single.tokens) == 1 + most


@pytest.mark.parametrize("most", [0, 3])
def test_streams_tell_the_same(client: openai.OpenAI, most: int) -> None:
    fields = {"model": MODEL, "prompt": TEXT, "temperature": 0, "logprobs": 1, "echo": True, "max_tokens": most}
    (whole,) = client.completions.create(**fields).choices
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **fields)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    for name in ("tokens", "text_offset", "token_logprobs"):
        found = [value for chunk in chunks if chunk.logprobs for value in getattr(chunk.logprobs, name)]
        assert found == getattr(whole.logprobs, name)


def test_a_prompt_without_logprobs_comes_alone(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt=TEXT, echo=True, max_tokens=0)
    assert reply.choices[0].text == TEXT and reply.choices[0].logprobs is None and reply.usage.completion_tokens == 0
