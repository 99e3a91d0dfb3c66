"""Answers that must match a grammar: every way through a mask is a match, every match is a way, and mistakes are told."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from live_server import MODEL, LiveServer
from serving_fakes import FakeRunner, FakeVocabulary, ManualClock

from serving import grammar as grammar_module
from serving.config import EngineConfig
from serving.core import Grammar, Request, SamplingParams
from serving.engine import Engine
from serving.errors import RequestError
from serving.grammar import MAX_LENGTH, Grammars
from serving.loader import Checkpoint
from serving.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "ü\n"]}, "maxItems": 2},
        "deep": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                                            "additionalProperties": False}]},
    },
    "required": ["id", "tags", "deep"],
    "additionalProperties": False,
}  # fmt: skip


def matches(value: object) -> bool:
    """SCHEMA in Python."""
    if not (isinstance(value, dict) and set(value) == {"id", "tags", "deep"}):
        return False
    deep = value["deep"]
    return (
        type(value["id"]) is int
        and 0 <= value["id"] <= 99
        and len(value["tags"]) <= 2
        and set(value["tags"]) <= {"a", "ü\n"}
        and (deep is None or (set(deep) == {"ok"} and type(deep["ok"]) is bool))
    )


def set_bits(mask: bytes) -> list[int]:
    return [8 * place + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


@pytest.fixture(scope="module")
def grammars(tiny_checkpoint: Checkpoint) -> Grammars:
    return Grammars(tiny_checkpoint.tokenizer)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Checkpoint) -> Tokenizer:
    return tiny_checkpoint.tokenizer


def walk(grammars: Grammars, grammar: Grammar, tokenizer: Tokenizer, rng: random.Random) -> str:
    """Tokens picked blindly among those allowed, until one ends the answer."""
    matcher, tokens = grammars.matcher(grammar), []
    while True:
        allowed = set_bits(matcher.compute_bitmask())
        assert allowed and not matcher.is_error() and max(allowed) < tokenizer.vocab_size
        token = rng.choice(allowed)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(tokens)
        tokens.append(token)
        matcher.consume_token(token)


def test_blind_walks_end_in_matches(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rng, schema, regex = random.Random(0), Grammar("json_schema", json.dumps(SCHEMA)), r"[a-f]{2,4}(-[0-9]+)?|ü/"
    found = [json.loads(walk(grammars, schema, tokenizer, rng)) for _ in range(100)]
    assert all(map(matches, found)) and len({json.dumps(value) for value in found}) > 20
    texts = [walk(grammars, Grammar("regex", regex), tokenizer, rng) for _ in range(100)]
    assert all(re.fullmatch(regex, text) for text in texts) and len(set(texts)) > 20


@pytest.mark.parametrize("indent", [None, 2])
def test_every_match_is_allowed(grammars: Grammars, tokenizer: Tokenizer, indent: int | None) -> None:
    rng = random.Random(1)
    for _ in range(20):
        deep = rng.choice([None, {"ok": rng.random() < 0.5}])
        value = {"id": rng.randrange(100), "tags": rng.choices(["a", "ü\n"], k=rng.randrange(3)), "deep": deep}
        assert matches(value)
        matcher = grammars.matcher(Grammar("json_schema", json.dumps(SCHEMA)))
        for token in tokenizer.encode(json.dumps(value, indent=indent, ensure_ascii=False)):
            assert token in set_bits(matcher.compute_bitmask())
            matcher.consume_token(token)
        assert not tokenizer.eos_ids.isdisjoint(set_bits(matcher.compute_bitmask()))


def test_matchers_of_a_grammar_are_apart(grammars: Grammars) -> None:
    """Compiled once, in whatever thread; each answer has a place of its own."""
    grammar = Grammar("regex", "ab|cd")
    with ThreadPoolExecutor(4) as pool:
        first, second, *_ = pool.map(grammars.matcher, [grammar] * 8)
    first.consume_token(set_bits(first.compute_bitmask())[0])
    assert len(set_bits(first.compute_bitmask())) == 1 and len(set_bits(second.compute_bitmask())) == 2


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", '{"type": "nope"}', "the JSON schema cannot be used: Invalid type: nope"),
        ("json_schema", '{"$ref": "#/x"}', "the JSON schema cannot be used: Pointer '/x' does not exist"),
        ("json_schema", "{", "the JSON schema cannot be used: EOF while parsing an object at line 1 column 1"),
        ("json_schema", "x" * (MAX_LENGTH + 1), "the JSON schema has 65537 characters, but at most 65536 are allowed"),
        (
            "regex",
            "(a",
            'the regular expression cannot be used: at 1(8): invalid regex "(a" (in regex): regex parse error:',
        ),
        ("lark", "begin: x", "the grammar cannot be used: no start rule found"),
    ],
)
def test_grammars_that_cannot_be_used(grammars: Grammars, kind, text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammars.matcher(Grammar(kind, text))
    assert str(caught.value).splitlines()[0] == message and caught.value.status == 400


def test_what_takes_too_long_is_stopped(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns that must all match take the library minutes; its process ends, and the next grammar has another."""
    monkeypatch.setattr(grammar_module, "MAX_SECONDS", 0.3)
    grammars = Grammars(tiny_checkpoint.tokenizer)
    patterns = [f"^.*{letter}.{{{count}}}$" for letter in "abcdefgh" for count in range(20)]
    hard = Grammar(
        "json_schema", json.dumps({"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]})
    )
    with pytest.raises(
        RequestError, match=r"^the JSON schema is too complex: it could not be compiled within 0\.3 seconds$"
    ):
        grammars.matcher(hard)
    monkeypatch.undo()
    process = grammars.matcher(Grammar("regex", "a")) and grammars._trial._process
    process.kill()
    with pytest.raises(RequestError, match="too complex"):
        grammars.matcher(Grammar("regex", "b"))
    assert set_bits(grammars.matcher(Grammar("regex", "b")).compute_bitmask())
    del grammars
    assert process.returncode is not None


def test_a_token_that_is_not_allowed_fails_the_matcher_alone(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.matcher(Grammar("regex", "ab"))
    matcher.consume_token(tokenizer.encode("b")[0])
    assert matcher.is_error() and set(set_bits(matcher.compute_bitmask())) == tokenizer.eos_ids


def test_a_matcher_that_fails_ends_its_request_alone() -> None:
    class Failing:
        failed = False

        def is_error(self) -> bool:
            return self.failed

        def compute_bitmask(self) -> bytes:
            return b"\xff" * 8

        def consume_token(self, token_id: int) -> bool:
            self.failed = True
            return False

    config = EngineConfig(num_pages=8, max_model_len=32, page_size=4)
    engine = Engine(FakeRunner(4), FakeVocabulary(), config, ManualClock(), lambda grammar: Failing())
    engine.add(Request("bound", (5, 6), SamplingParams(max_tokens=9, grammar=Grammar("regex", "x"))))
    engine.add(Request("free", (5, 6), SamplingParams(max_tokens=9, ignore_eos=True)))
    reasons = {}
    while engine.has_work:
        reasons |= {output.request_id: output.finish_reason for output in engine.step()}
        engine.check()
    assert reasons == {"bound": "grammar", "free": "length"}


def chat(client: openai.OpenAI, text: str, **more):
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    params = {"response_format": schema, "max_tokens": 170} | more
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **params)


def test_answers_of_the_server(any_token_server: LiveServer) -> None:
    """In a batch with others, streamed and whole; cut short by max_tokens or a stop, what is there begins a match."""
    with any_token_server.client() as client, ThreadPoolExecutor(8) as pool:
        free = [pool.submit(chat, client, text, response_format={"type": "text"}, max_tokens=30) for text in "xyz"]
        whole = list(pool.map(lambda text: chat(client, text).choices[0], "abcdefgh"))
        assert all(choice.finish_reason == "stop" and matches(json.loads(choice.message.content)) for choice in whole)
        assert all(future.result().usage.completion_tokens for future in free)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, "d", stream=True))
        assert streamed == whole[3].message.content
        assert len({choice.message.content for choice in whole}) > 4
        short = chat(client, "d", max_tokens=9).choices[0]
        assert short.finish_reason == "length" and streamed.startswith(short.message.content)
        stopped = chat(client, "d", stop='"tags"').choices[0]
        assert stopped.finish_reason == "stop" and stopped.message.content == streamed[: streamed.index('"tags"')]
    any_token_server.check_idle()


