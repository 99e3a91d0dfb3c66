"""The HTTP interface as clients see it: a real server on loopback, the real `openai` client, the tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from live_server import CONFIG, MODEL, LiveServer, serve, wait_until
from tiny_llama import CPU, tiny_engine

from serving.config import EngineConfig
from serving.core import Request, SamplingParams
from serving.loader import Checkpoint
from serving.model import Model
from serving.runner import TorchRunner

USER = [{"role": "user", "content": "hi"}]
FIXED = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def server(tiny_server: LiveServer) -> LiveServer:
    return tiny_server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
    server.check_idle()


@pytest.fixture(scope="module")
def answer(tiny_model: Model, tiny_checkpoint: Checkpoint):
    """The text that one request gets alone, without any server."""

    def generate(prompt: str | list[dict[str, str]], **params) -> str:
        tokenizer = tiny_checkpoint.tokenizer
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
        engine = tiny_engine(tiny_model, tiny_checkpoint)
        engine.add(Request("r", ids, SamplingParams(**({"max_tokens": 12, "ignore_eos": True} | params))))
        text = ""
        while engine.has_work:
            text += "".join(output.text for output in engine.step())
        return text

    return generate


def test_chat(client: openai.OpenAI, answer) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=USER, **FIXED)
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == answer(USER, temperature=0)
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    prompt_tokens = len("_user\nhi_\n_assistant\n")  # special tokens count as one
    assert reply.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": prompt_tokens + 12,
    }
    assert reply.object == "chat.completion" and reply.model == MODEL
    again = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "ho"}], **FIXED)
    assert again.system_fingerprint == reply.system_fingerprint and reply.system_fingerprint.startswith("fp_")


def test_chat_as_a_stream(client: openai.OpenAI, answer) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}, **FIXED
        )
    )
    *deltas, last = chunks
    assert deltas[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == answer(USER, temperature=0)
    assert [chunk.choices[0].finish_reason for chunk in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in deltas)
    assert last.choices == [] and last.usage.completion_tokens == 12
    assert {chunk.system_fingerprint for chunk in chunks} == {last.system_fingerprint}
    assert {(chunk.id, chunk.object, chunk.created) for chunk in chunks} == {
        (last.id, "chat.completion.chunk", last.created)
    }


def test_tokens_found_in_the_cache_are_told(client: openai.OpenAI) -> None:
    """Whole pages of 4, but never the last token; of each prompt once, whatever n."""
    prompts, found = ["cached are 19 tokens", "and others"], []
    for _ in range(2):
        reply = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=1, **FIXED)
        stream = client.completions.create(
            model=MODEL, prompt=prompts, n=2, seed=1, stream=True, stream_options={"include_usage": True}, **FIXED
        )
        found += [reply.usage, [*stream][-1].usage]
    assert [usage.prompt_tokens_details.cached_tokens for usage in found] == [0, 16 + 8, 16 + 8, 16 + 8]
    assert {(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) for usage in found} == {(30, 48, 78)}


def test_usage_in_all_chunks(client: openai.OpenAI) -> None:
    counts = [0, 0]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="usage", n=2, logprobs=0, stream=True, stream_options=options, **FIXED
        )
    )
    for chunk in chunks[:-1]:
        counts[chunk.choices[0].index] += len(chunk.choices[0].logprobs.tokens)
        assert (chunk.usage.completion_tokens, chunk.usage.prompt_tokens) == (sum(counts), 5)
    assert chunks[-1].usage == chunks[-2].usage and counts == [12, 12]


def test_echo(client: openai.OpenAI, tiny_checkpoint: Checkpoint, answer) -> None:
    """The prompts come before the answers, also as tokens, with special tokens, and in streams."""
    text = "hi <|im_start|>ü"
    expected = text + answer(text, temperature=0)
    for prompt in (text, list(tiny_checkpoint.tokenizer.encode(text))):
        reply = client.completions.create(model=MODEL, prompt=[prompt, prompt], echo=True, n=2, **FIXED)
        assert [choice.text for choice in reply.choices] == [expected] * 4
        texts = ["", ""]
        for chunk in client.completions.create(model=MODEL, prompt=prompt, echo=True, n=2, stream=True, **FIXED):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [expected] * 2


def test_an_answer_goes_on_with_the_last_message(client: openai.OpenAI, tiny_checkpoint: Checkpoint, answer) -> None:
    begun = [*USER, {"role": "assistant", "content": "Well, "}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nWell, "
    fields = FIXED | {
        "extra_body": {"ignore_eos": True, "continue_final_message": True, "add_generation_prompt": False}
    }
    reply = client.chat.completions.create(model=MODEL, messages=begun, **fields)
    assert reply.choices[0].message.content == answer(text, temperature=0)
    fields["extra_body"] = {"ignore_eos": True, "add_generation_prompt": False, "chat_template_kwargs": {"x": 1}}
    reply = client.chat.completions.create(model=MODEL, messages=begun, **fields)
    assert reply.choices[0].message.content == answer(text + "<|im_end|>\n", temperature=0)


def test_the_stream_on_the_wire(server: LiveServer) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert "usage" not in json.loads(event.removeprefix("data: "))


def test_eight_streams_at_once_equal_one_by_one(server: LiveServer, answer) -> None:
    """Four may run and four wait; half of them sample. Pages are too few for all, so some are preempted."""
    prompts = [f"Question {i}: " + "word " * (3 * i) for i in range(8)]
    params = [{"temperature": (i % 2) * 0.9, "seed": i, "max_tokens": 40} for i in range(8)]
    expected = [answer(prompt, **p) for prompt, p in zip(prompts, params)]

    def stream(index: int) -> str:
        with server.client() as client:
            chunks = client.completions.create(
                model=MODEL, prompt=prompts[index], stream=True, extra_body={"ignore_eos": True}, **params[index]
            )
            return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(stream, range(8)))
    assert found == expected
    server.check_idle()


def test_choices_have_random_streams_of_their_own(client: openai.OpenAI, answer) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=["ab", "cd"], n=2, seed=7, max_tokens=12, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    expected = [answer(prompt, seed=seed) for prompt in ("ab", "cd") for seed in (7, 8)]
    assert [choice.text for choice in reply.choices] == expected
    assert len(set(expected)) == 4
    assert reply.usage.prompt_tokens == 4 and reply.usage.completion_tokens == 48


def test_choices_in_a_stream(client: openai.OpenAI, answer) -> None:
    texts = ["", ""]
    for chunk in client.chat.completions.create(
        model=MODEL, messages=USER, n=2, seed=1, stream=True, max_tokens=12, extra_body={"ignore_eos": True}
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [answer(USER, seed=1), answer(USER, seed=2)]


def test_token_ids_as_prompts(client: openai.OpenAI, tiny_checkpoint: Checkpoint, answer) -> None:
    ids = list(tiny_checkpoint.tokenizer.encode("hello"))
    for prompt in (ids, [ids]):
        reply = client.completions.create(model=MODEL, prompt=prompt, **FIXED)
        assert reply.choices[0].text == answer("hello", temperature=0)


def test_what_is_asked_of_the_logits(client: openai.OpenAI, tiny_checkpoint: Checkpoint, answer) -> None:
    """Fields reach the sampler: each answer is that of an engine asked the same, and not the one without the field."""
    plain = answer("x", temperature=1, seed=3)
    (letter,) = tiny_checkpoint.tokenizer.encode("q")
    for standard, own in (
        ({"presence_penalty": 2, "frequency_penalty": 2}, {}),
        ({}, {"repetition_penalty": 2}),
        ({}, {"min_p": 0.2}),
    ):
        params = {"temperature": 1, "seed": 3} | standard
        own_fields = {"ignore_eos": True, "priority": -1} | own
        reply = client.completions.create(model=MODEL, prompt="x", max_tokens=12, extra_body=own_fields, **params)
        assert reply.choices[0].text == answer("x", **(params | own)) != plain, (standard, own)
    reply = client.completions.create(
        model=MODEL, prompt="x", max_tokens=3, temperature=0, logit_bias={str(letter): 100}
    )
    assert reply.choices[0].text == "qqq"


def test_stop_strings_never_show(client: openai.OpenAI, answer) -> None:
    whole = answer(USER, temperature=0, max_tokens=40)
    stop = whole[9:13]
    cut = whole[: whole.index(stop)]
    params = {"temperature": 0, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    reply = client.chat.completions.create(model=MODEL, messages=USER, stop=stop, **params)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (cut, "stop")
    shown = ""
    for chunk in client.chat.completions.create(
        model=MODEL, messages=USER, stop=["never", stop], stream=True, **params
    ):
        shown += chunk.choices[0].delta.content or ""
        assert cut.startswith(shown)
    assert shown == cut


def test_eos_ends_the_answer(client: openai.OpenAI, answer) -> None:
    """With a seed whose answer contains the end token early."""
    for seed in range(400):
        reply = client.completions.create(model=MODEL, prompt="x", seed=seed, temperature=2, max_tokens=30)
        if reply.choices[0].finish_reason == "stop":
            break
    assert reply.choices[0].finish_reason == "stop"
    text = answer("x", seed=seed, temperature=2, max_tokens=30, ignore_eos=False)
    assert reply.choices[0].text == text
    assert reply.usage.completion_tokens <= 30


def test_default_max_tokens(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="x", temperature=0, extra_body={"ignore_eos": True})
    assert reply.usage.completion_tokens == 16  # OpenAI's default for plain completions
    reply = client.chat.completions.create(model=MODEL, messages=USER, temperature=0, extra_body={"ignore_eos": True})
    assert reply.usage.total_tokens == CONFIG.max_model_len
    reply = client.chat.completions.create(
        model=MODEL, messages=USER, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert reply.usage.completion_tokens == 3


def test_messages_in_parts_and_the_developer_role(client: openai.OpenAI, answer) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    reply = client.chat.completions.create(model=MODEL, messages=messages, **FIXED)
    assert reply.choices[0].message.content == answer([{"role": "system", "content": "s"}, *USER], temperature=0)


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="x", logprobs=3, **FIXED)
    found = reply.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 12
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        assert top[token] == logprob == max(top.values()) <= 0
    chosen = client.completions.create(model=MODEL, prompt="x", logprobs=0, **FIXED).choices[0].logprobs
    assert chosen.top_logprobs == [{token: value} for token, value in zip(found.tokens, found.token_logprobs)]
    streamed = list(client.completions.create(model=MODEL, prompt="x", logprobs=3, stream=True, **FIXED))
    merged = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [t for m in merged for t in m.tokens] == found.tokens
    assert [o for m in merged for o in m.text_offset] == found.text_offset


def test_offsets_are_places_in_the_text(client: openai.OpenAI) -> None:
    """Also behind characters of several tokens, of which those behind the first stand where the next character does."""
    text = "hi <|im_start|>ü😀x"
    fixed = FIXED | {"max_tokens": 0}
    choice = client.completions.create(model=MODEL, prompt=text, echo=True, logprobs=0, **fixed).choices[0]
    assert choice.text == text
    whole = [pair for pair in zip(choice.logprobs.tokens, choice.logprobs.text_offset) if pair[0] != "\ufffd"]
    assert [token for token, _ in whole] == ["h", "i", " ", "<|im_start|>", "x"]
    assert all(text[offset:].startswith(token) for token, offset in whole)
    end = len(text) - 1
    assert choice.logprobs.text_offset[-7:] == [end - 2, end - 1, end - 1, end, end, end, end]


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2, **FIXED)
    content = reply.choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 2
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    joined = b"".join(bytes(entry.bytes) for entry in content)
    assert joined.decode(errors="replace") == reply.choices[0].message.content
    plain = client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, **FIXED)
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[]] * 12


COMPLETION = {"model": MODEL, "prompt": "x"}
CHAT = {"model": MODEL, "messages": USER}
LIMIT = "this model's context holds 200 tokens"
REFUSED = [
    (
        "completions",
        COMPLETION | {"model": "gpt"},
        404,
        "model",
        "the model 'gpt' does not exist; this server has 'tiny'",
    ),
    ("completions", {"prompt": "x"}, 400, "model", "model: field required"),
    ("completions", {"model": MODEL}, 400, "prompt", "prompt: field required"),
    ("completions", COMPLETION | {"prompt": ""}, 400, "prompt", "the prompt has no tokens, but at least 1 is needed"),
    (
        "completions",
        COMPLETION | {"prompt": []},
        400,
        "prompt",
        "prompt is an empty list, but must hold at least one prompt",
    ),
    (
        "completions",
        COMPLETION | {"prompt": [5, 300]},
        400,
        "prompt",
        "the prompt contains token 300, but token ids go from 0 to 258",
    ),
    (
        "completions",
        COMPLETION | {"prompt": "x" * 300},
        400,
        "prompt",
        f"the prompt has 300 tokens and max_tokens is 16, together 316, but {LIMIT}",
    ),
    (
        "completions",
        COMPLETION | {"max_tokens": 200},
        400,
        "max_tokens",
        f"the prompt has 1 tokens and max_tokens is 200, together 201, but {LIMIT}",
    ),
    (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "x" * 300}]},
        400,
        "prompt",
        f"the prompt has 319 tokens, but {LIMIT}; it must leave room for at least 1 token",
    ),
    ("completions", COMPLETION | {"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0, but must be at least 1"),
    (
        "completions",
        COMPLETION | {"max_tokens": 1.5},
        400,
        "max_tokens",
        "max_tokens: input should be a valid integer, but found 1.5",
    ),
    (
        "completions",
        COMPLETION | {"temperature": 3},
        400,
        "temperature",
        "temperature is 3.0, but must be between 0 and 2",
    ),
    (
        "completions",
        COMPLETION | {"temperature": "hot"},
        400,
        "temperature",
        "temperature: input should be a valid number, but found 'hot'",
    ),
    ("completions", COMPLETION | {"top_p": 0}, 400, "top_p", "top_p is 0.0, but must be above 0 and at most 1"),
    ("completions", COMPLETION | {"top_k": -2}, 400, "top_k", "top_k is -2, but must be at least 1, or 0 for no limit"),
    ("completions", COMPLETION | {"n": 0}, 400, "n", "n: input should be greater than or equal to 1, but found 0"),
    ("completions", COMPLETION | {"n": 129}, 400, "n", "n: input should be less than or equal to 128, but found 129"),
    (
        "completions",
        COMPLETION | {"stop": ""},
        400,
        "stop",
        "stop is [''], but must be at most 16 strings of 1 to 256 characters",
    ),
    ("completions", COMPLETION | {"logprobs": 21}, 400, "logprobs", "logprobs is 21, but must be between 0 and 20"),
    ("completions", COMPLETION | {"suffix": "x"}, 400, "suffix", "suffix = 'x' is not supported by this server"),
    ("completions", COMPLETION | {"best_of": 2}, 400, "best_of", "best_of = 2 is not supported by this server"),
    (
        "completions",
        COMPLETION | {"stop_token_ids": [5, 259]},
        400,
        "stop_token_ids",
        "stop_token_ids contains token 259, but token ids go from 0 to 258",
    ),
    (
        "completions",
        COMPLETION | {"prompt": [5, "x"]},
        400,
        "prompt.0",
        "prompt.0: input should be a valid string, but found 5",
    ),
    (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages.0.content.0.type",
        "messages.0.content.0.type: input should be 'text', but found 'image_url'",
    ),
    (
        "chat/completions",
        CHAT | {"tool_choice": {"type": "allowed_tools"}},
        400,
        "tool_choice.type",
        "tool_choice.type: input should be 'function', but found 'allowed_tools'",
    ),
    (
        "chat/completions",
        CHAT | {"continue_final_message": True},
        400,
        "continue_final_message",
        "continue_final_message needs a text of 'assistant' in the end, not 'user' and 2 characters",
    ),
    (
        "chat/completions",
        CHAT | {"continue_final_message": True, "add_generation_prompt": True},
        400,
        "continue_final_message",
        "continue_final_message and add_generation_prompt cannot both be true",
    ),
    (
        "completions",
        COMPLETION | {"presence_penalty": -2.5},
        400,
        "presence_penalty",
        "presence_penalty is -2.5, but must be between -2 and 2",
    ),
    ("completions", COMPLETION | {"min_p": 1.5}, 400, "min_p", "min_p is 1.5, but must be between 0 and 1"),
    (
        "completions",
        COMPLETION | {"logit_bias": {"x": 1}},
        400,
        "logit_bias.x",
        "logit_bias.x: input should be a valid integer, unable to parse string as an integer, but found 'x'",
    ),
    (
        "completions",
        COMPLETION | {"logit_bias": {"259": 1}},
        400,
        "logit_bias",
        "logit_bias contains token 259, but token ids go from 0 to 258",
    ),
    (
        "completions",
        COMPLETION | {"logit_bias": {"5": 101}},
        400,
        "logit_bias",
        "logit_bias is {5: 101.0}, but must be at most 1024 tokens with numbers between -100 and 100",
    ),
    ("completions", COMPLETION | {"typo": 1}, 400, "typo", "typo = 1 is not supported by this server"),
    (
        "completions",
        COMPLETION | {"stream_options": {"include_usage": True}},
        400,
        "stream_options",
        "stream_options is only allowed when stream is true",
    ),
    (
        "chat/completions",
        CHAT | {"messages": []},
        400,
        "messages",
        "messages: list should have at least 1 item after validation, not 0, but found []",
    ),
    (
        "chat/completions",
        CHAT | {"messages": [{"role": "robot", "content": "x"}]},
        400,
        "messages.0.role",
        "messages.0.role: input should be 'system', 'developer', 'user', 'assistant' or 'tool', but found 'robot'",
    ),
    (
        "chat/completions",
        CHAT | {"tools": [{"type": "function"}]},
        400,
        "tools.0.function",
        "tools.0.function: field required",
    ),
    (
        "chat/completions",
        CHAT | {"functions": [{"name": "f"}]},
        400,
        "functions",
        "functions = [{'name': 'f'}] is not supported by this server",
    ),
    (
        "chat/completions",
        CHAT | {"top_logprobs": 2},
        400,
        "top_logprobs",
        "top_logprobs is only allowed when logprobs is true",
    ),
    (
        "chat/completions",
        CHAT | {"logprobs": True, "top_logprobs": 21},
        400,
        "top_logprobs",
        "top_logprobs: input should be less than or equal to 20, but found 21",
    ),
    (
        "chat/completions",
        CHAT | {"max_completion_tokens": 0},
        400,
        "max_completion_tokens",
        "max_completion_tokens: input should be greater than or equal to 1, but found 0",
    ),
    (
        "completions",
        COMPLETION | {"stop": "y" * 10**5},
        400,
        "stop",
        f"stop is ['{'y' * 198}, but must be at most 16 strings of 1 to 256 characters",
    ),
    (
        "completions",
        COMPLETION | {"length_penalty": 2},
        400,
        "length_penalty",
        "length_penalty = 2 is not supported by this server",
    ),
    (
        "chat/completions",
        CHAT | {"max_tokens": 2, "max_completion_tokens": 3},
        400,
        "max_tokens",
        "max_tokens is 2 and max_completion_tokens is 3, but they mean the same; give one",
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"), REFUSED, ids=[case[-1][:40] for case in REFUSED]
)
def test_refusals_in_full(server: LiveServer, path: str, body: object, status: int, param: str, message: str) -> None:
    reply = httpx.post(f"{server.url}/v1/{path}", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["message"], error["param"]) == (status, message, param)
    assert error["type"] == "invalid_request_error"
    expected_code = {404: "model_not_found"}.get(status, "context_length_exceeded" if "context" in message else None)
    assert error["code"] == expected_code
    server.check_idle()


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (
            b'{"model": "tiny",',
            {},
            "the body is not valid JSON: Expecting property name enclosed in double quotes at character 17",
        ),
        (b"", {}, "the body: field required"),
        (b"[1]", {}, "the body: input should be a valid dictionary or object to extract fields from, but found [1]"),
        (b"{}", {"Content-Type": "text/plain"}, "the body must be JSON, sent with Content-Type: application/json"),
    ],
)
def test_bodies_that_are_no_requests(server: LiveServer, content: bytes, headers: dict[str, str], message: str) -> None:
    headers = {"Content-Type": "application/json"} | headers
    reply = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert reply.status_code == 400
    assert reply.json() == {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def test_hostile_bodies_are_refused_and_forgotten(server: LiveServer) -> None:
    def post(content: bytes) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        reply = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers, timeout=60)
        return reply.status_code, reply.json()["error"]["message"]

    big = b'{"model": "tiny", "prompt": "' + b"x" * (16 * 2**20) + b'"}'
    assert post(big) == (413, "POST /v1/completions: the body has more than 16777216 bytes")
    assert post(b"[" * 100_000)[0] == 400
    half = "prompt is not valid Unicode: character 1 is half of a surrogate pair"
    assert post(b'{"model": "tiny", "prompt": "a\\ud800"}') == (400, half)
    assert post(b'{"model": "tiny", "prompt": "a", "\\ud800": 1}')[0] == 400
    many = b'{"model": "tiny", "n": 100, "prompt": ["a", "b"]}'
    expected = "2 prompts with n = 100 ask for 200 answers, but a request may ask for at most 128"
    assert post(many) == (400, expected)
    server.check_idle()


def test_fields_without_effect_are_accepted(client: openai.OpenAI, answer) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=USER, user="me", frequency_penalty=0, response_format={"type": "text"}, service_tier="flex",
        **FIXED,
    )  # fmt: skip
    assert reply.choices[0].message.content == answer(USER, temperature=0)
    nothing = {"ignore_eos": True, "top_k": -1, "guided_json": None, "best_of": 1, "suffix": "", "echo": False}
    reply = client.completions.create(model=MODEL, prompt="x", **(FIXED | {"extra_body": nothing}))
    assert reply.choices[0].text == answer("x", temperature=0)
    nothing = {"ignore_eos": True, "echo": False, "use_beam_search": False, "length_penalty": 1.0, "bad_words": []}
    reply = client.chat.completions.create(model=MODEL, messages=USER, **(FIXED | {"extra_body": nothing}))
    assert reply.choices[0].message.content == answer(USER, temperature=0)


def test_the_other_endpoints(server: LiveServer, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "tilus")
    assert (model.max_model_len, model.root, model.parent) == (200, MODEL, None)
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="the model 'a/b' does not exist; this server has 'tiny'"):
        client.models.retrieve("a/b")
    assert httpx.get(f"{server.url}/health").json() == httpx.get(f"{server.url}/ping").json() == {"status": "ok"}
    assert set(httpx.get(f"{server.url}/version").json()) == {"version"}
    reply = httpx.get(f"{server.url}/v2/nothing")
    assert (reply.status_code, reply.json()["error"]["message"]) == (404, "GET /v2/nothing: Not Found")
    reply = httpx.get(f"{server.url}/v1/completions")
    assert (reply.status_code, reply.json()["error"]["message"]) == (405, "GET /v1/completions: Method Not Allowed")


def test_a_client_that_leaves_gives_its_pages_back(server: LiveServer, answer) -> None:
    """One leaves in the middle of a stream, one while it waits for a whole answer; a third is unharmed."""
    server.runner.delay = 0.01
    body = {"model": MODEL, "prompt": "leaves", "max_tokens": 190, "ignore_eos": True}
    results: list[str] = []

    def stay() -> None:
        with server.client() as client:
            reply = client.completions.create(model=MODEL, prompt="stays", **(FIXED | {"max_tokens": 40}))
            results.append(reply.choices[0].text)

    thread = threading.Thread(target=stay)
    thread.start()
    with httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
    thread.join(30)
    assert results == [answer("stays", temperature=0, max_tokens=40)]
    steps_left = 190 * server.runner.delay
    assert steps_left > 1.5  # had it gone on, the answers would take this long
    server.check_idle()
    server.runner.delay = 0.0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits_is_forgotten(
    tiny_model: Model, tiny_checkpoint: Checkpoint, stream: bool
) -> None:
    config = EngineConfig(num_pages=60, max_model_len=200, page_size=4, max_batch=1, max_step_tokens=24)
    runner = TorchRunner(tiny_model, config.num_pages, config.page_size, CPU)
    with serve(runner, tiny_checkpoint, config) as server, httpx.Client() as http:
        server.runner.open.clear()  # nothing moves: no output tells the server that the client has gone
        body = {"model": MODEL, "prompt": "a", "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            http.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
        wait_until(lambda: not server.async_engine._generations)
        server.runner.open.set()
        server.check_idle()


def test_a_full_queue_is_429(tiny_model: Model, tiny_checkpoint: Checkpoint) -> None:
    config = EngineConfig(num_pages=60, max_model_len=200, page_size=4, max_batch=1, max_step_tokens=24)
    runner = TorchRunner(tiny_model, config.num_pages, config.page_size, CPU)
    with serve(runner, tiny_checkpoint, config, max_waiting=1) as server, server.client() as client:
        server.runner.open.clear()  # nothing moves
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(client.completions.create, model=MODEL, prompt="a", **FIXED) for _ in range(2)]
            wait_until(lambda: server.engine.has_work)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=MODEL, prompt="a", n=2, **FIXED)
            assert caught.value.status_code == 429
            assert caught.value.response.headers["retry-after"] == "1"
            assert caught.value.code == "queue_full"
            assert "more were asked for, but at most 2 may be; try again later" in caught.value.message
            told = "3 answers were asked for, but at most 2 requests may run or wait at once"
            with pytest.raises(openai.BadRequestError, match=told):  # to try again would be in vain
                client.completions.create(model=MODEL, prompt="a", n=3, **FIXED)
            server.runner.open.set()
            assert len({future.result(30).choices[0].text for future in running}) == 1
        server.check_idle()


def test_a_failing_engine_tells_everyone(tiny_model: Model, tiny_checkpoint: Checkpoint) -> None:
    runner = TorchRunner(tiny_model, CONFIG.num_pages, CONFIG.page_size, CPU)
    with serve(runner, tiny_checkpoint, CONFIG) as server, server.client() as client:
        server.runner.open.clear()
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(client.completions.create, model=MODEL, prompt="a", **FIXED) for _ in range(2)]
            stream = client.completions.create(model=MODEL, prompt="a", stream=True, **FIXED)
            wait_until(lambda: server.engine.has_work)
            server.runner.error = ValueError("out of memory")
            server.runner.open.set()
            for future in waiting:
                with pytest.raises(
                    openai.InternalServerError, match="the engine failed: ValueError: out of memory"
                ) as e:
                    future.result(30)
                assert e.value.status_code == 503
            with pytest.raises(openai.APIError, match="the engine failed: ValueError: out of memory"):
                list(stream)
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert health.json() == {"status": "failed", "reason": "the engine failed: ValueError: out of memory"}
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.completions.create(model=MODEL, prompt="a")


def test_a_request_that_takes_too_long_is_504(tiny_model: Model, tiny_checkpoint: Checkpoint) -> None:
    config = EngineConfig(
        num_pages=60, max_model_len=200, page_size=4, max_batch=1, max_step_tokens=9, request_timeout=0.2
    )
    runner = TorchRunner(tiny_model, config.num_pages, config.page_size, CPU)
    with serve(runner, tiny_checkpoint, config) as server:
        server.runner.delay = 0.05
        body = {"model": MODEL, "prompt": "a", "max_tokens": 100, "ignore_eos": True}
        reply = httpx.post(f"{server.url}/v1/completions", json=body)
        message = "the request took longer than the server allows"
        assert (reply.status_code, reply.json()["error"]["message"]) == (504, message)
        reply = httpx.post(f"{server.url}/v1/completions", json=body | {"stream": True})
        *_, last, end = reply.text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == message and end == ""
        server.check_idle()
