"""Whatever is asked for, and in whatever combination, the chunks of a stream add up to the whole answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from any_token_runner import AnyTokenRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import MODEL, LiveServer, serve
from test_serving_tools import TOOLS

from serving.config import EngineConfig
from serving.loader import Checkpoint

Json = dict[str, Any]

# Bytes are tokens of the tiny model, and any may come: answers are full of characters that are cut in two, or are none.
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 20),
    "n": st.integers(1, 3),
    "stop": st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 4)), max_size=2
    ),  # of the answer without: see `with_stops`
    "include_stop_str_in_output": st.booleans(),
    "min_tokens": st.integers(0, 9),
    "stop_token_ids": st.lists(st.integers(0, 258), max_size=20),
    "skip_special_tokens": st.booleans(),
    "ignore_eos": st.booleans(),
    "logit_bias": st.just({"5": 3.0}),
    "frequency_penalty": st.just(0.5),
}
TEXT = st.text(max_size=9).filter(lambda text: text.isprintable())
SEVERAL = st.lists(st.integers(0, 258), min_size=1, max_size=5)
COMPLETION = st.fixed_dictionaries(
    {"prompt": TEXT.filter(len) | SEVERAL | st.lists(SEVERAL, min_size=1, max_size=2)},
    optional=COMMON | {"logprobs": st.integers(0, 2)},
)
ECHO = st.fixed_dictionaries({"prompt": TEXT.filter(len) | SEVERAL, "echo": st.just(True)}, optional=COMMON)
MESSAGES = TEXT.map(lambda text: [{"role": "user", "content": text}])
SCORED = st.fixed_dictionaries({"logprobs": st.just(True)}, optional={"top_logprobs": st.integers(0, 2)})
CHAT = st.builds(
    lambda body, scored: body | scored,
    st.fixed_dictionaries({"messages": MESSAGES}, optional=COMMON | {"tools": st.just(TOOLS[1:])}),
    st.just({}) | SCORED,
)
WITHOUT_GRAMMAR = ("min_tokens", "ignore_eos")
CALLS = st.fixed_dictionaries(
    {"messages": MESSAGES, "tools": st.just(TOOLS[1:]), "tool_choice": st.just("required")},
    optional={name: values for name, values in COMMON.items() if name not in WITHOUT_GRAMMAR}
    | {"max_tokens": st.integers(1, 90)},
)


CONFIG = EngineConfig(num_pages=200, max_model_len=500, page_size=4, max_batch=4, max_step_tokens=128)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Checkpoint) -> Iterator[LiveServer]:
    """With room for tools."""
    runner = AnyTokenRunner(CONFIG.page_size, tiny_checkpoint.tokenizer.vocab_size)
    with serve(runner, tiny_checkpoint, CONFIG) as live:
        yield live


def fitting(body: Json) -> Json:
    """Answers are short, and their least number of tokens is at most the largest."""
    most = body.get("max_tokens", 20)
    least = {"min_tokens": min(body["min_tokens"], most)} if "min_tokens" in body else {}
    return body | {"model": MODEL, "max_tokens": most} | least


def answer(server: LiveServer, path: str, body: Json) -> Json:
    reply = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def with_stops(server: LiveServer, path: str, body: Json) -> Json:
    """Stop strings that come: pieces (start, length) of what is answered without."""
    if "stop" not in body:
        return body
    text = plain(answer(server, path, body | {"stop": [], "echo": False})["choices"][0])["text"]
    return body | {"stop": [piece for start, size in body["stop"] if (piece := text[start : start + size])]}


def events(server: LiveServer, path: str, body: Json) -> Iterator[Json]:
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    reply = httpx.post(f"{server.url}/v1/{path}", json=asked, timeout=60)
    lines = reply.content.decode().split("\n\n")
    assert (reply.status_code, lines[-2:]) == (200, ["data: [DONE]", ""]), reply.text
    yield from (json.loads(line.removeprefix("data: ")) for line in lines[:-2])


def add(known: Any, piece: Any) -> Any:
    """What OpenAI's clients make of two pieces: texts, numbers and lists go on, parts of calls by their index."""
    if isinstance(known, dict):
        return known | {name: add(known.get(name), value) for name, value in piece.items() if value is not None}
    if isinstance(known, list) and piece and isinstance(piece[0], dict) and "index" in piece[0]:
        found = {call["index"]: call for call in known}
        return [*(found | {call["index"]: add(found.get(call["index"]), call) for call in piece}).values()]
    return piece if known is None or isinstance(known, int) else known + piece


def put_together(chunks: list[Json]) -> tuple[dict[int, Json], Json]:
    """The choices of a stream by index, and the usage. A choice ends once, and nothing comes behind its end."""
    *chunks, last = chunks
    assert last["choices"] == []
    choices: dict[int, Json] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        known = choices.setdefault(choice["index"], {})
        assert known.get("finish_reason") is None
        choices[choice["index"]] = add(known, choice)
    return choices, last["usage"]


def plain(choice: Json) -> Json:
    """A choice without what differs between two requests, or between streams and whole answers."""
    message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return {"text": message["content"] or "", "calls": calls, "logprobs": choice.get("logprobs"),
            "finish_reason": choice["finish_reason"]}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("path", "bodies"),
    [("completions", COMPLETION), ("completions", ECHO), ("chat/completions", CHAT), ("chat/completions", CALLS)],
    ids=["completions", "echo", "chats", "calls"],
)
def test_chunks_add_up_to_the_answer(server: LiveServer, path: str, bodies: st.SearchStrategy[Json]) -> None:
    @given(bodies.map(fitting))
    @settings(max_examples=25)
    def check(body: Json) -> None:
        body = with_stops(server, path, body)
        whole = answer(server, path, body)
        choices, usage = put_together(list(events(server, path, body)))
        assert {index: plain(choice) for index, choice in choices.items()} == {
            choice["index"]: plain(choice) for choice in whole["choices"]
        }
        for counts in (usage, whole["usage"]):
            del counts["prompt_tokens_details"]  # the second request finds the first one's prompt
        assert usage == whole["usage"]
        check_ends(body, whole)

    check()
    server.check_idle()


def check_ends(body: Json, whole: Json) -> None:
    """No answer shows a stop string that was not wanted, and all have as many tokens as they may or must."""
    count = len(whole["choices"])
    least, most = body.get("min_tokens", 0), body["max_tokens"]
    assert count * least <= whole["usage"]["completion_tokens"] <= count * most
    if not least and not body.get("echo") and not body.get("include_stop_str_in_output"):
        texts = [plain(choice)["text"] for choice in whole["choices"]]
        assert not [stop for stop in body.get("stop", ()) for text in texts if stop in text]