def test_the_other_ways_to_ask(tiny_server: LiveServer) -> None:
    def ask(**fields) -> httpx.Response:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 170, "seed": 2} | fields
        return httpx.post(f"{tiny_server.url}/v1/completions", json=body, timeout=60)

    def text(**fields) -> str:
        return ask(**fields).json()["choices"][0]["text"]

    assert re.fullmatch(r"\d{3}-[ab]{2}", text(structured_outputs={"regex": r"\d{3}-[ab]{2}"}))
    assert text(structured_outputs={"choice": ['y"es', "nö\n"]}) in ('y"es', "nö\n")
    assert matches(json.loads(text(structured_outputs={"json": SCHEMA}, temperature=1.5)))
    free = ask(response_format={"type": "json_object"}, max_tokens=40).json()["choices"][0]
    assert free["text"].startswith("{") and (
        free["finish_reason"] == "length" or isinstance(json.loads(free["text"]), dict)
    )
    for fields, message in (
        ({"response_format": {"type": "json_schema"}}, "json_schema must be given with type = 'json_schema', and only then"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}},
         "structured_outputs has 2 of json, regex and choice, but needs one"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "the regular expression cannot be used: "),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         "response_format and structured_outputs both say what the answer must match; give one"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True},
         "ignore_eos is True, but must be false where a grammar decides"),
    ):  # fmt: skip
        reply = ask(**fields)
        assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(message)
    tiny_server.check_idle()
